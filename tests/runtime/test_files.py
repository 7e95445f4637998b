"""Files: whole under their names, appended to or named in an error, held by one process at a time."""

import os
import signal
import subprocess
import sys

import pytest

import files
from conftest import ROOT
from errors import UserError


def test_a_file_is_replaced_and_the_one_before_kept(tmp_path):
    path, previous = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    for text in (b"one", b"two", b"three"):
        files.replace(path, lambda file: file.write(text), previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"three", b"two")
    assert sorted(os.listdir(tmp_path)) == ["last.prev.pt", "last.pt"]


def test_a_write_that_fails_leaves_both(tmp_path):
    path, previous = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    for text in (b"one", b"two"):
        files.replace(path, lambda file: file.write(text), previous)

    def fail(file):
        file.write(b"thr")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with pytest.raises(UserError, match=r"cannot write .*last.pt \(is the disk full\?\): what was saved"):
        files.replace(path, fail, previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"two", b"one") and len(os.listdir(tmp_path)) == 2


def test_a_line_that_cannot_be_appended_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*log.jsonl \(No space left on device\).*--resume"):
        files.append_line(tmp_path / "log.jsonl", {"kind": "step"})


def test_asking_whether_a_lock_is_held_keeps_nobody_from_it(tmp_path):
    path = tmp_path / ".lock"
    path.touch()
    code = f"import files\nprint('asking', flush=True)\nwhile True: files.is_held({str(path)!r})"
    asking = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert asking.stdout.readline() == "asking\n"
    try:
        for _ in range(30):
            files.hold(path, "it")
            files._held.pop(path).close()
    finally:
        asking.kill()
        asking.communicate()


def test_a_lock_keeps_other_processes_out_and_dies_with_its_owner(tmp_path):
    path = tmp_path / ".lock"
    code = f"import files, time; files.hold({str(path)!r}, 'it'); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    assert files.is_held(path)
    with pytest.raises(UserError, match="another process is at work on out/x"):
        files.hold(path, "out/x")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert files.is_held(path) is False and files.is_held(tmp_path / "none") is False
    assert not (tmp_path / "none").exists()
    files.hold(path, "out/x")
    files.hold(path, "out/x")  # one's own lock is no hindrance
    assert files.is_held(path) is False  # by another process; asking does not give the lock away
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "another process is at work on it" in again.stderr
