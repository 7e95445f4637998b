"""The stories of a source: separators, white space, pieces, the validation split, duplicates, cleaning."""

from pathlib import Path

import numpy as np
import pytest

from conftest import write
from storygpt.corpus import nursery, sources, stories
from storygpt.corpus.stories import Corpus, cut_in_pieces
from storygpt.corpus.tokenizer import END_OF_TEXT, Tokenizer
from storygpt.system.errors import UserError

STORIES = [*nursery.stories(20, seed=9), "Two lines.\n\nAnd a naïve 🦊.", "He said\tyes."]


def joined(corpus):
    """The stories of each split of a corpus: their pieces are joined."""
    splits, story = {}, ""
    for split, piece, ends in corpus:
        story += piece
        if ends:
            splits.setdefault(split, []).append(story)
            story = ""
    assert not story
    return splits


def test_a_corpus_can_be_read_again(here):
    write("x/a.txt", STORIES[:9])
    write("x/valid.txt", STORIES[9:])
    corpus = Corpus("x", max_stories=7)
    for _ in range(2):
        assert list(corpus) == ([("train", story, True) for story in STORIES[:7]]
                                + [("validation", story, True) for story in STORIES[9:]])


@pytest.mark.parametrize("size", [20, 50, 1 << 20])
def test_stories_are_separated_wherever_the_marker_is(here, monkeypatch, size):
    """In a line of its own, within a line or at its end; in files that are read in parts, and in columns."""
    monkeypatch.setattr(sources, "PART_CHARACTERS", size)
    text = (f"One.\n{END_OF_TEXT}\nTwo.{END_OF_TEXT}Three, {END_OF_TEXT}\nFour.\n\n"
            f"{END_OF_TEXT}\ufeffFive <|endof text|>\n")  # with a byte-order mark, as of joined files
    expected = ["One.", "Two.", "Three,", "Four.", "Five <|endof text|>"]
    write("a.txt", [text])
    write("b.jsonl", [text, "Six."])
    for source, more in (("a.txt", []), ("b.jsonl", ["Six."])):
        corpus = Corpus(source)
        assert joined(corpus) == {"train": expected + more} and corpus.findings["empty"] == 0


def test_white_space_line_endings_and_empty_stories(here):
    text = (f"\ufeff{END_OF_TEXT}\r\n\r\n{END_OF_TEXT}\r\n  One.\r\n\r\nMore. \r\n"
            f"{END_OF_TEXT} \r\n\r\n{END_OF_TEXT}\r\nTwo.\r\nThree.\r\n{END_OF_TEXT}\r\n")
    Path("a.txt").write_bytes(text.encode())
    write("b.jsonl", ["One.\n\nMore.", "  ", None, "\n", "Two.\nThree.  "])
    for source, empty in (("a.txt", 2), ("b.jsonl", 3)):
        corpus = Corpus(source)
        for _ in range(2):  # the count is of one iteration
            assert joined(corpus) == {"train": ["One.\n\nMore.", "Two.\nThree."]}
            assert corpus.findings["empty"] == empty


@pytest.mark.parametrize("text", [
    "word " * 200, "word, and\n\nother words.  Then " * 40, "x" * 999, "故事" * 300, "a\nb\n" * 200,
    f"{'long ' * 60}{END_OF_TEXT}{'x' * 250}{END_OF_TEXT}short", "a  " * 400, "b     " * 200, "1234 don't \n\n" * 90])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_long_story_comes_in_pieces_with_the_same_tokens(here, monkeypatch, text, suffix):
    source = write(f"a.{suffix}", [text])
    whole = joined(Corpus(source))
    monkeypatch.setattr(sources, "PART_CHARACTERS", 70)
    monkeypatch.setattr(stories, "PIECE_CHARACTERS", 100)
    _, pieces, ends = zip(*Corpus(source))
    assert joined(Corpus(source)) == whole and len(pieces) > sum(ends) and max(map(len, pieces)) <= 200
    write("b.txt", [text] * 2 + ["x"])  # a validation split of the source counts, too
    Path("both").mkdir()
    for name in ("train", "val"):
        Path(f"both/{name}.txt").write_bytes(Path("b.txt").read_bytes())
    corpus = Corpus("both")
    corpus.examine(0.1, 1, False)
    assert corpus.count == sum(ends for _, _, ends in corpus)
    if " " in text or "\n" in text:  # if there is a place to cut
        tokenizer = Tokenizer.named("gpt2")
        tokens = tokenizer.encode_stories(whole["train"])
        assert (tokenizer.encode_stories(pieces, ends) == tokens).all()
        if "x" * 201 in text:
            return  # there is none in one of the stories
        parts = [tokenizer.encode_stories([piece], [end]) for piece, end in zip(pieces, ends)]  # as in two batches
        assert (np.concatenate(parts) == tokens).all()


def test_pieces_are_cut_between_words(monkeypatch):
    monkeypatch.setattr(stories, "PIECE_CHARACTERS", 10)
    assert cut_in_pieces("a word." * 2) == ["a word." * 2]
    assert cut_in_pieces("One, two, and three, four, five.") == ["One, two, and", " three, four, five."]
    assert cut_in_pieces("x" * 25) == ["x" * 10, "x" * 15]


def test_validation_split(here):
    for count, fraction, size in ((len(STORIES), 0.2, 4), (10, 1e-6, 1), (10, 0.999, 9)):  # at least one story in each
        corpus = Corpus(write("a.txt", STORIES[:count]))
        assert corpus.examine(fraction, 1, False)[1]["validation_split"] == "random stories"
        assert [split for split, _, _ in corpus].count("validation") == size
        assert len(list(corpus)) == corpus.count == count


