"""train.py: what an update sees and computes, the logs, the checkpoints, stopping and going on."""

import functools
import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import train
from config import Config, read_recipe
from conftest import ROOT, TINY, launch
from dataset import Split, TrainingOrder, evaluation_windows, seal
from model import GPT, GPTConfig


def weights(out_dir, name="last.pt"):
    return checkpoint.load(Path(out_dir, name))["model"]


def same(a, b):
    """Whether two dicts of weights are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def records(out_dir, kind):
    return [r for r in checkpoint.read_log(Path(out_dir, "log.jsonl")) if r["kind"] == kind]


def test_the_run_folder_is_complete_in_itself(trained):
    run, data = trained / "out/tiny", trained / "data/nursery-bpe300"
    assert sorted(os.listdir(run)) == [".lock", "ckpt.pt", "last.prev.pt", "last.pt", "log.jsonl", "meta.json",
                                       "samples.md", "tokenizer.tiktoken"]
    for name in ("meta.json", "tokenizer.tiktoken"):
        assert (run / name).read_bytes() == (data / name).read_bytes()


def test_the_model_learns(trained):
    losses = [r["loss"] for r in records(trained / "out/tiny", "step")]
    assert abs(losses[0] - math.log(300)) < 0.15 and losses[-1] < losses[0] - 0.5


def test_log_has_the_run_its_steps_and_its_evaluations(trained):
    (run,), steps, evals = (records(trained / "out/tiny", kind) for kind in ("run", "step", "eval"))
    meta = json.loads((trained / "data/nursery-bpe300/meta.json").read_text())
    assert Config(**run["config"]).max_iters == 24 and run["seed"] == 1337 and run["torch"] == torch.__version__
    assert run["data_sha256"] == {split: meta["splits"][split]["sha256"] for split in ("train", "validation")}
    assert {"git", "device", "dtype", "python", "parameters"} <= run.keys()
    # An update is two iterations of 4 * 16 tokens; every fourth iteration is logged, and the first update.
    assert [r["iter"] for r in steps] == [2, 4, 8, 12, 16, 20, 24]
    assert all(r["update"] == r["iter"] / 2 and r["tokens"] == r["iter"] * 64 for r in steps)
    windows = (meta["splits"]["train"]["tokens"] - 16) // 16
    assert all(r["epoch"] == pytest.approx(r["tokens"] / (windows * 16)) for r in steps)
    assert all(r["lr"] == pytest.approx(train.learning_rate(r["iter"] - 2, Config(**run["config"]))) for r in steps)
    assert all(r["grad_norm"] > 0 and r["tokens_per_s"] > 0 for r in steps)
    assert [r["iter"] for r in evals] == [8, 16, 24]
    figures = meta["splits"]["validation"]
    for r in evals:
        assert r["val_bpb"] == pytest.approx(r["val_loss"] * figures["tokens"] / figures["bytes"] / math.log(2))
    seconds = [r["seconds"] for r in checkpoint.read_log(trained / "out/tiny/log.jsonl")[1:]]
    assert seconds == sorted(seconds)


def test_ckpt_is_the_best_and_says_what_it_is(trained):
    state = checkpoint.load(trained / "out/tiny/ckpt.pt")
    best = min(records(trained / "out/tiny", "eval"), key=lambda r: r["val_loss"])
    assert state["iter"] == best["iter"] and state["figures"]["val_loss"] == best["val_loss"]
    assert "optimizer" not in state and state["model_config"]["vocab_size"] == 300
    assert state["model"].keys() == {name for name, _ in GPT(GPTConfig(**state["model_config"])).named_parameters()}


def test_a_loss_that_rises_again_leaves_the_best_in_ckpt(with_data):
    train.main([*TINY, "--out_dir=out/x", "--min_lr=3.0", "--grad_clip=0"])  # the rate rises to where it does harm
    losses = {r["val_loss"]: r["iter"] for r in records("out/x", "eval")}
    assert losses[min(losses)] == checkpoint.load("out/x/ckpt.pt")["iter"] < 24
    assert checkpoint.load("out/x/last.pt")["best_val_loss"] == min(losses)


def test_an_event_is_due_at_the_first_update_at_or_after_its_interval():
    published = [i for i in range(32, 20_001, 32) if train.is_due(i, 500, Config())]
    assert published[:4] == [512, 1024, 1504, 2016] and len(published) == 40
    plain = Config(gradient_accumulation_steps=1)
    assert [i for i in range(1, 31) if train.is_due(i, 10, plain)] == [10, 20, 30]


def test_samples_tell_a_story_at_each_evaluation(trained):
    text = (trained / "out/tiny/samples.md").read_text()
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("## ")] == [
        "## iteration 8", "## iteration 16", "## iteration 24"]
    assert text.count("\n\nOnce upon a time") == 3


def test_the_end_is_a_block_of_figures_and_the_command_that_samples(with_data, capsys):
    train.main([*TINY, "--out_dir=out/x", "--max_iters=6"])
    out = capsys.readouterr().out
    assert "sequences = 128 tokens" in out and "3 updates = 384 tokens" in out and "on cpu, in float32" in out
    end = dict(line.split(": ", 1) for line in out.splitlines()[-7:])
    assert list(end) == ["best_val_loss", "val_bits_per_byte", "tokens", "seconds", "tokens_per_s", "checkpoint",
                         "sample"]
    assert end["tokens"] == "384" and end["checkpoint"] == "out/x/ckpt.pt"
    assert end["sample"] == 'python sample.py --out_dir out/x --start "Once upon a time"'
    assert float(end["best_val_loss"]) == pytest.approx(records("out/x", "eval")[0]["val_loss"], abs=1e-4)


def test_a_rate_that_ends_higher_is_warned_of(with_data, capsys):
    words = [*TINY, "--out_dir=out/x", "--max_iters=4", "--overwrite"]
    train.main([*words, "--learning_rate=1e-4", "--min_lr=5e-4"])
    assert "warning: min_lr = 0.0005 is above learning_rate = 0.0001" in capsys.readouterr().out
    train.main(words)
    assert "warning" not in capsys.readouterr().out


def test_the_learning_rate_is_the_designs():
    cfg = Config(learning_rate=1.0, min_lr=0.2, warmup_iters=9, lr_decay_iters=29, max_iters=100)
    rate = [train.learning_rate(i, cfg) for i in range(100)]
    assert rate[:9] == pytest.approx([(i + 1) / 10 for i in range(9)])
    assert rate[9] == 1.0 and rate[19] == pytest.approx(0.6) and rate[14] == pytest.approx(0.6 + 0.4 * math.sqrt(0.5))
    assert rate[29:] == [0.2] * 71
    published = Config()
    assert train.learning_rate(20_000 - 32, published) == pytest.approx(5e-4, rel=1e-3)  # it rises


def test_linear_and_wsd_schedules():
    linear = Config(lr_schedule="linear", learning_rate=1.0, min_lr=0.2, warmup_iters=9, lr_decay_iters=29)
    assert [train.learning_rate(i, linear) for i in (0, 8, 9, 19, 24, 29, 99)] == pytest.approx(
        [0.1, 0.9, 1.0, 0.6, 0.4, 0.2, 0.2])
    wsd = Config(lr_schedule="wsd", decay_fraction=0.25, learning_rate=1.0, min_lr=0.2, warmup_iters=9,
                 lr_decay_iters=29)
    assert [train.learning_rate(i, wsd) for i in (0, 8, 9, 19, 24, 25, 28, 29, 99)] == pytest.approx(
        [0.1, 0.9, 1.0, 1.0, 1.0, 0.84, 0.36, 0.2, 0.2])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_optimizer_and_matrices_alone_decay(optimizer):
    model = GPT(GPTConfig(300, 16, 2, 2, 16))
    names = {p: name for name, p in model.named_parameters()}
    optimizers = train.make_optimizers(model, Config(optimizer=optimizer, learning_rate=3e-3, muon_lr=0.01))
    groups = [(type(o).__name__, g, {names[p] for p in g["params"]}) for o in optimizers for g in o.param_groups]
    everything = [name for _, _, group_names in groups for name in group_names]
    assert sorted(everything) == sorted(names.values()) and sum(len(g["params"]) for _, g, _ in groups) == len(names)
    hidden = {name for name in names.values() if name.startswith("transformer.h.") and ".weight" in name
              and ".ln_" not in name}
    assert len(hidden) == 2 * 4
    in_muon = set().union(*(group_names for kind, _, group_names in groups if kind == "Muon"))
    assert in_muon == (hidden if optimizer == "muon" else set())
    assert {g["lr"] for kind, g, _ in groups if kind == "Muon"} <= {0.01}
    assert {g["lr"] for kind, g, _ in groups if kind == "AdamW"} == {3e-3}
    decayed = set().union(*(group_names for _, g, group_names in groups if g["weight_decay"] == 0.1))
    assert decayed == hidden | {"transformer.wte.weight", "transformer.wpe.weight"}
    assert {g["weight_decay"] for _, g, _ in groups} == {0.1, 0.0}


def test_one_schedule_multiplies_both_rates(with_data):
    """Muon's step has the size of its rate, whatever the gradient: the largest change of a matrix tells it."""
    train.main([*TINY, "--optimizer=muon", "--weight_decay=0", "--out_dir=out/x", "--max_iters=4", "--warmup_iters=3",
                "--muon_lr=0.02", "--learning_rate=1e-2"])
    state = checkpoint.load("out/x/last.pt", checkpoint.LAST_HAS)
    adamw, muon = state["optimizers"]
    rate = train.learning_rate(2, Config(**state["config"]))  # of the second and last update: warmup's third of four
    assert rate == pytest.approx(0.75e-2)
    assert [g["lr"] for g in adamw["param_groups"]] == pytest.approx([rate, rate])
    assert [g["lr"] for g in muon["param_groups"]] == pytest.approx([2 * rate])
    torch.manual_seed(1337)
    before = GPT(GPTConfig(300, 16, 2, 2, 16, 0.1)).state_dict()
    name = "transformer.h.0.attn.c_proj.weight"
    moved = torch.linalg.matrix_norm(weights("out/x")[name] - before[name], 2).item()
    # Two steps of 0.25 and 0.75 of the rate, each an almost orthogonal matrix: singular values of about 0.7 to 1.2.
    assert 0.5 * 0.02 * 0.75 < moved < 1.25 * 0.02


