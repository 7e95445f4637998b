"""prepare.py: complete token files for every source, and one line for every user error."""

import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import prepare
from conftest import ROOT, write
from faults.processes import at_file_operation, kill_this_process, limit_file_size, run
from storygpt.corpus import nursery
from storygpt.corpus.dataset import with_checksum
from storygpt.corpus.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer

STORIES = [*nursery.stories(20, seed=9), "Two lines.\n\nAnd a naïve 🦊.", "He said 'yes' and left."]
BOOK = "Ein naïver Fuchs 🦊 läuft über die Straße. " * 200  # 8,600 characters
BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.fixture
def fast(here):
    """The flag for a vocabulary of 257 tokens, in a folder of its own: GPT-2's takes a second to open."""
    Path("bytes").mkdir()
    save(Tokenizer("bytes", GPT2_PATTERN, BYTES, {END_OF_TEXT: 256}), "bytes")
    return "--tokenizer=bytes"


def save(tokenizer, folder):
    """Save a tokenizer to a folder; its dataset is left out."""
    Path(folder, "meta.json").write_text(json.dumps(with_checksum({"tokenizer": tokenizer.save(folder)})))


def data_entries():
    """The entries of data/ except lock files, which are never removed."""
    return [name for name in os.listdir("data") if not name.endswith(".lock")]


def prepared(name):
    """Check that the files of data/<name>/ agree; return meta.json and {split: stories}."""
    folder = Path("data", name)
    assert sorted(os.listdir(folder)) == ["meta.json", "tokenizer.tiktoken", "train.bin", "validation.bin"]
    meta, tokenizer, stories = json.loads((folder / "meta.json").read_text()), Tokenizer.load(folder), {}
    for split, sizes in meta["splits"].items():
        tokens = np.fromfile(folder / f"{split}.bin", np.dtype(meta["dtype"]).newbyteorder("<"))
        ends = np.flatnonzero(tokens == meta["end_of_text"])
        stories[split] = [tokenizer.decode(t[:-1].tolist()) for t in np.split(tokens, ends + 1)[:-1]]
        assert tokens[-1] == meta["end_of_text"] and len(tokens) == sizes["tokens"]
        assert len(stories[split]) == sizes["stories"]
        assert sum(len(s.encode()) for s in stories[split]) == sizes["bytes"]
        assert hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest() == sizes["sha256"]
    assert meta["vocab_size"] == tokenizer.vocab_size and data_entries() == [name]
    return meta, stories


def prepare_as(name, *argv):
    """Prepare data/<name>/, which may exist already, and return what `prepared` does."""
    prepare.main([*argv, "--name", name, "--force"])
    return prepared(name)


def test_text_file(here):
    source = write(here / "Mine.txt", STORIES)
    prepare.main([source, "--validation_fraction", "0.2"])
    meta, stories = prepared("mine")
    assert sorted(stories["train"] + stories["validation"]) == sorted(STORIES)
    assert stories["train"] == [s for s in STORIES if s in stories["train"]]  # in the order of the source
    assert len(stories["validation"]) == 4  # 0.2 of 22
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 50257 and meta["tokenizer"]["name"] == "gpt2"
    assert meta["source"] == source and meta["tokenizer"]["special_tokens"] == {END_OF_TEXT: 50256}


def test_one_long_text_in_a_column_of_a_jsonl_file_is_cut(here, fast, capsys):
    (here / "book.jsonl").write_text("".join(json.dumps({"story": text}) + "\n" for text in (" ", BOOK)))
    meta, stories = prepare_as("book", "book.jsonl", "--text_column", "story", "--validation_fraction", "0.25", fast)
    assert f"{stories['train'][0]} {stories['validation'][0]}" == BOOK.strip() and len(stories["train"]) == 1
    assert abs(len(stories["validation"][0]) - 0.25 * len(BOOK)) < 100 and meta["empty_stories_dropped"] == 1
    assert "1 empty stories dropped, validation split: end of the text\n" in capsys.readouterr().out


