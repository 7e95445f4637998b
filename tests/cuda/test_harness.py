"""`python -m tests.cuda` on the CPU: its logic with parts of a line each, and every real part at toy size."""

import json
import os
import select
import signal

import pytest

from faults.processes import ForkedProcess
from tests.cuda import __main__ as cuda


@pytest.fixture
def run(nursery_data, tmp_path, monkeypatch):
    """A function that runs the command with more flags; the current folder has the dataset."""
    monkeypatch.chdir(nursery_data)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*flags):
        cuda.main(["--device=cpu", "--data=data/nursery-bpe300", f"--out={tmp_path}", *flags])
    yield run
    signal.signal(signal.SIGTERM, handler)  # main() has changed it


def report(out):
    return json.loads((out / "report.json").read_text())["parts"]


@pytest.mark.slow  # two minutes: the programs that it starts each import torch
def test_every_part_at_toy_size(run, tmp_path):
    run("--minutes=30", "--tiny")
    metrics = {name: part["figures"] for name, part in report(tmp_path).items()}
    assert list(metrics) == list(cuda.PARTS)
    assert metrics["machine"]["matmul_bf16_gflops"] > 0 and metrics["machine"]["torch"]
    assert metrics["tests"]["passed"] > 20 and set(metrics["tests"]["skipped_because"]) == {"CUDA only"}
    assert metrics["bench-train"]["tokens_per_s"] > 0 and metrics["bench-train"]["mfu"] > 0
    assert metrics["generate"]["tokens_per_s_32"] > 0
    assert metrics["published"]["tokens"] == 8 * 4 * 16 and 5 < metrics["published"]["loss"] < 6
    assert metrics["published"]["story"].startswith("Once upon a time")
    text = (tmp_path / "report.md").read_text()
    assert "## bench-train: done" in text and "| `tokens_per_s` |" in text and "at toy size" in text


def test_parts_that_failed_run_again_and_those_that_are_done_do_not(run, tmp_path, monkeypatch, capsys, fails):
    """A part that fails, or has a bug, does not keep the next one from running."""
    outcomes = {"machine": lambda harness: {"story": "A | B"}, "tests": lambda harness: 1 / 0,
                "generate": lambda harness: harness.call("x", "-c", "import sys; sys.exit('a reason')")}
    for name, part in outcomes.items():
        monkeypatch.setitem(cuda.PARTS, name, (1, part))
    error = fails(lambda flags: run(*flags), ["--only=machine,tests,generate"])
    assert "not done: tests, generate" in error
    parts, text = report(tmp_path), (tmp_path / "report.md").read_text()
    assert [parts[name]["status"] for name in outcomes] == ["done", "failed", "failed"]
    assert "ZeroDivisionError" in parts["tests"]["error"] and "exit code 1\na reason" in text and "> A | B" in text
    for name in ("tests", "generate"):
        monkeypatch.setitem(cuda.PARTS, name, (1, lambda harness: {"a": {"metric": 0.5}, "spreads": {"metric": 1}}))
    run("--only=tests,machine,generate")
    assert "machine: already done" in capsys.readouterr().out
    assert all("error" not in part for part in report(tmp_path).values())
    text = (tmp_path / "report.md").read_text()
    assert "| `a: metric` | 0.5 |" in text and "spreads" not in text
    assert "is of another device, dataset or size" in fails(lambda flags: run(*flags), ["--tiny"])


def test_a_part_that_reaches_its_limit_is_ended_and_leaves_time_for_the_next_one(run, tmp_path, monkeypatch, fails):
    wait = "import threading; threading.Event().wait()"
    monkeypatch.setitem(cuda.PARTS, "tests", (1 / 60, lambda harness: harness.call("x", "-c", wait)))
    monkeypatch.setitem(cuda.PARTS, "machine", (1, lambda harness: {"metric": 5}))
    assert "not done: tests;" in fails(lambda flags: run(*flags), ["--only=tests,machine"])
    assert report(tmp_path)["machine"]["status"] == "done" and report(tmp_path)["tests"]["status"] == "not finished"
    assert "stopped after 1 s" in report(tmp_path)["tests"]["error"]
    assert "not done: tests, generate;" in fails(
        lambda flags: run(*flags), ["--only=tests,machine,generate", "--minutes=0"])
    assert "generate" not in report(tmp_path)


def test_a_signal_ends_the_processes_of_the_part(run, tmp_path, monkeypatch):
    """Also those that they have started: one opens a named pipe, which is at its end once no process has it open."""
    os.mkfifo(tmp_path / "pipe")
    wait = "import threading; pipe = open('pipe', 'w'); threading.Event().wait(200)"
    start_another = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {wait!r}])"
    monkeypatch.setitem(cuda.PARTS, "machine", (9, lambda harness: harness.call("x", "-c", start_another)))
    process = ForkedProcess(lambda flags: run(*flags), ["--only=machine"])
    with open(tmp_path / "pipe", "rb", 0) as pipe:  # waits until the other end is open
        os.kill(process.pid, signal.SIGTERM)
        code, _, error = process.result()
        assert (code, error) == (130, "stopped\n")
        assert select.select([pipe], [], [], 60)[0] and pipe.read(1) == b""


def test_the_figures_of_the_published_run(trained, tmp_path, monkeypatch):
    """What reads the log of a run; that train.py saves and resumes is tested elsewhere."""
    called = []
    monkeypatch.setattr(cuda.Harness, "call", lambda self, name, *command: called.append(command) or (
        "loss: 5.5\nstandard_error: 0.1\nbits_per_byte: 1.5\n"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/published").symlink_to(trained / "out/tiny")
    result = cuda.train_published(cuda.Harness("cpu", True, trained / "data/nursery-bpe300", tmp_path, 0))
    assert "--resume=auto" in called[0] and "--eval_only" in called[1] and result["resumed"] == 0
    assert result["tokens"] == 24 * 64 and result["loss"] == 5.5


def test_wrong_flags_and_a_missing_dataset_are_refused(run, fails):
    assert "unknown part 'bench-trian': the parts are machine, tests" in fails(
        lambda flags: run(*flags), ["--only=bench-trian"], 2)
    assert "no dataset in data/none" in fails(lambda flags: run(*flags), ["--data=data/none"])
