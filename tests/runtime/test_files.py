"""Atomic writes, appends and locks."""

import os
import signal
import subprocess
import sys

import pytest

from conftest import ROOT
from runtime import files
from runtime.errors import UserError


def test_atomic_write_replaces_a_file_and_keeps_the_previous_one(tmp_path):
    path, previous = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    for text in (b"one", b"two", b"three"):
        files.atomic_write(path, lambda file: file.write(text), previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"three", b"two")
    assert sorted(os.listdir(tmp_path)) == ["last.prev.pt", "last.pt"]


def test_a_failed_atomic_write_leaves_both_files(tmp_path):
    path, previous = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    for text in (b"one", b"two"):
        files.atomic_write(path, lambda file: file.write(text), previous)

    def fail(file):
        file.write(b"thr")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with pytest.raises(UserError, match=r"cannot write .*last.pt \(is the disk full\?\): what was saved"):
        files.atomic_write(path, fail, previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"two", b"one") and len(os.listdir(tmp_path)) == 2


def test_a_failed_append_names_the_file(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*log.jsonl \(No space left on device\).*--resume"):
        files.append_line(tmp_path / "log.jsonl", {"kind": "step"})


def test_is_locked_does_not_keep_others_from_locking(tmp_path):
    path = tmp_path / ".lock"
    path.touch()
    code = (f"from runtime import files\nprint('started', flush=True)\n"
            f"while True: files.is_locked({str(path)!r})")
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "started\n"
    try:
        for _ in range(30):
            files.acquire_lock(path, "out/x")
            files._locked.pop(path).close()
    finally:
        other.kill()
        other.communicate()


def test_a_lock_excludes_other_processes_until_its_owner_ends(tmp_path):
    path = tmp_path / ".lock"
    code = (f"import time; from runtime import files; files.acquire_lock({str(path)!r}, 'out/x'); "
            "print('locked', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    assert files.is_locked(path)
    with pytest.raises(UserError, match="another process is using out/x"):
        files.acquire_lock(path, "out/x")
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert files.is_locked(path) is False and files.is_locked(tmp_path / "none") is False
    assert not (tmp_path / "none").exists()
    files.acquire_lock(path, "out/x")
    files.acquire_lock(path, "out/x")  # a process may lock a file again
    assert files.is_locked(path) is False  # by another process
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "another process is using out/x" in again.stderr  # is_locked has not released the lock
