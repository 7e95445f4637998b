"""Stories that are known to be bad, for comparison: sentences of different stories, and those of a trigram model."""

import itertools
from collections import defaultdict

import numpy as np

from tools.judging.text import SENTENCE


def shuffled_sentences(stories):
    """The sentences of all stories, distributed at random over as many stories with as many sentences each."""
    sentences = [SENTENCE.findall(story) for story in stories]
    shuffled = iter(np.random.default_rng(0).permutation([sentence for story in sentences for sentence in story]))
    return [" ".join(itertools.islice(shuffled, len(story))) for story in sentences]


def trigram_stories(tokens, end_of_text, count, max_tokens):
    """Stories (lists of tokens) of a trigram model: each token follows the last two as often as in `tokens`.

    A story ends after an end of text, after `max_tokens`, or where nothing follows the last two tokens.
    """
    followers, rng = defaultdict(list), np.random.default_rng(0)
    tokens, stories = [end_of_text, *tokens.tolist()], []
    for a, b, c in zip(tokens, tokens[1:], tokens[2:]):
        followers[a, b].append(c)
        if a == end_of_text:
            followers[end_of_text].append(b)
    for _ in range(count):
        story = [end_of_text, rng.choice(followers[end_of_text])]
        while story[-1] != end_of_text and len(story) <= max_tokens and (following := followers[story[-2], story[-1]]):
            story.append(rng.choice(following))
        stories.append([token for token in story if token != end_of_text])
    return stories
