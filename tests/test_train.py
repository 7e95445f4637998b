"""train.py: the log, the schedule, what a step computes, stopping and resuming, and errors."""

import itertools
import json
import math
import os
import platform
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from conftest import ROOT, TINY, load_last, records
from faults.processes import at_file_operation, run as run_process, run_ranks, script
from faults.soak import equal, what_must_be_equal
from model import GPT, GPTConfig
from modern import make_model
from storygpt import checkpoint, run
from storygpt.corpus.dataset import Split, TrainingOrder
from storygpt.embeddings import cooccurrence_embeddings
from storygpt.muon import Muon
from storygpt.run import TrainState, read_log
from storygpt.settings import Config, read_command_line, read_config_file
from storygpt.system.errors import QUICKSTART, UserError

TINY_MODEL = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=16)  # TINY's
ANY_LENGTH = [word for word in TINY if "max_iters" not in word]  # TINY without a length of the run


def weights(out_dir, name="last.pt"):
    """The weights in a checkpoint, name → tensor."""
    return checkpoint.load(Path(out_dir, name))["model"]


def state_at(cfg, step=0, seconds=0.0, **values):
    """A TrainState after `step` optimizer steps and `seconds`; without data and, by default, without a model."""
    values = dict(data=None, model=None, optimizers=[], scaler=None, device=torch.device("cpu"), dtype=torch.float32,
                  micro_batch_size=1) | values
    return TrainState(cfg, step=step, seconds=seconds, **values)


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by 10 ms each time it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 100)


# ---- the run folder, the log and the output ----


def test_the_run_folder_is_self_contained(trained):
    run, data = trained / "out/tiny", trained / "data/nursery-bpe300"
    assert sorted(os.listdir(run)) == [".lock", "ckpt.pt", "last.prev.pt", "last.pt", "log.jsonl", "meta.json",
                                       "samples.md", "tokenizer.tiktoken"]
    for name in ("meta.json", "tokenizer.tiktoken"):
        assert (run / name).read_bytes() == (data / name).read_bytes()
    samples = (run / "samples.md").read_text()
    assert re.findall(r"## (iteration \d+): .*\n\nOnce upon a time", samples) == [
        "iteration 8", "iteration 16", "iteration 24"]


def test_the_log_has_the_run_its_steps_and_its_evaluations(trained):
    (run,), steps, evals = (records(trained / "out/tiny", kind) for kind in ("run", "step", "eval"))
    meta = json.loads((trained / "data/nursery-bpe300/meta.json").read_text())
    cfg = Config(**run["config"])
    assert cfg.max_iters == 24 and run["seed"] == 1337 and run["torch"] == torch.__version__
    assert run["device"] == f"cpu {platform.machine()}"
    assert run["data_sha256"] == {split: meta["splits"][split]["sha256"] for split in ("train", "validation")}
    assert {"git", "dtype", "python", "parameters"} <= run.keys()
    # A step is two iterations of 4 * 16 tokens. The first step is logged, then every fourth iteration.
    assert [r["iter"] for r in steps] == [2, 4, 8, 12, 16, 20, 24]
    assert all(r["step"] == r["iter"] / 2 and r["tokens"] == r["iter"] * 64 for r in steps)
    windows = (meta["splits"]["train"]["tokens"] - 16) // 16
    assert all(r["epoch"] == pytest.approx(r["tokens"] / (windows * 16)) for r in steps)
    assert all(r["lr"] == pytest.approx(expected_learning_rate(cfg, r["iter"] - 2)) for r in steps)
    assert all(r["grad_norm"] > 0 and r["tokens_per_s"] > 0 for r in steps)
    assert abs(steps[0]["loss"] - math.log(300)) < 0.15 and steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert [r["iter"] for r in evals] == [8, 16, 24]
    validation = meta["splits"]["validation"]
    for r in evals:
        assert r["val_bpb"] == pytest.approx(r["val_loss"] * validation["tokens"] / validation["bytes"] / math.log(2))
    log = read_log(trained / "out/tiny/log.jsonl")
    seconds = [r["seconds"] for r in log[1:-1]]
    assert seconds == sorted(seconds) and log[-1] == {"kind": "end", "iter": 24, "reason": "finished"}


