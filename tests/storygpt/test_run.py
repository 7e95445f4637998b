"""run.py: finding, opening, resuming and replacing runs, their logs, init_from."""

import json
import os
import shutil
import types
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

import train
from conftest import TINY, load_last, records
from model import GPT, GPTConfig
from storygpt import checkpoint, run
from storygpt.corpus.dataset import with_checksum
from storygpt.settings import Config, apply_overrides
from storygpt.system import files
from storygpt.system.errors import UserError

NEW_RUN = types.SimpleNamespace(**{"resume": False, "resume=auto": False, "overwrite": False})  # no actions


@pytest.fixture
def in_trained(trained, monkeypatch):
    """The folder with the run out/tiny, which is the current folder during the test. Read-only."""
    monkeypatch.chdir(trained)
    return trained


# ---- the files of a run ----


def test_runs_are_listed_by_their_newest_checkpoint(here, fails):
    assert "no trained model under out/" in fails(train.main, ["--resume"])
    assert "no checkpoint out/x/last.pt" in fails(train.main, ["--resume", "--out_dir=out/x"])
    for name, file, when in [("a", "last.prev.pt", 1), ("a", "ckpt.pt", 4), ("b", "last.pt", 3), ("b", "ckpt.pt", 2),
                             ("c", "last.prev.pt", 5), ("no", "log.jsonl", 6), ("sweep/d", "ckpt.pt", 0)]:
        path = Path("out", name, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (when, when))
    assert run.list_runs() == [Path("out/c"), Path("out/a"), Path("out/b"), Path("out/sweep/d")]
    assert run.newest_run() == Path("out/c")
    assert [run.best_checkpoint(f"out/{name}").name for name in "abc"] == ["ckpt.pt", "ckpt.pt", "last.prev.pt"]


@pytest.mark.parametrize("name, is_hub_name", [
    ("gpt2", True), ("gpt2-large", True), ("distilgpt2", True), ("openai-community/gpt2", True), ("out/none", False),
    ("runs/empty", False), ("none", False), ("../none", False), ("a/b/c", False), ("a/my model", False)])
def test_a_model_of_the_hub_in_place_of_a_run_is_imported_first(here, name, is_hub_name):
    Path("runs/empty").mkdir(parents=True)
    with pytest.raises(UserError) as raised:
        run.best_checkpoint(name)
    assert str(raised.value).startswith(f"no checkpoint in {name}: train a model first, or name the folder of another ")
    assert (f"python -m tools.hf import {name} out/{Path(name).name}" in str(raised.value)) == is_hub_name


