"""Reading UTF-8 text, atomic writes, appends with clear errors, and locks that one process holds at a time."""

import codecs
import json
import os
import platform
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from storygpt.system.errors import UserError

RENAME_SECONDS = 5  # for another process to close the file, on Windows
# The first bytes of gzip, zip (also .docx), bzip2, xz, zstd, Parquet, PDF and .doc files.
NOT_TEXT = (b"\x1f\x8b", b"PK\3\4", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PAR1", b"%PDF", b"\xd0\xcf\x11\xe0")
_locked = {}  # path → the open file whose lock this process has: it must stay open


def atomic_write(path, write, previous=None):
    """Replace the file at `path` atomically: readers see the old file or the complete new one.

    `write(file)` writes the content to a binary file. With `previous`, the old file is kept under that name; between
    the two renames only that one exists. Raises UserError if the file cannot be written, as on a full disk: the old
    file is then still there.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with write_errors(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file under the name
            if previous and path.exists():
                rename(path, previous)
            rename(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def rename(source, target):
    """Rename a file or folder, replacing a file that has the new name.

    Windows refuses that while another process has one of the two open (sample.py, a virus scanner): the call then tries
    again for RENAME_SECONDS. Raises OSError if it fails.
    """
    deadline = time.monotonic() + RENAME_SECONDS
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if platform.system() != "Windows" or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def sync_folder(folder):
    """Flush a folder's entries to the disk, where the system can do that: not on Windows and some network disks."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def open_text(path):
    """Open a UTF-8 text file for reading, with or without a byte-order mark and with line ends of any system.

    Raises UserError if it cannot be opened, or with its likely encoding if it is not UTF-8, also while it is read.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            start = file.buffer.peek()
            if start.count(0) > len(start) // 10:  # UTF-16 without a byte-order mark may be valid UTF-8
                raise UnicodeDecodeError("utf-8", start, 0, 1, "it has NUL bytes")
            yield file
    except UnicodeDecodeError as error:
        if error.object.startswith(NOT_TEXT):
            raise UserError(f"{path} is not text but compressed, or a document: unpack or convert it") from error
        encoding = likely_encoding(error.object)
        unsure = ", if it is Western European text from Windows" * (encoding == "cp1252")
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): convert it, for example with  "
                        f"iconv -f {encoding} -t utf-8 OLD > NEW{unsure}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def likely_encoding(data):
    """The most likely encoding of bytes that are not UTF-8 text, as iconv calls it."""
    for mark, encoding in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
                           (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if data.startswith(mark):
            return encoding
    even, odd = data[::2].count(0), data[1::2].count(0)
    if even + odd <= len(data) // 10:
        return "cp1252"
    # Of a Latin letter's bytes, all are 0 but the first (little-endian) or the last.
    return ("utf-32" if min(even, odd) > len(data) // 8 else "utf-16") + ("le" if odd > even else "be")


def append(path, text):
    """Append to a text file. Raises UserError if that fails; part of the text may have been written then."""
    with write_errors(path), open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(text)


def append_line(path, record):
    """Append one JSON object as a line to a log; values of numpy and torch as numbers, others as text."""
    append(path, json.dumps(record, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x)) + "\n")


@contextmanager
def write_errors(path):
    """Raise UserError if the system reports an error while a file is written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if "inline_container.cc" in str(error):  # torch's zip writer hides what file.write raised, which may be Ctrl-C
            error = error.__context__ or error
        if not isinstance(error, OSError):
            raise error
        reason = error.strerror or str(error)
        if isinstance(error, PermissionError) and platform.system() == "Windows":
            reason += ": another program may have it open"
        raise UserError(f"cannot write {path} ({reason}): what was saved before is intact; free some space or fix the "
                        "permissions, then run the command again (train.py with --resume)") from error


def acquire_lock(path, name):
    """Lock a file, which is created if needed, until this process ends, however it ends.

    `name` says in messages what the lock protects. Raises UserError if another process has the lock.
    """
    path = Path(path).absolute()
    if path in _locked:
        return
    file = open(path, "a")
    for _ in range(10):  # `is_locked` takes the lock for a moment
        if not (taken := lock_or_taken(file)):
            break
        time.sleep(0.02)
    if taken:
        raise UserError(f"another process is using {name}: wait until it ends, or stop it (its lock {path.name} is "
                        "released when it ends)")
    if taken is None:
        print(f"note: no locks on this file system: make sure that no other process uses {name}", file=sys.stderr)
    _locked[path] = file


def is_locked(path):
    """Whether another process has the lock; None if that is unknown (no locks on this file system, or read-only)."""
    if Path(path).absolute() in _locked:  # opening and closing it again would release the lock
        return False
    try:
        with open(path, "r+") as file:
            return lock_or_taken(file)
    except OSError as error:
        return False if isinstance(error, FileNotFoundError) else None


def lock_or_taken(file):
    """Lock an open file until it is closed, or return True if another process has the lock; None if there are no locks.

    The `filelock` package is not used: several of its versions delete the file when they release a lock, so that two
    processes could lock two files of that name, and it cannot tell whether a file is locked without creating it.
    """
    try:
        if platform.system() == "Windows":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # depending on the system
        return True
    except OSError:
        return None
    return False
