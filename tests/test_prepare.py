"""prepare.py: complete token files for every source, and one line for every user error."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import prepare
from conftest import ROOT, launch
from storygpt.corpus import nursery
from storygpt.corpus.dataset import with_checksum
from storygpt.corpus.tokenizer import END_OF_TEXT, Tokenizer
from storygpt.system import files

STORIES = [*nursery.stories(20, seed=9), "Two lines.\n\nAnd a naïve 🦊.", f"He said {END_OF_TEXT} and left."]
BOOK = "Ein naïver Fuchs 🦊 läuft über die Straße. " * 200  # 8,600 characters


def data_entries():
    """The entries of data/ except lock files, which are never removed."""
    return [name for name in os.listdir("data") if not name.endswith(".lock")]


def write(path, stories):
    """Write stories to a .txt file; return the path as a string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"\n{END_OF_TEXT}\n".join(stories), encoding="utf-8")
    return str(path)


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


def test_text_file(here):
    source = write(here / "Mine.txt", STORIES)
    prepare.main([source, "--validation_fraction", "0.2"])
    meta, stories = prepared("mine")
    assert sorted(stories["train"] + stories["validation"]) == sorted(STORIES)
    assert stories["train"] == [s for s in STORIES if s in stories["train"]]  # in the order of the source
    assert len(stories["validation"]) == 4  # 0.2 of 22
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 50257 and meta["tokenizer"]["name"] == "gpt2"
    assert meta["source"] == source and meta["tokenizer"]["special_tokens"] == {END_OF_TEXT: 50256}


def test_column_of_a_jsonl_file(here):
    (here / "mine.jsonl").write_text("".join(json.dumps({"id": 1, "story": story}) + "\n" for story in STORIES))
    prepare.main(["mine.jsonl", "--text_column", "story"])
    stories = prepared("mine")[1]
    assert sorted(stories["train"] + stories["validation"]) == sorted(STORIES)


def test_source_with_a_validation_split(here):
    write(here / "books/My-train.txt", STORIES[:15])
    write(here / "books/My-valid.txt", STORIES[15:])
    prepare.main(["books/", "--max_stories", "12"])
    assert prepared("books")[1] == {"train": STORIES[:12], "validation": STORIES[15:]}


def test_empty_stories_are_counted(here, capsys):
    prepare.main([write(here / "mine.txt", ["One.", "  ", "", " Two. ", "\n\n"]), "--validation_fraction", "0.5"])
    meta, stories = prepared("mine")
    assert sorted(stories["train"] + stories["validation"]) == ["One.", "Two."]
    assert meta["empty_stories_dropped"] == 3
    assert "3 empty stories dropped" in capsys.readouterr().out


def test_one_long_text_is_cut(here, capsys):
    (here / "book.txt").write_text(BOOK, encoding="utf-8")
    prepare.main(["book.txt", "--validation_fraction", "0.25"])
    meta, stories = prepared("book")
    assert len(stories["train"]) == len(stories["validation"]) == 1
    assert f"{stories['train'][0]} {stories['validation'][0]}" == BOOK.strip()
    assert abs(len(stories["validation"][0]) - 0.25 * len(BOOK)) < 100
    assert meta["validation_split"] == "end of the text"
    assert "0 empty stories dropped, validation split: end of the text\n" in capsys.readouterr().out

    (here / "more.jsonl").write_text(json.dumps({"text": BOOK}) + "\n" + json.dumps({"text": STORIES[0]}))
    (here / "books").mkdir()
    (here / "books/a.txt").write_text(BOOK, encoding="utf-8")
    for source in ("more.jsonl --max_stories 1", "books"):
        prepare.main([*source.split(), "--validation_fraction", "0.25", "--name", "book", "--force"])
        assert prepared("book")[1] == stories


def test_the_end_of_one_text_does_not_reach_the_vocabulary(here):
    text = "The cat sat on the mat. " * 300
    for end in ("sat", "zebra"):
        (here / f"{end}.txt").write_text(text + f"The {end} sat on the mat. " * 100)
        prepare.main([f"{end}.txt", "--tokenizer", "bpe:260", "--validation_fraction", "0.25", "--name", end])
    assert Tokenizer.load("data/sat") == Tokenizer.load("data/zebra")