def test_a_damaged_last_pt_is_kept_beside_and_never_replaces_the_good_one_before_it(tmp_path, capsys):
    last, previous = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    state = {key: kind() for key, kind in checkpoint.LAST_REQUIRED_KEYS.items()}
    for step in (1, 2):
        checkpoint.save(last, state | {"step": step})
    good = previous.read_bytes()
    flipped = bytearray(last.read_bytes())
    flipped[len(flipped) // 2] ^= 4
    last.write_bytes(flipped)
    assert run.load_resume_checkpoint(tmp_path)["step"] == 1
    assert "last.pt is missing or damaged: resuming from" in capsys.readouterr().err
    assert last.read_bytes() == good and not previous.exists()
    assert (tmp_path / "last.damaged.pt").read_bytes() == flipped
    last.rename(previous)  # now last.pt is missing
    assert run.load_resume_checkpoint(tmp_path)["step"] == 1 and last.read_bytes() == good
    last.rename(previous)
    last.mkdir()  # reading a folder fails, as from a broken disk: then last.pt is not replaced
    with pytest.raises(OSError, match="Is a directory"):
        run.load_resume_checkpoint(tmp_path)
    assert last.is_dir() and previous.read_bytes() == good


def test_an_incomplete_last_log_line_is_ignored_and_a_damaged_line_is_named(tmp_path):
    records = [{"kind": "run"}, *({"kind": "step", "iter": i} for i in (1, 2, 3))]
    for record in records:
        files.append_line(tmp_path / "log.jsonl", record)
    files.append(tmp_path / "log.jsonl", '{"kind": "st')
    assert run.read_log(tmp_path / "log.jsonl") == records
    (tmp_path / "bad.jsonl").write_text('{"kind": "run"}\n' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match="bad.jsonl, line 2 is damaged"):
        run.read_log(tmp_path / "bad.jsonl")


def test_logs_are_truncated_to_their_sizes_at_the_checkpoint(tmp_path):
    log, samples = tmp_path / "log.jsonl", tmp_path / "samples.md"
    log.write_text('{"kind": "run"}\n')
    sizes = run.flush_logs(tmp_path)
    for text in ('{"kind": "step"}\n', '{"kind": "st'):
        files.append(log, text)
        files.append(samples, "## iteration 3: x\n\nThr")  # did not exist at the checkpoint
        run.truncate_logs(tmp_path, sizes)
        assert log.read_text() == '{"kind": "run"}\n' and samples.read_text() == ""
    log.write_text("short")
    with pytest.raises(UserError, match="log.jsonl is shorter than at the last checkpoint: restore it, or move it"):
        run.truncate_logs(tmp_path, sizes)
    log.write_text("another\nfile, longer than the log\n")
    with pytest.raises(UserError, match="log.jsonl, line 1 is damaged"):
        run.truncate_logs(tmp_path, sizes)
    assert log.read_text() == "another\nfile, longer than the log\n"  # a file of unknown content is not truncated
    log.unlink()
    run.truncate_logs(tmp_path, sizes)  # resuming without it is allowed
    assert not log.exists()


# ---- resuming ----


def test_the_optimizer_is_fused_as_this_machine_does_it(in_trained):
    """As when a run on MPS is resumed on a CPU."""
    last = load_last("out/tiny")
    for optimizer in last["optimizers"]:
        for group in optimizer["param_groups"]:
            group["fused"] = False
    cfg, device = Config(**last["config"]), torch.device("cpu")
    model = GPT(GPTConfig(**last["model_config"]))
    state = run.TrainState(cfg, None, model, torch.amp.GradScaler("cpu"), device, torch.float32, 4,
                           optimizers=train.make_optimizers(model, cfg))
    state.restore(last)
    assert {group["fused"] for optimizer in state.optimizers for group in optimizer.param_groups} == {True}


CHANGEABLE_ON_RESUME = {"out_dir", "max_iters", "max_tokens", "max_minutes", "eval_interval", "log_interval",
                        "checkpoint_minutes", "device", "dtype", "compile", "device_batch_size"}


def test_exactly_these_settings_may_change_when_a_run_is_resumed(capsys):
    stored = asdict(Config(max_minutes=5.0))
    for name, value in stored.items():
        refused = pytest.raises(UserError, match=f"^{name} = 'another value' cannot change when a run is resumed")
        with nullcontext() if name in CHANGEABLE_ON_RESUME else refused:
            run.check_resume_settings(stored, stored | {name: "another value"}, {})
            assert capsys.readouterr().out == f"changed: {name} is now 'another value', was {value!r}\n"


def test_resuming_refuses_another_unit_of_length_and_a_longer_run_at_learning_rate_0():
    minutes, iterations = asdict(Config(max_minutes=5.0)), asdict(Config(max_iters=4000, min_lr=0.0))
    for stored, flags in [(minutes, {"max_iters": 9000}), (minutes, {"max_tokens": 10**9}),
                          (iterations, {"max_minutes": 1.0})]:
        now = asdict(Config(**apply_overrides(stored, flags)))
        with pytest.raises(UserError, match="length of a run with max_minutes can be changed by --max_minutes only"):
            run.check_resume_settings(stored, now, {})
    for flags in ({"max_iters": 6000}, {"max_tokens": 10**9}):
        now = asdict(Config(**apply_overrides(iterations, flags)))
        with pytest.raises(UserError, match="the learning rate is 0 from iteration 4000 on"):
            run.check_resume_settings(iterations, now, {})
    shorter = asdict(Config(**apply_overrides(iterations, {"max_iters": 2000})))
    run.check_resume_settings(iterations, shorter, {})
    run.check_resume_settings(shorter, iterations, {})  # back to the length of its schedule


def test_resuming_refuses_other_data_under_the_same_name_and_other_settings(trained, here, fails):
    for name in ("data", "out"):
        shutil.copytree(trained / name, name)
    resume = ["--resume", "--out_dir=out/tiny", "--max_iters=30"]
    assert fails(train.main, [*resume, "--dropout=0.3"]).startswith("error: dropout = 0.3 cannot change")
    path = Path("data/nursery-bpe300/meta.json")
    meta = json.loads(path.read_text())
    meta["splits"]["train"]["sha256"] = "of other tokens"
    path.write_text(json.dumps(with_checksum(meta)))
    assert "is not the data that out/tiny was trained on" in fails(train.main, resume)


def test_resuming_refuses_a_checkpoint_that_does_not_fit_the_run(with_data, fails):
    train.main([*TINY, "--max_iters=2", "--out_dir=out/x"])
    state = load_last("out/x")
    for part in ({"optimizers": []}, {"model": {}}, {"config": state["config"] | {"n_heads": 2}}):
        checkpoint.save("out/x/last.pt", state | part)
        line = fails(train.main, ["--resume", "--out_dir=out/x", "--max_iters=4"])
        assert "out/x/last.pt does not fit this version of the program: use the version that saved it" in line


# ---- starting a run ----


def test_init_from_starts_a_new_run_from_the_weights_of_another(with_data, fails, capsys):
    import prepare
    train.main([*TINY, "--out_dir=out/old", "--max_iters=8", "--n_layer=1", "--n_head=4", "--n_embd=32",
                "--bias=False"])
    old = checkpoint.load("out/old/ckpt.pt")
    old["model"]["transformer.wte.weight"].normal_(std=0.02)  # also of tokens that do not occur in the data
    checkpoint.save("out/old/ckpt.pt", old)
    words = [word for word in TINY if not word.startswith(("--n_", "--block_size"))]
    train.main([*words, "--init_from=out/old", "--out_dir=out/new", "--max_iters=2", "--learning_rate=1e-9",
                "--min_lr=0", "--block_size=8", "--dropout=0.3"])  # a shorter block and another dropout are allowed
    assert "starting from the weights of out/old, trained on 512 tokens" in capsys.readouterr().out
    new = checkpoint.load("out/new/last.pt")
    assert new["model_config"] == old["model_config"] | {"block_size": 8, "dropout": 0.3} and new["tokens"] == 64
    old["model"]["transformer.wpe.weight"] = old["model"]["transformer.wpe.weight"][:8]
    torch.testing.assert_close(new["model"], old["model"])

    other_run = [*TINY, "--out_dir=out/y"]
    same_architecture = ["--init_from=out/old", "--n_layer=1", "--n_head=4", "--n_embd=32", "--bias=False"]
    for words, message in [
        ([*same_architecture, "--n_embd=16"], "n_embd = 16 differs from that of init_from = 'out/old', 32"),
        ([*same_architecture, "--block_size=32"], "block_size = 32 differs from that of"),
        (["--init_from=out/none"], "no checkpoint in out/none: train a model first, or name the folder of another run"),
        (["--init_from=gpt2-xl"], "hub with python -m tools.hf import gpt2-xl out/gpt2-xl"),
        ([*same_architecture, "--out_dir=out/old", "--overwrite"], "is also the folder of the new run"),
    ]:
        assert message in fails(train.main, [*other_run, *words])
    prepare.main(["nursery", "--tokenizer", "bpe:310", "--max_stories", "60"])
    assert "different tokenizer from init_from = 'out/old'" in fails(
        train.main, [*other_run, *same_architecture, "--dataset=nursery-bpe310"])
    assert not Path("out/y").exists()


def test_init_from_takes_every_field_of_the_architecture(in_trained):
    settings = {"dataset": "nursery-bpe300", "out_dir": "out/new", "init_from": "out/tiny"}
    cfg, resumed, source = run.open_run(settings, {"warmup_iters": 1}, NEW_RUN, world_size=1)
    assert resumed is None and source["model"].keys() == checkpoint.load("out/tiny/ckpt.pt")["model"].keys()
    architecture = {f.name for f in fields(GPTConfig)} - {"vocab_size", "dropout"}
    assert architecture < asdict(cfg).keys()
    for name in architecture:
        value = source["model_config"][name]
        assert getattr(cfg, name) == value
        other = {"bias": not value, "gelu": "exact", "architecture": "modern"}.get(name, 2 * value)
        with pytest.raises(
                UserError, match=f"^{name} = {other!r} differs from that of init_from = 'out/tiny', {value!r}"):
            run.open_run(settings | {name: other}, {"warmup_iters": 1}, NEW_RUN, world_size=1)


def contents(folder):
    """The content of each file in a folder except the lock, name → bytes."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def test_overwrite_replaces_a_run_once_the_new_one_has_done_a_step(with_data, monkeypatch, capsys, fails):
    words, forward_backward = [*TINY, "--max_iters=2", "--out_dir=out/x"], train.forward_backward
    train.main(words)
    Path("out/x/last.damaged.pt").touch()
    Path("out/x/notes.txt").write_text("mine")
    before = contents("out/x")
    assert "out/x already contains a run: resume it (--resume), replace it" in fails(train.main, words)
    assert contents("out/x") == before

    def fail(state, *args):
        if failure == "exception":
            raise RuntimeError("shapes cannot be multiplied")
        loss = forward_backward(state, *args)
        if failure == "gradient":
            state.model.transformer.wte.weight.grad[0, 0] = float("nan")
        return loss * float("nan") if failure == "loss" else loss

    monkeypatch.setattr(train, "forward_backward", fail)
    for failure, error, message in [("exception", RuntimeError, "shapes cannot be multiplied"),
                                    ("loss", SystemExit, "the loss is nan at iteration 2"),
                                    ("gradient", SystemExit, "the gradient norm is nan at iteration 2")]:
        with pytest.raises(error) as raised:
            train.main([*words, "--overwrite", "--seed=3"])
        assert message in f"{raised.value} {capsys.readouterr().err}" and contents("out/x") == before

    failure = None
    train.main([*words, "--overwrite", "--seed=3"])
    first, = records("out/x", "run")
    assert first["seed"] == 3 and Path("out/x/notes.txt").read_text() == "mine"
    assert contents("out/x").keys() == before.keys() - {"last.damaged.pt"}
