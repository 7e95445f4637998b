"""`python -m tests.cuda` on the CPU: its logic with parts of a line each, and every real part at toy size."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from conftest import ROOT
from tests.cuda import __main__ as cuda


@pytest.fixture
def run(nursery_data, tmp_path, monkeypatch):
    """A function that runs the command with more flags; the current folder has the dataset."""
    monkeypatch.chdir(nursery_data)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*flags):
        cuda.main(["--device=cpu", "--tiny", "--data=data/nursery-bpe300", f"--out={tmp_path}", *flags])
    yield run
    signal.signal(signal.SIGTERM, handler)  # main() has changed it


def report(out):
    return json.loads((out / "report.json").read_text())["parts"]


@pytest.mark.slow  # two minutes: the programs that it starts each import torch
def test_every_part_at_toy_size(run, tmp_path):
    run("--minutes=30")
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
                "generate": lambda harness: harness.call("x", ["-c", "import sys; sys.exit('a reason')"])}
    for name, part in outcomes.items():
        monkeypatch.setitem(cuda.PARTS, name, (1, part))
    error = fails(lambda flags: run(*flags), ["--only=machine,tests,generate"])
    assert "not done: tests, generate" in error
    parts, text = report(tmp_path), (tmp_path / "report.md").read_text()
    assert [parts[name]["status"] for name in outcomes] == ["done", "failed", "failed"]
    assert "ZeroDivisionError" in parts["tests"]["error"] and "exit code 1\na reason" in text and "> A | B" in text
    for name in ("tests", "generate"):
        monkeypatch.setitem(cuda.PARTS, name, (1, lambda harness: {"metric": 0.5}))
    run("--only=tests,machine,generate")
    assert "machine: already done" in capsys.readouterr().out
    assert all("error" not in part for part in report(tmp_path).values())
    assert "| `metric` | 0.5 |" in (tmp_path / "report.md").read_text()
    assert "is of another device, dataset or size" in fails(lambda flags: run(*flags), ["--device=cuda"])
    (tmp_path / "report.json").write_text("{")
    assert "is damaged" in fails(lambda flags: run(*flags), [])


def test_a_part_that_reaches_its_limit_is_ended_and_leaves_time_for_the_next_one(tmp_path, monkeypatch):
    child = "import threading; threading.Event().wait()"
    wait = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setitem(cuda.PARTS, "tests", (1 / 60, lambda harness: harness.call("x", ["-c", wait])))
    monkeypatch.setitem(cuda.PARTS, "machine", (1, lambda harness: {"metric": 5}))
    harness = cuda.Harness("cpu", False, Path("data"), tmp_path, time.monotonic() + 120)
    parts = cuda.read_report(harness)
    assert [cuda.run_part(name, harness, parts) for name in ("tests", "machine")] == [False, True]
    assert parts["parts"]["tests"]["status"] == "not finished"
    assert "stopped after 1 s" in parts["parts"]["tests"]["error"] and processes_in(tmp_path) == []
    harness.deadline = 0
    assert not cuda.run_part("generate", harness, parts) and "generate" not in parts["parts"]


def processes_in(folder):
    """The processes whose current folder is this one; none on other systems than Linux."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):  # another user's process, or it has ended
            found += [path] if Path(os.readlink(path)) == folder else []
    return found


def test_a_signal_ends_the_processes_of_the_part(nursery_data, tmp_path):
    flags = ["--device=cpu", "--tiny", f"--data={nursery_data / 'data/nursery-bpe300'}", f"--out={tmp_path}"]
    process = subprocess.Popen([sys.executable, "-m", "tests.cuda", *flags, "--only=bench-train"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "logs" / "bench-train.log").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120)[0].endswith("stopped\n") and process.returncode == 130
    assert processes_in(tmp_path) == []


def test_the_figures_of_the_published_run(trained, tmp_path, monkeypatch):
    """What reads the log of a run; that train.py saves and resumes is tested elsewhere."""
    harness = cuda.Harness("cpu", True, trained / "data/nursery-bpe300", tmp_path, time.monotonic() + 600)
    (tmp_path / "data").symlink_to(trained / "data")
    called = []
    monkeypatch.setattr(cuda.Harness, "call", lambda self, name, command: called.append(command) or (
        "loss: 5.5\nstandard_error: 0.1\nbits_per_byte: 1.5\n"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/published").symlink_to(trained / "out/tiny")
    result = cuda.train_published(harness)
    assert "--resume=auto" in called[0] and "--eval_only" in called[1] and result["resumed"] == 0
    assert result["tokens"] == 24 * 64 and result["loss"] == 5.5


@pytest.mark.parametrize("flags, code, message", [
    (["--only=bench-trian"], 2, "unknown part 'bench-trian': the parts are machine, tests"),
    (["--minutes=0"], 2, "--minutes: 0 is not above 0"), (["--devise=cpu"], 2, "did you mean --device?"),
    (["--data=data/none"], 1, "no dataset in data/none"),
])
def test_wrong_flags_and_datasets_are_refused(run, fails, flags, code, message):
    assert message in fails(lambda flags: run(*flags), flags, code)


def test_another_dataset_of_the_same_name_is_refused(run, tmp_path):
    (tmp_path / "data" / "nursery-bpe300").mkdir(parents=True)
    with pytest.raises(SystemExit):
        run()