@pytest.mark.parametrize("flags, tokens", [
    (["--max_tokens=1000"], 896),  # seven updates of 128 tokens; an eighth would go beyond
    (["--max_tokens=128"], 128),
    (["--max_iters=7"], 512),  # in iterations, rounded up to whole updates
])
def test_a_budget_of_tokens_or_iterations_ends_where_it_says(with_data, flags, tokens):
    words = [word for word in TINY if "max_iters" not in word]
    train.main([*words, "--warmup_iters=0", *flags, "--out_dir=out/x"])
    assert checkpoint.load("out/x/last.pt")["tokens"] == records("out/x", "eval")[-1]["tokens"] == tokens
    cfg = Config(**records("out/x", "run")[0]["config"])
    assert cfg.lr_decay_iters == cfg.max_iters  # so the rate has decayed when the budget is spent
    assert records("out/x", "step")[-1]["lr"] < 0.5 * cfg.learning_rate or tokens == 128


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by 10 ms each time that it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(ticks) / 100)


MINUTES = [word for word in TINY if "max_iters" not in word] + ["--lr_schedule=linear", "--log_interval=1",
                                                                 "--out_dir=out/x"]


def test_a_budget_of_minutes_ends_when_it_is_spent_with_the_rate_decayed(with_data, clock, capsys):
    train.main([*MINUTES, "--min_lr=0", "--max_minutes=0.05"])
    assert "the run: 0.05 minutes" in capsys.readouterr().out
    state = checkpoint.load("out/x/last.pt", checkpoint.LAST_HAS)
    steps, evals = records("out/x", "step"), records("out/x", "eval")
    assert len(steps) > 40 and steps[-2]["seconds"] < 3.05 and 3 <= state["seconds"] < 3.2
    assert evals[-1]["iter"] == state["iter"] == steps[-1]["iter"]
    for before, step in zip(steps[5:], steps[6:]):  # as much of the rate as there is of the time
        assert step["lr"] == pytest.approx(1e-2 * (1 - before["seconds"] / 3), abs=1e-3)
    train.main(["--resume", "--out_dir=out/x"])
    assert "at its end already: raise --max_minutes" in capsys.readouterr().out
    train.main(["--resume", "--out_dir=out/x", "--max_minutes=0.06"])
    assert "changed: max_minutes is now 0.06, was 0.05" in capsys.readouterr().out
    assert checkpoint.load("out/x/last.pt", checkpoint.LAST_HAS)["seconds"] >= 3.6


