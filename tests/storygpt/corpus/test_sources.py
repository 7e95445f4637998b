"""Reading stories: every kind of source yields the same stories, and every bad source raises a UserError."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import ROOT
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
        path.write_text("".join(json.dumps({"id": i, column: s}) + "\n" for i, s in enumerate(stories)))
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


def test_nursery_and_text_files_do_not_import_datasets(here):
    write(here / "a.txt", STORIES)
    code = ("import sys; from storygpt.corpus.sources import Corpus; list(Corpus('nursery')); list(Corpus('a.txt')); "
            "sys.exit('datasets' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=here, env={"PYTHONPATH": str(ROOT)}).returncode == 0


def test_nursery():
    assert read("nursery", max_stories=7, seed=5) == {"train": list(nursery.stories(7, 5))}
    assert sum(1 for _ in Corpus("nursery")) == sources.NURSERY_STORIES


def test_folder_with_the_layout_of_the_hub(here):
    write(here / "repo/data/train-00000-of-00002.parquet", STORIES[:10])
    write(here / "repo/data/train-00001-of-00002.parquet", STORIES[10:15])
    write(here / "repo/data/validation-00000-of-00001.parquet", STORIES[15:])
    assert read("repo/", max_stories=12) == {"train": STORIES[:12], "validation": STORIES[15:]}


def test_dataset_that_is_not_streamed(here):
    """The hub cannot be reached in tests; `load_dataset` returns the same kind of object for a local folder."""
    write(here / "repo/data/train-00000-of-00001.parquet", STORIES)
    splits = datasets.load_dataset("repo", cache_dir=str(here / "cache"))
    assert list(sources.read_column(splits["train"], "text", "repo")) == STORIES


def test_folder_of_text_files(here):
    write(here / "books/b.txt", STORIES[3:6])
    write(here / "books/more/a.txt", STORIES[:3])
    (here / "books/.DS_Store").write_bytes(b"\0\0\0\1Bud1")  # macOS creates one in folders opened in the Finder
    write(here / "books/.git/COMMIT_EDITMSG.txt", ["More books"])
    assert read("books") == {"train": STORIES[3:6] + STORIES[:3]}


def test_folder_of_text_files_with_a_validation_split(here):
    write(here / "books/My-train.txt", STORIES[:6])
    write(here / "books/My-valid.txt", STORIES[6:9])
    assert read("books") == {"train": STORIES[:6], "validation": STORIES[6:9]}


def test_text_files_in_a_hub_folder_are_not_stories(here):
    write(here / "repo/data/train.jsonl", STORIES[:6])
    write(here / "repo/data/validation.jsonl", STORIES[6:9])
    (here / "repo/LICENSE.txt").write_text("All rights reserved.")
    assert read("repo") == {"train": STORIES[:6], "validation": STORIES[6:9]}


def test_white_space_line_endings_and_empty_stories(here):
    text = (f"\ufeff{END_OF_TEXT}\r\n\r\n{END_OF_TEXT}\r\n  One.\r\n\r\nMore. \r\n"
            f"{END_OF_TEXT} \r\n\r\n{END_OF_TEXT}\r\nTwo.\r\nThree.\r\n")
    (here / "a.txt").write_bytes(text.encode())
    write(here / "b.jsonl", ["One.\n\nMore.", "  ", None, "\n", "Two.\nThree.  "])
    for source, empty_stories in (("a.txt", 2), ("b.jsonl", 3)):
        corpus = Corpus(source)
        for _ in range(2):
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
])
def test_one_text_is_cut_between_words(here, text, fraction, size):
    corpus = Corpus(write(here / "a.txt", [" ", text]))
    found = corpus.examine(fraction, 1, False)[1]
    assert (found["validation_split"], found["empty_stories_dropped"]) == ("end of the text", 1)
    for _ in range(2):
        (_, train), (_, validation) = corpus
        assert (train, validation) == (train.strip(), validation.strip())
        assert train.split() + validation.split() in (text.split(), [train, validation])
        assert abs(len(validation) - size) <= 5


@pytest.mark.parametrize("size", [3071, 3072])
def test_the_shortest_text_that_can_be_cut(here, size):
    corpus = Corpus(write(here / "a.txt", ["x" * size]))
    if size < 3072:
        with pytest.raises(UserError, match="of 3,071 characters, but training and validation need 3,072"):
            corpus.examine(0.01, 1, False)
    else:
        assert corpus.examine(0.01, 1, False)[1]["validation_split"] == "end of the text"


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


def bad_utf8(folder):
    (folder / "bad.txt").write_bytes(b"A story.\n<|endoftext|>\nA caf\xe9.\n")
    return "bad.txt"


def utf16(folder):
    (folder / "utf16.txt").write_text("A story.", encoding="utf-16")
    return "utf16.txt"


def bad_parquet(folder):
    (folder / "bad.parquet").write_bytes(b"PAR1 but no more than that")
    return "bad.parquet"


def parquet_with_bytes(folder):
    offsets, text = pa.py_buffer(np.array([0, 3], np.int32).tobytes()), pa.py_buffer(b"a\xff\xfe")
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, [None, offsets, text])}),
                   folder / "raw.parquet")
    return "raw.parquet"


def bad_jsonl(folder):
    (folder / "bad.jsonl").write_text('{"text": "A story."}\n{"text": \n')
    return "bad.jsonl"


def numbers(folder):
    pq.write_table(pa.table({"text": [1, 2, 3]}), folder / "numbers.parquet")
    return "numbers.parquet"


def no_rows(folder):
    return write(folder / "none.parquet", [])


def only_test_split(folder):
    write(folder / "repo/data/test-00000-of-00001.parquet", STORIES)
    return "repo"


def empty_file(name):
    return lambda folder: (folder / name).touch() or name


def empty_folder(folder):
    (folder / "hollow").mkdir()
    return "hollow"


def csv(folder):
    (folder / "a.csv").write_text("A story.")
    return "a.csv"


@pytest.mark.parametrize("source, column, message", [
    ("nothing.txt", "text", "nothing.txt does not exist"),
    ("../nothing", "text", "does not exist"),
    ("nobody/nothing", "text", "cannot reach nobody/nothing on the Hugging Face hub: check the name and the network"),
    (lambda f: write(f / "a.jsonl", STORIES), "story", "no column 'story': choose one of id, text"),
    (lambda f: write(f / "a.parquet", STORIES), "id", "story 1 of the train split is int, not text"),
    (numbers, "text", "story 1 of the train split is int, not text"),
    (bad_utf8, "text", "bad.txt is not UTF-8 text"),
    (utf16, "text", "iconv -f utf-16"),
    (parquet_with_bytes, "text", "raw.parquet is not UTF-8 text"),
    (bad_parquet, "text", "cannot read bad.parquet"),
    (bad_jsonl, "text", "cannot read bad.jsonl"),
    (empty_file("empty.txt"), "text", "empty.txt: the train split has no stories, or only empty ones"),
    (empty_file("empty.jsonl"), "text", "empty.jsonl"),
    (empty_file("empty.parquet"), "text", "cannot read empty.parquet"),
    (no_rows, "text", "none.parquet"),
    (empty_folder, "text", "a folder must contain .txt, .jsonl or .parquet files"),
    (only_test_split, "text", "repo has no split 'train', only test"),
    (csv, "text", "a.csv: unsupported file type, use one of .txt, .jsonl, .parquet"),
])
def test_bad_sources_raise_user_errors(here, source, column, message):
    with pytest.raises(UserError) as error:
        Corpus(source(here) if callable(source) else source, column).examine(0.01, 1, False)
    assert message in str(error.value)
