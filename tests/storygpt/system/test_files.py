"""Atomic writes, appends and locks."""

import errno
import io
import multiprocessing
import os
import platform
import signal
import sys
import types
from contextlib import nullcontext

import pytest
import torch

from faults.processes import run
from storygpt.system import files
from storygpt.system.errors import UserError


class FailingFile(io.BytesIO):
    """A file whose write fails after some bytes: torch.save then raises an error of its own."""

    def __init__(self, error, size=500):
        super().__init__()
        self.error, self.left = error, size

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise self.error
        return super().write(data)


class FailsToPickle:
    """What torch.save cannot save."""

    def __reduce__(self):
        raise DEVICE_ERROR


FULL = OSError(errno.ENOSPC, "No space left on device")
DEVICE_ERROR = torch.AcceleratorError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("write, expected", [
    (lambda file: FailingFile(FULL, 0).write(b"x"), None),
    (lambda file: torch.save({"weight": torch.zeros(10**4)}, FailingFile(FULL)), None),
    (lambda file: torch.save({"weight": torch.zeros(10**4)}, FailingFile(KeyboardInterrupt())), KeyboardInterrupt),
    (lambda file: torch.save({"weight": FailsToPickle()}, file), type(DEVICE_ERROR)),
    (lambda file: torch.zeros(2) @ torch.zeros(3), RuntimeError),
], ids=["disk full", "disk full, hidden by torch", "Ctrl-C, hidden by torch", "device", "bug"])
def test_an_atomic_write_keeps_the_previous_file_and_both_if_it_fails(tmp_path, write, expected):
    """And it reports only errors of the system."""
    path, previous = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    for text in (b"zero", b"one", b"two"):
        files.atomic_write(path, lambda file: file.write(text), previous)
    with pytest.raises(BaseException) as raised:
        files.atomic_write(path, lambda file: (file.write(b"thr"), write(file)), previous)
    assert raised.type is (expected or UserError)
    if not expected:
        assert f"cannot write {path} (No space left on device): what was saved before is intact" in str(raised.value)
    assert (path.read_bytes(), previous.read_bytes()) == (b"two", b"one") and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("system, refusals, error", [
    ("Windows", 3, ""), ("Windows", 10**9, "Access is denied: another program may have it open"),
    ("Linux", 1, "Access is denied")])
def test_renaming_waits_on_windows_while_another_process_has_the_file_open(
        monkeypatch, tmp_path, system, refusals, error):
    path, replace, refused = tmp_path / "ckpt.pt", os.replace, []

    def refuse_at_first(source, target):
        if len(refused) < refusals:
            refused.append(source)
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    path.write_bytes(b"one")
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(os, "replace", refuse_at_first)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(files, "RENAME_SECONDS", 0.01 if refusals > 3 else 60)
    with pytest.raises(UserError, match=rf"ckpt.pt \({error}\): what was saved") if error else nullcontext():
        files.atomic_write(path, lambda file: file.write(b"two"))
    assert (len(refused) > 1) == (system == "Windows")
    assert path.read_bytes() == (b"one" if error else b"two") and os.listdir(tmp_path) == ["ckpt.pt"]


def test_a_failed_append_names_the_file(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*log.jsonl \(No space left on device\).*--resume"):
        files.append_line(tmp_path / "log.jsonl", {"kind": "step"})


def lock_and_wait(path, locked):
    """What another process does until it is killed."""
    files.acquire_lock(path, "out/x")
    locked.set()
    signal.pause()


def test_a_lock_excludes_other_processes_until_its_owner_ends(tmp_path, monkeypatch):
    path, context = tmp_path / ".lock", multiprocessing.get_context("fork")
    locked = context.Event()
    other = context.Process(target=lock_and_wait, args=(path, locked), daemon=True)
    other.start()
    assert locked.wait(60) and files.is_locked(path)
    with pytest.raises(UserError, match="another process is using out/x"):
        files.acquire_lock(path, "out/x")
    monkeypatch.setattr(files.time, "sleep", lambda seconds: (other.kill(), other.join()))
    files.acquire_lock(path, "out/x")  # waits a moment and tries again, as `is_locked` has the lock for a moment
    assert other.exitcode == -signal.SIGKILL
    files.acquire_lock(path, "out/x")  # a process may lock a file again
    assert files.is_locked(path) is False  # by another process
    _, out, _ = run(lambda argv: (files._locked.clear(), print(files.is_locked(path))), [])
    assert out == "True\n"  # is_locked has not released the lock
    files._locked.pop(path).close()
    assert files.is_locked(path) is files.is_locked(tmp_path / "none") is (tmp_path / "none").exists() is False


def test_windows_locks_one_byte(monkeypatch, tmp_path):
    calls = []

    def windows_locking(descriptor, mode, size):
        calls.append((mode, size))
        if len(calls) > 1:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=windows_locking, LK_NBLCK=2))
    with open(tmp_path / "lock", "a") as file:
        assert [files.lock_or_taken(file) for _ in range(2)] == [False, True]
    assert calls == [(2, 1), (2, 1)]


def test_a_file_system_without_locks_is_a_note(monkeypatch, tmp_path, capsys):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    files.acquire_lock(tmp_path / ".lock", "out/x")
    assert capsys.readouterr().err.startswith("note: no locks on this file system: make sure that no other process us")
    assert files.is_locked(tmp_path / ".lock") is False  # by another process, as far as this one knows
    files._locked.pop(tmp_path / ".lock").close()
    assert files.is_locked(tmp_path / ".lock") is None


def test_a_few_nul_bytes_do_not_make_text_utf_16(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One." * 100 + b"\0")
    with files.open_text(tmp_path / "a.txt") as file:
        assert file.read().endswith("\0")  # reported by its reader
    assert files.likely_encoding(b"caf\xe9" * 99 + b"\0") == "cp1252"
