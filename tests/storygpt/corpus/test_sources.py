"""Reading stories: every kind of source yields the same stories, and every bad source raises a UserError."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storygpt.corpus import nursery, sources
from storygpt.corpus.sources import Corpus
from storygpt.corpus.tokenizer import END_OF_TEXT
from storygpt.system.errors import UserError

STORIES = [*nursery.stories(20, seed=9), "Two lines.\n\nAnd a naïve 🦊.", f"He said {END_OF_TEXT} and left."]


def write(path, stories, column="text"):
    """Write stories to a file in the format of its extension; return the path as a string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text(f"\n{END_OF_TEXT}\n".join(stories), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: story}) + "\n" for story in stories))
    else:
        pq.write_table(pa.table({"id": range(len(stories)), column: pa.array(stories, pa.string())}), path)
    return str(path)


def read(*args, **options):
    """The stories of each split of a source."""
    splits = {}
    for split, story in Corpus(*args, **options):
        splits.setdefault(split, []).append(story)
    return splits


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_files_of_every_format(here, suffix):
    corpus = Corpus(write(here / f"Mine.{suffix}", STORIES, "story"), "story")
    for _ in range(2):  # a corpus can be read again
        assert list(corpus) == [("train", story) for story in STORIES]


def test_nursery(monkeypatch):
    assert read("nursery", max_stories=7, seed=5) == {"train": list(nursery.stories(7, 5))}
    monkeypatch.setattr(sources, "NURSERY_STORIES", 30)
    assert len(read("nursery")["train"]) == 30


def test_folder_with_the_layout_of_the_hub(here):
    write(here / "repo/data/train-00000-of-00002.parquet", STORIES[:10])
    write(here / "repo/data/train-00001-of-00002.parquet", STORIES[10:15])
    write(here / "repo/data/validation-00000-of-00001.parquet", STORIES[15:])
    (here / "repo/LICENSE.txt").write_text("All rights reserved.")
    assert read("repo/", max_stories=12) == {"train": STORIES[:12], "validation": STORIES[15:]}
    # The hub cannot be reached in tests; without streaming, `load_dataset` returns what it does for the hub.
    splits = datasets.load_dataset("repo", cache_dir=str(here / "cache"))
    assert list(sources.read_column(splits["validation"], "text", "repo")) == STORIES[15:]


def test_folder_of_text_files(here):
    write(here / "books/b.txt", STORIES[3:6])
    write(here / "books/more/a.txt", STORIES[:3])
    (here / "books/.DS_Store").touch()  # macOS creates one in folders opened in the Finder
    write(here / "books/.git/COMMIT_EDITMSG.txt", ["More books"])
    assert read("books") == {"train": STORIES[3:6] + STORIES[:3]}
    write(here / "books/My-valid.txt", STORIES[6:9])
    assert read("books") == {"train": STORIES[3:6] + STORIES[:3], "validation": STORIES[6:9]}


def test_white_space_line_endings_and_empty_stories(here):
    text = (f"\ufeff{END_OF_TEXT}\r\n\r\n{END_OF_TEXT}\r\n  One.\r\n\r\nMore. \r\n"
            f"{END_OF_TEXT} \r\n\r\n{END_OF_TEXT}\r\nTwo.\r\nThree.\r\n")
    (here / "a.txt").write_bytes(text.encode())
    write(here / "b.jsonl", ["One.\n\nMore.", "  ", None, "\n", "Two.\nThree.  "])
    for source, empty_stories in (("a.txt", 2), ("b.jsonl", 3)):
        corpus = Corpus(source)
        for _ in range(2):  # the count is of one iteration
            assert [story for _, story in corpus] == ["One.\n\nMore.", "Two.\nThree."]
            assert corpus.empty_stories == empty_stories


def test_validation_split(here):
    for count, fraction, size in ((len(STORIES), 0.2, 4), (10, 1e-6, 1), (10, 0.999, 9)):  # at least one story in each
        corpus = Corpus(write(here / "a.txt", STORIES[:count]))
        assert corpus.examine(fraction, 1, False)[1]["validation_split"] == "random stories"
        assert [split for split, _ in corpus].count("validation") == size and len(list(corpus)) == corpus.count == count


