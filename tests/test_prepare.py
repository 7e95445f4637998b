"""prepare.py: every kind of source gives the same tokens, and everything that can be wrong is told in one line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare
from conftest import ROOT, launch
from data import nursery
from tokenizer import END_OF_TEXT, Tokenizer

STORIES = [*nursery.stories(20, seed=9), "Two lines.\n\nAnd a naïve 🦊.", f"He said {END_OF_TEXT} and left."]


def in_data():
    """What is in data/, but for the locks, which stay."""
    return [name for name in os.listdir("data") if not name.endswith(".lock")]


def write(path, stories, column="text"):
    """A file of stories in the format that its ending names; the path comes back as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text(f"\n{END_OF_TEXT}\n".join(stories), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, column: s}) + "\n" for i, s in enumerate(stories)))
    else:
        pq.write_table(pa.table({"id": range(len(stories)), column: pa.array(stories, pa.string())}), path)
    return str(path)


def prepared(name):
    """(meta, {split: stories}) of data/<name>/, after a check that all in it agrees."""
    folder = Path("data", name)
    assert sorted(os.listdir(folder)) == ["meta.json", "tokenizer.tiktoken", "train.bin", "validation.bin"]
    meta, tokenizer, stories = json.loads((folder / "meta.json").read_text()), Tokenizer.load(folder), {}
    for split, figures in meta["splits"].items():
        tokens = np.fromfile(folder / f"{split}.bin", np.dtype(meta["dtype"]).newbyteorder("<"))
        ends = np.flatnonzero(tokens == meta["end_of_text"])
        stories[split] = [tokenizer.decode(t[:-1].tolist()) for t in np.split(tokens, ends + 1)[:-1]]
        assert tokens[-1] == meta["end_of_text"] and len(tokens) == figures["tokens"]
        assert len(stories[split]) == figures["stories"]
        assert sum(len(s.encode()) for s in stories[split]) == figures["bytes"]
        assert prepare.hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest() == figures["sha256"]
    assert meta["vocab_size"] == tokenizer.vocab_size and in_data() == [name]
    return meta, stories


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_every_format_gives_the_stories_back(here, ending):
    source = write(here / f"Mine.{ending}", STORIES)
    prepare.main([source, "--validation_fraction", "0.2"])
    meta, stories = prepared("mine")
    assert sorted(stories["train"] + stories["validation"]) == sorted(STORIES)
    assert stories["train"] == [s for s in STORIES if s in stories["train"]]  # in the order of the source
    assert len(stories["validation"]) == 4  # 0.2 of 22
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 50257 and meta["tokenizer"]["name"] == "gpt2"
    assert meta["source"] == source and meta["tokenizer"]["special_tokens"] == {END_OF_TEXT: 50256}


def test_folder_laid_out_as_on_the_hub(here):
    write(here / "repo/data/train-00000-of-00002.parquet", STORIES[:10])
    write(here / "repo/data/train-00001-of-00002.parquet", STORIES[10:15])
    write(here / "repo/data/validation-00000-of-00001.parquet", STORIES[15:])
    prepare.main(["repo/", "--max_stories", "12"])
    assert prepared("repo")[1] == {"train": STORIES[:12], "validation": STORIES[15:]}


def test_a_dataset_from_the_hub_is_read_as_the_folder_is(here, monkeypatch):
    """The hub cannot be reached here; what its download gives, a dataset that is not streamed, can be made."""
    monkeypatch.setenv("HF_HOME", str(here / "cache"))
    write(here / "repo/data/train-00000-of-00001.parquet", STORIES)
    splits = prepare.load("repo", "repo", cache_dir=str(here / "cache"))
    assert list(prepare.read_column(splits["train"], "text", "repo")) == STORIES


def test_folder_of_text_files(here):
    write(here / "books/b.txt", STORIES[3:6])
    write(here / "books/more/a.txt", STORIES[:3])
    (here / "books/.DS_Store").write_bytes(b"\0\0\0\1Bud1")  # a Mac leaves one in every folder that was looked at
    write(here / "books/.git/COMMIT_EDITMSG.txt", ["More books"])
    prepare.main(["books"])
    stories = prepared("books")[1]
    assert len(stories["validation"]) == 1 and sorted(stories["train"] + stories["validation"]) == sorted(STORIES[:6])