def test_a_source_with_a_validation_split_and_duplicates(here, fast, capsys):
    a, b, c, d, e = STORIES[:5]
    train = [a, b, f" {a}\n", c, d, a, c]  # compared without outer white space
    write(here / "books/My-train.txt", train)
    write(here / "books/My-valid.txt", [e, f"\n{d}", d, c])
    meta, stories = prepare_as("books", "books/", fast)
    assert stories == {"train": [a, b, a, c, d, a, c], "validation": [e, d, d, c]}
    assert meta["validation_split"] == "source"
    meta, stories = prepare_as("books", "books", "--drop_duplicates", fast)
    assert stories == {"train": [a, b], "validation": [e, d, d, c]}
    assert meta["duplicates"] == {"within_train": 3, "validation_in_train": 3, "dropped": 5}
    assert ("duplicates: 3 training stories repeat an earlier one, 3 validation stories are also in training; "
            "dropped by --drop_duplicates: 5\n") in capsys.readouterr().out
    write(here / "books/My-train.txt", [BOOK])  # a single text is not cut if there is a validation split
    assert prepare_as("books", "books", fast)[1] == {"train": [BOOK.strip()], "validation": [e, d, d, c]}


def test_a_random_validation_split_depends_on_the_seed_only_and_duplicates_may_be_in_it(here, fast):
    words = [write(here / "mine.txt", [*STORIES, *STORIES[:10], *STORIES[:10]]), fast, "--validation_fraction", "0.2"]
    meta, kept = prepare_as("x", *words, "--seed", "3")
    _, dropped = prepare_as("x", *words, "--seed", "3", "--drop_duplicates")
    assert prepare_as("x", *words, "--seed", "4")[1]["validation"] != kept["validation"] == dropped["validation"]
    unseen = [story for story in kept["train"] if story not in kept["validation"]]
    assert dropped["train"] == list(dict.fromkeys(unseen))
    assert len(dropped["train"]) < len(set(kept["train"])) < len(kept["train"]) == 34
    assert meta["duplicates"] == {
        "within_train": len(kept["train"]) - len(set(kept["train"])), "dropped": 0,
        "validation_in_train": sum(story in kept["train"] for story in kept["validation"])}


def test_batches_stay_in_order(fast, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 3000)
    stories = prepare_as("x", "nursery", "--max_stories", "100", "--seed", "5", fast)[1]
    assert stories["train"] == [story for story in nursery.stories(100, 5) if story not in stories["validation"]]


def test_a_trained_vocabulary_and_that_of_another_dataset(here, fails):
    prepare.main(["nursery", "--tokenizer", "bpe:300", "--max_stories", "40"])
    meta, stories = prepared("nursery-bpe300")
    assert meta["vocab_size"] == 300 and meta["end_of_text"] == 299
    assert sorted(stories["train"] + stories["validation"]) == sorted(nursery.stories(40, 1337))
    Path("data/nursery-bpe300").rename("other")
    write(here / "mine.txt", STORIES)
    prepare.main(["mine.txt", "--tokenizer", "other/"])
    assert Tokenizer.load("data/mine-other") == Tokenizer.load("other") and prepared("mine-other")
    words = ["mine.txt", "--name", "x", "--tokenizer"]
    assert "the folder of a run or dataset" in fails(prepare.main, [*words, "out/no"])
    Path("other/tokenizer.tiktoken").write_text("")
    assert "tokenizer.tiktoken is missing or damaged" in fails(prepare.main, [*words, "other"])
    assert data_entries() == ["mine-other"]


