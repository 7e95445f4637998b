"""Reading sources: which texts of which files are read, as which split, and one line for every bad source."""

import codecs
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import ROOT, write
from storygpt.corpus import nursery, sources
from storygpt.corpus.sources import open_source, split_of
from storygpt.corpus.tokenizer import END_OF_TEXT
from storygpt.system.errors import UserError

STORIES = [*nursery.stories(20, seed=9), "Two lines.\n\nAnd a naïve 🦊.", "He said\tyes."]


def read(source, *args, **options):
    """The stories of each split of a source, in order."""
    return {split: [story.strip() for text in texts() for story in "".join(text).split(END_OF_TEXT)]
            for split, texts in open_source(source, *args, **options).items()}


@pytest.mark.parametrize("name", ["a.txt", "B.TXT", "c.jsonl", "D.JSONL", "e.json", "F.Json", "g.parquet", "text8"])
def test_files_of_every_format(here, name):
    splits = open_source(write(name, STORIES, "story"), "story")
    for _ in range(2):  # a source can be read again
        texts = ["".join(text) for text in splits["train"]()]
        assert texts == (STORIES if len(texts) > 1 else [f"\n{END_OF_TEXT}\n".join(STORIES)])
    Path("folder").mkdir()
    if name != "text8":  # in a folder, a file without an ending can be anything
        Path(name).rename(f"folder/{name}")
        assert read("folder", "story") == {"train": STORIES}


def test_nursery(monkeypatch):
    assert read("nursery", max_stories=7, seed=5) == {"train": list(nursery.stories(7, 5))}
    monkeypatch.setattr(sources, "NURSERY_STORIES", 30)
    assert len(read("nursery")["train"]) == 30


def test_home_folder_and_json_without_an_ending(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    write("texts/a.txt", STORIES)
    assert read("~/texts") == {"train": STORIES}
    for suffix in ("jsonl", "json"):
        Path(write(f"a.{suffix}", STORIES)).rename("texts/a")
        assert read("texts/a") == {"train": STORIES}


PRINT_TWICE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from storygpt.corpus.sources import open_source
texts = open_source(sys.argv[1])["train"]
print(["".join(text) for _ in range(2) for text in texts()])
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names for pipes")
def test_a_pipe_is_copied_and_can_be_read_again(here, monkeypatch):
    Path("program.py").write_text(PRINT_TWICE)
    Path("a.txt").write_text("One.")
    Path("a.txt.gz").write_bytes(gzip.compress(b"One."))
    os.mkfifo("fifo")
    Path("temporary").mkdir()
    monkeypatch.setenv("TMPDIR", "temporary")
    commands = ["cat a.txt | $0 program.py -", "$0 program.py /dev/stdin < a.txt", "$0 program.py <(zcat a.txt.gz)",
                "cat a.txt > fifo & $0 program.py fifo"]
    for command in commands:
        done = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("['One.', 'One.']\n", "")
    assert not list(Path("temporary").iterdir())  # the copies
    limited = "ulimit -f 1; head -c 5000 /dev/zero | $0 program.py -"
    done = subprocess.run(["bash", "-c", limited, sys.executable], capture_output=True, text=True)
    assert "UserError: cannot copy - to " in done.stderr and "(File too large): set TMPDIR to" in done.stderr


@pytest.mark.parametrize("path, split", [
    ("train.txt", "train"), ("training.jsonl", "train"), ("Valid.txt", "validation"), ("val.txt", "validation"),
    ("DEV.TXT", "validation"), ("valid_1.txt", "validation"), ("validation-00000-of-00001-5a1f.parquet", "validation"),
    ("TinyStories-valid.txt", "validation"), ("my.val.jsonl", "validation"), ("dev2.txt", "validation"),
    ("test.txt", "test"), ("Testing 3.txt", "test"), ("story.txt", None), ("invalid.txt", None), ("contest.txt", None),
    ("value.txt", None), ("device.txt", None), ("trains.txt", None),
    ("val/a.txt", "validation"), ("Dev/a.txt", "validation"), ("train/the test.txt", "train"),
    ("val/a-train.txt", "validation"), ("training_data/val.txt", "validation"), ("train_data/a.txt", "train"),
    ("train/val.txt", "validation"), ("training/dev/train.txt", "train"), ("train/dev/a.txt", "validation"),
    ("StoriesValid.txt", "validation"), ("StoriesTrain.txt", "train"), ("Val and the Dragon.txt", None),
    ("The Test.txt", None),
    ("eval.txt", "test"), ("stories_val_01.txt", "validation"), ("A test of courage.txt", None),
    ("My valid reason.txt", None), ("train_sft", "train"), ("validation_matched", "validation"),
    ("data/train-00000-of-00001.parquet", "train"), ("en/fr/a.txt", None)])
def test_a_split_is_told_by_names(path, split):
    assert split_of(Path(path)) == split


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".jsonl", ".json", ".parquet"])
def test_splits_of_a_folder_are_the_same_for_all_formats(here, suffix, capsys):
    for name, stories in (("Train", STORIES[:9]), ("more/dev", STORIES[9:12]), ("b", STORIES[12:]), ("test", ["no"])):
        write(f"x/{name}{suffix}", stories)
    assert read("x") == {"train": STORIES[:9] + STORIES[12:], "validation": STORIES[9:12]}
    assert capsys.readouterr().err == f"x: {suffix.lower()} files: 2 train, 1 validation, 1 test (left out: test)\n"


