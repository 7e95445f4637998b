"""Token embeddings from co-occurrence counts: a start from which a model learns faster than from random ones."""

import torch
import torch.nn.functional as F

from storygpt.system.errors import UserError

DISTANCES = (1, 2, 3, 4)  # of neighbours, in tokens
CONTEXTS = 2000  # only so many tokens, the most frequent ones, count as neighbours
MAX_DENSE = 2**27  # a matrix with fewer elements is made dense before it is decomposed, which is faster
CONTEXT_POWER = 0.75  # of the frequency of neighbours; below 1 it lowers the weight of rare ones


@torch.no_grad()
def set_embeddings(model, embeddings):
    """Start from token embeddings (V, C) whose rows have a mean square of 1, instead of random ones.

    They are scaled to ten times the std of random ones, so that training does not change them quickly; the last norm's
    gain is a tenth, so that the logits are no larger. Raises UserError for a model without these two.
    """
    try:
        model.transformer.wte.weight.copy_(0.2 * embeddings)
        model.transformer.ln_f.weight.fill_(0.1)
    except (AttributeError, RuntimeError) as error:  # the latter: another shape
        raise UserError("init_embeddings = 'cooccurrence' sets transformer.wte and the gain of transformer.ln_f, but "
                        f"the model lacks one or it has another shape ({error}): use --init_embeddings=random"
                        ) from error


def cooccurrence_embeddings(sequences, vocab_size, width):
    """Embeddings that are similar for tokens with similar neighbours in `sequences`, token ids (N, T) as an int array.

    Returns a float tensor (vocab_size, width); rows have a mean square of 1, or are 0 for tokens that do not occur.
    The method is that of word vectors from counts (Levy & Goldberg 2014; Levy, Goldberg & Dagan 2015): a singular value
    decomposition of the positive pointwise mutual information, log p(token, neighbour) / p(token) p(neighbour), of each
    token with the neighbours at each distance to the left and to the right.
    """
    sequences, V = torch.from_numpy(sequences), vocab_size
    counts = sequences.flatten().bincount(minlength=V)
    rank_of = counts.argsort(descending=True, stable=True).argsort()  # of each token in the order of frequency
    blocks = []  # (V, CONTEXTS) each, sparse
    for distance in DISTANCES:
        pairs, n = torch.unique(sequences[:, :-distance] * V + sequences[:, distance:], return_counts=True)
        for tokens, neighbours in ((pairs // V, pairs % V), (pairs % V, pairs // V)):
            blocks.append(mutual_information(tokens, rank_of[neighbours], n.double(), V))
    matrix = torch.cat(blocks, 1).coalesce()  # (V, 8 * CONTEXTS)
    if matrix.numel() < MAX_DENSE:
        matrix = matrix.to_dense()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the random start of the decomposition
        rank = min(width, V)
        # 32 more than needed: the last ones are inaccurate
        u, s, _ = torch.svd_lowrank(matrix, q=min(rank + 32, V), niter=2)
    embeddings = F.pad(u[:, :rank] * s[:rank], (0, width - rank))  # (V, width)
    embeddings /= embeddings.square().mean(1, keepdim=True).sqrt().clamp_min(1e-9)
    embeddings[counts == 0] = 0
    return embeddings


def mutual_information(tokens, columns, n, vocab_size):
    """The positive pointwise mutual information of `tokens` with neighbours `columns` (< CONTEXTS, others are left out)
    that occur together `n` times, three tensors (P): a sparse tensor (vocab_size, CONTEXTS).
    """
    tokens, columns, n = (values[columns < CONTEXTS] for values in (tokens, columns, n))
    p_column = columns.bincount(n, CONTEXTS) ** CONTEXT_POWER
    p_column /= p_column.sum()
    values = (n / (tokens.bincount(n, vocab_size)[tokens] * p_column[columns])).log().float()
    positive = values > 0
    return torch.sparse_coo_tensor(torch.stack([tokens, columns])[:, positive], values[positive],
                                   (vocab_size, CONTEXTS), check_invariants=True)
