"""tools/judging: each measure on hand-made stories with known answers."""

import numpy as np
import pytest
import torch

pytest.importorskip("sacrebleu", reason="pip install -r requirements-extra.txt")

from storygpt.checkpoint import load_model
from storygpt.corpus import nursery
from storygpt.corpus.tokenizer import Tokenizer
from tools.judging import controls, novelty, pairs, scoring, text

# Enough uses of each name to learn it; Honey is also a word.
LEARNED = ["One day, Lily sang and she was happy. Then Lily ran, and she fell. Soon Lily slept, and she dreamed.",
           "Once, Tom sang and he was happy. Then Tom ran, and he fell. Soon Tom slept, and he dreamed.",
           "He saw Honey and ate honey. He saw Honey, and Honey saw him. Mr. Wood met Mrs. Wood and little Mr. Wood."]
NAMES = {"Lily": "she", "Tom": "he", "Honey": None}

STORIES = list(nursery.stories(60, seed=9))


def shares(measure):
    """The numerators and denominators of a measure, as lists."""
    return [list(values) for values in zip(*measure)]


# ---- intervals ----


def test_the_value_is_the_ratio_of_the_sums():
    value, low, high = text.interval([(1, 2), (0, 0), (3, 4)] * 4).values()
    assert value == 4 / 6 and 0.5 < low < value < high <= 0.75
    assert text.interval([(1, 2), (0, 0), (3, 4)]) == {"value": 4 / 6, "low": None, "high": None}  # too few
    assert text.interval([(2, 4)] * 50) == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert text.interval([(0, 0), (0, 0)]) is None and text.interval([]) is None


def test_the_interval_is_that_of_the_normal_distribution_for_many_stories():
    value, low, high = text.interval([(1, 1)] * 150 + [(0, 1)] * 350).values()
    assert value == 0.3
    assert [low, high] == pytest.approx([0.3 - 0.0402, 0.3 + 0.0402], abs=0.006)  # 1.96 * sqrt(0.3 * 0.7 / 500)


# ---- varied ----


def test_words_and_sentences():
    story = '"Wait, Mr. Fox!" said Tim\'s mom. She had 2 cups… "No."\n\nThe end'
    assert text.split_words(story)[:9] == ['"', "wait", ",", "mr", ".", "fox", "!", '"', "said"]
    assert "tim's" in text.split_words(story) and "2" in text.split_words(story)
    assert text.SENTENCE.findall(story) == [
        '"Wait, Mr. Fox!"', "said Tim's mom.", "She had 2 cups…", '"No."', "The end"]


def test_distinct_n_grams_are_counted_in_groups_of_ten_stories():
    stories = ["a b a b".split()] * 10 + ["c d e f".split()] * 10 + ["too few for a group".split()]
    assert shares(text.distinct(stories, 1)) == [[2, 4], [40, 40]]
    assert shares(text.distinct(stories, 2)) == [[2, 3], [30, 30]]
    assert text.distinct(stories[:9], 3) == []


def test_self_bleu():
    same, other = "the cat sat on the mat".split(), "a dog ran in my yard".split()
    numbers = [[str(100 * i + j) for j in range(6)] for i in range(98)]
    assert shares(text.self_bleu([same, same, *numbers])) == [pytest.approx([1, 1] + [0] * 98), [1] * 100]
    assert sum(shares(text.self_bleu([same, other, *numbers, same]))[0]) == 0  # only the first hundred
    assert text.self_bleu([same] * 99) == []  # fewer would give a lower value


def test_openings_and_endings_of_other_stories_among_a_hundred():
    stories = ["Hi. It was fun. Bye.", "Hi. Bye.", "Hello. The end.", "Hey. Bye."] + [f"A{i}. B{i}." for i in range(96)]
    stories += [*reversed(stories), "Hi. Bye.", "Hi. Bye."]
    measures = text.measure(stories, [None] * len(stories), NAMES)
    assert shares(measures["same_opening"])[0] == [1, 1, 0, 0] + [0] * 192 + [0, 0, 1, 1]
    assert shares(measures["same_ending"])[0] == [1, 1, 0, 1] + [0] * 192 + [1, 0, 1, 1]


# ---- whole ----


