"""How a script tells its user what went wrong: one line on stderr and an exit code, never a traceback."""

import argparse
import difflib
import functools
import os
import platform
import sys


class UserError(Exception):
    """Something that the user can put right. The message is one line: what is wrong, where, and what to do."""


def exit_with_one_line(main):
    """Decorate a script's `main(argv=None)` so that what a user can put right ends in one line and an exit code.

    Exit codes: 1 for `UserError`, for errors of the operating system (a full disk, a file that may not be read) and
    where memory runs out, 130 for Ctrl-C, 141 where the reader of stdout has gone away (`| head`). argparse itself
    exits with 2 for wrong flags. Everything else is a fault of the program and keeps its traceback.
    """
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except UserError as error:
            message, code = f"error: {error}", 1
        except BrokenPipeError:
            # Python flushes stdout once more at exit; without this that flush would fail with a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            message, code = None, 141
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            message, code = f"error: {where}{error.strerror or error}", 1
        except KeyboardInterrupt:
            message, code = "stopped", 130
        except MemoryError as error:
            message, code = f"error: out of memory: {error or 'use smaller sizes'}", 1
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's for a GPU; not all scripts import torch
                raise
            message, code = f"error: out of memory on the GPU: use smaller sizes, or --device=cpu ({error})", 1
        if message and os.environ.get("RANK", "0") != "0":  # one of torchrun's processes, perhaps on another machine
            message = f"{message} (rank {os.environ['RANK']} on {platform.node()})"
        if message:
            print(" ".join(message.split()), file=sys.stderr)
        sys.exit(code)
    return wrapped


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line (exit code 2), and which suggests the nearest flag."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, argv=None):
        """The command line as a namespace; exits with code 2 for a word that is no flag, naming the nearest one."""
        args, unknown = self.parse_known_args(argv)
        for word in unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = difflib.get_close_matches(word.split("=")[0].replace("-", "_").replace("__", "--", 1), flags, 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists all flags"
            self.error(f"unknown argument {word}: {hint}")
        return args

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())}\n")