@pytest.mark.parametrize("other", ["README.md", "LICENSE", "desktop.ini", "notes.docx", "b.TXT", "b.jsonl", "b.parquet",
                                   "README.txt", "license.txt", "sub/b.json", ".git/a.txt", ".b.txt"])
def test_text_files_are_read_whatever_lies_beside_them(here, other, capsys):
    write("x/a.txt", STORIES[:2])
    write(f"x/{other}", STORIES[2:])
    is_text = other == "b.TXT"
    assert read("x") == {"train": STORIES if is_text else STORIES[:2]}
    said = capsys.readouterr().err
    label = {"LICENSE": "without an ending", "README.txt": "README.txt", "license.txt": "license.txt"}
    skipped = f"; skipped: 1 {label.get(other, Path(other).suffix)}" * (not is_text and other[0] != ".")
    assert said == f"x: .txt files: {1 + is_text} train{skipped}\n"


def test_the_format_with_most_bytes_is_read_if_there_are_no_texts(here):
    write("x/stories.jsonl", STORIES)
    write("x/metadata.json", ["License."], "license")
    assert read("x") == {"train": STORIES}


def test_links_to_folders_are_followed_and_a_loop_is_an_error(here):
    write("elsewhere/part2/b.txt", STORIES[5:])
    write("linked/a.txt", STORIES[:5])
    Path("linked/part2").symlink_to("../elsewhere/part2")
    Path("linked/part3").symlink_to("../elsewhere/part2")  # the same stories again
    assert read("linked") == {"train": STORIES}
    write("linked/val/v.txt", ["Unseen."])
    Path("linked/again").symlink_to("val")  # a name that tells no split
    assert read("linked") == {"train": STORIES, "validation": ["Unseen."]}
    for target in (".", ".."):
        Path("linked/loop").symlink_to(target)
        with pytest.raises(UserError, match="again: remove the link"):
            read("linked")
        Path("linked/loop").unlink()
    Path("linked/gone.txt").symlink_to("nowhere.txt")
    with pytest.raises(FileNotFoundError, match="gone.txt"):
        read("linked")


@pytest.mark.parametrize("name", ["brackets [v2]", "with spaces", "тексты", "a*b?", "x.txt"])
def test_folders_of_any_name(here, name):
    write(f"{name}/data/train.jsonl", STORIES[2:])
    write(f"{name}/data/validation.jsonl", STORIES[:2])
    assert read(name) == {"train": STORIES[2:], "validation": STORIES[:2]}


VARYING = [[None, ["x"]], [{"id": 1}, {"id": 1, "link": "x"}], [1, "one"], [{"a": 1}, "text"], [[1], [{"b": None}]]]


