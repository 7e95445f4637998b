"""Scripts in processes of their own, forked so that they start in no time, and what is to be said of their ends."""

import os
import signal
import sys
import tempfile
import time
import traceback

import torch._inductor  # noqa: F401  takes two seconds, and every training imports it: once here, not in each process

PATIENCE = 60  # seconds after which a process hangs


class Lost(Exception):
    """What no fault may bring about."""


def run(main, argv, before=None, meanwhile=None):
    """A script's main(argv) in a process of its own: its exit code (a signal's number negative), stdout and stderr.

    `before()` is called in it first; `meanwhile(pid)` in this one, while it runs.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            code = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
                                          for number in (1, 2))
                if before:
                    before()
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
        if meanwhile:
            meanwhile(pid)
        until = time.monotonic() + PATIENCE
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise Lost(f"{main.__module__} hangs: {argv}")
            time.sleep(0.001)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", errors="replace"))
        return os.waitstatus_to_exitcode(ended[1]), *texts


def one_line(result, names=""):
    """See that a process failed as it should: exit code 1 or 2, and one line of error that has `names` in it."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    if code not in (1, 2) or len(lines) != 1 or "Traceback" in err or names not in lines[0]:
        raise Lost(f"exit code {code} and no line of error about {names or 'it'}:\n{out}{err}")
    return lines[0]


def works(result):
    """See that a process ended well; its stdout comes back."""
    code, out, err = result
    if code:
        raise Lost(f"exit code {code}:\n{out}{err}")
    return out