def test_a_vocabulary_is_trained_on_pieces_of_a_long_text(here, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(prepare, "SAMPLE_CHARACTERS", 4000)
    for word in ("sat", "zebra"):  # only every second piece is read, in which this word does not occur
        pages = [("The cat sat on the mat. " * 50)[:1000], (f"The {word} sat on the mat. " * 50)[:1000]]
        (here / f"{word}.txt").write_text("".join(pages * 4))
        prepare.main([f"{word}.txt", "--tokenizer", "bpe:260", "--name", word])
    assert Tokenizer.load("data/sat") == Tokenizer.load("data/zebra")


def test_one_training_story_with_a_validation_split_is_not_cut(here):
    write(here / "books/train.txt", [BOOK])
    write(here / "books/valid.txt", STORIES)
    prepare.main(["books"])
    meta, stories = prepared("books")
    assert stories == {"train": [BOOK.strip()], "validation": STORIES} and meta["validation_split"] == "source"


def test_duplicates_are_counted_and_dropped(here, capsys):
    a, b, c, d, e = STORIES[:5]
    write(here / "books/train.txt", [a, b, f" {a}\n", c, d, a, c])  # compared without outer white space
    write(here / "books/valid.txt", [e, f"\n{d}", d, c])
    prepare.main(["books"])
    meta, stories = prepared("books")
    assert stories == {"train": [a, b, a, c, d, a, c], "validation": [e, d, d, c]}
    assert meta["duplicates"] == {"within_train": 3, "validation_in_train": 3, "dropped": 0}
    assert ("duplicates: 3 training stories repeat an earlier one, 3 validation stories are also in training; "
            "dropped by --drop_duplicates: 0\n") in capsys.readouterr().out

    prepare.main(["books", "--drop_duplicates", "--force"])
    meta, stories = prepared("books")
    assert stories == {"train": [a, b], "validation": [e, d, d, c]}
    assert meta["duplicates"] == {"within_train": 3, "validation_in_train": 3, "dropped": 5}
    assert meta["made_with"]["drop_duplicates"] and "dropped by --drop_duplicates: 5\n" in capsys.readouterr().out

    prepare.main(["books", "--drop_duplicates", "--force", "--max_stories", "3"])  # counted with duplicates
    assert prepared("books")[1]["train"] == [a, b]


def test_duplicates_of_a_random_validation_split(here):
    source = write(here / "mine.txt", [*STORIES, *STORIES[:10], *STORIES[:10]])
    both = {}
    for flags in ([], ["--drop_duplicates"]):
        prepare.main([source, "--validation_fraction", "0.2", "--seed", "3", "--force", *flags])
        both[not flags] = prepared("mine")
    (meta, kept), (meta_dropped, dropped) = both[True], both[False]
    unseen = [story for story in kept["train"] if story not in kept["validation"]]
    assert dropped == {"train": list(dict.fromkeys(unseen)), "validation": kept["validation"]}
    assert len(dropped["train"]) < len(set(kept["train"])) < len(kept["train"]) == 34
    found = {"within_train": len(kept["train"]) - len(set(kept["train"])),
             "validation_in_train": sum(story in kept["train"] for story in kept["validation"])}
    assert meta["duplicates"] == found | {"dropped": 0}
    assert meta_dropped["duplicates"] == found | {"dropped": 34 - len(dropped["train"])}


def test_validation_split_depends_on_the_seed_only(here):
    by_seed = {}
    for seed in ("1", "1", "2"):
        prepare.main(["nursery", "--max_stories", "50", "--validation_fraction", "0.3", "--seed", seed, "--force",
                      "--name", "x"])
        stories = prepared("x")[1]
        assert len(stories["validation"]) == 15 and not set(stories["validation"]) & set(stories["train"])
        assert sorted(stories["train"] + stories["validation"]) == sorted(nursery.stories(50, int(seed)))
        assert by_seed.setdefault(seed, stories) == stories
    places = [[s in by_seed[seed]["validation"] for s in nursery.stories(50, int(seed))] for seed in "12"]
    assert places[0] != places[1] and places[0] != sorted(places[0])


def test_trained_vocabulary(here):
    prepare.main(["nursery", "--tokenizer", "bpe:400", "--max_stories", "100"])
    meta, stories = prepared("nursery-bpe400")
    assert meta["vocab_size"] == 400 and meta["end_of_text"] == 399
    assert sorted(stories["train"] + stories["validation"]) == sorted(nursery.stories(100, 1337))


def test_tokenizer_of_another_dataset(here, fails):
    prepare.main(["nursery", "--tokenizer", "bpe:400", "--max_stories", "100"])
    Path("data/nursery-bpe400").rename("other")
    write(here / "mine.txt", STORIES)
    prepare.main(["mine.txt", "--tokenizer", "other/"])
    assert Tokenizer.load("data/mine-other") == Tokenizer.load("other")
    stories = prepared("mine-other")[1]
    assert sorted(stories["train"] + stories["validation"]) == sorted(STORIES)
    Path("other/tokenizer.tiktoken").write_text("")
    for folder, message in (("other", "tokenizer.tiktoken is missing or damaged"),
                            ("out/no", "the folder of a run or dataset")):
        assert message in fails(prepare.main, ["mine.txt", "--tokenizer", folder, "--name", "x"])


def test_files_that_cannot_be_read_are_named(here, fails):
    prepare.main(["nursery", "--tokenizer", "bpe:300", "--max_stories", "40", "--name", "a"])
    for name in ("tokenizer.tiktoken", "meta.json"):
        path = Path(f"copy-{name}", name)
        shutil.copytree("data/a", path.parent)
        path.unlink()
        path.mkdir()  # as root, a file without permissions could be read
        line = fails(prepare.main, ["nursery", "--tokenizer", str(path.parent)])
        assert line == f"error: {path}: Is a directory" and data_entries() == ["a"]


def test_vocabulary_above_65536_tokens_uses_uint32(here):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(20_000)]
    stories = [" ".join(words[i:i + 100]) for i in range(0, len(words), 100)] * 2
    prepare.main([write(here / "mine.txt", stories), "--tokenizer", "bpe:66000"])
    meta, read = prepared("mine-bpe66000")
    assert meta["dtype"] == "uint32" and meta["end_of_text"] == 65_999
    assert sorted(read["train"] + read["validation"]) == sorted(stories)
    assert max(np.fromfile("data/mine-bpe66000/train.bin", "<u4")) > 65_535