def test_ckpt_has_the_best_weights_even_if_the_loss_rises_again(with_data, capsys):
    # A learning rate that rises until it harms.
    train.main([*TINY, "--out_dir=out/x", "--max_iters=16", "--eval_interval=4", "--min_lr=3.0", "--grad_clip=0"])
    assert "warning: min_lr = 3 is above learning_rate = 0.01" in capsys.readouterr().out
    best, state = min(records("out/x", "eval"), key=lambda r: r["val_loss"]), checkpoint.load("out/x/ckpt.pt")
    assert state["iter"] == best["iter"] < 16 and state["metrics"]["val_loss"] == best["val_loss"]
    assert load_last("out/x")["best_val_loss"] == best["val_loss"]
    assert "optimizers" not in state and state["model_config"]["vocab_size"] == 300
    assert state["model"].keys() == GPT(GPTConfig(**state["model_config"])).state_dict().keys()


def test_train_py_as_a_script(with_data):
    """It prints plain lines without a terminal, and ends with the results and the command to sample."""
    code, out, err = run_process(script("train.py"), [*TINY, "--out_dir=out/my run", "--max_iters=6"])
    assert code == 0 and err == "" and "iteration 4: loss " in out and "warning" not in out
    assert "3 steps = 384 tokens" in out and "on cpu, in float32, not compiled (compile = False), 1 thread" in out
    results = dict(line.split(": ", 1) for line in out.splitlines()[-7:])
    assert list(results) == ["best_val_loss", "val_bits_per_byte", "tokens", "seconds", "tokens_per_s", "checkpoint",
                             "sample"]
    assert results["tokens"] == "384" and results["checkpoint"] == "out/my run/ckpt.pt"
    assert results["sample"] == """python sample.py --out_dir 'out/my run' --start "Once upon a time\""""
    assert float(results["best_val_loss"]) == pytest.approx(records("out/my run", "eval")[0]["val_loss"], abs=1e-4)


# ---- the learning rate ----


def expected_learning_rate(cfg, iteration, end=None):
    """The schedule as a formula of the iteration: warmup, decay to min_lr at `end` (lr_decay_iters), then min_lr."""
    end = end or cfg.lr_decay_iters
    if iteration < cfg.warmup_iters:
        return cfg.learning_rate * (iteration + 1) / (cfg.warmup_iters + 1)
    if iteration >= end:
        return cfg.min_lr
    left = (end - iteration) / (end - cfg.warmup_iters)  # 1 to 0
    if cfg.lr_schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    elif cfg.lr_schedule == "wsd":
        left = min(1, left / cfg.decay_fraction)
    return cfg.min_lr + left * (cfg.learning_rate - cfg.min_lr)


def multiplier_at(state):
    """The learning-rate multiplier of a state's next step."""
    return train.learning_rate_multiplier(state.cfg, state.iteration, train.schedule_progress(state))


SCHEDULES = {
    "published": Config(),
    "cosine to 0": Config(min_lr=0.0, warmup_iters=0, gradient_accumulation_steps=1, max_iters=200),
    "linear": Config(**read_config_file(ROOT / "config/tinystories_fast.py")),
    "wsd": Config(lr_schedule="wsd", min_lr=0.0, gradient_accumulation_steps=5, max_iters=5000, decay_fraction=0.3),
    "ends early": Config(min_lr=1e-5, max_iters=9000, lr_decay_iters=5000, gradient_accumulation_steps=30),
}


