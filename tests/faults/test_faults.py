"""Real faults: kills, signals, closed pipes, full disks, unwritable folders, two processes on one run, a short soak."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sample
import train
from conftest import ROOT, TINY, load_last
from faults.processes import (ForkedProcess, at_file_operation, check_one_line_error, check_success, kill_this_process,
                              limit_file_size, run, wait_for_steps)
from faults.soak import check_same_run, equal
from storygpt import checkpoint

RUN = [*TINY, "--out_dir=out/x", "--resume=auto"]  # when complete, it equals the run of the fixture `trained`


@pytest.mark.slow  # two minutes
def test_short_soak():
    flags = "--kills 8 --disks 1 --damages 20 --rank_kills 1 --cases 40 --seed 7".split()
    done = subprocess.run([sys.executable, "-m", "tests.faults.soak", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("failures")] == [
        f"failures in {name}: 0" for name in ("kills", "disks", "damages", "rank_kills", "cases")]


def test_a_run_killed_again_and_again_equals_one_that_was_not(with_data, trained):
    flags = [*RUN, "--checkpoint_minutes=0"]
    for count, name, event in [
        (1, "last.pt.tmp", "open"),  # before the first checkpoint
        (2, "last.pt.tmp", "os.rename"),  # the previous one has its new name, the second one not yet
        (1, "samples.md", "open"),  # an evaluation is logged, its sample not yet
        (1, "ckpt.pt.tmp", "os.rename"),  # an evaluation is complete but for its weights
        (1, "samples.md", "os.truncate"),  # the log is truncated, the samples not yet
    ]:
        code, out, err = run(train.main, flags, lambda: at_file_operation(count, name, kill_this_process, event))
        assert code == -signal.SIGKILL, f"{name}, {event}:\n{out}{err}"
    check_success(run(train.main, flags))
    check_same_run(trained / "out/tiny", "out/x")


def test_a_repeated_signal_aborts_and_keeps_the_last_checkpoint(with_data):
    def interrupt_twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    flags = [*RUN, "--eval_interval=4"]  # after the second step; the first one has been saved
    code, _, err = run(train.main, flags, lambda: at_file_operation(1, "samples.md", interrupt_twice, "open"))
    assert code == 130 and err.endswith("stopped\n") and "Traceback" not in err
    assert checkpoint.load("out/x/last.pt")["step"] == 1


@pytest.mark.parametrize("main, flags", [(train.main, [*TINY, "--out_dir=out/x"]), (sample.main, [])],
                         ids=["train", "sample"])
def test_a_closed_stdout_ends_a_script_silently(with_data, trained, main, flags):
    def close_stdout():
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)

    if main is sample.main:
        os.chdir(trained)
    code, _, err = run(main, flags, setup=close_stdout)
    assert code == 141 and err.count("\n") == (main is sample.main)  # the line that names the model


def test_a_second_process_on_a_run_is_refused_until_the_first_ends(with_data):
    """The first one pauses when it saves its second checkpoint."""
    flags = [*TINY, "--out_dir=out/x", "--log_interval=1", "--checkpoint_minutes=0", "--max_iters=6"]
    first = ForkedProcess(train.main, flags, lambda: at_file_operation(2, "last.pt.tmp", signal.pause, "open"))
    wait_for_steps("out/x", 2)
    for words in (["--resume", "--out_dir=out/x"], [*flags, "--overwrite"], [*flags, "--resume=auto"]):
        check_one_line_error(run(train.main, words), "another process is using out/x")
    os.kill(first.pid, signal.SIGKILL)
    assert first.result()[0] == -signal.SIGKILL
    check_success(run(train.main, ["--resume", "--out_dir=out/x"]))


def test_a_run_on_a_full_disk_can_be_resumed_once_there_is_space(with_data, trained):
    """A limit on file sizes stands for the full disk, as it needs no privileges."""
    def fill_disk(size, name):
        line = check_one_line_error(run(train.main, RUN, setup=lambda: limit_file_size(size)),
                                    f"cannot write out/x/{name} (File too large)")
        assert "free some space" in line

    fill_disk(1500, "tokenizer.tiktoken")
    fill_disk(20_000, "last.pt")
    check_success(run(train.main, [*RUN, "--max_iters=4", "--lr_decay_iters=24"]))
    # Resuming appends to the log before it saves a checkpoint, here close to the limit.
    fill_disk(load_last("out/x")["sizes"]["log.jsonl"] + 100, "log.jsonl")
    check_success(run(train.main, RUN))
    assert equal(load_last(trained / "out/tiny")["model"], load_last("out/x")["model"])


def test_a_folder_that_cannot_be_created_is_named(with_data, fails):
    Path("out").write_text("a file where the folder should be")
    for folder in ("out/x", "/proc/x"):
        assert folder in fails(train.main, [*TINY, f"--out_dir={folder}"])
