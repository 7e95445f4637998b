"""Files that are whole under their names: replaced at once, appended to by whole lines, held by one process alone."""

import json
import os
import sys
import time
from pathlib import Path

from errors import UserError
from hardware import try_lock

_held = {}  # path → the open file whose lock this process has: it must stay open


def replace(path, write, previous=None):
    """Put a file in place of the one at `path` so that under its name there is always a whole one: old or new.

    `write(file)` writes it, in bytes. With `previous`, the file before stays under that name, and between two renames
    it alone is there. Raises UserError where it cannot be written, as on a full disk: the file before is still there.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name changes hands, or a power cut could leave neither
        if previous and path.exists():
            path.replace(previous)
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's word for a write that failed
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder):
    """Have the names in a folder on the disk too, where the system can be asked to: Windows cannot."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot either; the file itself is whole
    finally:
        os.close(descriptor)


def append(path, text):
    """Append to a text file. Raises UserError where that fails: a part of the text may then stand there."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise cannot_write(path, error) from error


def append_line(path, record):
    """Append one JSON object as a line to a log."""
    append(path, json.dumps(record) + "\n")


def cannot_write(path, error):
    """The UserError for a file that could not be written."""
    reasons = (getattr(e, "strerror", None) for e in (error, error.__context__))  # torch's own error comes over it
    reason = next(filter(None, reasons), "is the disk full?")
    return UserError(f"cannot write {path} ({reason}): what was saved before is kept; make room or give it leave, then "
                     "give the command again, train.py with --resume")


def hold(path, what):
    """Lock a file for this process until it ends, however it ends; the file is made where there is none.

    Raises UserError where another process holds it, naming `what` the lock is for.
    """
    path = Path(path).absolute()
    if path in _held:
        return
    file = open(path, "a+", encoding="utf-8")
    try:
        for attempt in range(10):  # `is_held` takes it for a moment
            if try_lock(file):
                break
            time.sleep(0.02)
        else:
            file.close()
            raise UserError(f"another process is at work on {what}: wait for its end, or stop it (its lock {path.name} "
                            "ends with it)")
    except OSError as error:  # a file system without locks
        print(f"note: {what} cannot be locked ({error.strerror}): let no other process work on it", file=sys.stderr)
    _held[path] = file


def is_held(path):
    """Whether another process holds a file's lock; None where that cannot be told: on a file system without locks, or
    for a file that may only be read.
    """
    if Path(path).absolute() in _held:
        return False
    try:
        with open(path, "r+", encoding="utf-8") as file:
            return not try_lock(file)
    except FileNotFoundError:
        return False
    except OSError:
        return None