@pytest.mark.parametrize("piece", [1 << 20, 100])
@pytest.mark.parametrize("text, fraction, size", [
    ("word " * 2000, 0.2, 2000),
    ("word     " * 2000, 0.2, 3599),  # a cut within white space
    ("word " * 2000, 1e-6, 1024),  # a window of the default block_size at least,
    ("word " * 2000, 0.999, 9999 - 2048),  # and two for training
    ("故" * 9999, 0.2, 1901),  # the search for the end of a word is bounded
    ("x" * 3072, 0.01, 1024 - 99),  # the shortest text that can be cut
], ids=range(6))
def test_one_text_is_cut_between_words(here, monkeypatch, text, fraction, size, piece):
    monkeypatch.setattr(stories, "PIECE_CHARACTERS", piece)
    corpus = Corpus(write("a.txt", [" ", text]))
    found = corpus.examine(fraction, 1, False)[1]
    assert (found["validation_split"], found["empty_stories_dropped"], corpus.count) == ("end of the text", 0, 2)
    splits = joined(corpus)
    (train,), (validation,) = splits["train"], splits["validation"]
    assert (train, validation) == (train.strip(), validation.strip())
    assert train.split() + validation.split() in (text.split(), [train, validation])
    assert abs(len(validation) - size) <= (5 if piece > 100 else 99)  # a word may end with a piece


def test_duplicates(here):
    rng = np.random.default_rng(0)
    for train_size, validation_size in ((300, 40), (40, 300)):
        train = rng.integers(200, size=train_size).astype(str).tolist()
        validation = rng.integers(200, size=validation_size).astype(str).tolist()
        write("books/train.txt", train)
        write("books/valid.txt", validation)
        corpus = Corpus("books")
        kept = [story for story in dict.fromkeys(train) if story not in validation]
        assert corpus.examine(0.01, 1, True)[1]["duplicates"] == {
            "within_train": len(train) - len(set(train)), "dropped": len(train) - len(kept),
            "validation_in_train": sum(story in train for story in validation)}
        assert joined(corpus) == {"train": kept, "validation": validation}
        assert corpus.count == len(kept) + len(validation)


def test_duplicates_among_stories_in_pieces(here, monkeypatch):
    monkeypatch.setattr(stories, "PIECE_CHARACTERS", 100)
    long, other, third = "a word " * 100, "a word " * 99 + "a name", "a name " + "a word " * 99
    found = Corpus(write("a.txt", [long, other, long, "short", other + "s", third])).examine(0.2, 1, False)[1]
    assert sum(found["duplicates"].values()) == 1


def test_a_source_that_changes_is_an_error(here):
    for count in (len(STORIES) - 1, len(STORIES) + 1):
        corpus = Corpus(write("a.jsonl", STORIES))
        corpus.examine(0.2, 1, False)
        write("a.jsonl", (STORIES * 2)[:count])
        with pytest.raises(UserError, match="a.jsonl has changed while it was read: run the command again"):
            list(corpus)


def test_cleaning_a_long_story(here, monkeypatch):
    monkeypatch.setattr(stories, "PIECE_CHARACTERS", 100)
    text = "“Yes” " + "a word " * 100 + "and"  # changed at its beginning only, and its end looks like a fragment
    corpus = Corpus(write("a.jsonl", [text, "x" * 98 + "."]), cleaned=True)
    assert joined(corpus) == {"train": [text.replace("“Yes”", '"Yes"')]}
    assert corpus.findings == {"changed": 1, "fragment": 1}


def test_cleaning_counts_changed_stories_and_drops_fragments(here):
    whole = "Ana had a red ball. She went to the park with Ben, and they played until dinner. It was a good day, too."
    texts = [whole, whole.replace("a red", "“a red”"), whole[:-1], "Short.", "", f"{whole}\n\nThe End",
             f"{whole} \nYes.", "\u200b", f"—{whole}\n\u200b"]
    corpus = Corpus(write("a.txt", texts), cleaned=True)
    found = corpus.examine(0.2, 1, False)[1]
    assert found["cleaned"] == {"stories_changed": 3, "fragments_dropped": 2} and found["empty_stories_dropped"] == 2
    kept = [story for _, story, _ in corpus]
    assert kept == [whole, whole.replace("a red", '"a red"'), f"{whole}\n\nThe End", f"{whole}\nYes.", f"- {whole}"]
    assert "cleaned" not in Corpus("a.txt").examine(0.2, 1, False)[1]


@pytest.mark.parametrize("texts, message", [
    ([], "the train split has no stories, or only empty ones"),
    ([" ", "\n"], "the train split has no stories, or only empty ones"),
    (["x" * 3071], "of 3,071 characters, but training and validation need 3,072"),
    (["x"] * 9, "--drop_duplicates would leave none"),
    (["A story.", "An\0other." + "x" * 999], "text of the train split has NUL characters, after 'An': remove them"),
])
def test_bad_stories_raise_user_errors(here, texts, message, monkeypatch):
    monkeypatch.setattr(stories, "PIECE_CHARACTERS", 300)
    with pytest.raises(UserError, match=message):
        Corpus(write("a.jsonl", texts)).examine(0.01, 1, drop_duplicates=True)
    write("b/train.txt", STORIES)
    write("b/valid.txt", ["", "  "])
    with pytest.raises(UserError, match=r"b: the validation split has no stories, or only empty ones and fragments"):
        Corpus("b", cleaned=True).examine(0.01, 1, False)
    with pytest.raises(UserError, match="b: the validation split has no stories, or only empty ones$"):
        Corpus("b").examine(0.01, 1, False)
