"""How scripts report errors: one line on stderr, and the exit code."""

import io
import platform
import re
import sys

import pytest
import torch

import prepare
import sample
import train
from storygpt.system.errors import Parser, UserError, exit_with_one_line


def script_that_raises(error):
    """A script's main(argv) that fails with this exception."""
    @exit_with_one_line
    def main(argv=None):
        """Raise the exception."""
        raise error
    return main


@pytest.mark.parametrize("error, code, line", [
    (UserError("no data:\ncreate it"), 1, "error: no data: create it"),
    (FileNotFoundError(2, "No such file or directory", "x.txt"), 1, "error: x.txt: No such file or directory"),
    (OSError("unknown"), 1, "error: unknown"),
    (KeyboardInterrupt(), 130, "stopped"),
    (ModuleNotFoundError("No module named 'gguf'"), 1,
     "error: No module named 'gguf': pip install -r requirements.txt -r requirements-extra.txt"),
    (MemoryError(), 1, "error: out of memory: use smaller sizes (MemoryError)"),
    (torch.OutOfMemoryError("CUDA"), 1, "error: out of memory: use smaller sizes (CUDA)"),
    (RuntimeError("MPS backend out of memory"), 1,
     "error: out of memory: use smaller sizes (MPS backend out of memory)"),
], ids=range(8))
def test_errors_that_a_user_can_fix_print_one_line(capsys, monkeypatch, error, code, line):
    for rank, suffix in ((None, ""), ("0", ""), ("1", f" (rank 1 on {platform.node()})")):
        monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
        with pytest.raises(SystemExit) as exit:
            script_that_raises(error)()
        assert exit.value.code == code and capsys.readouterr() == ("", f"{line}{suffix}\n")
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(SystemExit):
        script_that_raises(error)()
    assert re.fullmatch(rf"Traceback .*\n{re.escape(line + suffix)}\n", capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), SystemExit(2),
                                   torch.AcceleratorError("CUDA error: device-side assert triggered")], ids=range(4))
def test_other_exceptions_and_the_result_are_passed_on(error):
    with pytest.raises(type(error)) as raised:
        script_that_raises(error)()
    assert raised.value is error
    assert exit_with_one_line(lambda argv=None: argv)(["--x"]) == ["--x"]


def test_every_character_is_printed_whatever_the_encoding_of_the_system(monkeypatch):
    """As on Windows, where a file or pipe gets a code page; a file name that is no text has lone surrogates."""
    @exit_with_one_line
    def main(argv=None):
        """Print, and fail."""
        print("книга \udcff")
        raise UserError("no книга")

    for streams in ([io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="\n") for _ in range(2)],
                    [io.StringIO(), io.StringIO()]):  # the latter cannot be changed, as a notebook's
        for name, stream in zip(("stdout", "stderr"), streams):
            monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit):
            main()
        texts = []
        for stream in streams:
            stream.seek(0)  # flushes it, too
            texts.append(stream.read())
        assert texts[0] in ("книга ?\n", "книга \udcff\n") and texts[1] == "error: no книга\n"


@pytest.mark.parametrize("argv, complaint", [
    (["--out-dir=x"], "unknown argument --out-dir=x: did you mean --out_dir?"),
    (["--out=x"], "unknown argument --out=x: did you mean --out_dir?"),  # abbreviations are not accepted
    (["--seed=x"], "argument --seed: invalid int value: 'x'"),
    (["--out_dir", "-a"], "argument --out_dir: expected one argument: write --out_dir=-a for a value that "
                                    "begins with a dash"),
    (["--out_dir", "--seed=1"], "argument --out_dir: expected one argument"),
    (["--seed=1", "--out_dir"], "argument --out_dir: expected one argument"),
    (["extra\nword"], "unknown argument extra word: --help lists all flags"),
])
def test_wrong_flags_print_one_line_with_the_closest_flag(capsys, argv, complaint):
    parser = Parser(prog="script.py")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out_dir")
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(argv)
    assert exit.value.code == 2 and capsys.readouterr() == ("", f"error: {complaint}\n")
    assert vars(parser.parse_args(["--seed=1"])) == {"seed": 1, "out_dir": None}


@pytest.mark.parametrize("main, hidden", [(prepare.main, "--text_column"), (train.main, "--muon_lr"),
                                          (sample.main, "--top_p")], ids=["prepare", "train", "sample"])
def test_help_fits_one_screen_and_help_all_has_the_rest(capsys, monkeypatch, main, hidden):
    monkeypatch.setenv("COLUMNS", "80")
    texts = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as exit:
            main([flag])
        assert exit.value.code == 0
        texts[flag] = capsys.readouterr().out
    assert len(texts["--help"].splitlines()) <= 24
    assert hidden not in texts["--help"] and hidden in texts["--help-all"] and "--help-all" in texts["--help"]
    short, long = (set(re.findall(r"^  (--\S+)", text, re.M)) for text in texts.values())
    assert len(short) >= 4 and short < long