@pytest.mark.parametrize("first, second", VARYING)
def test_only_the_text_column_is_read(here, first, second):
    """Other columns may vary between rows and files."""
    def row(i, meta):
        return json.dumps({"text": STORIES[i], "meta": meta} | ({"more": i} if i % 2 else {})) + "\n"
    Path("rows").mkdir()
    Path("rows/a.jsonl").write_text("".join(row(i, first if i < 5 else second) for i in range(10)))
    Path("rows/b.jsonl").write_text(row(10, second) + "\n" + row(11, first))
    assert read("rows") == {"train": STORIES[:12]}
    Path("tables").mkdir()
    for name, meta in (("a", first), ("b", second)):
        pq.write_table(pa.table({"text": STORIES[:3], "meta": [meta] * 3}), f"tables/{name}.parquet")
    assert read("tables") == {"train": STORIES[:3] * 2}


def test_any_number_and_missing_values_in_columns(here):
    rows = ['{"text": "One.", "id": %s}' % ("9" * 5000), '{"id": NaN}', '{"text": null}', '{"text": "Two."}']
    Path("a.jsonl").write_text("\n".join(rows))
    assert read("a.jsonl") == {"train": ["One.", "", "", "Two."]}


def test_line_ends_and_surrogates_in_columns(here):
    Path("a.jsonl").write_text('{"text": "One.\\r\\n\\r\\nTwo.\\rThree."}\n{"text": "\\ud83e\\udd8a \\ud83e no"}\n')
    assert read("a.jsonl") == {"train": ["One.\n\nTwo.\nThree.", "🦊 \ufffd no"]}


README = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train*
  - split: dev
    path: [en/x.jsonl]
- config_name: fr
  data_dir: fr
- config_name: one
  data_files: en/x.jsonl