@pytest.mark.parametrize("cfg", SCHEDULES.values(), ids=SCHEDULES)
def test_the_learning_rate_is_that_of_the_formula(cfg):
    for step in [*range(0, train.total_steps(state_at(cfg)), 3), train.total_steps(state_at(cfg))]:
        state = state_at(cfg, step)
        expected = expected_learning_rate(cfg, state.iteration) / cfg.learning_rate
        assert multiplier_at(state) == pytest.approx(expected, rel=1e-12, abs=0)
        if state.iteration >= cfg.lr_decay_iters:
            assert train.schedule_progress(state) == 1 and multiplier_at(state) == cfg.min_lr / cfg.learning_rate


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_with_max_minutes_the_schedule_follows_the_time(schedule):
    """At a constant speed, it equals the schedule of a run of as many steps as the time allows: here 1,000."""
    cfg = Config(max_minutes=2.0, lr_schedule=schedule, min_lr=1e-5, warmup_iters=50, gradient_accumulation_steps=2)
    for step in range(0, 1001, 5):
        state = state_at(cfg, step, seconds=step * 0.12)
        expected = expected_learning_rate(cfg, state.iteration, end=2000) / cfg.learning_rate
        assert multiplier_at(state) == pytest.approx(expected, rel=1e-9)
    for step in (25, 30):  # the time is over, exactly at the end of warmup or later
        assert multiplier_at(state_at(cfg, step, seconds=120.0)) == cfg.min_lr / cfg.learning_rate
    with_end = Config(max_minutes=2.0, lr_decay_iters=4000, warmup_iters=50)
    assert train.schedule_progress(state_at(with_end, 10, seconds=100.0)) == 320 / 4000  # lr_decay_iters goes first


def test_all_optimizers_get_the_same_multiplier():
    cfg = Config(optimizer="muon", learning_rate=3e-3, muon_lr=0.01, min_lr=0.0)
    optimizers = train.make_optimizers(GPT(TINY_MODEL), cfg)
    for step in (0, 20, 40, 300, 624, 625):
        state = state_at(cfg, step, optimizers=optimizers)
        multiplier = multiplier_at(state)
        assert train.set_learning_rate(state) == 3e-3 * multiplier
        for o in optimizers:
            initial = 0.01 if isinstance(o, Muon) else 3e-3
            assert [group["lr"] for group in o.param_groups] == [initial * multiplier] * len(o.param_groups)


# ---- the length of a run, and when things are due ----


def test_total_steps_is_rounded_up_or_estimated_from_the_time():
    assert train.total_steps(state_at(Config())) == 625
    assert train.total_steps(state_at(Config(max_iters=20_001))) == 626
    cfg = Config(max_minutes=2.0, gradient_accumulation_steps=1)
    estimates = [train.total_steps(state_at(cfg, 10, seconds)) for seconds in (12, 60, 119.9, 120, 500)]
    assert estimates == [100, 20, 11, 10, 10]
    assert train.total_steps(state_at(cfg)) == 1  # the speed is still unknown
    assert train.total_steps(state_at(cfg, 0, seconds=500)) == 1  # the start took longer


def test_an_evaluation_is_due_at_intervals_and_at_the_end_and_the_run_is_finished_after_that():
    due = [step * 32 for step in range(1, 626) if train.is_due(state_at(Config(), step), 500)]
    assert due[:4] == [512, 1024, 1504, 2016] and len(due) == 40  # the first step that reaches a multiple of 500
    cfg = Config(gradient_accumulation_steps=1, eval_interval=10, max_iters=25, warmup_iters=1)

    def state(step, evaluated_at, stop=False, seconds=0.0, cfg=cfg):
        return state_at(cfg, step, seconds, metrics={"iter": evaluated_at}, stop=stop)

    assert [step for step in range(26) if train.evaluation_is_due(state(step, 0))] == [10, 20, 25]
    assert not train.evaluation_is_due(state(20, 20)) and not train.evaluation_is_due(state(25, 25))  # done already
    assert not train.evaluation_is_due(state(20, 10, stop=True))  # left to the resumed run
    assert train.evaluation_is_due(state(25, 20, stop=True))  # nothing else is left to do

    assert [train.is_finished(state(*at)) for at in ((0, 0), (24, 24), (25, 20), (25, 25))] == [False] * 3 + [True]
    assert train.is_finished(state(26, 20))  # max_iters has been lowered
    minutes = {"cfg": Config(max_minutes=1.0, gradient_accumulation_steps=1)}
    assert not train.is_finished(state(25, 25, seconds=59.0, **minutes))
    assert train.is_finished(state(25, 25, seconds=61.0, **minutes))
    assert not train.is_finished(state(25, 20, seconds=61.0, **minutes))


