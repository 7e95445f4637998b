"""Real faults: a short soak test, signals, closed pipes, full disks, unwritable folders, two processes on one run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import prepare
import train
from conftest import ROOT, TINY
from faults.processes import check_one_line_error, check_success, limit_file_size, run, wait_for_steps
from storygpt import checkpoint
from storygpt.run import read_log

LONG = [*TINY, "--max_iters=100000", "--eval_interval=100000", "--out_dir=out/x"]


@pytest.mark.slow  # a minute, and more on a busy machine
def test_short_soak():
    flags = "--kills 8 --disks 1 --damages 30 --rank_kills 1 --cases 80 --seed 7".split()
    done = subprocess.run([sys.executable, "-m", "tests.faults.soak", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("failures")] == [
        f"failures in {name}: 0" for name in ("kills", "disks", "damages", "rank_kills", "cases")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_repeated_signal_aborts_and_keeps_the_last_checkpoint(with_data, number):
    def send_twice(pid):
        while not Path("out/x/last.pt").exists():  # saved after the first step
            time.sleep(0.01)
        for _ in range(2):
            time.sleep(0.1)
            os.kill(pid, number)

    flags = [*LONG, "--block_size=64", "--batch_size=2048", "--device_batch_size=4"]  # a step takes seconds
    code, out, err = run(train.main, flags, while_running=send_twice)
    assert code == 130 and err.endswith("stopped\n") and "Traceback" not in err
    assert checkpoint.load("out/x/last.pt")["step"] == 1


def test_a_run_killed_just_before_its_first_checkpoint_is_started_again(with_data):
    """As by torchrun, which restarts the same command."""
    def kill_at_first_save():
        def hook(event, args):
            if event == "open" and str(args[0]).endswith("last.pt.tmp"):
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)

    flags = [*TINY, "--out_dir=out/x", "--resume=auto", "--max_iters=4"]
    assert run(train.main, flags, setup=kill_at_first_save)[0] == -signal.SIGKILL
    assert Path("out/x/log.jsonl").exists()
    check_success(run(train.main, flags))
    assert [r["kind"] for r in read_log("out/x/log.jsonl")] == ["run", "step", "step", "eval", "end"]


def test_a_closed_stdout_ends_the_run_silently(with_data):
    def close_stdout():
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)

    code, _, err = run(train.main, LONG, setup=close_stdout)
    assert code == 141 and err == ""
    check_success(run(train.main, [*TINY, "--resume=auto", "--out_dir=out/x", "--max_iters=4"]))


def test_a_second_process_on_a_run_is_refused(with_data):
    def start_second(pid):
        wait_for_steps("out/x", 3)
        for flags in (["--resume", "--out_dir=out/x"], [*LONG, "--overwrite"], [*LONG, "--resume=auto"]):
            check_one_line_error(run(train.main, flags), "another process is using out/x")
        os.kill(pid, signal.SIGKILL)

    assert run(train.main, LONG, while_running=start_second)[0] == -signal.SIGKILL
    check_success(run(train.main, ["--resume", "--out_dir=out/x", "--max_iters=40"]))


@pytest.mark.parametrize("size, name", [(1500, "tokenizer.tiktoken"), (20_000, "last.pt"), (400, "log.jsonl")])
def test_a_run_on_a_full_disk_can_be_resumed_once_there_is_space(with_data, size, name):
    """A limit on file sizes stands for the full disk, as it needs no privileges."""
    flags = [*TINY, "--out_dir=out/x", "--resume=auto"]
    if name == "log.jsonl":  # resuming appends to the log, here close to the limit, before it saves a checkpoint
        check_success(run(train.main, [*flags, "--max_iters=4", "--lr_decay_iters=24"]))
        last = checkpoint.load("out/x/last.pt", checkpoint.LAST_REQUIRED_KEYS)
        size = last["sizes"]["log.jsonl"] + 100
        assert size < Path("out/x/last.pt").stat().st_size
    line = check_one_line_error(run(train.main, flags, setup=lambda: limit_file_size(size)),
                                f"cannot write out/x/{name} (File too large)")
    assert "free some space" in line
    check_success(run(train.main, flags))
    check_success(run(train.main, [*TINY, "--out_dir=out/whole"]))
    a, b = (checkpoint.load(f"out/{name}/last.pt")["model"] for name in ("whole", "x"))
    assert all(a[name].equal(b[name]) for name in a)


def test_a_full_disk_while_preparing_leaves_no_dataset(here):
    flags = ["nursery", "--max_stories", "500", "--tokenizer", "bpe:300", "--name", "x"]
    check_one_line_error(run(prepare.main, flags, setup=lambda: limit_file_size(10_000)),
                         "cannot write data/x: File too large")
    assert not Path("data/x").exists()
    check_success(run(prepare.main, flags))


def test_a_folder_that_cannot_be_created_is_named(with_data):
    Path("out").write_text("a file where the folder should be")
    check_one_line_error(run(train.main, [*TINY, "--out_dir=out/x"]), "out/x")
    check_one_line_error(run(train.main, [*TINY, "--out_dir=/proc/x"]), "/proc/x")