def test_wholeness():
    stories = ['He said, "Go." He ran home. He ran home.', 'He said, "Go. A b c d e a b c d e.', "“Go,” he said."]
    measures = text.measure(stories, [True, False, None], NAMES)
    assert measures["ends"] == [(1, 1), (0, 1)]  # of the last story it is not known
    assert shares(measures["words"])[0] == [15, 17, 7]
    assert shares(measures["quotes_balanced"])[0] == [1, 0, 1]
    assert shares(measures["repeated_sentences"]) == [[1, 0, 0], [3, 2, 1]]  # only those of three words
    assert shares(measures["repeated_4_grams"]) == [[1, 2, 0], [12, 14, 4]]


# ---- consistent ----


def test_names_and_their_pronouns_are_learned():
    assert text.learn_names(LEARNED) == NAMES
    assert text.learn_names([LEARNED[0], "Lily ran, so he fell."])["Lily"] is None  # 3 of 4


def test_words_are_learned_as_names_only_within_sentences_and_without_a_title():
    stories = ["Sunny days. Sunny days! \"Sunny days\". Sunny days.", "He saw Mama Bear. " * 5,
               "I saw a bear and Grizzly. " * 3, "In May she met Mom in May and May. "]
    assert text.learn_names(stories) == {"Grizzly": None}


@pytest.mark.parametrize("story, names, not_introduced, pronouns, agreeing", [
    ("There was a girl named Lily. She met Tom. She ran.", ["Lily", "Tom"], [], 0, 0),
    ("There was a girl named Lily. She sang. She ran.", ["Lily"], [], 2, 2),
    ("There was a girl named Lily. He sang. She ran.", ["Lily"], [], 2, 1),
    ("There was a boy named Lily. He sang.", ["Lily"], [], 1, 1),  # the noun counts more than the name
    ("Lily sang. Her mom came. She ran. Lily slept, and she dreamed.", ["Lily"], [], 1, 1),  # the mom ran
    ('Lily sang. "He ran," said Lily. She slept.', ["Lily"], [], 1, 1),  # quotations are not counted
    ("Honey sang. He ran. She ran.", ["Honey"], [], 0, 0),  # may be either
    ("Lily sang. It rained. Tom ran.", ["Lily", "Tom"], ["Tom"], 0, 0),
    ("Lily sang. It rained. Her friend Tom ran. Tom fell.", ["Lily", "Tom"], [], 0, 0),
    ("Lily sang. It rained. Tom the goat ran.", ["Lily", "Tom"], [], 0, 0),
    ("Lily sang. It rained. Mama Honey ran.", ["Lily"], [], 0, 0),  # a title
    ("Lily_2 sang. It rained. Then Tom7 ran to Tommy.", ["Lily", "Tom"], ["Tom"], 0, 0),
    ("Once there was a cat. It sang.", [], [], 0, 0)])
def test_the_cast_of_a_story(story, names, not_introduced, pronouns, agreeing):
    assert text.find_cast(story, NAMES) == (names, not_introduced)
    assert text.consistency(["Lily sang.", story], NAMES) == {
        "names": [(1, 1), (len(names), 1)], "names_not_introduced": [(0, 1), (len(not_introduced), len(names))],
        "pronouns_agree": [(0, 0), (agreeing, pronouns)],
        "one_hero": [(1, 1), (names != [] == not_introduced and pronouns == agreeing, names != [])]}


# ---- copied or new ----


@pytest.mark.parametrize("dtype, vocabulary", [(np.uint16, 4), (np.uint16, 2000), (np.uint32, 70_000)])
def test_longest_matches_are_those_of_a_search_by_hand(dtype, vocabulary):
    rng = np.random.default_rng(0)
    tokens = rng.choice(rng.integers(vocabulary, size=4), 300).astype(dtype)  # four tokens, of any bytes
    stories = [rng.choice(tokens, length).tolist() for length in (1, 2, 30, 50)] + [[], tokens[40:60].tolist()]
    found, positions = novelty.TrainingText(tokens, end_of_text=0).longest_matches(stories)
    spans = {tuple(tokens[i:i + n]) for n in range(1, 25) for i in range(len(tokens) - n + 1)}
    for story, lengths, places in zip(stories, found, positions, strict=True):
        assert list(lengths) == [max([n for n in range(1, len(story) - i + 1) if tuple(story[i:i + n]) in spans],
                                     default=0) for i in range(len(story))]
        for i, (length, place) in enumerate(zip(lengths, places)):
            assert list(tokens[place:place + length]) == story[i:i + length]


