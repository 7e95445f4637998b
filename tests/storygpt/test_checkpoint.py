"""checkpoint.py: atomic saves of what can be loaded, damage that is found when reading, files of other programs."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from storygpt import checkpoint
from storygpt.system.errors import UserError


class OfAReader:
    """An object of a class that `load` does not know."""


OLD = {"model": {}, "iter": 1}


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    checkpoint.save(tmp_path / "last.pt", OLD)
    for value in (OfAReader(), Path("x"), np.float64(2), np.zeros(3), lambda: 2):
        with pytest.raises(UserError, match="last.pt is not saved, because its 'metrics' could not be loaded again"):
            checkpoint.save(tmp_path / "last.pt", OLD | {"iter": 2, "metrics": {"losses": [value]}})
    assert checkpoint.load(tmp_path / "last.pt", {"iter": int}) == OLD and os.listdir(tmp_path) == ["last.pt"]


def test_an_unreadable_checkpoint_is_refused_by_name(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(UserError, match="no checkpoint .*ckpt.pt"):
        checkpoint.load(path)
    checkpoint.save(path, {"model": torch.zeros(1000)})
    for content in (b"", path.read_bytes()[:2000], b"hello\n"):
        path.write_bytes(content)
        with pytest.raises(checkpoint.DamagedCheckpoint, match="ckpt.pt"):
            checkpoint.load(path)
    path.unlink()
    path.mkdir()  # reading a folder fails, as from a broken disk: that is no damage
    with pytest.raises(OSError, match="Is a directory"):
        checkpoint.load(path)


def test_a_flipped_bit_in_a_checkpoint_is_detected_or_has_no_effect(tmp_path):
    path = tmp_path / "ckpt.pt"
    state = {"model": {"w": torch.arange(300.0)}, "config": {"n_layer": 2}}
    checkpoint.save(path, state)
    content, detected = path.read_bytes(), 0
    for bit in range(0, 8 * len(content), 61):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            loaded = checkpoint.load(path, {"model": dict})
            assert torch.equal(loaded["model"]["w"], state["model"]["w"]) and loaded["config"] == state["config"]
        except checkpoint.DamagedCheckpoint as error:
            assert "ckpt.pt is damaged" in str(error)
            detected += 1
    assert detected > 1200 * 8 / 61  # at least every flipped bit in the 1,200 bytes of weights


class Malicious:
    """An object that, when unpickled carelessly, runs code: it creates the folder `evil`."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_code_in_a_checkpoint_is_refused_and_not_run(here):
    torch.save({"model": Malicious()}, "ckpt.pt")
    with pytest.raises(checkpoint.DamagedCheckpoint, match="ckpt.pt"):
        checkpoint.load("ckpt.pt")
    assert os.listdir() == ["ckpt.pt"]


def test_a_checkpoint_of_another_program_is_refused(here):
    no_model = dict.fromkeys(checkpoint.REQUIRED_KEYS, {}) | {"tokens": 0}
    for state in ({"weights": torch.zeros(3)}, torch.zeros(3), no_model):
        torch.save(state, "ckpt.pt")
        with pytest.raises(UserError, match="ckpt.pt (is not a checkpoint|does not fit this version)"):
            checkpoint.load_model("ckpt.pt")
