"""sample.py: stories on stdout, everything else on stderr, and clear words where something is missing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from conftest import ROOT, launch
from dataset import seal
from tokenizer import END_OF_TEXT


@pytest.fixture
def run(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained / "out/tiny"


def told(capsys, *words):
    """(stdout, stderr) of a sample.py command."""
    sample.main(["--max_new_tokens=40", *words])
    return capsys.readouterr()


def test_a_story_begins_with_its_prompt_and_stderr_has_the_rest(run, capsys):
    out, err = told(capsys, "--start", "Once upon a time", "--seed=1")
    assert out.startswith("Once upon a time") and len(out) > 30 and out.endswith("\n")
    assert "out/tiny/ckpt.pt" in err and "tokens/s" in err
    assert told(capsys, "--start", "Once upon a time", "--seed=1")[0] == out
    assert told(capsys, "--start", "Once upon a time", "--seed=2")[0] != out


def test_one_story_streamed_is_the_one_that_a_batch_tells(run, capsys):
    greedy = ["--temperature=0", "--start", "One day, a naïve 🦊"]
    one = told(capsys, *greedy)[0]
    assert one.startswith("One day, a naïve 🦊")
    batch = told(capsys, *greedy, "--num_samples=3")[0]
    assert batch == f"{END_OF_TEXT}\n".join([one] * 3)
    assert len(set(told(capsys, "--num_samples=3", "--seed=1")[0].split(END_OF_TEXT))) == 3


def test_prompt_from_a_file_and_an_empty_one(run, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("The fox\n", encoding="utf-8")
    assert told(capsys, "--start", f"FILE:{tmp_path / 'prompt.txt'}")[0].startswith("The fox")
    assert told(capsys, "--start", "", "--seed=1")[0].strip()


def test_text_of_the_end_token_is_text(run, capsys):
    assert told(capsys, "--start", END_OF_TEXT)[0].startswith(END_OF_TEXT)


def test_a_prompt_longer_than_the_window_is_told(run, capsys):
    out, err = told(capsys, "--start", "a b c d e f g h i j k l m n o p q r s t u v w x y z")
    assert out.startswith("a b c d") and "the model, with a window of 16, reads the last " in err


def test_last_is_used_where_there_is_no_best_yet(run, capsys, here):
    shutil.copytree(run, here / "out/x")
    os.remove("out/x/ckpt.pt")
    assert "out/x has no ckpt.pt yet: using last.pt" in told(capsys)[1]


def test_stories_can_be_told_in_other_dtypes(run, capsys):
    assert told(capsys, "--dtype=bfloat16")[0].strip()


@pytest.mark.parametrize("words, complaint", [
    (["--out_dir", "out/none"], "no checkpoint in out/none"),
    (["--start", "FILE:none.txt"], "cannot read the prompt file none.txt: No such file"),
    (["--start", "FILE:."], "cannot read the prompt file .:"),
    (["--device", "tpu"], "device = 'tpu' cannot be used"),
])
def test_what_is_missing_is_told(run, fails, words, complaint):
    assert complaint in fails(sample.main, words)


def test_a_gpu_with_too_little_memory_is_one_line(run, fails, monkeypatch):
    def to(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has …")
    monkeypatch.setattr(torch.nn.Module, "to", to)
    assert "out of memory on the GPU: use smaller sizes" in fails(sample.main, ["--dtype=float32"])


def test_no_run_and_a_broken_one(here, fails):
    assert "no trained model under out/" in fails(sample.main, [])
    (here / "out/x").mkdir(parents=True)
    (here / "out/x/ckpt.pt").write_text("no")
    assert "out/x/ckpt.pt is damaged or not a checkpoint" in fails(sample.main, [])


def test_prompt_file_that_is_not_text(run, fails, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\xfa")
    assert "is not UTF-8 text" in fails(sample.main, ["--start", f"FILE:{tmp_path / 'p.txt'}"])


@pytest.mark.parametrize("words, complaint", [
    (["--temperatur=1"], "did you mean --temperature?"), (["--temperature=-1"], "-1 is not from 0 to 100"),
    (["--top_p=0"], "0 is not above 0"), (["--top_k=-1"], "-1 is not 0 or more"), (["--num_samples=0"], "num_samples"),
    (["--max_new_tokens=x"], "max_new_tokens"), (["--dtype=fp8"], "dtype"), (["--temperature=nan"], "nan is not"),
])
def test_wrong_flags_end_with_code_2(run, fails, words, complaint):
    assert complaint in fails(sample.main, words, code=2)


def test_launched_as_a_user_does(run):
    done = launch("sample.py", "--start", "Once upon a time", "--max_new_tokens=30", "--num_samples=2",
                  cwd=run.parent.parent)
    assert done.returncode == 0 and done.stdout.count("Once upon a time") == 2
    assert done.stdout.count(END_OF_TEXT) == 1 and "tokens/s" not in done.stdout


def test_a_reader_that_goes_away_is_no_error(run):
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", "--max_new_tokens=4000"], cwd=run.parent.parent,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(5)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read() and process.wait(60) in (0, 141)


def test_a_tokenizer_of_other_data_beside_the_checkpoint_is_refused(trained, here, fails):
    shutil.copytree(trained / "out", "out")
    meta = json.loads(Path("out/tiny/meta.json").read_text())
    meta["splits"]["train"]["sha256"] = "0" * 64
    Path("out/tiny/meta.json").write_text(json.dumps(seal(meta)))
    assert "out/tiny/meta.json is not of the data that out/tiny/ckpt.pt was trained on" in fails(sample.main, [])