def test_novelty_counts_n_grams():
    text_index = novelty.TrainingText(np.array([1, 2, 3, 0, 4, 5, 0], np.uint16), end_of_text=0)
    lengths, positions = text_index.longest_matches([[1, 2, 3, 4, 5], [9, 1]])
    assert [list(length) for length in lengths] == [[3, 2, 1, 2, 1], [0, 1]]  # 3, 4 are in different stories
    measures = novelty.novelty(lengths)
    assert measures["new_1_grams"] == [(0, 5), (1, 2)] and measures["new_2_grams"] == [(1, 4), (1, 1)]
    assert measures["new_3_grams"] == [(2, 3), (0, 0)] and measures["longest_copy"] == [(3, 1), (1, 1)]
    assert text_index.source(positions[0][3]) == (2, [4, 5]) and text_index.source(2) == (1, [1, 2, 3])


# ---- minimal pairs and losses ----


def test_minimal_pairs():
    story = "Lily saw a ball. She was glad. Then Lily sat, and she ate the apple."
    found = pairs.minimal_pairs([story], {"Lily": "she", "Kate": "she", "Tom": "he"}, 5)
    last = "She was glad. Then Lily sat, and she ate the apple."
    assert found.pop("agreement") == [("Lily saw a ball. She was glad.", "Lily saw a ball. She were glad.")]
    assert found.pop("article") == [("Lily saw a ball.", "Lily saw an ball.")]
    assert found.pop("name") == [(story, story.replace("Then Lily", "Then Kate"))]
    assert found.pop("gender") == [(story, story.replace("and she", "and he"))]
    assert found.pop("tense") == []  # only after he, she and it: "They want" is correct
    assert found.pop("pronoun")[0] in [("Lily saw a ball. She was glad.", "Lily saw a ball. Her was glad."),
                                       (last, last.replace("and she", "and her"))]
    assert found.pop("word order")[0] in [("Lily saw a ball.", "Lily saw ball a."),
                                          (last, last.replace("the apple", "apple the"))]
    assert not found


def test_words_that_minimal_pairs_leave_alone():
    def changes(story):
        return {kind: [wrong for _, wrong in each] for kind, each in pairs.minimal_pairs([story], {
            "Lily": "she", "Kate": "she", "Anna": "she", "Tom": "he"}, 5).items() if each}
    assert changes("If it was red, they asked her to come and gave her some.").keys() == {"pronoun"}
    assert changes("It was he. He ran to us.")["tense"] == ["It was he. He run to us."]
    assert changes("Lily sang. Lily and Anna ran. Lily slept.")["name"] == ["Lily sang. Lily and Anna ran. Kate slept."]
    assert "gender" not in changes("Lily sang. Then Lily saw her mom, and she ran.")
    assert "name" not in changes("Annabel sang. Lily ran.")


def test_quotations_are_not_changed_and_the_count_is_limited():
    stories = ['"He was a fox," said Lily.', "He was a fox.", "He was a dog.", "He was a cat."]
    found = pairs.minimal_pairs(stories, NAMES, 2)["agreement"]
    assert [wrong for _, wrong in found] == ["He were a fox.", "He were a dog."]


@pytest.fixture(scope="module")
def model_and_tokenizer(trained):
    """A trained model with blocks of 16 tokens."""
    model, tokenizer, _ = load_model(trained / "out/tiny/ckpt.pt")
    return model, tokenizer


