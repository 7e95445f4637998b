"""How the scripts report errors: one line on stderr and an exit code; the words of the commands that they suggest."""

import argparse
import difflib
import functools
import os
import platform
import shlex
import signal
import sys
import traceback
from pathlib import Path

# What errors suggest to someone who has no data or no model yet: it takes a minute or two and no download.
QUICKSTART = "python prepare.py nursery --tokenizer bpe:2048 && python train.py config/quickstart.py"


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, where, and what to do."""


def exit_with_one_line(main):
    """Decorate a script's `main(argv=None)`: errors that the user can fix print one line and set the exit code.

    Exit codes: 1 for `UserError`, for errors of the operating system (a full disk, no permission), a missing package
    and when memory runs out; 130 for Ctrl-C; 141 when the reader of stdout has gone (`| head`). argparse exits with 2
    for wrong flags. Any other exception is a bug and keeps its traceback. The environment variable TRACEBACK=1 prints
    the traceback of every error, above its line. What is printed is UTF-8, because not every system's encoding has
    every character of a story or a name, and prepare.py reads UTF-8.
    """
    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # not a notebook's
                stream.reconfigure(encoding="utf-8", errors="replace")
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by storygpt/__init__.py
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 0
        try:
            result = main(argv)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit
            code = 141
        except (Exception, KeyboardInterrupt) as error:
            if not (line := one_line(error)):
                raise
            if os.environ.get("TRACEBACK") == "1":
                traceback.print_exc()
            print(line, file=sys.stderr)
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
        if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
            # Python's own shutdown can abort while a thread of gloo frees a tensor (pytorch issue 190489).
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return sys.exit(code) if code else result
    return wrapped


def one_line(error):
    """What to print for an exception that the user can fix; None for a bug."""
    if isinstance(error, KeyboardInterrupt):
        line = "stopped"
    elif isinstance(error, UserError):
        line = f"error: {error}"
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        line = f"error: {where}{error.strerror or error}"
    elif isinstance(error, ImportError):
        line = f"error: {error}: pip install -r requirements.txt -r requirements-extra.txt"
    elif out_of_memory(error):
        line = f"error: out of memory: use smaller sizes ({str(error) or 'MemoryError'})"
    else:
        return None
    if os.environ.get("RANK", "0") != "0":  # started by torchrun, perhaps on another machine
        line += f" (rank {os.environ['RANK']} on {platform.node()})"
    return " ".join(line.split())


def out_of_memory(error):
    """Whether an exception says that the memory of the machine or of its GPU has run out."""
    # torch's class by its name, because not every script imports torch.
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or any(words in str(error) for words in ("DefaultCPUAllocator", "MPS backend out of memory")))


def shell_word(path):
    """A path as a word of a command that is printed to be pasted. Windows, too, takes slashes, which need no quotes."""
    return shlex.quote(Path(path).as_posix())


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line (exit code 2) and suggest the closest flag.

    With `common`, the names of some arguments, --help lists only these, each up to the first semicolon of its help;
    --help-all lists everything.
    """

    def __init__(self, common=(), **options):
        super().__init__(allow_abbrev=False, **options,
                         formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=26))
        self.common = common
        if common:
            self.add_argument("--help-all", action="help", help="show the help of all flags")

    def parse_args(self, argv=None):
        """The command line as a namespace; exits with code 2 for an unknown argument and names the closest flag."""
        self.words = sys.argv[1:] if argv is None else argv
        if self.common and "--help-all" not in self.words:
            for action in self._actions:
                shown = action.dest in ("help", "help_all", *self.common)
                action.help = action.help.split(";")[0] if shown else argparse.SUPPRESS
        args, unknown = self.parse_known_args(argv)
        for word in unknown:
            near = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, 1)
            hint = f"did you mean {near[0]}?" if near else f"--help{'-all' if self.common else ''} lists all flags"
            self.error(f"unknown argument {word}: {hint}")
        return args

    def error(self, message):
        """Print the message as one line and exit with code 2."""
        if "expected one argument" in message:  # perhaps the next word is its value, and argparse took it for a flag
            for flag, value in zip(self.words, self.words[1:]):
                if f"argument {flag}:" in message and value.split("=")[0] not in self._option_string_actions:
                    message += f": write {flag}={shlex.quote(value)} for a value that begins with a dash"
        self.exit(2, f"error: {' '.join(message.split())}\n")
