"""sample.py: stories on stdout, everything else on stderr, clear errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
import sample
import train
from conftest import ROOT, launch
from storygpt.corpus.dataset import with_checksum
from storygpt.corpus.tokenizer import END_OF_TEXT


@pytest.fixture
def run(trained, monkeypatch):
    """The folder of a trained run, under the current folder."""
    monkeypatch.chdir(trained)
    return trained / "out/tiny"


def run_sample(capsys, *flags):
    """Run sample.py; returns (stdout, stderr)."""
    sample.main(["--max_new_tokens=40", *flags])
    return capsys.readouterr()


def test_stdout_is_the_story_with_its_prompt_and_stderr_has_the_rest(run, capsys):
    out, err = run_sample(capsys, "--start", "Once upon a time", "--seed=1")
    assert out.startswith("Once upon a time") and len(out) > 30 and out.endswith("\n")
    assert "out/tiny/ckpt.pt" in err and "tokens/s" in err
    assert run_sample(capsys, "--start", "Once upon a time", "--seed=1")[0] == out
    assert run_sample(capsys, "--start", "Once upon a time", "--seed=2")[0] != out


def test_one_streamed_story_equals_those_of_a_batch(run, capsys):
    greedy = ["--temperature=0", "--start", "One day, a naïve 🦊"]
    one = run_sample(capsys, *greedy)[0]
    assert one.startswith("One day, a naïve 🦊")
    batch = run_sample(capsys, *greedy, "--num_samples=3")[0]
    assert batch == f"{END_OF_TEXT}\n".join([one] * 3)
    assert len(set(run_sample(capsys, "--num_samples=3", "--seed=1")[0].split(END_OF_TEXT))) == 3


@pytest.mark.parametrize("num_samples", [1, 2])
def test_the_number_of_tokens_includes_the_end_of_text(run, capsys, monkeypatch, num_samples):
    def generate(model, idx, max_new_tokens, *_):
        """Tokens 65, 66, 67 and, unless `max_new_tokens` is lower, an end of text."""
        yield from torch.tensor([[65, 66, 67, 299][:max_new_tokens]] * len(idx)).T
    monkeypatch.setattr(sample, "generate", generate)
    for max_new_tokens, expected in ((400, 4), (4, 4), (3, 3), (1, 1)):
        flags = f"--max_new_tokens={max_new_tokens}", f"--num_samples={num_samples}"
        assert f"\n{expected * num_samples} tokens in " in run_sample(capsys, *flags)[1]


def test_prompt_from_a_file_and_an_empty_one(run, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("The fox\n", encoding="utf-8")
    assert run_sample(capsys, "--start", f"FILE:{tmp_path / 'prompt.txt'}")[0].startswith("The fox")
    assert run_sample(capsys, "--start", "", "--seed=1")[0].strip()


def test_end_of_text_in_a_prompt_is_ordinary_text(run, capsys):
    assert run_sample(capsys, "--start", END_OF_TEXT)[0].startswith(END_OF_TEXT)


def test_a_prompt_longer_than_the_context_window_prints_a_note(run, capsys):
    out, err = run_sample(capsys, "--start", "a b c d e f g h i j k l m n o p q r s t u v w x y z")
    assert out.startswith("a b c d") and "more than the context window of 16: the model reads the last " in err


def test_last_pt_is_used_if_there_is_no_ckpt_pt_yet(run, capsys, here):
    shutil.copytree(run, here / "out/x")
    os.remove("out/x/ckpt.pt")
    assert "out/x has no ckpt.pt yet: using last.pt" in run_sample(capsys)[1]


def test_dtype_of_the_weights(run, capsys):
    assert run_sample(capsys, "--dtype=bfloat16")[0].strip()


@pytest.mark.parametrize("flags, message", [
    (["--out_dir", "out/none"], "no checkpoint in out/none"),
    (["--start", "FILE:none.txt"], "error: none.txt: No such file"),
    (["--start", "FILE:."], "error: .: Is a directory"),
    (["--device", "tpu"], "device = 'tpu' cannot be used"),
])
def test_missing_files_and_devices(run, fails, flags, message):
    assert message in fails(sample.main, flags)


def test_out_of_gpu_memory_prints_one_line(run, fails, monkeypatch):
    def to(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has …")
    monkeypatch.setattr(torch.nn.Module, "to", to)
    assert "out of memory: use smaller sizes" in fails(sample.main, ["--dtype=float32"])


def test_no_run_and_a_damaged_one(here, fails):
    assert "no trained model under out/" in fails(sample.main, [])
    (here / "out/x").mkdir(parents=True)
    (here / "out/x/ckpt.pt").write_text("no")
    assert "out/x/ckpt.pt is damaged or not a checkpoint" in fails(sample.main, [])


@pytest.mark.parametrize("error", [TypeError, AttributeError, RuntimeError, KeyError])
def test_a_bug_in_an_edited_model_keeps_its_traceback(run, monkeypatch, error):
    """It is no checkpoint of another version; loading one raises the same exceptions."""
    class Block(model.Block):
        def __init__(self, config):
            raise error("of a reader")

    monkeypatch.setattr(model, "Block", Block)
    for main, argv in ((sample.main, []), (train.main, ["--resume", "--max_iters=30"]), (train.main, ["--eval_only"])):
        with pytest.raises(error, match="of a reader"):
            main([*argv, "--out_dir=out/tiny"])


def test_prompt_file_that_is_not_utf8(run, fails, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\xfa")
    assert "is not UTF-8 text" in fails(sample.main, ["--start", f"FILE:{tmp_path / 'p.txt'}"])


@pytest.mark.parametrize("flags, message", [
    (["--temperatur=1"], "did you mean --temperature?"), (["--temperature=-1"], "-1 is not from 0 to 100"),
    (["--top_p=0"], "0 is not above 0"), (["--top_k=-1"], "-1 is not 0 or more"), (["--num_samples=0"], "num_samples"),
    (["--max_new_tokens=x"], "max_new_tokens"), (["--dtype=fp8"], "dtype"), (["--temperature=nan"], "nan is not"),
])
def test_invalid_flags_exit_with_code_2(run, fails, flags, message):
    assert message in fails(sample.main, flags, code=2)


def test_as_a_command(run):
    done = launch("sample.py", "--start", "Once upon a time", "--max_new_tokens=30", "--num_samples=2",
                  cwd=run.parent.parent)
    assert done.returncode == 0 and done.stdout.count("Once upon a time") == 2
    assert done.stdout.count(END_OF_TEXT) == 1 and "tokens/s" not in done.stdout


def test_a_closed_stdout_is_not_an_error(run):
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", "--max_new_tokens=4000"], cwd=run.parent.parent,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(5)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read() and process.wait(60) in (0, 141)


def test_a_tokenizer_of_other_data_than_the_checkpoint_is_an_error(trained, here, fails):
    shutil.copytree(trained / "out", "out")
    meta = json.loads(Path("out/tiny/meta.json").read_text())
    meta["splits"]["train"]["sha256"] = "0" * 64
    Path("out/tiny/meta.json").write_text(json.dumps(with_checksum(meta)))
    message = "out/tiny/meta.json does not belong to the data that out/tiny/ckpt.pt was trained on"
    assert message in fails(sample.main, [])