def test_losses_do_not_depend_on_the_batch(model_and_tokenizer):
    model, _ = model_and_tokenizer
    sequences = [[1, 2, 3, 4, 5], [7, 8], list(range(17)), [9, 8, 7]] * 20
    losses = scoring.token_losses(model, sequences)
    for sequence, *of_the_same in zip(sequences[:4], *(losses[i:i + 4] for i in range(0, 80, 4))):
        logits = model(torch.tensor([sequence[:-1]]))[0]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(sequence[1:]), reduction="none")
        for loss in of_the_same:  # a row's place in the batch changes the rounding on some processors
            assert loss == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_more_likely_text_counts_and_ties_count_half(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    good, bad = "Once upon a time", "Once upon a emit"
    both = {"a": [(good, bad), (bad, good)], "b": [(good, bad)],
            "c": [("x" * 40, "x" * 39 + "y"), ("x" + "y" * 40, "y" * 41),
                  ("xy", "y" * 40), ("xy", "xyy"), ("xy", "xy")]}
    measures = scoring.language(model, tokenizer, both)
    assert measures["pairs_a"] == [(1, 1), (0, 1)] and measures["pairs_b"] == [(1, 1)]
    assert len(measures["pairs_c"]) == 1  # the others differ outside the window, or only in length, or not
    with torch.no_grad():
        weight = model.transformer.wte.weight.clone()
        model.transformer.wte.weight.zero_()  # all tokens equally likely
    tokens = [len(tokenizer.encode(side)) for side in ("Once", "Onec")]
    (score, _), = scoring.language(model, tokenizer, {"d": [("Once", "Onec")]})["pairs_d"]
    model.transformer.wte.weight.data.copy_(weight)
    assert score == (0.5 if tokens[0] == tokens[1] else float(tokens[0] < tokens[1]))


def test_loss_by_position(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    stories = STORIES[:4]
    measures, curves = scoring.context(model, tokenizer, stories)
    stream = [tokenizer.end_of_text]
    for story in stories:
        stream += [*tokenizer.encode(story), tokenizer.end_of_text]
    count = (len(stream) - 1) // 16
    x = torch.tensor(stream[:count * 16]).view(count, 16)
    y = torch.tensor(stream[1:count * 16 + 1]).view(count, 16)
    losses = torch.nn.functional.cross_entropy(model(x).mT, y, reduction="none").detach()  # (B, T)
    assert curves["loss_by_window_position"] == pytest.approx(losses.mean(0).tolist(), abs=1e-4)
    assert text.interval(measures["loss_window_start"])["value"] == pytest.approx(losses[:, :4].mean().item(), abs=1e-4)
    assert text.interval(measures["loss_window_end"])["value"] == pytest.approx(losses[:, 8:].mean().item(), abs=1e-4)
    assert curves["loss_by_story_position"][0] == pytest.approx(
        torch.stack([losses.flatten()[i] for i, token in enumerate(stream[:-1])
                     if token == tokenizer.end_of_text and i < count * 16]).mean().item(), abs=1e-4)
    lengths = [len(tokenizer.encode(story)) + 1 for story in stories]
    lengths[-1] -= sum(lengths) - count * 16  # the last window may be incomplete
    for start, end in scoring.STORY_SPANS:
        _, counts = shares(measures[f"loss_story_{start}"])
        assert sum(counts) == sum(max(0, min(end, length) - start) for length in lengths)
    assert sum(shares(measures["loss_story_16"])[0]) == pytest.approx(sum(
        losses.flatten()[sum(lengths[:i]) + 16:sum(lengths[:i]) + 64].sum().item() for i in range(4)), rel=1e-4)
    assert scoring.context(model, tokenizer, ["Hi."]) == ({}, {})


# ---- controls ----


def test_shuffled_sentences_are_those_of_the_stories():
    before, after = ([text.SENTENCE.findall(story) for story in stories]
                     for stories in (STORIES, controls.shuffled_sentences(STORIES)))
    assert [*map(len, before)] == [*map(len, after)] and before != after and sorted(sum(before, [])) == sorted(
        sum(after, []))


def test_the_trigram_model_has_only_trigrams_of_its_text(trained):
    tokenizer = Tokenizer.load(trained / "out/tiny")
    tokens = tokenizer.encode_stories(STORIES)
    stories = controls.trigram_stories(tokens, tokenizer.end_of_text, 5, max_tokens=100)
    lengths, _ = novelty.TrainingText(tokens, tokenizer.end_of_text).longest_matches(stories)
    assert len(stories) == 5 and all(0 < len(story) <= 100 for story in stories)
    assert all(min(length[:-2]) >= 3 for length in lengths) and len(set(map(tuple, stories))) == 5
    assert all(tokenizer.decode(story)[0].isupper() for story in stories)  # they begin as stories do
    assert controls.trigram_stories(np.array([5, 6, 7, 0, 5, 6, 8]), 0, 9, 9)  # the last story is incomplete