def test_max_tokens_can_be_increased_and_the_schedule_stays(with_data, capsys):
    train.main([*ANY_LENGTH, "--out_dir=out/x", "--max_tokens=512"])
    train.main(["--resume", "--out_dir=out/x"])
    assert "out/x is finished already: to train it further, increase --max_tokens" in capsys.readouterr().out
    train.main(["--resume", "--out_dir=out/x", "--max_tokens=1000"])  # seven steps of 128; an eighth would exceed it
    out = capsys.readouterr().out
    assert "changed: max_tokens is now 1000, was 512" in out and "changed: max_iters is now 14, was 8" in out
    assert load_last("out/x")["tokens"] == records("out/x", "eval")[-1]["tokens"] == 896
    assert records("out/x", "step")[-1]["lr"] == 1e-3  # min_lr: the schedule ended after 512 tokens


def test_max_minutes_ends_the_run_in_time_with_the_learning_rate_decayed(with_data, clock, capsys):
    train.main([*ANY_LENGTH, "--lr_schedule=linear", "--log_interval=1", "--eval_interval=1000", "--out_dir=out/x",
                "--min_lr=0", "--max_minutes=0.02"])
    assert "the run: 0.02 minutes" in capsys.readouterr().out
    state = load_last("out/x")
    steps, evals = records("out/x", "step"), records("out/x", "eval")
    assert len(steps) > 10 and steps[-2]["seconds"] < 1.25 and 1.2 <= state["seconds"] < 1.4
    assert evals[-1]["iter"] == state["iter"] == steps[-1]["iter"]
    for previous, step in zip(steps[2:], steps[3:]):  # proportional to the time that is left
        assert step["lr"] == pytest.approx(1e-2 * (1 - previous["seconds"] / 1.2), abs=1e-3)
    train.main(["--resume", "--out_dir=out/x"])
    assert "out/x is finished already: to train it further, increase --max_minutes" in capsys.readouterr().out
    train.main(["--resume", "--out_dir=out/x", "--max_minutes=0.03"])
    assert "changed: max_minutes is now 0.03, was 0.02" in capsys.readouterr().out
    assert load_last("out/x")["seconds"] >= 1.8


def test_a_finished_run_says_how_it_can_be_trained_further():
    """A run whose learning rate has decayed to 0 cannot, unless it is limited by minutes."""
    for settings, hint in [({"max_minutes": 5.0, "lr_decay_iters": 2000}, "its learning rate is 0 now, so start a"),
                           ({}, "its learning rate is 0 now, so start a longer run with another --out_dir"),
                           ({"lr_decay_iters": 30_000}, "increase --max_iters")]:
        cfg = Config(**{"min_lr": 0.0} | settings)
        assert hint in train.extension_hint(state_at(cfg, 625))


def test_a_run_of_no_time_at_all_is_one_step(with_data, capsys):
    """As with the start taking longer than max_minutes."""
    train.main([*ANY_LENGTH, "--max_minutes=0.00001", "--warmup_iters=1000", "--out_dir=out/x"])
    assert checkpoint.load("out/x/ckpt.pt")["step"] == load_last("out/x")["step"] == 1
    assert "warning: the run ended during warmup" in capsys.readouterr().out


# ---- one optimizer step ----


@pytest.mark.parametrize("optimizer, architecture", [("adamw", "gpt2"), ("muon", "gpt2"), ("muon", "modern")])
def test_every_parameter_is_in_one_optimizer_and_only_matrices_decay(optimizer, architecture):
    model = make_model(replace(TINY_MODEL, architecture=architecture))
    names = {p: name for name, p in model.named_parameters()}
    optimizers = train.make_optimizers(model, Config(optimizer=optimizer, learning_rate=3e-3, muon_lr=0.01))
    groups = [(type(o).__name__, g, {names[p] for p in g["params"]}) for o in optimizers for g in o.param_groups]
    assert sorted(names[p] for _, g, _ in groups for p in g["params"]) == sorted(names.values())
    hidden = {name for name in names.values() if name.startswith("transformer.h.") and ".weight" in name
              and ".ln_" not in name}
    assert len(hidden) == 2 * (5 if architecture == "modern" else 4)
    in_muon = set().union(*(members for kind, _, members in groups if kind == "Muon"))
    assert in_muon == (hidden if optimizer == "muon" else set())
    assert {(kind, g["lr"]) for kind, g, _ in groups} <= {("Muon", 0.01), ("AdamW", 3e-3)}
    embeddings = {"gpt2": ["wte", "wpe"], "modern": ["wte", "ve"]}[architecture]
    decayed = hidden | {f"transformer.{name}.weight" for name in embeddings}
    for decay, expected in ((0.1, decayed), (0.0, set(names.values()) - decayed)):
        assert set().union(*(members for _, g, members in groups if g["weight_decay"] == decay)) == expected
    if optimizer == "muon":
        parts = {names[p]: count for p, count in optimizers[1].parts.items()}
        assert {name for name, count in parts.items() if count == 3} == {
            f"transformer.h.{layer}.attn.c_attn.weight" for layer in (0, 1)} and set(parts.values()) == {1, 3}