def test_folder_of_text_files_with_a_validation_split(here):
    write(here / "books/My-train.txt", STORIES[:6])
    write(here / "books/My-valid.txt", STORIES[6:9])
    prepare.main(["books"])
    assert prepared("books")[1] == {"train": STORIES[:6], "validation": STORIES[6:9]}


def test_text_beside_the_data_of_a_hub_folder_is_no_story(here):
    write(here / "repo/data/train.jsonl", STORIES[:6])
    write(here / "repo/data/validation.jsonl", STORIES[6:9])
    (here / "repo/LICENSE.txt").write_text("All rights reserved.")
    prepare.main(["repo"])
    assert prepared("repo")[1] == {"train": STORIES[:6], "validation": STORIES[6:9]}


def test_a_text_without_separators_does_not_fill_the_memory(here, fails, monkeypatch):
    monkeypatch.setattr(prepare, "LONGEST_STORY", 1000)
    (here / "a.txt").write_text("A line.\n" * 1000)
    assert "a.txt has no line <|endoftext|> in 1,00" in fails(prepare.main, ["a.txt"])


def test_white_space_line_ends_and_empty_stories(here, capsys):
    text = f"\ufeff{END_OF_TEXT}\r\n  One.\r\n\r\nMore. \r\n{END_OF_TEXT} \r\n\r\n{END_OF_TEXT}\r\nTwo.\r\nThree.\r\n"
    (here / "a.txt").write_bytes(text.encode())
    write(here / "b.jsonl", ["One.\n\nMore.", "  ", None, "\n", "Two.\nThree.  "])
    for source in ("a.txt", "b.jsonl"):
        prepare.main([source, "--name", "x", "--validation_fraction", "0.5", "--force"])
        meta, stories = prepared("x")
        assert sorted(stories["train"] + stories["validation"]) == ["One.\n\nMore.", "Two.\nThree."]
        assert meta["empty_stories_dropped"] == {"a.txt": 2, "b.jsonl": 3}[source]
    assert "3 empty stories dropped" in capsys.readouterr().out


def test_validation_is_a_seeded_draw(here):
    drawn = {}
    for seed in ("1", "1", "2"):
        prepare.main(["nursery", "--max_stories", "50", "--validation_fraction", "0.3", "--seed", seed, "--force",
                      "--name", "x"])
        stories = prepared("x")[1]
        assert len(stories["validation"]) == 15 and not set(stories["validation"]) & set(stories["train"])
        assert sorted(stories["train"] + stories["validation"]) == sorted(nursery.stories(50, int(seed)))
        assert drawn.setdefault(seed, stories) == stories
    places = [[s in drawn[seed]["validation"] for s in nursery.stories(50, int(seed))] for seed in "12"]
    assert places[0] != places[1] and places[0] != sorted(places[0])


def test_trained_vocabulary(here):
    prepare.main(["nursery", "--tokenizer", "bpe:400", "--max_stories", "100"])
    meta, stories = prepared("nursery-bpe400")
    assert meta["vocab_size"] == 400 and meta["end_of_text"] == 399
    assert sorted(stories["train"] + stories["validation"]) == sorted(nursery.stories(100, 1337))


def test_the_tokenizer_of_other_data_is_taken_from_its_folder(here, fails):
    prepare.main(["nursery", "--tokenizer", "bpe:400", "--max_stories", "100"])
    Path("data/nursery-bpe400").rename("other")
    write(here / "mine.txt", STORIES)
    prepare.main(["mine.txt", "--tokenizer", "other/"])
    assert Tokenizer.load("data/mine-other") == Tokenizer.load("other")
    stories = prepared("mine-other")[1]
    assert sorted(stories["train"] + stories["validation"]) == sorted(STORIES)
    Path("other/tokenizer.tiktoken").write_text("")
    assert "tokenizer.tiktoken is damaged" in fails(prepare.main, ["mine.txt", "--tokenizer", "other", "--name", "x"])
    assert "or the folder of a run or a dataset" in fails(prepare.main, ["mine.txt", "--tokenizer", "out/no"])


