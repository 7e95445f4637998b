"""How the scripts report errors: one line on stderr and an exit code."""

import argparse
import difflib
import functools
import os
import platform
import signal
import sys

from runtime import startup

# What errors suggest to someone who has no data or no model yet: it takes a minute or two and no download.
QUICKSTART = "python prepare.py nursery --tokenizer bpe:2048 && python train.py config/quickstart.py"


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
    """An ArgumentParser whose errors are one line (exit code 2) and suggest the closest flag.

    With `common`, the names of some arguments, --help lists only these, each up to the first semicolon of its help;
    --help-all lists everything.
    """

    def __init__(self, common=(), **options):
        super().__init__(allow_abbrev=False, add_help=not common, **options,
                         formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=26))
        self.common = common
        if common:
            self.add_argument("-h", "--help", action=ShortHelp, help="show this help")
            self.add_argument("--help-all", action="help", help="show the help of all flags")

    def parse_args(self, argv=None):
        """The command line as a namespace; exits with code 2 for an unknown argument and names the closest flag."""
        args, unknown = self.parse_known_args(argv)
        for word in unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = difflib.get_close_matches(word.split("=")[0].replace("-", "_").replace("__", "--", 1), flags, 1)
            hint = f"did you mean {near[0]}?" if near else f"--help{'-all' if self.common else ''} lists all flags"
            self.error(f"unknown argument {word}: {hint}")
        return args

    def error(self, message):
        """Print the message as one line and exit with code 2."""
        self.exit(2, f"error: {' '.join(message.split())}\n")


class ShortHelp(argparse.Action):
    """The action of --help in a Parser with `common`."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        """Print the help without the other arguments and exit."""
        for action in parser._actions:
            shown = action.dest in ("help", "help_all", *parser.common)
            action.help = action.help.split(";")[0] if shown else argparse.SUPPRESS
        parser.print_help()
        parser.exit()
