"""Run folders: whole files under their names, damage told by name, logs cut back."""

import json
import os

import pytest
import torch

import checkpoint
from errors import UserError


def test_what_is_saved_comes_back(tmp_path):
    state = {"model": {"w": torch.arange(6.0)}, "config": {"n_layer": 2, "compile": "auto", "bias": True}, "iter": 3}
    checkpoint.save(tmp_path / "last.pt", state)
    again = checkpoint.load(tmp_path / "last.pt", needed=state)
    assert torch.equal(again["model"].pop("w"), state["model"].pop("w")) and again == state
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_save_that_fails_leaves_the_one_before(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"iter": 1})
    with pytest.raises(AttributeError):
        checkpoint.save(tmp_path / "last.pt", {"iter": lambda: 2})  # no checkpoint can hold a function
    assert checkpoint.load(tmp_path / "last.pt", ["iter"]) == {"iter": 1} and os.listdir(tmp_path) == ["last.pt"]


def test_a_full_disk_is_told_and_leaves_the_one_before(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"iter": 1})
    (tmp_path / "last.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*last.pt .*what was there before is kept"):
        checkpoint.save(tmp_path / "last.pt", {"iter": 2, "model": torch.zeros(100_000)})
    assert checkpoint.load(tmp_path / "last.pt", ["iter"]) == {"iter": 1} and os.listdir(tmp_path) == ["last.pt"]


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


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_with_code_in_it_is_refused_and_nothing_is_run(here):
    torch.save({"model": Evil()}, "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt"):
        checkpoint.load("ckpt.pt")
    assert os.listdir() == ["ckpt.pt"]


@pytest.mark.parametrize("state", [{"weights": torch.zeros(3)}, torch.zeros(3), dict.fromkeys(
    ("model", "model_config", "config", "tokens", "figures"), {})])
def test_a_foreign_checkpoint_is_refused(here, state):
    torch.save(state, "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt is not a checkpoint of this program"):
        checkpoint.load_model("ckpt.pt")


def test_newest_run_is_that_of_the_newest_checkpoint(here):
    with pytest.raises(UserError, match="no trained model under out/"):
        checkpoint.newest_run()
    for age, name in enumerate(["b/ckpt.pt", "a/last.pt", "c/ckpt.pt"]):
        (here / "out" / name).parent.mkdir(parents=True)
        (here / "out" / name).touch()
        os.utime(here / "out" / name, (1000 - age, 1000 - age))
    assert checkpoint.newest_run().name == "b"
    assert checkpoint.best_in("out/b").name == "ckpt.pt" and checkpoint.best_in("out/a").name == "last.pt"


def test_a_torn_last_line_is_passed_over_and_logs_are_cut_back(tmp_path):
    records = [{"kind": "run"}, *({"kind": "step", "iter": i} for i in (1, 2, 3)), {"kind": "eval", "iter": 2},
               {"kind": "eval", "iter": 3}]
    for record in records:
        checkpoint.append_line(tmp_path / "log.jsonl", record)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "st')
    assert checkpoint.read_log(tmp_path / "log.jsonl") == records
    (tmp_path / "bad.jsonl").write_text('{"kind": "run"}\ngarbage\n')
    with pytest.raises(UserError, match="bad.jsonl, line 2 is damaged"):
        checkpoint.read_log(tmp_path / "bad.jsonl")
    kept = "mine\n## iteration 2: x\n\nTwo ## iteration 9\n\n"
    (tmp_path / "samples.md").write_text(kept + "## iteration 3: x\n\nThree\n\n")
    checkpoint.cut_back(tmp_path, iteration=3, evaluated=2)
    assert checkpoint.read_log(tmp_path / "log.jsonl") == records[:-1]
    assert (tmp_path / "log.jsonl").read_text() == "".join(json.dumps(r) + "\n" for r in records[:-1])
    assert (tmp_path / "samples.md").read_text() == kept