def batch_with_ignored_targets(state, get_batch=train.get_batch):
    """A reader's get_batch: sequence 3 of a step has no target, the others have more or fewer."""
    x, y = get_batch(state)
    for number, targets in enumerate(y, state.rank * len(y)):
        targets[:16 if number == 3 else number] = -1
    return x, y


def test_a_step_does_not_depend_on_the_micro_batch_size_or_the_number_of_ranks(with_data, large_eps, monkeypatch):
    """Steps of 8 sequences; micro-batches of 3 leave a smaller last one."""
    monkeypatch.setattr(train, "get_batch", batch_with_ignored_targets)
    flags = [*TINY, "--max_iters=4", "--dropout=0"]
    for size in (8, 1, 3):
        train.main([*flags, f"--device_batch_size={size}", f"--out_dir=out/{size}"])
    flags.append("--device_batch_size=3")
    assert [code for code, *_ in run_ranks(2, train.main, [*flags, "--out_dir=out/ranks"])] == [0, 0]
    for name in ("1", "3", "ranks"):
        for key, w in weights("out/8").items():
            torch.testing.assert_close(weights(f"out/{name}")[key], w, rtol=1e-3, atol=1e-5)
        for a, b in zip(records("out/8", "step"), records(f"out/{name}", "step"), strict=True):
            assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4)


def test_a_step_without_any_target_leaves_the_gradient_at_zero():
    model = GPT(TINY_MODEL)
    state = state_at(Config(), model=model, scaler=torch.amp.GradScaler("cpu", enabled=False))
    x = torch.zeros(2, 16, dtype=torch.long)
    assert train.forward_backward(state, model, x, x - 1) == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_a_step_is_adamw_with_clipping_on_the_next_sequences(with_data, large_eps):
    """The first step against a plain computation: all sequences at once, all tokens, and AdamW's formulas."""
    train.main([*TINY, "--max_iters=2", "--dropout=0", "--grad_clip=0.1", "--out_dir=out/x"])
    torch.manual_seed(1337)
    model = GPT(replace(TINY_MODEL, dropout=0.0))
    split = Split("data/nursery-bpe300", "train", 16)
    unused = torch.from_numpy(~split.used_tokens())
    assert 10 < unused.sum() < 290
    with torch.no_grad():
        model.transformer.wte.weight[unused] = 0
    x, y = TrainingOrder(split, 1337).sequences(0, 8)
    loss = model(torch.from_numpy(x), torch.from_numpy(y))
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    step = records("out/x", "step")[0]
    assert (step["loss"], step["grad_norm"]) == pytest.approx((loss.item(), norm), rel=1e-5) and norm > 0.1
    lr = 1e-2 / 2  # the first of one warmup iteration
    after = weights("out/x")
    for name, p in model.named_parameters():
        g = p.grad * 0.1 / norm
        decayed = p * (1 - lr * 0.1) if p.dim() == 2 else p  # weight decay: matrices, not biases and norms
        expected = decayed - lr * g / (g.abs() + 1e-3)  # AdamW's first step, with bias correction
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6)