def test_batches_stay_in_order(here, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 3000)
    prepare.main(["nursery", "--max_stories", "200"])
    stories = prepared("nursery")[1]
    assert stories["train"] == [s for s in nursery.stories(200, 1337) if s not in stories["validation"]]


def test_existing_dataset_is_kept_unless_forced(here, capsys, fails):
    words = ["nursery", "--max_stories", "30"]
    prepare.main(words)
    before = os.stat("data/nursery/train.bin")
    prepare.main(words)
    assert "data/nursery already exists" in capsys.readouterr().out
    assert os.stat("data/nursery/train.bin").st_mtime_ns == before.st_mtime_ns
    assert "created with max_stories 30, now 31" in fails(prepare.main, ["nursery", "--max_stories", "31"])
    prepare.main(["nursery", "--max_stories", "31", "--force"])
    assert sum(s["stories"] for s in prepared("nursery")[0]["splits"].values()) == 31


def test_dataset_of_a_version_with_fewer_flags_is_kept(here, capsys):
    prepare.main(["nursery", "--max_stories", "30"])
    meta = json.loads(Path("data/nursery/meta.json").read_text())
    del meta["made_with"]["drop_duplicates"]
    Path("data/nursery/meta.json").write_text(json.dumps(with_checksum(meta)))
    prepare.main(["nursery", "--max_stories", "30"])
    assert "data/nursery already exists" in capsys.readouterr().out


def test_a_dataset_gets_its_name_back_if_replacing_it_fails(here, monkeypatch, capsys):
    words, rename = ["nursery", "--max_stories", "30"], files.rename
    prepare.main(words)

    def fail_at_the_second(source, target):
        rename(source, target)
        if Path(target).name == "old":
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "rename", fail_at_the_second)
    with pytest.raises(SystemExit):
        prepare.main([*words, "--force"])
    assert prepared("nursery")
    Path("data/.nursery.partial").mkdir()
    rename("data/nursery", "data/.nursery.partial/old")  # as after a kill there
    prepare.main(words)
    assert "data/nursery already exists" in capsys.readouterr().out and prepared("nursery")
    assert not Path("data/.nursery.partial").exists()


def test_folder_that_is_not_a_dataset_is_never_replaced(here, fails):
    (here / "data/mine").mkdir(parents=True)
    (here / "data/mine/thesis.txt").write_text("years of work")
    (here / "data/program.py").touch()
    assert "data/program.py" in fails(prepare.main, ["nursery", "--name", "program.py", "--force"])
    assert "data/mine/meta.json is missing" in fails(prepare.main, ["nursery", "--name", "mine", "--force"])
    assert os.listdir("data/mine") == ["thesis.txt"]


