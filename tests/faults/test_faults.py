"""Faults, tried for real: a short soak, signals, closed pipes, full and read-only disks, two processes on one run."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import checkpoint
import prepare
import train
from conftest import ROOT, TINY
from faults.processes import one_line, run, works

LONG = [*TINY, "--max_iters=100000", "--eval_interval=100000", "--out_dir=out/x"]


def test_a_short_soak():
    words = "--kills 8 --disks 1 --damages 30 --rank_kills 1 --cases 80 --seed 7".split()
    done = subprocess.run([sys.executable, "-m", "tests.faults.soak", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("lost")] == [
        f"lost in {name}: 0" for name in ("kills", "disks", "damages", "rank_kills", "cases")]


def wait_for_steps(count):
    log = Path("out/x/log.jsonl")
    while not log.exists() or len(log.read_bytes().splitlines()) <= count:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once_and_loses_nothing_that_was_saved(with_data, number):
    def twice(pid):
        wait_for_steps(0)
        for _ in range(2):
            time.sleep(0.1)
            os.kill(pid, number)

    words = [*LONG, "--block_size=64", "--batch_size=2048", "--device_batch_size=4"]  # an update takes seconds
    code, out, err = run(train.main, words, None, twice)
    assert code == 130 and err.endswith("stopped\n") and "Traceback" not in err
    assert checkpoint.load("out/x/last.pt")["update"] == 0


def test_a_reader_of_stdout_who_goes_away_ends_the_run_without_a_word(with_data):
    def close():
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)

    code, _, err = run(train.main, LONG, close)
    assert code == 141 and err == ""
    works(run(train.main, ["--resume", "--out_dir=out/x", "--max_iters=4"]))


def test_two_processes_on_one_run(with_data):
    def second(pid):
        wait_for_steps(3)
        for words in (["--resume", "--out_dir=out/x"], [*LONG, "--overwrite"], [*LONG, "--resume=auto"]):
            assert "another process is at work on out/x" in one_line(run(train.main, words))
        os.kill(pid, signal.SIGKILL)

    assert run(train.main, LONG, None, second)[0] == -signal.SIGKILL
    works(run(train.main, ["--resume", "--out_dir=out/x", "--max_iters=40"]))


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size, name", [(1500, "tokenizer.tiktoken"), (20_000, "last.pt"), (400, "log.jsonl")])
def test_a_disk_that_is_full(with_data, size, name):
    """As far as a user without privileges can have one: no file may grow beyond a size."""
    words = [*TINY, "--out_dir=out/x", "--resume=auto"]
    if name == "log.jsonl":  # a log that is nearly at the limit already, the checkpoints being written elsewhere
        works(run(train.main, [*words, "--max_iters=4", "--lr_decay_iters=24"]))
        last = checkpoint.load("out/x/last.pt", checkpoint.LAST_HAS)
        size = last["sizes"]["log.jsonl"] + 100
        assert size < Path("out/x/last.pt").stat().st_size
    line = one_line(run(train.main, words, lambda: limit_files(size)), f"cannot write out/x/{name} (File too large)")
    assert "make room" in line
    works(run(train.main, words))
    works(run(train.main, [*TINY, "--out_dir=out/whole"]))
    a, b = (checkpoint.load(f"out/{name}/last.pt")["model"] for name in ("whole", "x"))
    assert all(a[name].equal(b[name]) for name in a)


def test_a_disk_that_fills_while_data_is_prepared(here):
    words = ["nursery", "--max_stories", "500", "--tokenizer", "bpe:300", "--name", "x"]
    assert "cannot write data/x: File too large" in one_line(run(prepare.main, words, lambda: limit_files(10_000)))
    assert not Path("data/x").exists()
    works(run(prepare.main, words))


def test_a_folder_that_cannot_be_written(with_data):
    Path("out").write_text("a file in the folder's place")
    assert "out/x" in one_line(run(train.main, [*TINY, "--out_dir=out/x"]))
    assert "/proc/x" in one_line(run(train.main, [*TINY, "--out_dir=/proc/x"]))