def test_embeddings_start_from_the_text_of_the_run(with_data):
    train.main([*TINY, "--max_iters=2", "--warmup_iters=0", "--init_embeddings=cooccurrence", "--learning_rate=1e-9",
                "--min_lr=0", "--out_dir=out/x"])
    sequences = TrainingOrder(Split("data/nursery-bpe300", "train", 16), 1337).sequences(0, 8)[0]
    expected = 0.2 * cooccurrence_embeddings(sequences, 300, 16)
    torch.testing.assert_close(weights("out/x")["transformer.wte.weight"], expected, rtol=0, atol=1e-6)
    assert expected.square().mean(1).max() > 0.03
    torch.testing.assert_close(weights("out/x")["transformer.ln_f.weight"], torch.full((16,), 0.1))


@pytest.mark.parametrize("architecture, dtype, tolerance", [("gpt2", "float32", 1e-3), ("modern", "bfloat16", 1e-2)])
def test_compiled_training_gives_the_same_losses(with_data, large_eps, monkeypatch, architecture, dtype, tolerance):
    """With tracing only (aot_eager): generating C++ code would take half a minute."""
    compiled, torch_compile = [], torch.compile

    def compile(function):
        compiled.append(function)
        return torch_compile(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile)
    for setting in ("False", "True"):
        train.main([*TINY, "--max_iters=4", "--dropout=0", f"--compile={setting}", f"--out_dir=out/{setting}",
                    f"--architecture={architecture}", f"--dtype={dtype}"])
    losses = {setting: [r["loss"] for r in records(f"out/{setting}", "step")] for setting in ("False", "True")}
    assert losses["True"] == pytest.approx(losses["False"], rel=tolerance)
    assert not any("orig_mod" in name for name in weights("out/True"))
    assert len(compiled) == 2 + 1  # the blocks; whether it works


def test_an_overflow_in_float16_makes_all_optimizers_skip_the_step():
    torch.manual_seed(0)
    model, cfg = GPT(TINY_MODEL), Config(optimizer="muon")
    state = state_at(cfg, model=model, optimizers=train.make_optimizers(model, cfg), scaler=torch.amp.GradScaler("cpu"))
    state.scaler.scale(torch.zeros(()))  # creates its scale
    before = {name: w.clone() for name, w in model.state_dict().items()}
    for value, skipped in ((math.inf, 1), (1.0, 1)):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.transformer.wte.weight.grad[0, 0] = value  # in AdamW, not in Muon
        grad_norm = train.optimizer_step(state)
        assert math.isfinite(grad_norm) == math.isfinite(value) and state.skipped == skipped
        assert all(p.grad is None for p in model.parameters())
        assert equal(model.state_dict(), before) == (value == math.inf)


def test_steps_skipped_in_float16_are_counted(with_data, capsys):
    words = [*TINY, "--out_dir=out/x", "--dtype=float16", "--log_interval=1", "--lr_decay_iters=24"]
    train.main([*words, "--max_iters=2"])
    state = load_last("out/x")
    assert state["scaler"]["scale"] == 65536 and state["skipped"] == 0
    state["scaler"]["scale"] *= 2.0**7  # too large
    checkpoint.save("out/x/last.pt", state)
    train.main([*words, "--resume"])
    steps = records("out/x", "step")
    assert all((b["grad_norm"] is None) == (b["skipped"] > a["skipped"]) for a, b in zip(steps, steps[1:]))
    skipped = steps[-1]["skipped"]
    assert 2 < skipped < 9 and steps[-1]["grad_norm"] > 0 and f"skipped_steps: {skipped}\n" in capsys.readouterr().out
    assert load_last("out/x")["scaler"]["scale"] == 65536 * 2.0**(7 - skipped)


# ---- stopping and resuming ----


@pytest.mark.parametrize("stop, optimizer, schedule, architecture", [
    (2, "adamw", "cosine", "gpt2"), (8, "muon", "wsd", "gpt2"), (10, "muon", "linear", "modern")])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(with_data, stop, optimizer, schedule, architecture):
    """With dropout and gradient accumulation, stopped at and between evaluations (every 8 iterations)."""
    words = [*TINY, "--dropout=0.2", "--lr_decay_iters=16", f"--optimizer={optimizer}", f"--lr_schedule={schedule}",
             f"--architecture={architecture}", "--max_iters=16"]
    train.main([*words, "--out_dir=out/whole"])
    train.main([*words, "--out_dir=out/parts", f"--max_iters={stop}"])
    train.main([*words, "--out_dir=out/parts", "--resume"])
    whole, parts = map(what_must_be_equal, ("out/whole", "out/parts"))
    assert equal(whole["last.pt"], parts["last.pt"]) and equal(whole["ckpt.pt"], parts["ckpt.pt"])
    assert len(load_last("out/parts")["optimizers"]) == (2 if optimizer == "muon" else 1)
    assert len(records("out/parts", "run")) == 2 and load_last("out/parts")["seconds"] > 0
    assert all(line in parts["log.jsonl"] for line in whole["log.jsonl"])  # it has more: of the end of the first part