def test_a_vocabulary_is_trained_on_training_text_and_on_pieces_of_a_long_one(here, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1000)
    for word in ("sat", "zebra"):
        text = [("The cat sat on the mat. " * 50)[:1000], (f"The {word} sat on the mat. " * 50)[:1000]]
        (here / f"end-{word}.txt").write_text(text[0] * 6 + text[1] * 2)  # in the last quarter
        (here / f"pieces-{word}.txt").write_text("".join(text * 4))  # in every second piece
        prepare.main([f"end-{word}.txt", "--tokenizer", "bpe:260", "--validation_fraction", "0.25"])
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "SAMPLE_CHARACTERS", 4000)  # half of the text
            prepare.main([f"pieces-{word}.txt", "--tokenizer", "bpe:260"])
    for name in ("end", "pieces"):
        assert Tokenizer.load(f"data/{name}-sat-bpe260") == Tokenizer.load(f"data/{name}-zebra-bpe260")


def test_vocabulary_above_65536_tokens_uses_uint32(here):
    pairs = {bytes(pair): 256 + i for i, pair in enumerate(itertools.product(range(256), range(256)))}
    save(Tokenizer("pairs", GPT2_PATTERN, BYTES | pairs, {END_OF_TEXT: 256 + 65_536}), ".")
    meta, stories = prepare_as("mine", write(here / "mine.txt", STORIES), "--tokenizer", str(here))
    assert meta["dtype"] == "uint32" and sorted(stories["train"] + stories["validation"]) == sorted(STORIES)


def test_existing_dataset_is_kept_unless_forced(fast, capsys, fails):
    words, meta_path = ["nursery", "--name", "x", fast, "--max_stories"], Path("data/x/meta.json")
    prepare.main([*words, "30"])
    before = meta_path.read_text()
    prepare.main([*words, "30"])
    assert "data/x already exists" in capsys.readouterr().out
    assert "created with max_stories 30, now 31" in fails(prepare.main, [*words, "31"])
    assert meta_path.read_text() == before
    assert sum(map(len, prepare_as("x", "nursery", fast, "--max_stories", "31")[1].values())) == 31


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_a_dataset_gets_its_name_back_if_replacing_it_fails(fast, capsys):
    words = ["nursery", "--max_stories", "30", fast, "--name", "x"]
    prepare.main(words)
    for action, code in ((interrupt, 130), (kill_this_process, -signal.SIGKILL)):
        between_the_renames = partial(at_file_operation, 1, ".x.partial/new", action, "os.rename")
        assert run(prepare.main, [*words, "--force"], setup=between_the_renames)[0] == code
        assert os.path.exists("data/x") == (code == 130)
        prepare.main(words)
        assert "data/x already exists" in capsys.readouterr().out and prepared("x")


def test_folder_that_is_not_a_dataset_is_never_replaced(here, fails):
    (here / "data/mine").mkdir(parents=True)
    (here / "data/mine/thesis.txt").write_text("years of work")
    (here / "data/program.py").touch()
    assert "data/program.py" in fails(prepare.main, ["nursery", "--name", "program.py", "--force"])
    assert "data/mine/meta.json is missing" in fails(prepare.main, ["nursery", "--name", "mine", "--force"])
    assert os.listdir("data/mine") == ["thesis.txt"]


@pytest.mark.parametrize("fault, code, error, entries", [
    (lambda: at_file_operation(1, "validation.bin", kill_this_process), -signal.SIGKILL, "", [".x.partial"]),
    (lambda: at_file_operation(1, "validation.bin", interrupt), 130, "stopped\n", []),
    (lambda: limit_file_size(10_000), 1, "error: cannot write data/x: File too large\n", []),
], ids=["kill", "Ctrl-C", "full disk"])
def test_a_run_that_dies_leaves_no_dataset_and_the_next_one_succeeds(fast, fault, code, error, entries):
    words = ["nursery", "--max_stories", "60", fast, "--name", "x"]
    assert run(prepare.main, words, setup=fault) == (code, "", error)
    assert data_entries() == entries
    prepare.main(words)
    assert prepared("x")