def test_a_run_of_minutes_that_ends_in_its_warmup_says_so(with_data, clock, capsys):
    train.main([*MINUTES, "--max_minutes=0.01", "--warmup_iters=1000"])
    assert "warning: the run ended in its warmup" in capsys.readouterr().out


def test_resume_refuses_another_unit_and_a_longer_run_that_would_learn_nothing(with_data, clock, fails):
    train.main([*MINUTES, "--max_minutes=0.01"])
    for flag in ("--max_iters=1000", "--max_tokens=100000"):
        assert "goes on by --max_minutes alone" in fails(train.main, ["--resume", "--out_dir=out/x", flag])
    train.main([*TINY, "--out_dir=out/y", "--max_iters=4", "--min_lr=0"])
    assert "--max_minutes alone" in fails(train.main, ["--resume", "--out_dir=out/y", "--max_minutes=1"])
    for flag in ("--max_iters=6", "--max_tokens=384"):
        line = fails(train.main, ["--resume", "--out_dir=out/y", flag])
        assert "the learning rate is 0 from iteration 4 on" in line


def test_a_budget_of_tokens_can_be_raised(with_data, capsys):
    words = [word for word in TINY if "max_iters" not in word]
    train.main([*words, "--out_dir=out/x", "--max_tokens=512"])
    train.main(["--resume", "--out_dir=out/x"])
    assert "at its end already: raise --max_tokens" in capsys.readouterr().out
    train.main(["--resume", "--out_dir=out/x", "--max_tokens=1000"])
    out = capsys.readouterr().out
    assert "changed: max_tokens is now 1000, was 512" in out and "changed: max_iters is now 14, was 8" in out
    assert records("out/x", "step")[-1]["tokens"] == 896
    assert records("out/x", "step")[-1]["lr"] == 1e-3  # min_lr: the schedule is the first budget's


def test_a_run_that_ends_before_its_schedule_says_so(with_data, capsys):
    train.main([*TINY, "--out_dir=out/x", "--max_iters=4", "--lr_decay_iters=8"])
    assert "reaches min_lr at iteration 8, and the run ends before, at 4" in capsys.readouterr().out
    train.main([*TINY, "--out_dir=out/y", "--max_iters=4"])
    assert "reaches min_lr" not in capsys.readouterr().out


