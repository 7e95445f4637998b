"""What is measured with the model itself, on held-out text: minimal pairs, and the loss by position."""

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from storygpt.loss import IGNORED_TARGET
from tools.judging.text import per_story

BATCH = 8  # sequences scored at once: their logits are in memory
CONTEXT_WINDOWS = 300  # of held-out text, for the loss by position
STORY_SPANS = ((0, 16), (16, 64), (64, 128), (128, 256))  # positions in a story, in tokens


@torch.no_grad()
def token_losses(model, sequences):
    """The losses of the tokens of each sequence from its second token on: a list of arrays.

    `sequences`: lists of 2 … block_size + 1 tokens. Those of similar length go through the model together.
    """
    losses, order = [None] * len(sequences), sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in tqdm(range(0, len(order), BATCH), "scoring", leave=False, disable=None):
        batch = order[start:start + BATCH]
        padded = pad_sequence([torch.tensor(sequences[i]) for i in batch], batch_first=True,
                              padding_value=IGNORED_TARGET).to(next(model.parameters()).device)  # (B, T + 1)
        targets = padded[:, 1:].contiguous()  # (B, T)
        logits = model(padded[:, :-1].clamp(min=0))  # (B, T, V)
        rows = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="none")
        for i, row in zip(batch, rows.view(targets.shape).float().cpu().numpy()):
            losses[i] = row[:len(sequences[i]) - 1]
    return losses


def language(model, tokenizer, pairs_by_kind):
    """Of each kind of minimal pairs, the share whose right text is more likely to the model; ties count half.

    `pairs_by_kind`: from `pairs.minimal_pairs`. Returns measures, with an entry per pair.
    """
    sequences, scored = [], []  # scored: of each pair, its kind and the index of the first loss that differs
    for kind, pair in ((kind, pair) for kind, found in pairs_by_kind.items() for pair in found):
        right, wrong = ([tokenizer.end_of_text, *tokenizer.encode(side)] for side in pair)
        start = max(0, max(len(right), len(wrong)) - model.config.block_size - 1)  # both lose the same context
        first = next((i for i, (a, b) in enumerate(zip(right, wrong)) if a != b), 0) - start - 1
        if first >= 0:  # else they do not differ in the window
            sequences += [right[start:], wrong[start:]]
            scored.append((kind, first))
    losses, scores = token_losses(model, sequences), {kind: [] for kind in pairs_by_kind}
    for (kind, first), *pair in zip(scored, losses[::2], losses[1::2]):
        right, wrong = (side[first:].sum() for side in pair)
        scores[kind].append(0.5 if right == wrong else float(right < wrong))
    return {f"pairs_{kind.replace(' ', '_')}": per_story(found) for kind, found in scores.items()}


def context(model, tokenizer, stories):
    """The loss on held-out stories by position in the context window and in the story.

    The stories follow each other as in training, so a window may contain several. Returns measures, with an entry per
    window, and curves, name → list of mean losses; both empty without a whole window.
    """
    T = model.config.block_size
    stream, places = [tokenizer.end_of_text], []  # tokens, and the position in its story of each one after the first
    for story in stories:
        tokens = [*tokenizer.encode(story), tokenizer.end_of_text]
        stream += tokens
        places += range(len(tokens))
    count = min(CONTEXT_WINDOWS, len(places) // T)
    if not count:
        return {}, {}
    losses = np.stack(token_losses(model, [stream[i * T:(i + 1) * T + 1] for i in range(count)]))  # (count, T)
    places = np.array(places[:count * T]).reshape(count, T)
    spans = {f"loss_story_{start}": (places >= start) & (places < end) for start, end in STORY_SPANS}
    spans["loss_window_start"] = np.broadcast_to(np.arange(T) < T // 4, places.shape)
    spans["loss_window_end"] = np.broadcast_to(np.arange(T) >= T // 2, places.shape)
    by_story = [float(losses[places == place].mean()) for place in range(min(STORY_SPANS[-1][1], places.max() + 1))]
    return ({name: list(zip((losses * span).sum(1), span.sum(1))) for name, span in spans.items()},
            {"loss_by_window_position": losses.mean(0).tolist(), "loss_by_story_position": by_story})
