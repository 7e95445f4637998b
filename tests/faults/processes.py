"""Run a script's main(argv) in forked processes, which need not import torch again, and check how they end."""

import itertools
import os
import resource
import runpy
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch._inductor  # noqa: F401  imported by every training run: here once, as it takes two seconds
from torch.distributed import TCPStore

from storygpt.system import files

TIMEOUT = 300  # seconds, for what takes a few on a machine that is not busy


class Failure(Exception):
    """A fault had an effect that no fault may have: lost data, a traceback, a hang."""


class ForkedProcess:
    """A process that runs a script's main(argv), forked from this one."""

    def __init__(self, main, argv, setup=None):
        """Start the process. It calls `setup()` first."""
        self.name = f"{main.__module__} {argv}"
        self.stdout, self.stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.pid = os.fork()
        if not self.pid:
            self._run(main, argv, setup)

    def _run(self, main, argv, setup):
        """In the new process: run `main` and exit with its exit code, or 70 after an uncaught exception."""
        code = 70
        try:
            os.dup2(self.stdout.fileno(), 1)
            os.dup2(self.stderr.fileno(), 2)
            if setup:
                setup()  # may replace these
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
                                      for number in (1, 2))
            main(argv)
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def result(self):
        """Wait until the process ends: its exit code (negative: a signal's number), stdout and stderr.

        Raises Failure if it hangs.
        """
        deadline = time.monotonic() + TIMEOUT
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise Failure(f"{self.name} hangs")
            time.sleep(0.001)
        texts = []
        for file in (self.stdout, self.stderr):
            with file:
                file.seek(0)
                texts.append(file.read().decode("utf-8", errors="replace"))
        return os.waitstatus_to_exitcode(ended[1]), *texts


def run(main, argv, setup=None, while_running=None):
    """Run a script's main(argv) in a ForkedProcess: its exit code (negative: a signal's number), stdout and stderr.

    `setup()` is called in that process first, `while_running(pid)` in this one while it runs.
    """
    process = ForkedProcess(main, argv, setup)
    if while_running:
        while_running(process.pid)
    return process.result()


def script(name):
    """A main(argv) that runs a script of the project as `python NAME` does, but without importing torch again."""
    def main(argv):
        sys.argv = [name, *argv]
        runpy.run_path(str(Path(__file__).parents[2] / name), run_name="__main__")
    return main


def check_success(result):
    """Raise Failure unless a process succeeded; returns its stdout."""
    code, out, err = result
    if code:
        raise Failure(f"exit code {code}:\n{out}{err}")
    return out


def check_one_line_error(result, expected=""):
    """Raise Failure unless a process ended with exit code 1 or 2 and one line of error that contains `expected`.

    Returns that line.
    """
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    if code not in (1, 2) or len(lines) != 1 or "Traceback" in err or expected not in lines[0]:
        raise Failure(f"exit code {code}, but not one line of error that contains {expected!r}:\n{out}{err}")
    return lines[0]


def wait_for_steps(out_dir, count):
    """Wait until a run without evaluations has logged `count` training steps; 0: until it has started its log."""
    log, deadline = Path(out_dir, "log.jsonl"), time.monotonic() + TIMEOUT
    while not log.exists() or len(log.read_bytes().splitlines()) <= count:  # the first line describes the run
        if time.monotonic() > deadline:
            raise Failure(f"{out_dir} has not logged {count} steps after {TIMEOUT} s")
        time.sleep(0.01)


def at_file_operation(count, name, action, *events):
    """In this process, call `action()` just before the count-th of these audit events on a path that has `name` in it.

    By default it is any that changes a folder: opening, renaming, removing or truncating a file.
    """
    events = events or ("open", "os.rename", "os.remove", "os.truncate")
    operations = itertools.count(1)

    def hook(event, args):
        if event in events and name in str(args[0]) and next(operations) == count:
            action()
    sys.addaudithook(hook)


def kill_this_process():
    """End this process as a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)


def limit_file_size(size):
    """Make this process's writes beyond a file size in bytes fail, as on a full disk; None: no limit."""
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def run_ranks(world_size, main, argv, while_running=None, other_folder="."):
    """Run main(argv) on several processes, as torchrun would start them: (exit code, stdout, stderr) of each.

    All but rank 0 start in `other_folder`. `while_running(pids)` is called while they run.
    """
    reader, writer = os.pipe()

    def setup(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.read(reader, 5).decode(),
                       "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        os.chdir(other_folder if rank else ".")

    processes = [ForkedProcess(main, argv, lambda rank=rank: setup(rank)) for rank in range(world_size)]
    # After the last fork: its thread can hold a lock of libc, which a process that is forked then would never get.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's, at a port that nobody has
    os.write(writer, f"{store.port:05}".encode() * world_size)
    if while_running:
        while_running([process.pid for process in processes])
    results = [process.result() for process in processes]
    os.close(reader)
    os.close(writer)
    return results


@contextmanager
def locked(folder):
    """Another process has the lock of a run folder, like one that is training."""
    process = ForkedProcess(lambda folder: (files.acquire_lock(folder / ".lock", "it"), signal.pause()), folder)
    while not files.is_locked(folder / ".lock"):
        time.sleep(0.01)
    yield
    os.kill(process.pid, signal.SIGKILL)
    process.result()