@pytest.mark.parametrize("text, fraction, size", [
    ("word " * 2000, 0.2, 2000),
    ("word     " * 2000, 0.2, 3599),  # a cut within white space
    ("word " * 2000, 1e-6, 1024),  # a window of the default block_size at least,
    ("word " * 2000, 0.999, 9999 - 2048),  # and two for training
    ("故" * 9999, 0.2, 1901),  # the search for the end of a word is bounded
    ("x" * 3072, 0.01, 1024 - 99),  # the shortest text that can be cut
], ids=range(6))
def test_one_text_is_cut_between_words(here, text, fraction, size):
    corpus = Corpus(write(here / "a.txt", [" ", text]))
    found = corpus.examine(fraction, 1, False)[1]
    assert (found["validation_split"], found["empty_stories_dropped"]) == ("end of the text", 1)
    (_, train), (_, validation) = corpus
    assert (train, validation) == (train.strip(), validation.strip())
    assert train.split() + validation.split() in (text.split(), [train, validation])
    assert abs(len(validation) - size) <= 5


def test_duplicates(here):
    rng = np.random.default_rng(0)
    for train_size, validation_size in ((300, 40), (40, 300)):
        train = rng.integers(200, size=train_size).astype(str).tolist()
        validation = rng.integers(200, size=validation_size).astype(str).tolist()
        write(here / "books/train.txt", train)
        write(here / "books/valid.txt", validation)
        corpus = Corpus("books")
        kept = [story for story in dict.fromkeys(train) if story not in validation]
        assert corpus.examine(0.01, 1, True)[1]["duplicates"] == {
            "within_train": len(train) - len(set(train)), "dropped": len(train) - len(kept),
            "validation_in_train": sum(story in train for story in validation)}
        assert list(corpus) == [("train", story) for story in kept] + [("validation", story) for story in validation]


@pytest.fixture
def bad(here):
    """The current folder, with one source for each way to be wrong."""
    Path = here.joinpath
    Path("latin1.txt").write_bytes(b"A caf\xe9.\n")
    Path("utf16.txt").write_text("A story.", encoding="utf-16")
    Path("bad.parquet").write_bytes(b"PAR1 but no more than that")
    Path("bad.jsonl").write_text('{"text": "A story."}\n{"text": \n')
    offsets, text = pa.py_buffer(np.array([0, 3], np.int32).tobytes()), pa.py_buffer(b"a\xff\xfe")
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, [None, offsets, text])}), "latin1.parquet")
    for name in ("empty.txt", "empty.jsonl", "a.csv"):
        Path(name).touch()
    Path("hollow").mkdir()
    write(Path("a.parquet"), STORIES)
    write(Path("repo/data/test-00000-of-00001.parquet"), STORIES)
    write(Path("books/train.txt"), STORIES)
    write(Path("books/valid.txt"), ["", "  "])
    write(Path("short.txt"), ["x" * 3071])
    write(Path("same.txt"), ["x"] * 9)


@pytest.mark.parametrize("source, message", [
    ("nothing.txt", "nothing.txt does not exist"),
    ("../nothing", "does not exist"),
    ("nobody/nothing", "cannot reach nobody/nothing on the Hugging Face hub: check the name and the network"),
    ("a.parquet story", "no column 'story': choose one of id, text"),
    ("a.parquet id", "story 1 of the train split is int, not text"),
    ("latin1.txt", "latin1.txt is not UTF-8 text"),
    ("utf16.txt", "iconv -f utf-16"),
    ("latin1.parquet", "latin1.parquet is not UTF-8 text"),
    ("bad.parquet", "cannot read bad.parquet"),
    ("bad.jsonl", "cannot read bad.jsonl"),
    ("empty.txt", "empty.txt: the train split has no stories, or only empty ones"),
    ("empty.jsonl", "empty.jsonl"),
    ("hollow", "a folder must contain .txt, .jsonl or .parquet files"),
    ("repo", "repo has no split 'train', only test"),
    ("a.csv", "a.csv: unsupported file type, use one of .txt, .jsonl, .parquet"),
    ("books", "books: the validation split has no stories"),
    ("short.txt", "of 3,071 characters, but training and validation need 3,072"),
    ("same.txt", "--drop_duplicates would leave none"),
])
def test_bad_sources_raise_user_errors(bad, source, message):
    with pytest.raises(UserError) as error:
        Corpus(*source.split()).examine(0.01, 1, drop_duplicates=True)
    assert message in str(error.value)