def bad_utf8(folder):
    (folder / "bad.txt").write_bytes(b"A story.\n<|endoftext|>\nA caf\xe9.\n")
    return "bad.txt"


def empty_validation(folder):
    write(folder / "books/train.txt", STORIES)
    write(folder / "books/valid.txt", ["", "  "])
    return "books"


@pytest.mark.parametrize("source, flags, message", [
    (None, [], "cannot reach roneneldan/TinyStories"),
    ("nothing.txt", [], "nothing.txt does not exist"),
    (bad_utf8, [], "bad.txt is not UTF-8 text"),
    (lambda f: write(f / "blank.txt", [" ", "\n\n"]), [], "blank.txt: the train split has no stories"),
    (empty_validation, [], "books: the validation split has no stories"),
    (lambda f: write(f / "one.txt", STORIES[:1]), [], "one.txt has only one text, of "),
    ("nursery", ["--max_stories", "1"], "but training and validation need 3,072: use more text"),
    (lambda f: write(f / "one.txt", STORIES[:1] * 9), ["--drop_duplicates"], "--drop_duplicates would leave none"),
    ("nursery", ["--tokenizer", "gpt5"], "cannot load tokenizer 'gpt5' (ValueError): use one of cl100k_base, "),
    ("nursery", ["--tokenizer", "r50k_base"], "cannot load tokenizer 'r50k_base'"),
    ("nursery", ["--tokenizer", "bpe:many"], "the vocabulary size must be at least 257"),
    ("nursery", ["--tokenizer", "bpe:256"], "the vocabulary size must be at least 257"),
    ("nursery", ["--tokenizer", "bpe:60000", "--max_stories", "50"], "use --tokenizer bpe:"),
    ("nursery", ["--name", "../up"], "'../up' is not a valid folder name"),
    ("nursery", ["--name", ""], "'' is not a valid folder name"),
    ("nursery", ["--name", ".."], "'..' is not a valid folder name"),
    (lambda f: write(f / "my tales.txt", STORIES), [], "'my tales' is not a valid folder name: set --name"),
])
def test_user_errors_print_one_line_and_leave_no_files(here, fails, monkeypatch, source, flags, message):
    if "r50k_base" in flags:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(here / "none"))
    source = source(here) if callable(source) else source
    assert message in fails(prepare.main, [*([source] if source else []), *flags])
    assert not (here / "data").exists() or data_entries() == []


@pytest.mark.parametrize("flags, message", [
    (["--max_storys", "3"], "did you mean --max_stories?"),
    (["--max_stories", "0"], "--max_stories must be at least 1"),
    (["--max_stories", "x"], "--max_stories"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--validation_fraction", "1"], "--validation_fraction must be between 0 and 1"),
    (["--validation_fraction", "nan"], "--validation_fraction must be between 0 and 1"),
    (["a.txt", "b.txt"], "unknown argument b.txt"),
])
def test_wrong_flags_exit_with_code_2(here, fails, flags, message):
    assert message in fails(prepare.main, flags, code=2)


def test_killed_run_leaves_no_dataset_and_the_next_run_succeeds(here):
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", "nursery", "--max_stories", "200000"], cwd=here)
    partial = here / "data/.nursery.partial"
    while not partial.exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert data_entries() == [".nursery.partial"]
    prepare.main(["nursery", "--max_stories", "30"])
    assert prepared("nursery")


def test_ctrl_c_leaves_no_files(here):
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", "nursery", "--max_stories", "200000"], cwd=here,
                               stderr=subprocess.PIPE, text=True)
    while not (here / "data/.nursery.partial").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "stopped\n" and process.returncode == 130
    assert data_entries() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_prints_one_line(here, fails, monkeypatch):
    open_file = open
    monkeypatch.setattr("builtins.open", lambda path, mode="r", *rest, **more: open_file(
        "/dev/full" if str(path).endswith("train.bin") and "w" in mode else path, mode, *rest, **more))
    assert "cannot write data/nursery: No space left on device" in fails(prepare.main, ["nursery", "--max_stories=30"])
    assert data_entries() == []


def test_command_line(here):
    done = launch("prepare.py", "nursery", "--tokenizer", "bpe:300", "--max_stories", "40", cwd=here)
    assert done.returncode == 0 and done.stderr == ""
    assert "data/nursery-bpe300: bpe300, 300 tokens" in done.stdout and "train                 39" in done.stdout
    assert prepared("nursery-bpe300")