def test_a_signal_stops_after_the_current_step_and_the_run_can_be_resumed(with_data, trained):
    def signal_after_first_step():  # after the line of the run
        at_file_operation(2, "log.jsonl", lambda: os.kill(os.getpid(), signal.SIGTERM), "open")

    flags = [*TINY, "--out_dir=out/my run", "--eval_interval=4"]  # at the second step
    code, out, err = run_process(train.main, flags, signal_after_first_step)
    assert code == 0 and "stopping after this step or evaluation" in err and "Traceback" not in err
    assert "stopped after step 2 of 12; resume with  python train.py --out_dir='out/my run' --resume\n" in out
    assert checkpoint.load("out/my run/last.pt")["step"] == 2 and not Path("out/my run/ckpt.pt").exists()
    assert records("out/my run", "end") == [{"kind": "end", "iter": 4, "reason": "stopped"}]
    train.main(["--resume", "--out_dir=out/my run", "--eval_interval=8"])
    assert equal(weights("out/my run"), weights(trained / "out/tiny"))


def test_resuming_keeps_the_stored_settings_and_resume_auto_also_starts_a_run(with_data, capsys, fails):
    words = [*TINY, "--out_dir=out/x", "--resume=auto"]
    train.main([*words, "--max_iters=4"])
    assert "resuming" not in capsys.readouterr().out
    train.main(["--resume", "--max_iters=6"])  # the newest run
    out = capsys.readouterr().out
    assert "resuming after step 2 of 3" in out and "changed: max_iters is now 6, was 4" in out
    state = checkpoint.load("out/x/last.pt")
    assert state["step"] == 3 and state["config"]["n_embd"] == 16 and state["config"]["lr_decay_iters"] == 4
    train.main([*words, "--max_iters=8", "--lr_decay_iters=4"])
    assert "resuming after step 3 of 4" in capsys.readouterr().out
    Path("out/x/last.pt").unlink()
    Path("out/x/last.prev.pt").unlink()
    assert "out/x already contains a run: replace it (--overwrite)" in fails(train.main, words)  # to keep ckpt.pt
    assert Path("out/x/ckpt.pt").exists()


def test_resuming_notes_which_settings_of_the_config_file_it_ignores(with_data, capsys):
    _, settings, _ = read_command_line(ANY_LENGTH, {})
    text = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    Path("tiny.py").write_text(text)
    command = ["tiny.py", "--max_tokens=128", "--eval_iters=1"]
    train.main(command)
    capsys.readouterr()
    train.main([*command, "--resume"])  # the same command again: nothing differs
    out = capsys.readouterr().out
    assert "out/tiny is finished already" in out and "note" not in out and "changed" not in out
    Path("tiny.py").write_text(text.replace("batch_size = 4", "batch_size = 5"))
    train.main([*command, "--resume", "--max_tokens=256"])
    out = capsys.readouterr().out
    assert "note: the run keeps batch_size = 4; the config file has 5" in out and "changed: max_tokens" in out
    assert checkpoint.load("out/tiny/last.pt")["tokens"] == 256


def test_last_pt_is_saved_after_the_first_step_at_evaluations_and_in_between(with_data, monkeypatch, clock):
    saved, save = [], checkpoint.save

    def recording_save(path, state):
        saved.append((path.name, state["step"]))
        save(path, state)

    for module in (run, train):
        monkeypatch.setattr(module, "save", recording_save)
    train.main([*TINY, "--out_dir=out/x", "--max_iters=60", "--eval_interval=54", "--checkpoint_minutes=0.0025"])
    assert saved[0] == ("last.pt", 1) and saved[-4:] == [("ckpt.pt", 27), ("last.pt", 27), ("ckpt.pt", 30),
                                                         ("last.pt", 30)]
    gaps = np.diff([step for _, step in saved[:-4]])
    # 0.0025 minutes are 15 readings of the clock, of which each step makes a few.
    assert len(gaps) > 2 and 1 < gaps.min() and gaps.max() < 15


