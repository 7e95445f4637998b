"""Token embeddings from co-occurrence counts: a start from which a model learns faster than from random ones."""

import numpy as np
import torch
import torch.nn.functional as F

from storygpt.system.errors import UserError

DISTANCES = (1, 2, 3, 4)  # of neighbours, in tokens
CONTEXTS = 2000  # the most frequent tokens, which serve as neighbours
CONTEXT_POWER = 0.75  # of the frequency of neighbours; below 1 it lowers the weight of rare ones


@torch.no_grad()
def set_embeddings(model, embeddings):
    """Start from token embeddings (V, C) whose rows have a mean square of 1, instead of random ones.

    They are scaled to ten times the std of random ones, so that training does not change them quickly; the last norm's
    gain is a tenth, so that the logits are no larger. Raises UserError for a model without these two.
    """
    try:
        wte, gain = model.transformer.wte.weight, model.transformer.ln_f.weight
    except AttributeError as error:
        raise UserError(f"init_embeddings = 'cooccurrence' sets transformer.wte and the gain of transformer.ln_f, but "
                        f"the model lacks one ({error}): use --init_embeddings=random") from error
    wte.copy_(0.2 * embeddings)
    gain.fill_(0.1)


def cooccurrence_embeddings(sequences, vocab_size, width):
    """Embeddings that are similar for tokens with similar neighbours in `sequences`, token ids (N, T) as an int array.

    Returns a float tensor (vocab_size, width); rows have a mean square of 1, or are 0 for tokens that do not occur.
    The method is that of word vectors from counts (Levy & Goldberg 2014; Levy, Goldberg & Dagan 2015): a singular value
    decomposition of the positive pointwise mutual information, log p(token, neighbour) / p(token) p(neighbour), of each
    token with the neighbours at each distance to the left and to the right.
    """
    counts = np.bincount(sequences.ravel(), minlength=vocab_size)
    rank_of = np.argsort(np.argsort(-counts, kind="stable"))  # of each token in the order of frequency
    blocks = []  # (vocab_size, CONTEXTS) each, sparse
    for distance in DISTANCES:
        left, right = sequences[:, :-distance].ravel(), sequences[:, distance:].ravel()
        for tokens, columns in ((left, rank_of[right]), (right, rank_of[left])):
            used = columns < CONTEXTS
            pairs, n = np.unique(tokens[used] * CONTEXTS + columns[used], return_counts=True)
            row, column = np.divmod(pairs, CONTEXTS)
            p_column = np.bincount(column, n) ** CONTEXT_POWER
            p_column /= p_column.sum()
            values = np.log(n / (np.bincount(row, n)[row] * p_column[column]))
            blocks.append(torch.sparse_coo_tensor(
                np.stack([row, column])[:, values > 0], values[values > 0], (vocab_size, CONTEXTS),
                dtype=torch.float32, check_invariants=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the random start of the decomposition
        rank = min(width, vocab_size)
        # 32 more than needed: the last ones are inaccurate
        u, s, _ = torch.svd_lowrank(torch.cat(blocks, 1), q=min(rank + 32, vocab_size), niter=2)
    embeddings = F.pad(u[:, :rank] * s[:rank], (0, width - rank))  # (vocab_size, width)
    embeddings /= embeddings.square().mean(1, keepdim=True).sqrt().clamp_min(1e-9)
    embeddings[counts == 0] = 0
    return embeddings
