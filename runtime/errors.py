"""How the scripts report errors: one line on stderr and an exit code."""

import argparse
import difflib
import functools
import os
import platform
import signal
import sys

from runtime import startup


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, where, and what to do."""


def exit_with_one_line(main):
    """Decorate a script's `main(argv=None)`: errors that the user can fix print one line and set the exit code.

    Exit codes: 1 for `UserError`, for errors of the operating system (a full disk, no permission) and when memory runs
    out; 130 for Ctrl-C; 141 when the reader of stdout has gone (`| head`). argparse exits with 2 for wrong flags. Any
    other exception is a bug and keeps its traceback.
    """
    @functools.wraps(main)
    def wrapped(argv=None):
        """Run `main`; exit with one line if it fails."""
        if signal.getsignal(signal.SIGINT) is startup.exit_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        try:
            result = main(argv)
            if not under_torchrun:
                return result
            message, code = None, 0
        except UserError as error:
            message, code = f"error: {error}", 1
        except BrokenPipeError:
            # Python flushes stdout again at exit, which would fail with a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            message, code = None, 141
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            message, code = f"error: {where}{error.strerror or error}", 1
        except KeyboardInterrupt:
            message, code = "stopped", 130
        except MemoryError as error:
            message, code = f"error: out of memory: {str(error) or 'use smaller sizes'}", 1
        except RuntimeError as error:
            if "DefaultCPUAllocator" in str(error):  # torch on a CPU
                message, code = f"error: out of memory: use smaller sizes ({error})", 1
            elif type(error).__name__ == "OutOfMemoryError":  # torch's class; not every script imports torch
                message, code = f"error: out of memory on the GPU: use smaller sizes, or --device=cpu ({error})", 1
            else:
                raise
        if message and os.environ.get("RANK", "0") != "0":  # started by torchrun, perhaps on another machine
            message = f"{message} (rank {os.environ['RANK']} on {platform.node()})"
        if message:
            print(" ".join(message.split()), file=sys.stderr)
        if under_torchrun:
            # Python's own shutdown can abort while a thread of gloo frees a tensor (pytorch issue 190489).
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)
    return wrapped


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line (exit code 2) and suggest the closest flag."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, argv=None):
        """The command line as a namespace; exits with code 2 for an unknown argument and names the closest flag."""
        args, unknown = self.parse_known_args(argv)
        for word in unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = difflib.get_close_matches(word.split("=")[0].replace("-", "_").replace("__", "--", 1), flags, 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists all flags"
            self.error(f"unknown argument {word}: {hint}")
        return args

    def error(self, message):
        """Print the message as one line and exit with code 2."""
        self.exit(2, f"error: {' '.join(message.split())}\n")