---
Stories in two languages.
"""


def test_a_folder_with_several_configurations(here, capsys):
    def check(names):
        for config in (None, "xx"):
            with pytest.raises(UserError, match=f"^x.*: choose a configuration with --config: {names}$"):
                read("x", config=config)
        assert read("x", config="en") == {"train": STORIES[:5], "validation": STORIES[5:7]}
        assert read("x", config="fr") == {"train": STORIES[7:9], "validation": STORIES[9:]}
        assert "1 train, 1 validation; skipped: 2 .jsonl, 1 .md" in capsys.readouterr().err
    for name, part in (("en/train", STORIES[:5]), ("en/x", STORIES[5:7]), ("fr/train", STORIES[7:9]),
                       ("fr/dev", STORIES[9:])):
        write(f"x/{name}.jsonl", part)
    Path("x/README.md").write_text(README)
    check("en, fr, one")
    assert read("x", config="one") == {"train": STORIES[5:7]}
    Path("x/README.md").write_text("Stories in two languages.")  # it lists none
    Path("x/en/x.jsonl").rename("x/en/val.jsonl")
    check("en, fr, all")
    assert read("x", config="all") == {"train": STORIES[:5] + STORIES[7:9], "validation": STORIES[5:7] + STORIES[9:]}
    Path("x/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_dir: en\n---\n")
    assert read("x") == {"train": STORIES[:5], "validation": STORIES[5:7]}
    for other in (b"title: [x", b"- x", b"configs: x", b"configs:", b"title: \xff"):
        Path("x/README.md").write_bytes(b"---\n" + other + b"\n---\n")  # no dataset's
        check("en, fr, all")
    for folders in (["parts/train", "parts/training"], ["one/train_1", "one"], ["flat/a_train", "flat/b_train"]):
        for folder, part in zip(folders, (STORIES[:5], STORIES[5:])):  # none is a configuration
            write(f"{folder}/{'part' if folder[0] == 'f' else 'train'}.txt", part)
        assert sorted(read(Path(folders[0]).parent.as_posix())["train"]) == sorted(STORIES)


@pytest.mark.parametrize("configs, message", [
    ("- config_name: en\n  data_files: {train: x}", "cannot read x/README.md: Expected data_files in YAML to be"),
    ("- en", "cannot read x/README.md: Each config must include `config_name`"),
    ("- {config_name: no, data_dir: en}\n- {config_name: 1, data_dir: en}", "cannot read x/README.md: "),
    ("- config_name: en\n  data_files: data/train-*", "cannot read x/README.md: No .* data files found in x"),
])
def test_bad_lists_of_configurations(here, configs, message):
    write("x/en/a.txt", STORIES)
    Path("x/README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    with pytest.raises(UserError, match=message):
        read("x")


def test_the_default_configuration(here):
    write("x/en/a.txt", STORIES)
    write("x/fr/a.txt", STORIES[:5])
    for name, default in (("default", ""), ("fr", ", default: true")):
        Path("x/README.md").write_text("---\nconfigs:\n- {config_name: en, data_dir: en}\n"
                                       f"- {{config_name: {name}, data_dir: fr{default}}}\n---\n")
        assert read("x") == read("x", config=name) == {"train": STORIES[:5]}


def test_a_folder_with_the_layout_of_the_hub(here):
    write("repo/data/train-00000-of-00002.parquet", STORIES[:10])
    write("repo/data/train-00001-of-00002.parquet", STORIES[10:15])
    write("repo/data/validation-00000-of-00001-b1a5.parquet", STORIES[15:])
    write("repo/Stories-train.txt", ["the same stories in another format"])
    assert read("repo/") == {"train": STORIES[:15], "validation": STORIES[15:]}
    Path("repo/data/validation-00000-of-00001-b1a5.parquet").rename("repo/data/validation.parquet")
    assert read("repo/") == {"train": STORIES[:15], "validation": STORIES[15:]}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_datasets_loads_and_saves(here, capsys):
    """The hub cannot be reached in tests; `load_dataset` returns the same for a folder with its layout."""
    write("repo/data/train.jsonl", STORIES[:10])
    write("repo/data/dev.jsonl", STORIES[10:])
    loaded = sources.call_datasets("load_dataset", "repo", None, "repo")
    assert {split: list(sources.read_dataset(loaded[split], "text", "repo")) for split in loaded} == {
        "train": STORIES[:10], "validation": STORIES[10:]}
    train, validation = loaded.values()
    datasets.DatasetDict(Train=train, valid=train, validation=validation, test=train).save_to_disk("saved")
    capsys.readouterr()
    assert read("saved") == {"train": STORIES[:10], "validation": STORIES[10:]}
    assert capsys.readouterr().err == "saved: splits Train, validation; skipped: valid, test\n"
    loaded["train"].save_to_disk("one")
    assert read("one") == {"train": STORIES[:10]}
    Path("one/data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(UserError, match="cannot read one, which `save_to_disk` wrote: "):
        read("one")
    Path("repo/README.md").write_text("---\nconfigs:\n- {config_name: en, data_dir: data}\n"
                                      "- {config_name: fr, data_dir: data}\n---\n")
    for config in (None, "xx"):
        with pytest.raises(UserError, match="^repo: choose a configuration with --config: en, fr$"):
            sources.call_datasets("load_dataset", "repo", config, "repo")
    assert set(sources.call_datasets("load_dataset", "repo", "fr", "repo")) == {"train", "validation"}


def test_a_cache_that_cannot_be_written_is_reported_as_that(here, monkeypatch):
    Path("file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "file/cache")
    write("repo/train.jsonl", STORIES)
    message = r"cache of Hugging Face's libraries, .*file.* \(Not a directory\): set HF_HOME"
    with pytest.raises(UserError, match=message):
        sources.load_from_hub("repo", None)


@pytest.fixture
def bad(here):
    """The current folder, with one source for each way to be wrong."""
    for encoding in ("latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        Path(f"{encoding}.txt").write_bytes("A café.\n".encode(encoding))
    Path("bom-be.txt").write_bytes(codecs.BOM_UTF16_BE + "A café.\n".encode("utf-16-be"))
    Path("utf16.jsonl").write_text('{"text": "A story."}\n', encoding="utf-16-le")
    Path("mixed.txt").write_bytes("故故 A story.".encode("utf-16-le"))  # all of its bytes are those of ASCII characters
    Path("late.txt").write_bytes(b"word " * 5000 + b"\xff")
    Path("bad.parquet").write_bytes(b"PAR1 but no more than that")
    Path("bad.jsonl").write_text('{"text": "A story."}\n\n{"text": \n')
    Path("bad.json").write_text('[{"text":\n"A story."}')
    Path("numbers.json").write_text("[1, 2]")
    pq.write_table(pa.table({"text": ["A story. " * 999] * 99}), "page.parquet")
    damaged = bytearray(Path("page.parquet").read_bytes())
    damaged[40:60] = b"x" * 20
    Path("page.parquet").write_bytes(damaged)
    Path("saved").mkdir()
    Path("saved/dataset_dict.json").touch()
    Path("keys.jsonl").write_text('{"story": "A story."}\n{"text": "A story."}\n')
    offsets, text = pa.py_buffer(np.array([0, 3], np.int32).tobytes()), pa.py_buffer(b"a\xff\xfe")
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, [None, offsets, text])}), "latin1.parquet")
    Path("packed.txt").write_bytes(gzip.compress(b"A story."))
    for name in ("a.csv", "a.gz", "hollow/a.csv", "hollow/LICENSE.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    write("a.parquet", STORIES)
    write("repo/test.parquet", STORIES)


@pytest.mark.parametrize("source, message", [
    ("nothing.txt", "nothing.txt does not exist"),
    ("../nothing", "does not exist"),
    ("my--texts", "my--texts does not exist: give a file, a folder"),
    ("тексты", "тексты does not exist"),
    ("my_texts.", "my_texts. does not exist"),
    ("nobody/nothing", "cannot reach nobody/nothing on the Hugging Face hub: check the name and the network"),
    ("a.parquet story", "no column 'story': choose one of id, text"),
    ("a.parquet id", "a.parquet: value 1 is int, not text"),
    ("keys.jsonl", "keys.jsonl, line 1 has no column 'text': choose one of story with --text_column"),
    ("a.parquet text en", "a.parquet has no configurations: leave out --config"),
    ("nursery text en", "nursery has no configurations"),
    ("- text en", "- has no configurations"),
    ("saved text en", "saved has no configurations"),
    ("~nobody/texts", "~nobody/texts does not exist"),
    ("latin-1.txt", "latin-1.txt is not UTF-8 text (invalid continuation byte): convert it, for example with  iconv -f "
                    "cp1252 -t utf-8 OLD > NEW, if it is Western European text from Windows"),
    ("utf-16.txt", "iconv -f utf-16 "),
    ("bom-be.txt", "iconv -f utf-16 "),
    ("utf-16-le.txt", "iconv -f utf-16le "),
    ("utf-16-be.txt", "iconv -f utf-16be "),
    ("utf-32.txt", "iconv -f utf-32 "),
    ("utf-32-le.txt", "iconv -f utf-32le "),
    ("utf-32-be.txt", "iconv -f utf-32be "),
    ("utf16.jsonl", "iconv -f utf-16le "),
    ("mixed.txt", "iconv -f utf-16le "),
    ("late.txt", "late.txt is not UTF-8 text"),
    ("latin1.parquet", "latin1.parquet has text that is not UTF-8"),
    ("bad.parquet", "cannot read bad.parquet"),
    ("page.parquet", "cannot read page.parquet"),
    ("bad.jsonl", "bad.jsonl, line 3 is not valid JSON"),
    ("bad.json", "bad.json, line 2 is not valid JSON"),
    ("numbers.json", "numbers.json, item 1 is not a JSON object"),
    ("hollow", "hollow has no .txt, .jsonl, .json, .parquet files"),
    ("repo", "repo has no split 'train', only test"),
    ("repo text en", "repo has no configurations: leave out --config"),
    ("a.gz", "a.gz: unsupported file type, use one of .txt, .jsonl, .json, .parquet, or a pipe as in  zcat"),
    ("packed.txt", "packed.txt is not text but compressed, or a document"),
    ("a.csv", "a.csv: unsupported file type, use one of .txt, .jsonl, .json, .parquet"),
])
def test_bad_sources_raise_user_errors(bad, source, message):
    with pytest.raises(UserError) as error:
        read(*source.split())
    assert message in str(error.value)
