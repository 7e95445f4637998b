"""sample.py: stories on stdout, everything else on stderr, clear errors."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import model
import sample
import train
from faults.processes import run as run_process, script
from storygpt import checkpoint
from storygpt.corpus.dataset import with_checksum
from storygpt.corpus.tokenizer import END_OF_TEXT


def run_sample(capsys, *flags):
    """Run sample.py; returns (stdout, stderr)."""
    sample.main(["--max_new_tokens=40", *flags])
    return capsys.readouterr()


def test_stdout_is_the_story_with_its_prompt_and_stderr_has_the_rest(run, capsys):
    flags = ["--max_new_tokens=40", "--start", "Once upon a time", "--seed=1"]
    code, out, err = run_process(script("sample.py"), flags)
    assert code == 0 and out.startswith("Once upon a time") and len(out) > 30 and out.endswith("\n")
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


def test_the_number_of_tokens_includes_the_end_of_text(run, capsys, monkeypatch):
    def generate(model, idx, max_new_tokens, *_):
        """Tokens 65, 66, 67 and, unless `max_new_tokens` is lower, an end of text. The prompt follows one, too."""
        assert idx.tolist() == [[299]] * len(idx)
        yield from torch.tensor([[65, 66, 67, 299][:max_new_tokens]] * len(idx)).T
    monkeypatch.setattr(sample, "generate", generate)
    for num_samples, max_new_tokens, expected in ((1, 400, 4), (1, 4, 4), (1, 3, 3), (2, 400, 8), (2, 1, 2)):
        err = run_sample(capsys, f"--max_new_tokens={max_new_tokens}", f"--num_samples={num_samples}")[1]
        assert f"\n{expected} tokens in " in err


def test_a_prompt_is_text_or_a_file(run, capsys, tmp_path, fails):
    (tmp_path / "prompt.txt").write_text("The fox\n", encoding="utf-8")
    assert sample.read_prompt(f"FILE:{tmp_path / 'prompt.txt'}") == "The fox"
    assert run_sample(capsys, "--start", f"FILE:{tmp_path / 'prompt.txt'}", "--dtype=bfloat16")[0].startswith("The fox")
    assert run_sample(capsys, "--start", "", "--seed=1")[0].strip()
    assert run_sample(capsys, "--start", END_OF_TEXT)[0].startswith(END_OF_TEXT)  # ordinary text in a prompt
    for content in (b"\xff\xfe\xfa", "The fox".encode("utf-16-le")):
        (tmp_path / "prompt.txt").write_bytes(content)
        assert "is not UTF-8 text" in fails(sample.main, ["--start", f"FILE:{tmp_path / 'prompt.txt'}"])
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfThe fox\r\n\r\nsat\r\n")  # as Windows' Notepad writes it
    assert sample.read_prompt(f"FILE:{tmp_path / 'prompt.txt'}") == "The fox\n\nsat"


def test_a_prompt_longer_than_the_context_window_prints_a_note(run, capsys):
    out, err = run_sample(capsys, "--start", "a b c d e f g h i j k l m n o p q r s t u v w x y z")
    assert out.startswith("a b c d") and "more than the context window of 16: the model reads the last " in err


def test_last_pt_is_used_if_there_is_no_ckpt_pt_yet_and_damage_is_an_error(run, capsys, fails):
    shutil.copy("out/tiny/ckpt.pt", "ckpt.pt")
    os.remove("out/tiny/ckpt.pt")
    assert "out/tiny has no ckpt.pt yet: using last.pt" in run_sample(capsys)[1]
    Path("out/tiny/ckpt.pt").write_text("no")
    assert "out/tiny/ckpt.pt is damaged or not a checkpoint" in fails(sample.main, [])
    shutil.copy("ckpt.pt", "out/tiny/ckpt.pt")
    meta = json.loads(Path("out/tiny/meta.json").read_text())
    meta["splits"]["train"]["sha256"] = "0" * 64
    Path("out/tiny/meta.json").write_text(json.dumps(with_checksum(meta)))
    message = "out/tiny/meta.json does not belong to the data that out/tiny/ckpt.pt was trained on"
    assert message in fails(sample.main, [])


@pytest.mark.parametrize("flags", [[], ["--temperature=0"], ["--dtype=float32", "--num_samples=2"]], ids=str)
def test_weights_that_are_nan_are_one_line(run, fails, flags):
    state = checkpoint.load("out/tiny/ckpt.pt")
    state["model"]["transformer.h.1.mlp.c_fc.weight"][0, 0] = torch.nan
    torch.save(state, "out/tiny/ckpt.pt")
    assert "error: the model's logits are NaN or infinite: " in fails(sample.main, flags)


@pytest.mark.parametrize("flags, message", [
    (["--out_dir", "out/none"], "no checkpoint in out/none"),
    (["--start", "FILE:none.txt"], "error: cannot read none.txt: No such file"),
    (["--start", "FILE:."], "error: cannot read .: Is a directory"),
    (["--device", "tpu"], "device = 'tpu' cannot be used"),
])
def test_missing_files_and_devices(run, fails, flags, message):
    assert message in fails(sample.main, flags)


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_a_bug_in_an_edited_model_keeps_its_traceback(run, monkeypatch, error):
    """It is no checkpoint of another version; loading one raises the same exceptions."""
    class Block(model.Block):
        def __init__(self, config):
            raise error("of a reader")

    monkeypatch.setattr(model, "Block", Block)
    for main, argv in ((sample.main, []), (train.main, ["--resume", "--max_iters=30"]), (train.main, ["--eval_only"])):
        with pytest.raises(error, match="of a reader"):
            main([*argv, "--out_dir=out/tiny"])


def test_invalid_flags_exit_with_code_2(run, fails):
    for flag, message in [("--temperatur=1", "did you mean --temperature?"), ("--temperature=-1", "not from 0 to 100"),
                          ("--temperature=nan", "nan is not"), ("--top_p=0", "0 is not above 0"),
                          ("--top_k=-1", "-1 is not 0 or more"), ("--num_samples=0", "0 is not from 1 to 1000"),
                          ("--max_new_tokens=x", "invalid int value: 'x'"), ("--dtype=fp8", "invalid choice: 'fp8'")]:
        assert message in fails(sample.main, [flag], code=2)