def test_minutes_become_updates_at_the_pace_so_far():
    cfg = Config(max_minutes=2.0, gradient_accumulation_steps=1)
    assert [train.updates_in_all(cfg, 10, seconds) for seconds in (12, 60, 119.9, 120, 500)] == [100, 20, 11, 10, 10]
    assert train.updates_in_all(cfg, 0, 0.0) == 1  # nothing is known yet
    assert cfg.lr_decay_iters == 0 and train.learning_rate(1500, cfg, 2000) == pytest.approx(3e-4)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_update_is_the_same_however_it_is_cut(with_data, large_eps, cut, monkeypatch):
    """Of 8 sequences at once; 3 leave a smaller last piece, as auto may."""
    words = [*TINY, "--max_iters=6", "--dropout=0"]
    train.main([*words, "--out_dir=out/whole"])
    monkeypatch.setattr(train, "pick_device_batch_size", lambda *_: cut)
    train.main([*words, "--out_dir=out/cut"])
    assert [r["sequences_at_a_time"] for name in ("whole", "cut") for r in records(f"out/{name}", "run")] == [8, cut]
    for name, w in weights("out/whole").items():
        torch.testing.assert_close(weights("out/cut")[name], w, rtol=1e-3, atol=1e-5)
    for a, b in zip(records("out/whole", "step"), records("out/cut", "step"), strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4)


def test_the_update_is_adamw_with_clipping_on_the_sequences_of_the_order(with_data, large_eps):
    """One update against the plain form of it: all sequences at once, and the formulas of AdamW."""
    train.main([*TINY, "--max_iters=2", "--dropout=0", "--grad_clip=0.1", "--out_dir=out/x"])
    torch.manual_seed(1337)
    model = GPT(GPTConfig(300, 16, 2, 2, 16, 0.0))
    x, y = TrainingOrder(Split("data/nursery-bpe300", "train", 16), 1337).sequences(0, 8)
    loss = model(torch.from_numpy(x), torch.from_numpy(y))
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    step = records("out/x", "step")[0]
    assert (step["loss"], step["grad_norm"]) == pytest.approx((loss.item(), norm), rel=1e-5) and norm > 0.1
    lr = 1e-2 / 2  # the first of one warmup iteration
    for name, p in model.named_parameters():
        g = p.grad * 0.1 / norm
        decayed = p * (1 - lr * 0.1) if p.dim() == 2 else p  # weight decay: matrices, not biases and norms
        expected = decayed - lr * g / (g.abs() + 1e-3)  # the first AdamW step, its two means corrected for bias
        torch.testing.assert_close(weights("out/x")[name], expected, rtol=1e-4, atol=1e-6)


def test_evaluation_is_without_dropout_and_the_same_each_time(with_data):
    torch.manual_seed(0)
    model = GPT(GPTConfig(300, 16, 2, 2, 16, 0.5)).train()
    split = Split("data/nursery-bpe300", "validation", 16)
    starts = evaluation_windows(split, 12)
    losses = train.evaluate(model, split, starts, batch_size=5)
    assert model.training and losses.shape == (12,)
    assert torch.allclose(losses, train.evaluate(model, split, starts, batch_size=12), atol=1e-5)
    x, y = map(torch.from_numpy, split.windows(starts[3:4]))
    assert losses[3].item() == pytest.approx(model.eval()(x, y).item(), rel=1e-5)


@pytest.mark.parametrize("stop, optimizer, schedule", [
    (2, "adamw", "cosine"), (8, "adamw", "wsd"), (14, "adamw", "linear"), (6, "muon", "wsd"), (14, "muon", "cosine")])
def test_going_on_gives_the_run_that_was_never_stopped(with_data, stop, optimizer, schedule):
    """With dropout and accumulation, stopped at and between evaluations (every 8 iterations)."""
    words = [*TINY, "--dropout=0.2", "--lr_decay_iters=24", f"--optimizer={optimizer}", f"--lr_schedule={schedule}"]
    train.main([*words, "--out_dir=out/whole"])
    train.main([*words, "--out_dir=out/parts", f"--max_iters={stop}"])
    train.main([*words, "--out_dir=out/parts", "--resume"])
    a, b = (checkpoint.load(f"out/{name}/last.pt") for name in ("whole", "parts"))
    assert same(a["model"], b["model"]) and a["update"] == b["update"] == 12
    for one, other in zip(a["optimizers"], b["optimizers"], strict=True):
        assert one["state"].keys() == other["state"].keys() and all(
            same(state, other["state"][i]) for i, state in one["state"].items())
    assert len(a["optimizers"]) == (2 if optimizer == "muon" else 1)
    assert b["seconds"] > 0 and same(weights("out/whole", "ckpt.pt"), weights("out/parts", "ckpt.pt"))
    whole = {r["iter"]: r["loss"] for r in records("out/whole", "step")}
    assert len(records("out/parts", "run")) == 2
    assert all(r["loss"] == whole.get(r["iter"], r["loss"]) for r in records("out/parts", "step"))
    evals = {r["iter"]: r["val_loss"] for r in records("out/parts", "eval")}
    assert {r["iter"]: r["val_loss"] for r in records("out/whole", "eval")}.items() <= evals.items()


