"""Which n-grams of a story do not occur in the training text, and which spans are copied from it: a suffix array."""

import numpy as np

from tools.judging.text import per_story

LONGEST_N = 12  # of the n-grams whose novelty is reported


class TrainingText:
    """The training tokens with their suffixes in sorted order, to find every span exactly.

    Memory, with tokens of 2 bytes: 22 bytes per token while it is made, 6 afterwards (measured: docs/judging.md).
    """

    def __init__(self, tokens, end_of_text):
        """`tokens`: an unsigned integer array (N,); `end_of_text`: the token between stories."""
        from pydivsufsort import divsufsort

        self.tokens, self.end_of_text = np.append(tokens, tokens.dtype.type(0)), end_of_text  # (N + 1): see _compare
        self.suffixes = divsufsort(tokens)  # (N,): where they begin, in sorted order; int32 below 2 GB

    def longest_matches(self, stories):
        """For each position of each story, the longest span from there on that is also in the training text.

        `stories`: lists of tokens. Returns two lists of arrays (tokens of the story,): lengths, and positions in
        `tokens`.
        """
        query = np.concatenate([[*story, -1] for story in stories])  # -1 after each story: in no vocabulary
        at = np.flatnonzero(query >= 0)  # (M,)
        low, high = np.zeros(len(at), np.int64), np.full(len(at), len(self.suffixes))
        lengths, sources = np.zeros(len(query), np.int64), np.zeros(len(query), np.int64)
        while (searching := np.flatnonzero(low < high)).size:
            middle = (low[searching] + high[searching]) // 2
            positions, places = self.suffixes[middle].astype(np.int64), at[searching]
            common, is_less = self._compare(positions, query, places)
            low[searching[is_less]], high[searching[~is_less]] = middle[is_less] + 1, middle[~is_less]
            # The neighbors of the place where the search ends are among those visited, and one has the longest match.
            longer = common > lengths[places]
            lengths[places[longer]], sources[places[longer]] = common[longer], positions[longer]
        starts = np.flatnonzero(query < 0)[:-1] + 1  # of all stories but the first
        return tuple([story[:-1] for story in np.split(array, starts)] for array in (lengths, sources))

    def _compare(self, positions, query, places):
        """Compare suffixes of the training text with suffixes of the query, both given by their positions (M,).

        Returns the lengths of their common prefixes (M,) and whether the former is less (M,).
        """
        last = len(self.tokens) - 1  # the extra token at the end stands for the end of the text
        common, equal = np.zeros(len(places), np.int64), np.arange(len(places))
        while equal.size:
            ahead = positions[equal] + common[equal]
            equal = equal[(ahead < last) & (self.tokens[ahead] == query[places[equal] + common[equal]])]
            common[equal] += 1
        ahead = positions + common
        return common, (ahead == last) | (self.tokens[ahead] < query[places + common])

    def source(self, position):
        """The number of the training story at a position, from 1, and its tokens."""
        ends = np.flatnonzero(self.tokens[:-1] == self.end_of_text)
        bounds = np.concatenate([[-1], ends, [len(self.tokens) - 1]])  # the last story may be incomplete
        number = int(np.searchsorted(bounds, position))
        return number, self.tokens[bounds[number - 1] + 1:bounds[number]].tolist()


def novelty(lengths):
    """n-novelty (Merrill, Smith & Elazar 2024, arXiv 2406.13069): the share of a story's n-grams that are not in the
    training text, for n = 1 … LONGEST_N, and the longest span of a story that is.

    `lengths`: from `TrainingText.longest_matches`. Returns measures, with an entry per story.
    """
    measures = {}
    for n in range(1, LONGEST_N + 1):
        grams = [story[:max(0, len(story) - n + 1)] for story in lengths]  # where an n-gram begins
        measures[f"new_{n}_grams"] = [((story < n).sum(), len(story)) for story in grams]
    return measures | {"longest_copy": per_story(story.max() for story in lengths)}