def test_a_vocabulary_beyond_65536_tokens_is_kept_in_uint32(here):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(20_000)]
    stories = [" ".join(words[i:i + 100]) for i in range(0, len(words), 100)] * 2
    prepare.main([write(here / "mine.jsonl", stories), "--tokenizer", "bpe:66000"])
    meta, read = prepared("mine-bpe66000")
    assert meta["dtype"] == "uint32" and meta["end_of_text"] == 65_999
    assert sorted(read["train"] + read["validation"]) == sorted(stories)
    assert max(np.fromfile("data/mine-bpe66000/train.bin", "<u4")) > 65_535


def test_many_batches_stay_in_order(here, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 3000)
    prepare.main(["nursery", "--max_stories", "200"])
    stories = prepared("nursery")[1]
    assert stories["train"] == [s for s in nursery.stories(200, 1337) if s not in stories["validation"]]


def test_second_run_says_that_it_is_there_and_force_makes_it_again(here, capsys, fails):
    words = ["nursery", "--max_stories", "30"]
    prepare.main(words)
    before = os.stat("data/nursery/train.bin")
    prepare.main(words)
    assert "data/nursery is there already" in capsys.readouterr().out
    assert os.stat("data/nursery/train.bin").st_mtime_ns == before.st_mtime_ns
    assert "max_stories 30, now 31" in fails(prepare.main, ["nursery", "--max_stories", "31"])
    prepare.main(["nursery", "--max_stories", "31", "--force"])
    assert sum(s["stories"] for s in prepared("nursery")[0]["splits"].values()) == 31


def test_a_run_with_force_that_died_between_its_renames_loses_nothing(here, capsys):
    words = ["nursery", "--max_stories", "30"]
    prepare.main(words)
    os.rename("data/nursery", "data/.nursery.old")
    prepare.main(words)
    assert "data/nursery is there already" in capsys.readouterr().out and prepared("nursery")


def test_a_folder_that_is_no_dataset_is_left_alone(here, fails):
    (here / "data/mine").mkdir(parents=True)
    (here / "data/mine/thesis.txt").write_text("years of work")
    (here / "data/program.py").touch()
    assert "data/program.py is a file" in fails(prepare.main, ["nursery", "--name", "program.py", "--force"])
    assert "left alone" in fails(prepare.main, ["nursery", "--name", "mine", "--force"])
    assert os.listdir("data/mine") == ["thesis.txt"]


def bad_utf8(folder):
    (folder / "bad.txt").write_bytes(b"A story.\n<|endoftext|>\nA caf\xe9.\n")
    return "bad.txt"


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


def empty_validation(folder):
    write(folder / "repo/data/train-00000-of-00001.parquet", STORIES)
    write(folder / "repo/data/validation-00000-of-00001.parquet", ["", "  "])
    return "repo"


def only_test_split(folder):
    write(folder / "repo/data/test-00000-of-00001.parquet", STORIES)
    return "repo"


def no_rows(folder):
    return write(folder / "none.parquet", [])


def empty(name):
    return lambda folder: (folder / name).touch() or name


def folder(here):
    (here / "hollow").mkdir()
    return "hollow"