def test_going_on_cuts_the_logs_back_to_the_checkpoint(with_data):
    """A run that was killed has logged more than its last.pt knows, and perhaps half a line."""
    train.main([*TINY, "--out_dir=out/x", "--max_iters=8", "--lr_decay_iters=24"])
    with open("out/x/log.jsonl", "a") as log, open("out/x/samples.md", "a") as samples:
        log.write('{"kind": "step", "iter": 10, "loss": 0}\n{"kind": "eval", "iter": 16}\n{"kind": "st')
        samples.write("## iteration 16: validation loss 0\n\nlost\n\n")
    train.main(["--resume", "--out_dir=out/x", "--max_iters=24"])
    assert [r["iter"] for r in records("out/x", "step")] == [2, 4, 8, 12, 16, 20, 24]
    assert [r["iter"] for r in records("out/x", "eval")] == [8, 16, 24]
    assert Path("out/x/samples.md").read_text().count("## iteration 16") == 1


def test_resume_auto_starts_a_run_and_goes_on_with_it(with_data, capsys, fails):
    words = [*TINY, "--out_dir=out/x", "--resume=auto"]
    train.main([*words, "--max_iters=4", "--lr_decay_iters=24"])
    assert "going on" not in capsys.readouterr().out
    train.main([*words, "--max_iters=8"])
    assert "going on after update 2 of 4" in capsys.readouterr().out
    Path("out/x/last.pt").unlink()
    Path("out/x/last.prev.pt").unlink()
    assert "out/x already holds a run: replace it" in fails(train.main, words)  # ckpt.pt is not to be lost by it
    assert Path("out/x/ckpt.pt").exists()


def test_a_run_goes_on_from_before_its_first_update(with_data):
    """As one that was killed at once: last.pt is there from the start."""
    words = [*TINY, "--out_dir=out/x", "--max_iters=4", "--dropout=0.2"]
    train.main(words)
    whole = weights("out/x")
    Path("out/x/last.prev.pt").replace("out/x/last.pt")
    assert checkpoint.load("out/x/last.pt")["update"] == 0
    train.main(["--out_dir=out/x", "--resume"])
    assert same(weights("out/x"), whole) and [r["iter"] for r in records("out/x", "step")] == [2, 4]


def test_a_run_killed_before_its_last_evaluation_makes_that_first(with_data):
    train.main([*TINY, "--out_dir=out/x", "--max_iters=4", "--checkpoint_minutes=0"])
    whole = records("out/x", "eval")
    Path("out/x/last.prev.pt").replace("out/x/last.pt")  # of the last update, from before it was evaluated
    train.main(["--out_dir=out/x", "--resume"])
    (again,) = records("out/x", "eval")
    assert again | {"seconds": 0} == whole[0] | {"seconds": 0}
    assert checkpoint.load("out/x/last.pt")["figures"]["iter"] == 4


def test_last_pt_is_also_written_by_the_clock(with_data, monkeypatch):
    saved = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, state: (saved.append((path.name, state["update"])),
                                                                 save(path, state)))
    train.main([*TINY, "--out_dir=out/x", "--max_iters=6"])
    assert saved == [("last.pt", 0), ("ckpt.pt", 3), ("last.pt", 3)]
    saved.clear()
    train.main([*TINY, "--out_dir=out/y", "--max_iters=6", "--checkpoint_minutes=0"])
    assert saved == [("last.pt", 0), ("last.pt", 1), ("last.pt", 2), ("last.pt", 3), ("ckpt.pt", 3), ("last.pt", 3)]
    ticks = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(ticks) / 100)
    saved.clear()
    train.main([*TINY, "--out_dir=out/z", "--max_iters=200", "--eval_interval=1000", "--checkpoint_minutes=0.01"])
    gaps = np.diff([update for name, update in saved if name == "last.pt"][:-1])
    assert len(gaps) > 2 and len(set(gaps)) <= 2 and gaps.max() < 60  # 0.6 s of a clock that is read twice an update


@pytest.mark.parametrize("damage", ["flipped", "gone", "empty"])
def test_a_damaged_last_pt_gives_way_to_the_one_before(with_data, capsys, damage, fails):
    words = [*TINY, "--out_dir=out/x", "--lr_decay_iters=24", "--checkpoint_minutes=0"]
    train.main([*words, "--max_iters=24"])
    whole = weights("out/x")
    train.main([*words, "--max_iters=12", "--overwrite"])
    last, previous = Path("out/x/last.pt"), Path("out/x/last.prev.pt")
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 4
    last.write_bytes(data if damage == "flipped" else b"")
    if damage == "gone":
        last.unlink()
    capsys.readouterr()
    before = previous.read_bytes()
    train.main(["--out_dir=out/x", "--resume", "--max_iters=24"])
    err = capsys.readouterr().err
    assert "note: " in err and "out/x/last.pt" in err and "going on from out/x/last.prev.pt" in err
    assert same(weights("out/x"), whole) and [r["iter"] for r in records("out/x", "eval")] == [8, 16, 24]
    for path in (last, previous):
        path.write_bytes(before[:1000])
    assert "out/x/last.prev.pt is damaged" in fails(train.main, ["--out_dir=out/x", "--resume"])


