"""Run folders: whole files under their names, damage told by name, logs cut back."""

import os
from pathlib import Path

import pytest
import torch

import checkpoint
import files
from errors import UserError


def test_what_is_saved_comes_back(tmp_path):
    state = {"model": {"w": torch.arange(6.0)}, "config": {"n_layer": 2, "compile": "auto", "bias": True}, "iter": 3}
    checkpoint.save(tmp_path / "last.pt", state)
    again = checkpoint.load(tmp_path / "last.pt", dict.fromkeys(state, object))
    assert torch.equal(again["model"].pop("w"), state["model"].pop("w")) and again == state
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_save_that_fails_leaves_the_one_before(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"iter": 1})
    with pytest.raises(AttributeError):
        checkpoint.save(tmp_path / "last.pt", {"iter": lambda: 2})  # no checkpoint can hold a function
    assert checkpoint.load(tmp_path / "last.pt", {"iter": int}) == {"iter": 1} and os.listdir(tmp_path) == ["last.pt"]


def test_a_full_disk_is_told_and_leaves_the_one_before(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"iter": 1})
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*last.pt .No space left on device.: what was saved befo"):
        checkpoint.save(tmp_path / "last.pt", {"iter": 2, "model": torch.zeros(100_000)})
    assert checkpoint.load(tmp_path / "last.pt", {"iter": int}) == {"iter": 1} and os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "text"])
def test_a_broken_checkpoint_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, {"model": torch.zeros(1000)})
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "short": whole[:len(whole) // 2], "text": b"hello\n"}[damage])
    with pytest.raises(UserError, match="ckpt.pt"):
        checkpoint.load(path)


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed_or_without_effect(tmp_path):
    path = tmp_path / "ckpt.pt"
    state = {"model": {"w": torch.arange(300.0)}, "config": {"n_layer": 2}}
    checkpoint.save(path, state)
    whole, noticed = path.read_bytes(), 0
    for bit in range(0, 8 * len(whole), 7):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            again = checkpoint.load(path, {})
            assert torch.equal(again["model"]["w"], state["model"]["w"]) and again["config"] == state["config"]
        except UserError as error:
            assert "ckpt.pt is damaged" in str(error)
            noticed += 1
    assert noticed > 1200 * 8 / 7  # at the least where the weights are


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_with_code_in_it_is_refused_and_nothing_is_run(here):
    torch.save({"model": Evil()}, "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt"):
        checkpoint.load("ckpt.pt")
    assert os.listdir() == ["ckpt.pt"]


@pytest.mark.parametrize("state", [{"weights": torch.zeros(3)}, torch.zeros(3), dict.fromkeys(
    checkpoint.HAS, {}) | {"tokens": 0}])
def test_a_foreign_checkpoint_is_refused(here, state):
    torch.save(state, "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt is not a checkpoint of this program"):
        checkpoint.load_model("ckpt.pt")


def test_runs_are_listed_by_their_newest_checkpoint(here):
    with pytest.raises(UserError, match="no trained model under out/"):
        checkpoint.newest_run()
    for name, file, when in [("a", "last.prev.pt", 1), ("a", "ckpt.pt", 4), ("b", "last.pt", 3), ("b", "ckpt.pt", 2),
                             ("c", "last.prev.pt", 5), ("no", "log.jsonl", 6)]:
        path = Path("out", name, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (when, when))
    assert checkpoint.runs() == [Path("out/c"), Path("out/a"), Path("out/b")]
    assert checkpoint.newest_run() == Path("out/c")
    assert [checkpoint.best_in(f"out/{name}").name for name in "abc"] == ["ckpt.pt", "ckpt.pt", "last.prev.pt"]


def test_a_torn_last_line_is_passed_over_and_a_damaged_line_is_named(tmp_path):
    records = [{"kind": "run"}, *({"kind": "step", "iter": i} for i in (1, 2, 3))]
    for record in records:
        files.append_line(tmp_path / "log.jsonl", record)
    files.append(tmp_path / "log.jsonl", '{"kind": "st')
    assert checkpoint.read_log(tmp_path / "log.jsonl") == records
    (tmp_path / "bad.jsonl").write_text('{"kind": "run"}\n' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match="bad.jsonl, line 2 is damaged"):
        checkpoint.read_log(tmp_path / "bad.jsonl")


def test_a_damaged_last_pt_never_takes_the_place_of_the_good_one_before(tmp_path, capsys):
    state = {key: kind() for key, kind in checkpoint.LAST_HAS.items()}
    for update in (1, 2):
        checkpoint.save(tmp_path / "last.pt", state | {"update": update})
    (tmp_path / "last.pt").write_bytes(b"damaged")
    assert checkpoint.load_last(tmp_path)["update"] == 1
    assert "last.pt is damaged" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "last.pt")["update"] == 1 and not (tmp_path / "last.prev.pt").exists()
    (tmp_path / "last.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="last.pt is damaged"):
        checkpoint.load_last(tmp_path)


def test_logs_are_cut_back_to_the_checkpoint(tmp_path):
    log, samples = tmp_path / "log.jsonl", tmp_path / "samples.md"
    files.append_line(log, {"kind": "run"})
    sizes = checkpoint.sizes(tmp_path)
    for text in ('{"kind": "step"}\n', '{"kind": "st'):
        files.append(log, text)
        files.append(samples, "## iteration 3: x\n\nThr")  # there was none yet at the checkpoint
        checkpoint.cut_back(tmp_path, sizes)
        assert log.read_text() == '{"kind": "run"}\n' and samples.read_text() == ""
    log.write_text("short")
    with pytest.raises(UserError, match="log.jsonl is shorter than it was at the last checkpoint: put it back, or mov"):
        checkpoint.cut_back(tmp_path, sizes)
    log.write_text("another\nfile, longer than the log\n")
    with pytest.raises(UserError, match="log.jsonl, line 1 is damaged"):
        checkpoint.cut_back(tmp_path, sizes)
    assert log.read_text() == "another\nfile, longer than the log\n"  # nothing is cut from what is not understood
    log.unlink()
    checkpoint.cut_back(tmp_path, sizes)  # one may go on without it
    assert not log.exists()