def test_cleaning_and_a_configuration(fast, capsys, fails):
    text = "Ana had a red ball. She went to the park with “Ben”, and they played until dinner. It was a good day, too."
    for language in ("en", "fr"):
        write(Path("My texts", language, "train.txt"), [text, f"{language}: {text}", "A fragment"] * 2)
    prepare.main(["My texts", "--config=fr", "--clean", fast])
    meta, stories = prepared("my_texts-fr-bytes")
    plain = text.replace("“Ben”", '"Ben"')
    assert sorted(stories["train"] + stories["validation"]) == sorted([plain, f"fr: {plain}"] * 2)
    assert meta["cleaned"] == {"stories_changed": 4, "fragments_dropped": 2}
    assert "\ncleaned: 4 stories changed, 2 fragments dropped\n" in capsys.readouterr().out
    assert "config 'fr', now 'en', clean True, now False" in fails(
        prepare.main, ["My texts", "--config=en", "--name=my_texts-fr-bytes", fast])


@pytest.mark.parametrize("source, flags, name", [
    ("A/Tiny Stories-1.TXT", [], "tiny_stories-1"), ("A/[x] texts", [], "x_texts"), ("A/книги", [], "книги"),
    ("A/cafe\u0301", [], "café"), ("-", [], "stdin"), ("o/name", ["--config=a b"], "name-a_b"),
    ("nursery", ["--tokenizer=bpe:2048"], "nursery-bpe2048")])
def test_the_name_of_a_dataset(here, source, flags, name):
    assert prepare.parse_args([source, *flags]).name == name


def test_text_of_a_pipe_may_be_another_one(fast, monkeypatch, fails):
    for text in ("One", "Two"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{text} {END_OF_TEXT} and more".encode())))
        if text == "One":
            prepare.main(["-", fast])
    assert "data/stdin-bytes already exists, created with the text of a pipe, which may have been another" in fails(
        prepare.main, ["-", fast])
    prepare.main(["-", fast, "--force"])
    assert sorted(sum(prepared("stdin-bytes")[1].values(), [])) == ["Two", "and more"]


@pytest.mark.parametrize("flags, code, message", [
    ("", 1, "cannot reach roneneldan/TinyStories"),
    ("nursery --tokenizer=gpt5", 1, "cannot load tokenizer 'gpt5' (ValueError): use one of cl100k_base, "),
    ("one.txt", 1, "one.txt has only one text, of 3 characters, but training and validation need 3,072"),
    ("nursery --tokenizer=bpe:many", 1, "the vocabulary size must be at least 257"),
    ("nursery --tokenizer=bpe:256", 1, "the vocabulary size must be at least 257"),
    ("nursery --tokenizer=bpe:60000 --max_stories=50", 1, "use --tokenizer bpe:"),
    ("nursery --name=../up", 1, "'../up' is not a valid folder name"),
    ("nursery --name=", 1, "'' is not a valid folder name"),
    ("--name=.hidden", 1, "'.hidden' is not a valid folder name: set --name"),
    ("~~~.txt", 1, "'' is not a valid folder name: set --name"),
    ("--max_stories=1", 2, "--max_stories must be at least 2"),
    ("--seed=-1", 2, "--seed must be at least 0"),
    ("--validation_fraction=1", 2, "--validation_fraction must be between 0 and 1"),
    ("--validation_fraction=nan", 2, "--validation_fraction must be between 0 and 1"),
    ("a.txt b.txt", 2, "unknown argument b.txt"),
    ("--", 2, "SOURCE is empty"),
])
def test_user_errors_print_one_line_and_leave_no_files(here, fails, flags, code, message):
    (here / "one.txt").write_text("One")
    assert message in fails(prepare.main, [""] if flags == "--" else flags.split(), code)
    assert not (here / "data").exists() or data_entries() == []


def test_command_line(here, fast):
    """As a process, which imports only what it needs: neither torch, which takes seconds, nor datasets."""
    write(here / "mine.txt", STORIES)
    done = subprocess.run([sys.executable, ROOT / "prepare.py", "mine.txt", fast], capture_output=True, text=True,
                          timeout=120, env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "numpy" in imported and not imported & {"torch", "datasets", "tokenizers"}
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())
    assert "data/mine-bytes: bytes, 257 tokens" in done.stdout and "train                 21" in done.stdout
    assert prepared("mine-bytes")