def test_a_lost_ckpt_is_made_anew(with_data, capsys):
    train.main([*TINY, "--out_dir=out/x", "--max_iters=8", "--lr_decay_iters=24"])
    Path("out/x/ckpt.pt").unlink()
    train.main(["--out_dir=out/x", "--resume", "--max_iters=16"])
    assert "note: the next evaluation makes a new out/x/ckpt.pt" in capsys.readouterr().out
    assert checkpoint.load("out/x/ckpt.pt")["iter"] == 16
    Path("out/x/ckpt.pt").write_bytes(Path("out/x/ckpt.pt").read_bytes()[:-1000])
    train.main(["--out_dir=out/x", "--resume", "--max_iters=24"])
    assert "out/x/ckpt.pt is damaged" in capsys.readouterr().out
    assert checkpoint.load("out/x/ckpt.pt")["iter"] == 24


def test_a_checkpoint_of_another_run_is_refused(with_data, fails):
    for name, seed in (("x", 1), ("y", 2)):
        train.main([*TINY, f"--out_dir=out/{name}", "--max_iters=8", "--lr_decay_iters=24", f"--seed={seed}"])
    for name in ("last.pt", "log.jsonl", "samples.md"):  # whose sizes vary with the digits of their times
        Path("out/y", name).replace(Path("out/x", name))
    line = fails(train.main, ["--out_dir=out/x", "--resume", "--max_iters=16"])
    assert "out/x/ckpt.pt and the last.pt beside it are of different runs, by their seed" in line


def test_init_from_starts_a_new_run_from_old_weights(with_data, fails, capsys):
    import prepare
    train.main([*TINY, "--out_dir=out/old", "--max_iters=8", "--n_embd=32"])
    words = [word for word in TINY if not word.startswith(("--n_", "--block_size"))]
    train.main([*words, "--init_from=out/old", "--out_dir=out/new", "--max_iters=2", "--learning_rate=1e-9",
                "--min_lr=0", "--block_size=8"])  # the shape is the old run's; its block may be cut
    assert "starting from the weights of out/old, after 512 tokens" in capsys.readouterr().out
    state = checkpoint.load("out/new/last.pt")
    assert state["config"]["n_embd"] == 32 and state["tokens"] == 64
    for name, w in weights("out/old", "ckpt.pt").items():
        torch.testing.assert_close(state["model"][name], w[:8] if name == "transformer.wpe.weight" else w)
    for words, complaint in [
        (["--init_from=out/old", "--n_embd=16"], "n_embd = 16 is not that of init_from = 'out/old', 32"),
        (["--init_from=out/old", "--n_embd=32", "--block_size=32"], "block_size = 32 is not that of"),
        (["--init_from=out/none"], "no checkpoint in out/none"),
        (["--init_from=out/old", "--n_embd=32", "--out_dir=out/old", "--overwrite"], "would be replaced by the new"),
    ]:
        assert complaint in fails(train.main, [*TINY, "--out_dir=out/y", *words])
    prepare.main(["nursery", "--tokenizer", "bpe:310", "--max_stories", "60"])
    assert "another tokenizer than init_from = 'out/old'" in fails(
        train.main, [*TINY, "--out_dir=out/y", "--init_from=out/old", "--n_embd=32", "--dataset=nursery-bpe310"])
    assert not Path("out/y").exists()


def test_overflowing_gradients_in_float16_skip_their_update_and_are_counted(with_data, capsys):
    words = [*TINY, "--out_dir=out/x", "--dtype=float16", "--log_interval=1", "--lr_decay_iters=24"]
    train.main([*words, "--max_iters=4"])
    state = checkpoint.load("out/x/last.pt", checkpoint.LAST_HAS)
    assert state["scaler"]["scale"] == 65536 and state["skipped"] == 0
    state["scaler"]["scale"] *= 2.0**20  # far too much
    checkpoint.save(Path("out/x/last.pt"), state)
    before = state["model"]
    train.main([*words, "--resume", "--max_iters=8"])
    assert "skipped_updates: 2" in capsys.readouterr().out and same(weights("out/x"), before)
    train.main([*words, "--resume", "--max_iters=80"])
    steps = records("out/x", "step")
    assert all((r["grad_norm"] is None) == (r["skipped"] > before["skipped"]) for before, r in zip(steps, steps[1:]))
    assert 10 < steps[-1]["skipped"] < 30 and steps[-1]["grad_norm"] > 0 and not same(weights("out/x"), before)


def test_a_run_of_a_device_without_fused_adamw_goes_on_with_it(with_data):
    """As from MPS to CUDA: in float16, the fused one cannot do with the state of the other."""
    words = [*TINY, "--out_dir=out/x", "--lr_decay_iters=24"]
    train.main([*words, "--max_iters=4"])
    state = checkpoint.load("out/x/last.pt", checkpoint.LAST_HAS)
    for group in state["optimizers"][0]["param_groups"]:
        group["fused"] = False
    checkpoint.save(Path("out/x/last.pt"), state)
    train.main([*words, "--resume", "--max_iters=8", "--dtype=float16"])
    state = checkpoint.load("out/x/last.pt", checkpoint.LAST_HAS)
    assert state["update"] == 4 and all(group["fused"] for group in state["optimizers"][0]["param_groups"])