def test_a_missing_or_damaged_ckpt_is_written_again(with_data, capsys):
    train.main([*TINY, "--out_dir=out/x", "--max_iters=2", "--lr_decay_iters=24"])
    ckpt = Path("out/x/ckpt.pt")
    for max_iters, damage in ((4, ckpt.unlink), (6, lambda: ckpt.write_bytes(ckpt.read_bytes()[:-1000]))):
        damage()
        train.main(["--out_dir=out/x", "--resume", f"--max_iters={max_iters}"])
        assert "its next evaluation writes a new out/x/ckpt.pt" in capsys.readouterr().out
        assert checkpoint.load(ckpt)["iter"] == max_iters


# ---- errors ----


def test_missing_data_is_reported_with_the_command_that_prepares_it(here, fails):
    assert "mutually exclusive: choose one" in fails(train.main, ["--resume", "--overwrite"])
    line = fails(train.main, [str(ROOT / "config/quickstart.py")])
    dataset = read_config_file(ROOT / "config/quickstart.py")["dataset"]
    assert f"no data in data/{dataset}" in line and "python prepare.py nursery --tokenizer bpe:" in line
    assert QUICKSTART in (ROOT / "README.md").read_text(encoding="utf-8").replace(" \\\n    ", " ")
    assert fails(train.main, []).endswith(QUICKSTART) and fails(sample.main, []).endswith(QUICKSTART)
    assert not any(here.iterdir())


@pytest.mark.parametrize("flags, message", [
    (["--block_size=100000"], "block_size = 100000"),
    (["--device=cuda:99"], "device = 'cuda:99' cannot be used"),
    (["--n_layer=50", "--n_embd=1000000"], "parameters and 128 tokens per step and process need more than the"),
])
def test_what_cannot_work_is_reported_before_anything_is_written(with_data, fails, flags, message):
    assert message in fails(train.main, [*TINY, "--out_dir=out/x", *flags])
    assert not Path("out").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoints(with_data, fails):
    words = [*TINY, "--out_dir=out/x", "--grad_clip=0", "--lr_decay_iters=24"]
    train.main([*words, "--max_iters=2"])
    good = weights("out/x")
    state = load_last("out/x")
    for name in state["model"]:
        state["model"][name] *= 1e30  # the next loss overflows float32
    checkpoint.save("out/x/last.pt", state)
    line = fails(train.main, [*words, "--resume"])
    assert "the loss is nan at iteration" in line and "lower --learning_rate" in line
    assert equal(weights("out/x", "ckpt.pt"), good) and checkpoint.load("out/x/last.pt")["step"] == 1
    assert [r["iter"] for r in records("out/x", "step")] == [2]  # the failed step is not logged


def test_an_evaluation_that_is_not_finite_is_neither_logged_nor_saved(with_data, fails):
    """The loss of a step is from before it changes the weights, and may still be finite."""
    line = fails(train.main, [*TINY, "--out_dir=out/x", "--learning_rate=1e30", "--min_lr=1e29", "--warmup_iters=0",
                              "--eval_interval=1"])
    assert "the validation loss is nan at iteration 2" in line
    assert records("out/x", "eval") == [] and not Path("out/x/ckpt.pt").exists()
    assert "already contains a run: resume it (--resume)" in fails(train.main, [*TINY, "--out_dir=out/x"])


def test_what_is_not_finite_is_named_with_the_settings_to_change():
    state = state_at(Config(optimizer="muon"), 3, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="iteration 96: start again with .* a lower --muon_lr .* --warmup_iters$"):
        train.check_finite(state, "gradient norm", torch.tensor(math.inf))
    state.saved_step = 2
    with pytest.raises(UserError, match="96: resume with --dtype=float32, or start .* has earlier checkpoints$"):
        train.check_finite(state, "gradient norm", torch.tensor(math.inf))