@pytest.mark.parametrize("source, words, complaint", [
    ("nothing.txt", [], "nothing.txt does not exist"),
    ("../nothing", [], "does not exist"),
    ("nobody/nothing", [], "cannot reach nobody/nothing on the Hugging Face hub: check the name and the network"),
    (None, [], "cannot reach roneneldan/TinyStories"),
    (lambda f: write(f / "a.jsonl", STORIES), ["--text_column", "story"], "no column 'story': name one of id, text"),
    (lambda f: write(f / "a.parquet", STORIES), ["--text_column", "id"], "is no text but int"),
    (numbers, [], "story 1 of the train split is no text but int"),
    (bad_utf8, [], "bad.txt is not UTF-8 text"),
    (parquet_with_bytes, [], "raw.parquet is not UTF-8 text"),
    (bad_parquet, [], "cannot read bad.parquet"),
    (bad_jsonl, [], "cannot read bad.jsonl"),
    (empty("empty.txt"), [], "empty.txt is empty"),
    (empty("empty.jsonl"), [], "empty.jsonl is empty"),
    (empty("empty.parquet"), [], "empty.parquet is empty"),
    (lambda f: write(f / "blank.txt", [" ", "\n\n"]), [], "blank.txt: the train split has no story"),
    (no_rows, [], "none.parquet"),
    (folder, [], "cannot read hollow"),
    (empty_validation, [], "repo: the validation split has no story"),
    (only_test_split, [], "repo has no split 'train', only test"),
    (lambda f: write(f / "one.txt", STORIES[:1]), [], "has only one story"),
    (lambda f: write(f / "a.txt", STORIES) and str((f / "a.txt").rename(f / "a.csv")), [], "a.csv: a file must be "),
    ("nursery", ["--tokenizer", "gpt5"], "unknown tokenizer 'gpt5'"),
    ("nursery", ["--tokenizer", "r50k_base"], "cannot get tokenizer 'r50k_base'"),
    ("nursery", ["--tokenizer", "bpe:many"], "a vocabulary has at least 257 tokens"),
    ("nursery", ["--tokenizer", "bpe:256"], "a vocabulary has at least 257 tokens"),
    ("nursery", ["--tokenizer", "bpe:60000", "--max_stories", "50"], "use --tokenizer bpe:"),
    ("nursery", ["--name", "../up"], "'../up' is no plain folder name"),
    ("nursery", ["--name", ""], "'' is no plain folder name"),
    ("nursery", ["--name", ".."], "'..' is no plain folder name"),
    (lambda f: write(f / "my tales.txt", STORIES), [], "'my tales', the source's last part, is no plain folder name"),
], ids=str)
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_left(here, fails, monkeypatch, source, words, complaint):
    if "r50k_base" in words:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(here / "none"))
    source = source(here) if callable(source) else source
    assert complaint in fails(prepare.main, [*([source] if source else []), *words])
    assert not (here / "data").exists() or in_data() == []


@pytest.mark.parametrize("words, complaint", [
    (["--max_storys", "3"], "did you mean --max_stories?"),
    (["--max_stories", "0"], "0 is not 1 or more"),
    (["--max_stories", "x"], "--max_stories"),
    (["--seed", "-1"], "-1 is not 0 or more"),
    (["--validation_fraction", "1"], "1 is not between 0 and 1"),
    (["a.txt", "b.txt"], "unknown argument b.txt"),
])
def test_wrong_flags_end_with_code_2(here, fails, words, complaint):
    assert complaint in fails(prepare.main, words, code=2)


def test_a_run_that_was_killed_leaves_nothing_and_the_next_starts_clean(here):
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", "nursery", "--max_stories", "200000"], cwd=here)
    partial = here / "data/.nursery.partial"
    while not partial.exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert in_data() == [".nursery.partial"]
    prepare.main(["nursery", "--max_stories", "30"])
    assert prepared("nursery")


def test_ctrl_c_leaves_nothing(here):
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", "nursery", "--max_stories", "200000"], cwd=here,
                               stderr=subprocess.PIPE, text=True)
    while not (here / "data/.nursery.partial").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "stopped\n" and process.returncode == 130
    assert in_data() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is always full")
def test_a_full_disk_is_told_in_one_line(here, fails, monkeypatch):
    open_file = open
    monkeypatch.setattr("builtins.open", lambda path, mode="r", *rest, **more: open_file(
        "/dev/full" if str(path).endswith("train.bin") and "w" in mode else path, mode, *rest, **more))
    assert "cannot write data/nursery: No space left on device" in fails(prepare.main, ["nursery", "--max_stories=30"])
    assert in_data() == []


def test_launched_as_a_user_does(here):
    done = launch("prepare.py", "nursery", "--tokenizer", "bpe:300", "--max_stories", "40", cwd=here)
    assert done.returncode == 0 and done.stderr == ""
    assert "data/nursery-bpe300: bpe300, 300 tokens" in done.stdout and "train                 39" in done.stdout
    assert prepared("nursery-bpe300")