def test_resume_keeps_what_the_recipe_says_otherwise(with_data, capsys):
    Path("tiny.py").write_text("".join(word.removeprefix("--").replace("=", "='", 1) + "'\n" if "data" in word or
                                       "dtype" in word else word.removeprefix("--") + "\n" for word in TINY))
    train.main(["tiny.py", "--max_iters=4"])
    train.main(["tiny.py", "--max_iters=8", "--resume"])
    out = capsys.readouterr().out
    assert "changed: max_iters is now 8, was 4" in out and "note" not in out
    Path("tiny.py").write_text(Path("tiny.py").read_text().replace("batch_size=4", "batch_size=5"))
    train.main(["tiny.py", "--max_iters=12", "--resume"])
    assert "note: the run keeps batch_size = 4, though the recipe says 5" in capsys.readouterr().out
    assert checkpoint.load("out/tiny/last.pt")["tokens"] == 12 * 4 * 16


def test_resume_needs_no_recipe_and_keeps_the_stored_settings(with_data, capsys):
    train.main([*TINY, "--max_iters=4", "--out_dir=out/x"])
    train.main(["--resume", "--max_iters=8"])  # the newest run
    assert "changed: max_iters is now 8, was 4" in capsys.readouterr().out
    state = checkpoint.load("out/x/last.pt")
    assert state["update"] == 4 and state["config"]["n_embd"] == 16 and state["config"]["lr_decay_iters"] == 4
    train.main(["--resume", "--out_dir=out/x"])
    assert "at its end already: raise --max_iters" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["n_layer=3", "dropout=0.3", "batch_size=8", "learning_rate=1.0", "seed=1"])
def test_resume_refuses_a_setting_that_would_break_the_run(trained, monkeypatch, fails, change):
    monkeypatch.chdir(trained)
    line = fails(train.main, ["--resume", "--out_dir=out/tiny", f"--{change}"])
    assert f"error: {change.split('=')[0]} = " in line and "cannot change" in line


def test_resume_refuses_other_data_under_the_same_name(with_data, fails):
    train.main([*TINY, "--max_iters=2", "--out_dir=out/x"])
    data = with_data / "data/nursery-bpe300"
    folder = data.resolve()
    data.unlink()
    data.mkdir()
    for path in folder.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    meta = json.loads((data / "meta.json").read_text())
    tokens = np.fromfile(data / "train.bin", np.uint16)[::-1]
    tokens.tofile(data / "train.bin")
    meta["splits"]["train"]["sha256"] = hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()
    (data / "meta.json").write_text(json.dumps(seal(meta)))
    assert "is not the data that out/x was trained on" in fails(
        train.main, ["--resume", "--out_dir=out/x", "--max_iters=4"])


def test_a_run_is_not_overwritten_unless_told(with_data, fails):
    words = [*TINY, "--max_iters=2", "--out_dir=out/x"]
    train.main(words)
    before = Path("out/x/log.jsonl").read_text()
    assert "out/x already holds a run" in fails(train.main, words)
    assert Path("out/x/log.jsonl").read_text() == before
    Path("out/x/notes.txt").write_text("mine")
    train.main([*words, "--overwrite", "--seed=3"])
    assert records("out/x", "run")[0]["seed"] == 3 and len(records("out/x", "run")) == 1
    assert Path("out/x/notes.txt").read_text() == "mine"


def test_nothing_to_resume(here, fails):
    assert "no trained model under out/" in fails(train.main, ["--resume"])
    assert "no checkpoint out/x/last.pt" in fails(train.main, ["--resume", "--out_dir=out/x"])


def test_data_that_is_not_there_is_told_with_the_command_that_makes_it(here, fails):
    line = fails(train.main, [str(ROOT / "config/quickstart.py")])
    recipe = Config(**read_recipe(ROOT / "config/quickstart.py"))
    assert f"no data in data/{recipe.dataset}" in line and "python prepare.py nursery --tokenizer bpe:" in line
    assert not Path("out").exists()


def test_what_cannot_work_is_told_before_anything_starts(with_data, fails):
    for words, complaint in [
        (["--block_size=100000"], "block_size = 100000"),
        (["--device=tpu"], "device = 'tpu' cannot be used"),
        (["--device=cuda:99"], "device = 'cuda:99' cannot be used"),
        (["--n_layer=100000000000"], "parameters and updates of 128 tokens need more than the"),
        (["--batch_size=1000000000"], "updates of 32,000,000,000 tokens need more than the"),
    ]:
        assert complaint in fails(train.main, [*TINY, "--out_dir=out/x", *words])
        assert not Path("out").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoints(with_data, fails):
    words = [*TINY, "--out_dir=out/x", "--grad_clip=0"]
    train.main([*words, "--max_iters=8", "--lr_decay_iters=24"])
    good = weights("out/x")
    # Weights that overflow fp32: the next loss is not a number.
    state = checkpoint.load("out/x/last.pt")
    for name in state["model"]:
        state["model"][name] *= 1e30
    checkpoint.save("out/x/last.pt", state)
    line = fails(train.main, [*words, "--lr_decay_iters=24", "--resume"])
    assert "the loss is nan at iteration" in line and "lower --learning_rate" in line
    assert same(weights("out/x", "ckpt.pt"), good) and checkpoint.load("out/x/last.pt")["update"] == 4
    assert [r["iter"] for r in records("out/x", "step")][-1] == 8  # no line without a number in it


