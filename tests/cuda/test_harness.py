"""`python -m tests.cuda` at toy size on the CPU: every part, failing parts, the end of --minutes."""

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
from storygpt import checkpoint
from storygpt.system.errors import UserError
from tests.cuda import __main__ as cuda


def start(data, *flags):
    """Start the command in the project's folder; its output is a pipe."""
    return subprocess.Popen([sys.executable, "-m", "tests.cuda", "--device=cpu", "--tiny", "--data", data, *flags],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def report(out):
    return json.loads((out / "report.json").read_text())["parts"]


def test_every_part_at_toy_size(nursery_data, tmp_path):
    """In two processes at once, to save time."""
    data = nursery_data / "data/nursery-bpe300"
    halves = {"one": "machine,tests", "two": "published, generate,bench-train"}
    processes = {name: start(data, f"--out={tmp_path / name}", f"--only={parts}") for name, parts in halves.items()}
    try:
        texts = {name: process.communicate(timeout=500)[0] for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.terminate()
    assert all(process.returncode == 0 for process in processes.values()), texts
    one, two = report(tmp_path / "one"), report(tmp_path / "two")
    assert list(one) == ["machine", "tests"] and list(two) == ["bench-train", "published", "generate"]
    assert [*one, *two] == list(cuda.PARTS)
    metrics = {name: part["figures"] for name, part in (one | two).items()}
    assert metrics["machine"]["matmul_bf16_gflops"] > 0 and metrics["machine"]["torch"]
    assert metrics["tests"]["passed"] > 20 and set(metrics["tests"]["skipped_because"]) == {"CUDA only"}
    assert metrics["bench-train"]["tokens_per_s"] > 0 and metrics["bench-train"]["mfu"] > 0
    assert metrics["generate"]["tokens_per_s_32"] > 0
    assert metrics["published"]["tokens"] == 8 * 4 * 16 and 5 < metrics["published"]["loss"] < 6
    assert metrics["published"]["story"].startswith("Once upon a time")
    text = (tmp_path / "two" / "report.md").read_text()
    assert "## bench-train: done" in text and "| `tokens_per_s` |" in text and "at toy size" in text


@pytest.fixture
def harness(nursery_data, tmp_path):
    """A Harness at toy size with two minutes left, to call the command's functions."""
    (tmp_path / "data").symlink_to(nursery_data / "data")
    return cuda.Harness("cpu", True, nursery_data / "data/nursery-bpe300", tmp_path, time.monotonic() + 120)


def test_failed_parts_are_reported_and_completed_parts_are_skipped(harness, capsys):
    """A damaged checkpoint cannot be resumed; the next part still runs."""
    damaged = harness.out / "out/published/last.pt"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("no checkpoint")
    new = cuda.read_report(harness)
    assert [cuda.run_part(name, harness, new) for name in ("published", "machine")] == [False, True]
    assert "last.pt is damaged" in report(harness.out)["published"]["error"]
    assert "last.pt is damaged" in (harness.out / "report.md").read_text()
    damaged.unlink()
    again = cuda.read_report(harness)
    capsys.readouterr()
    assert all(cuda.run_part(name, harness, again) for name in ("machine", "published"))
    assert "machine: already done\npublished: done after" in capsys.readouterr().out
    assert list(report(harness.out)) == ["machine", "published"] and "error" not in report(harness.out)["published"]


def test_a_bug_in_the_harness_is_reported_with_its_traceback(harness, monkeypatch):
    monkeypatch.setitem(cuda.PARTS, "machine", (1, lambda harness: 1 / 0))
    assert not cuda.run_part("machine", harness, cuda.read_report(harness))
    assert "Traceback" in report(harness.out)["machine"]["error"]
    assert "ZeroDivisionError" in (harness.out / "report.md").read_text()


def test_without_cuda_no_part_is_done(harness):
    harness.device = "cuda"
    parts = cuda.read_report(harness)
    assert not any(cuda.run_part(name, harness, parts) for name in ("machine", "tests", "published"))
    errors = [part["error"] for part in report(harness.out).values()]
    assert "device = 'cuda' cannot be used" in errors[0] and "device = 'cuda' cannot be used" in errors[2]
    assert "no test was run: no CUDA here" in errors[1]


def test_a_report_of_another_device_or_a_damaged_one_is_refused(harness):
    cuda.write_report(harness, cuda.read_report(harness))
    harness.device = "cuda"
    with pytest.raises(UserError, match="is of another device, dataset or size"):
        cuda.read_report(harness)
    (harness.out / "report.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        cuda.read_report(harness)


def test_a_run_interrupted_by_the_deadline_is_saved_and_resumed(harness, monkeypatch):
    flags = [*cuda.TINY_FLAGS, "--eval_interval=100000", "--lr_decay_iters=100000"]
    monkeypatch.setattr(cuda, "TINY_FLAGS", [*flags, "--max_iters=100000"])
    path, parts = harness.out / "out/published/log.jsonl", cuda.read_report(harness)
    for seconds in (8, 20, 50):  # three pass until the first step; on a busy machine, more
        harness.deadline = time.monotonic() + seconds
        assert not cuda.run_part("published", harness, parts)
        assert parts["parts"]["published"]["status"] == "not finished"
        if path.exists():
            break
    assert not cuda.run_part("machine", harness, parts) and "machine" not in parts["parts"]  # no time left
    *log, end = path.read_text().splitlines()
    assert json.loads(end)["reason"] == "stopped"
    harness.deadline = time.monotonic() + 120
    reached = checkpoint.load(harness.out / "out/published/last.pt")["iter"]
    monkeypatch.setattr(cuda, "TINY_FLAGS", [*flags, f"--max_iters={reached + 8}"])
    assert cuda.run_part("published", harness, parts)
    assert parts["parts"]["published"]["figures"]["resumed"] == 1
    assert path.read_text().splitlines()[:len(log)] == log


WAIT = "import threading; threading.Event().wait()"


def test_a_part_that_reaches_its_limit_leaves_time_for_the_next_one(harness, monkeypatch):
    monkeypatch.setitem(cuda.PARTS, "tests", (1 / 60, lambda harness: harness.call("x", ["-c", WAIT])))
    harness.tiny, parts = False, cuda.read_report(harness)
    monkeypatch.setitem(cuda.PARTS, "machine", (1, lambda harness: {"metric": 5}))
    assert [cuda.run_part(name, harness, parts) for name in ("tests", "machine")] == [False, True]
    assert "stopped after 1 s" in report(harness.out)["tests"]["error"]


def processes_in(folder):
    """The processes whose current folder is this one; none on other systems than Linux."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):  # another user's process, or it has ended
            found += [path] if Path(os.readlink(path)) == folder else []
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_processes_of_the_part(nursery_data, tmp_path, number):
    process = start(nursery_data / "data/nursery-bpe300", f"--out={tmp_path}", "--only=bench-train")
    log = tmp_path / "logs" / "bench-train.log"
    while not log.exists():
        time.sleep(0.05)
        assert process.poll() is None
    time.sleep(1)
    assert processes_in(tmp_path) or not Path("/proc").exists()
    process.send_signal(number)
    assert process.communicate(timeout=60)[0].endswith("stopped\n") and process.returncode == 130
    deadline = time.monotonic() + 10  # a killed process takes a moment to free its memory
    while processes_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_in(tmp_path) == []


def test_wrong_flags_and_datasets_are_refused(nursery_data, tmp_path):
    data = nursery_data / "data/nursery-bpe300"
    for flags, code, complaint in [
        (["--only=bench-trian"], 2, "unknown part 'bench-trian': the parts are machine, tests"),
        (["--minutes=0"], 2, "--minutes: 0 is not above 0"), (["--devise=cpu"], 2, "did you mean --device?"),
    ]:
        process = start(data, f"--out={tmp_path}", *flags)
        assert complaint in process.communicate(timeout=60)[0] and process.returncode == code
    process = start(tmp_path / "none", f"--out={tmp_path}")
    assert "no dataset in" in process.communicate(timeout=60)[0] and process.returncode == 1
    (tmp_path / "data" / data.name).mkdir(parents=True)
    process = start(data, f"--out={tmp_path}")
    assert "is of another dataset of this name" in process.communicate(timeout=60)[0] and process.returncode == 1