def test_an_update_that_spoils_the_weights_stops_the_run_before_it_is_logged_or_saved(with_data, fails):
    """The loss is of before the update, and may be finite when the weights no longer are."""
    line = fails(train.main, [*TINY, "--out_dir=out/x", "--learning_rate=1e30", "--min_lr=1e29", "--warmup_iters=0",
                              "--eval_interval=1"])
    assert "the validation loss is nan at iteration 2" in line
    assert records("out/x", "eval") == [] and checkpoint.load("out/x/last.pt")["update"] == 0
    assert "already holds a run: go on with it (--resume)" in fails(train.main, [*TINY, "--out_dir=out/x"])


def test_eval_only_sweeps_the_whole_split(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    train.main(["--eval_only", "--out_dir=out/tiny", "--dtype=float32"])
    figures = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    model, tokenizer, _ = checkpoint.load_model("out/tiny/ckpt.pt")
    tokens = torch.from_numpy(np.fromfile("data/nursery-bpe300/validation.bin", np.uint16).astype(np.int64))
    losses = [model(tokens[None, i:i + 16][:, :len(tokens) - 1 - i], tokens[None, i + 1:i + 17], reduction="none")
              for i in range(0, len(tokens) - 1, 16)]
    every = torch.cat([loss.flatten() for loss in losses])
    assert int(figures["tokens"]) == len(tokens) - 1 == len(every)
    loss = every.mean().item()
    assert float(figures["loss"]) == pytest.approx(loss, abs=1e-4)
    assert float(figures["perplexity"]) == pytest.approx(math.exp(loss), rel=1e-3)
    split = json.loads(Path("data/nursery-bpe300/meta.json").read_text())["splits"]["validation"]
    assert float(figures["bits_per_byte"]) == pytest.approx(
        loss * split["tokens"] / split["bytes"] / math.log(2), abs=1e-4)
    windows = torch.stack([l.mean() for l in losses if l.numel() == 16])
    assert float(figures["standard_error"]) == pytest.approx(windows.std().item() / len(windows) ** 0.5, abs=1e-4)


def test_eval_only_refuses_another_tokenizer_and_other_settings(with_data, nursery_data, fails):
    import prepare
    train.main([*TINY, "--max_iters=2", "--out_dir=out/x"])
    prepare.main(["nursery", "--tokenizer", "bpe:310", "--max_stories", "60"])
    assert "has another tokenizer" in fails(train.main, ["--eval_only", "--dataset=nursery-bpe310"])
    assert "leave out --n_layer" in fails(train.main, ["--eval_only", "--n_layer=3"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_update_and_resume_goes_on(with_data, number):
    words = [sys.executable, ROOT / "train.py", *TINY, "--out_dir=out/x", "--lr_decay_iters=100000", "--dropout=0.1"]
    process = subprocess.Popen([*words, "--max_iters=100000", "--eval_interval=100000"], cwd=with_data, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (with_data / "out/x/log.jsonl").exists() or len(records("out/x", "step")) < 2:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopping after this update or evaluation" in err and "Traceback" not in err
    assert "python train.py --out_dir=out/x --resume" in out and not (with_data / "out/x/ckpt.pt").exists()
    stopped = checkpoint.load("out/x/last.pt")["update"]
    assert f"stopped after update {stopped:,} of 50,000" in out
    ends = f"--max_iters={2 * stopped + 6}"
    train.main(["--resume", "--out_dir=out/x", ends])
    train.main([*TINY, "--out_dir=out/whole", "--lr_decay_iters=100000", "--dropout=0.1", "--eval_interval=100000",
                ends])
    assert same(weights("out/x"), weights("out/whole"))


def test_launched_as_a_user_does(with_data):
    done = launch("train.py", *TINY, "--max_iters=8", "--out_dir=out/x", cwd=with_data)
    assert done.returncode == 0 and done.stderr == ""
    assert "iteration 4: loss " in done.stdout and "tokens/s" in done.stdout  # plain lines without a terminal


def test_training_and_sampling_need_neither_datasets_nor_tokenizers(with_data):
    code = ("import sys; sys.modules['datasets'] = sys.modules['tokenizers'] = None; sys.path.insert(0, sys.argv[1]); "
            "import train, sample; train.main(sys.argv[2:]); sample.main(['--max_new_tokens=5'])")
    done = subprocess.run([sys.executable, "-c", code, ROOT, *TINY, "--max_iters=2", "--out_dir=out/x"],
                          cwd=with_data, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compiled_training_gives_the_same_losses(with_data, large_eps, monkeypatch):
    """The model is traced forwards and backwards; turning that into C++ would take half of all the tests' time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for wish in ("False", "True"):
        train.main([*TINY, "--max_iters=8", "--dropout=0", f"--compile={wish}", f"--out_dir=out/{wish}"])
    losses = {wish: [r["loss"] for r in records(f"out/{wish}", "step")] for wish in ("False", "True")}
    assert losses["True"] == pytest.approx(losses["False"], rel=1e-3)
    assert not any("orig_mod" in name for name in weights("out/True"))
    assert records("out/True", "run")[0]["compiled"]
