"""Edits of the model or the loop as a reader makes them: each is trained, resumed, evaluated, sampled and exported.

What is generated must be what the trained model computes as written: see `check_everywhere`.
"""

import math
import os
import random
import shutil
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model as model_module
import modern
import sample
import train
from conftest import TINY
from faults.processes import run_ranks
from faults.soak import equal
from model import GPT, MLP, Block, CausalSelfAttention
from storygpt import generate
from storygpt.checkpoint import load, load_model
from storygpt.corpus.dataset import Split, evaluation_windows
from storygpt.corpus.tokenizer import Tokenizer
from storygpt.generate import prepare_for_generation, window_start
from storygpt.system.hardware import autocast

# Three optimizer steps, with a checkpoint after the second.
STEPS = ["--max_iters=6", "--lr_decay_iters=6", "--eval_interval=4", "--dropout=0"]
PROMPT = "One day"


# ---- edits of the layers ----


class MLPOfSequential(nn.Sequential):
    def __init__(self, config):
        super().__init__(nn.Linear(config.n_embd, 2 * config.n_embd), nn.ReLU(),
                         nn.Linear(2 * config.n_embd, config.n_embd))


class MixtureOfExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.n_embd, 3)
        self.experts = nn.ModuleList([MLP(config) for _ in range(3)])

    def forward(self, x):
        weights = F.softmax(self.router(x), -1)  # (B, T, 3)
        return sum(weights[..., i:i + 1] * expert(x) for i, expert in enumerate(self.experts))


class ChosenExpert(nn.Module):
    """Only some experts are used in a step."""

    def __init__(self, config):
        super().__init__()
        self.experts = nn.ModuleDict({name: MLP(config) for name in "ab"})

    def forward(self, x):
        return self.experts["a" if x.mean() > -10 else "b"](x)


class ExpertsInOneParameter(nn.Module):
    """A parameter of three dimensions."""

    def __init__(self, config):
        super().__init__()
        self.weights = nn.Parameter(0.1 * torch.randn(2, config.n_embd, config.n_embd))

    def forward(self, x):
        return sum(F.relu(x @ weight) for weight in self.weights)


class WeightNorm(MLP):
    def __init__(self, config):
        super().__init__(config)
        nn.utils.parametrizations.weight_norm(self.c_fc)


class LowRankUpdate(MLP):
    """LoRA by a functional call."""

    def __init__(self, config):
        super().__init__(config)
        self.a, self.b = nn.Parameter(torch.randn(4, config.n_embd)), nn.Parameter(torch.randn(4 * config.n_embd, 4))

    def forward(self, x):
        weight = self.c_fc.weight + 0.1 * self.b @ self.a
        x = F.relu(torch.func.functional_call(self.c_fc, {"weight": weight}, (x,)))
        return torch.func.functional_call(self.c_proj, {"bias": self.c_proj.bias + self.b[:len(self.a[0]), 0]}, (x,))


class ComplexBuffer(MLP):
    """As Llama's rotations."""

    def __init__(self, config):
        super().__init__(config)
        angles = torch.arange(config.n_embd // 2) + 1.0
        self.register_buffer("rotations", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x):
        rotated = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * self.rotations
        return super().forward(torch.view_as_real(rotated).flatten(-2))


class ForwardHooks(Block):
    def __init__(self, config):
        super().__init__(config)
        self.attn.register_forward_hook(lambda module, args, output: output * 3)
        self.mlp.c_fc.register_forward_pre_hook(lambda module, args: (args[0] + 0.3,))


class BackwardHook(Block):
    def __init__(self, config):
        super().__init__(config)
        self.mlp.c_proj.register_full_backward_hook(lambda module, grad, _: (grad[0] * 0.5,))


class ParallelBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.RMSNorm(config.n_embd), CausalSelfAttention(config), MLP(config)

    def forward(self, x, cache=None):
        y = self.norm(x)
        return x + self.attn(y, cache) + self.mlp(y)


class MultiQueryAttention(CausalSelfAttention):
    """Fewer keys than queries."""

    def __init__(self, config):
        super().__init__(config)
        self.c_attn = nn.Linear(config.n_embd, config.n_embd + 2 * config.n_embd // config.n_head)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        D = C // self.n_head
        q, k, v = (y.view(B, T, -1, D).transpose(1, 2) for y in self.c_attn(x).split([C, D, D], 2))
        return self.c_proj(self.attend(q, k, v, cache).transpose(1, 2).reshape(B, T, C))

    def attend(self, q, k, v, cache):
        if cache is not None:
            k, v = cache.append(k, v)
        return F.scaled_dot_product_attention(q, k, v, cache and cache.mask, is_causal=cache is None, enable_gqa=True)


def sliding_window_in_training_only(self, q, k, v, cache):
    """The branch with a cache was forgotten."""
    if cache is not None:
        k, v = cache.append(k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)
    near = torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril().triu(-2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near)


def attention_written_out(self, q, k, v, cache):
    if cache is not None:
        k, v = cache.append(k, v)
    T, S = q.size(2), k.size(2)
    past = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return torch.tanh(q @ k.mT).masked_fill(~past, -math.inf).softmax(-1) @ v


# ---- edits of the model ----


class ParameterList(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.gains = nn.ParameterList([nn.Parameter(torch.tensor(0.7)) for _ in range(config.n_layer)])

    def hidden_states(self, idx, positions, cache):
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        for gain, block in zip(self.gains, self.transformer.h):
            x = gain * block(x, cache)
        return x


class OneBlockForAllLayers(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.transformer.h = nn.ModuleList([self.transformer.h[0]] * 3)


class UntiedHead(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)


class HeadWithBias(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)


class PaddedVocabulary(GPT):
    def __init__(self, config):
        super().__init__(replace(config, vocab_size=320))


class PaddedLayers(GPT):
    def __init__(self, config):
        super().__init__(replace(config, vocab_size=320))
        self.config = config


class FrozenAndUnused(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.transformer.wpe.requires_grad_(False)
        self.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
        self.transformer.h[1].attn.unused = nn.Linear(config.n_embd, config.n_embd)


plain_forward = GPT.forward


def forward_without_a_cache(self, idx, targets=None):
    x = self.transformer.wte(idx) + self.transformer.wpe.weight[:idx.size(1)]
    for block in self.transformer.h:
        x = block(x)
    logits = self.lm_head(x)
    return logits if targets is None else F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def soft_cap_of_the_logits(self, idx, targets=None, cache=None):
    logits = 2 * torch.tanh(plain_forward(self, idx, cache=cache) / 2)
    return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def random_numbers_in_the_loss(self, idx, targets=None, cache=None):
    """Of Python and numpy: resume repeats them."""
    output = plain_forward(self, idx, targets, cache)
    return output if targets is None else output * (1 + random.random() * np.random.rand())


# ---- edits of the loop ----


plain_evaluate_and_log, plain_get_batch = train.evaluate_and_log, train.get_batch


def metrics_of_numpy(state, tokenizer):
    plain_evaluate_and_log(state, tokenizer)
    state.metrics |= {"scalar": np.float32(0.5), "array": np.arange(3), "tensor": torch.ones(2)}
    state.log({"kind": "metrics", **state.metrics})


def random_tokens_in_the_inputs(state):
    x, y = plain_get_batch(state)
    return torch.where(torch.rand(x.shape) < 0.1, torch.randint_like(x, 256), x), y


def another_optimizer(model, cfg):
    return [torch.optim.SGD(model.parameters(), lr=cfg.learning_rate, momentum=0.9)]


def another_schedule(cfg, iteration, progress):
    return 1 - progress


# The object that is edited and the name of its attribute → the new values, each in a test of its own.
EDITS = {
    (model_module, "MLP"): [MLPOfSequential, MixtureOfExperts, ChosenExpert, ExpertsInOneParameter, WeightNorm,
                           LowRankUpdate, ComplexBuffer],
    (model_module, "Block"): [ForwardHooks, BackwardHook, ParallelBlock],
    (model_module, "CausalSelfAttention"): [MultiQueryAttention],
    (CausalSelfAttention, "attend"): [sliding_window_in_training_only, attention_written_out],
    (modern, "GPT"): [ParameterList, OneBlockForAllLayers, UntiedHead, HeadWithBias, PaddedVocabulary,
                        PaddedLayers, FrozenAndUnused],
    (GPT, "forward"): [forward_without_a_cache, soft_cap_of_the_logits, random_numbers_in_the_loss],
    (train, "evaluate_and_log"): [metrics_of_numpy],
    (train, "get_batch"): [random_tokens_in_the_inputs],
    (train, "make_optimizers"): [another_optimizer],
    (train, "learning_rate_multiplier"): [another_schedule],
}
CHANGES = {value.__name__: (*place, value) for place, values in EDITS.items() for value in values}
STILL_GPT2 = {UntiedHead, PaddedVocabulary, BackwardHook, random_numbers_in_the_loss, metrics_of_numpy,
              random_tokens_in_the_inputs, another_optimizer, another_schedule}


# ---- what must hold ----


def plain_model(out_dir):
    """The trained model of a run as written, with nothing replaced."""
    checkpoint = load(f"{out_dir}/ckpt.pt")
    model = modern.make_model(model_module.GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval().requires_grad_(False)


def check_everywhere(out_dir, flags, capsys):
    """Train in one piece and once more from the second step on, sample and evaluate; compare with the plain forward."""
    train.main([*TINY, *STEPS, *flags, f"--out_dir={out_dir}"])
    shutil.copytree(out_dir, "out/resumed")
    os.replace("out/resumed/last.prev.pt", "out/resumed/last.pt")
    train.main([*TINY, *STEPS, *flags, "--out_dir=out/resumed", "--resume"])
    assert "resuming after step 2 of 3" in capsys.readouterr().out
    whole, resumed = (load(f"{folder}/last.pt") for folder in (out_dir, "out/resumed"))
    assert whole["step"] == resumed["step"] == 3
    assert equal(whole["model"], resumed["model"])

    model = plain_model(out_dir)
    tokenizer = Tokenizer.load(out_dir)
    fast, _, _ = load_model(f"{out_dir}/ckpt.pt")
    prepare_for_generation(fast, torch.device("cpu"), torch.float32)
    idx = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(PROMPT)]])
    for token, logits in generate.generate(fast, idx, 20, temperature=0, with_logits=True):  # more than a block of 16
        expected = model(idx[:, window_start(idx.size(1), 16):])[:, -1, :fast.config.vocab_size]
        assert torch.allclose(logits, expected, atol=1e-4 * expected.abs().max().item())
        idx = torch.cat([idx, token[:, None]], 1)
    assert ("note: with a cache," in capsys.readouterr().err) == (model_module.CausalSelfAttention.attend
                                                                 is sliding_window_in_training_only)
    sample.main(["--out_dir", out_dir, "--start", PROMPT, "--temperature=0", "--max_new_tokens=20", "--dtype=float32"])
    story = idx[0, 1:].tolist()
    story = story[:story.index(tokenizer.end_of_text)] if tokenizer.end_of_text in story else story
    assert capsys.readouterr().out == tokenizer.decode(story) + "\n"

    train.main(["--out_dir", out_dir, "--eval_only", "--batch_size=64"])
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    split = Split("data/nursery-bpe300", "validation", 16)
    x, y = (torch.from_numpy(tokens) for tokens in split.windows(evaluation_windows(split)))
    with autocast(torch.device("cpu"), torch.float32):
        assert float(printed["loss"]) == pytest.approx(F.cross_entropy(model(x).mT, y).item(), abs=3e-3)


def check_export(out_dir, is_gpt2, fails):
    """A model that computes what GPT-2 does is exported, and the export compares its logits; others are refused.

    tests/tools/formats/test_onnx.py exports edited models to ONNX.
    """
    from tools import export
    if is_gpt2:
        export.main([out_dir, "exported"])
    else:
        assert "export to page.onnx instead" in fails(export.main, [out_dir, "page.html"])
        assert fails(export.main, [out_dir, "exported"])
    assert os.path.exists("exported") == is_gpt2


@pytest.mark.parametrize("name", CHANGES)
def test_an_edit_holds_everywhere(name, with_data, monkeypatch, capsys, fails):
    monkeypatch.setattr(*CHANGES[name])
    check_everywhere("out/edited", ["--optimizer=muon"], capsys)  # and AdamW, for embeddings, biases and norms
    if find_spec("transformers") and find_spec("py_mini_racer"):  # of requirements-extra.txt
        check_export("out/edited", CHANGES[name][2] in STILL_GPT2, fails)


def test_a_model_that_cannot_be_loaded_as_it_was_trained_is_refused(with_data, monkeypatch, fails):
    class Edited(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("noise", torch.randn(config.n_embd), persistent=False)

        def hidden_states(self, idx, positions, cache):
            return super().hidden_states(idx, positions, cache) + self.noise
    monkeypatch.setattr(modern, "GPT", Edited)
    assert "keep what it depends on in a parameter" in fails(train.main, [*TINY, *STEPS, "--out_dir=out/edited"])


def test_a_state_that_is_not_saved_is_noticed_at_the_first_evaluation(with_data, monkeypatch, fails):
    def forward_that_counts(self, idx, targets=None, cache=None):
        self.calls = getattr(self, "calls", 0) + self.training
        output = plain_forward(self, idx, targets, cache)
        if targets is None:
            output = output.index_fill(-1, excluded, -math.inf)
        return output if self.calls < 2 else 2 * output
    excluded = torch.tensor(Tokenizer.load("data/nursery-bpe300").ranks[b"\xff"])  # not in text
    monkeypatch.setattr(GPT, "forward", forward_that_counts)
    assert "keep what it depends on in a parameter" in fails(train.main, [*TINY, *STEPS, "--out_dir=out/edited"])
    assert load("out/edited/last.pt")["step"] == 2


class NormsInAnotherOrder(Block):
    def __init__(self, config):
        super().__init__(config)
        self.ln_1 = self._modules.pop("ln_1")


def other_hyperparameters(model, cfg):
    optimizer, = plain_make_optimizers(model, cfg)
    optimizer.param_groups[1]["betas"] = 0.5, 0.6
    return [optimizer]


plain_make_optimizers = train.make_optimizers


@pytest.mark.parametrize("place, edit, complaint", [
    ((model_module, "Block"), NormsInAnotherOrder, "has parameter = transformer.h.0.ln_1.weight where the program"),
    ((train, "make_optimizers"), other_hyperparameters, "has betas = (0.9, 0.95) where the program now has (0.5, 0.6)"),
    ((train, "make_optimizers"), another_optimizer, "has optimizer = AdamW where the program now has SGD")])
def test_a_resumed_run_whose_optimizers_were_edited_is_refused(with_data, monkeypatch, fails, place, edit, complaint):
    train.main([*TINY, *STEPS, "--out_dir=out/edited"])
    os.replace("out/edited/last.prev.pt", "out/edited/last.pt")
    monkeypatch.setattr(*place, edit)
    assert complaint in fails(train.main, [*TINY, *STEPS, "--out_dir=out/edited", "--resume"])


def test_the_extra_state_of_a_module_is_saved(with_data, monkeypatch, capsys):
    class ExtraState(GPT):
        calls = 0

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state):
            self.calls = state["calls"]

        def forward(self, idx, targets=None, cache=None):
            self.calls += self.training
            return super().forward(idx, targets, cache)
    monkeypatch.setattr(modern, "GPT", ExtraState)
    train.main([*TINY, *STEPS, "--out_dir=out/edited"])
    assert load_model("out/edited/ckpt.pt")[0].calls == load("out/edited/ckpt.pt")["model"]["_extra_state"]["calls"] > 1


def test_an_edit_can_stop_a_run_early(with_data, monkeypatch, capsys):
    def stop_after_the_evaluation(state, tokenizer):
        plain_evaluate_and_log(state, tokenizer)
        state.stop = True
    monkeypatch.setattr(train, "evaluate_and_log", stop_after_the_evaluation)
    train.main([*TINY, *STEPS, "--out_dir=out/edited"])
    assert "stopped after step 2 of 3" in capsys.readouterr().out


def test_an_optimizer_is_made_when_the_model_has_its_initial_weights(with_data, monkeypatch):
    seen = []

    def weights_when_it_is_made(model, cfg):
        seen.append(model.transformer.wte.weight.detach().clone())
        return plain_make_optimizers(model, cfg)
    train.main([*TINY, *STEPS, "--out_dir=out/edited"])
    monkeypatch.setattr(train, "make_optimizers", weights_when_it_is_made)
    train.main([*TINY, *STEPS, "--init_from=out/edited", "--out_dir=out/tuned"])
    assert torch.equal(seen[0], load("out/edited/ckpt.pt")["model"]["transformer.wte.weight"])


def last_logits_only(self, idx, targets=None, cache=None):
    output = plain_forward(self, idx, targets, cache)
    return output if targets is not None else output[:, -1:]


def optimizer_of_another_parameter(model, cfg):
    return [*plain_make_optimizers(model, cfg), torch.optim.SGD([nn.Parameter(torch.zeros(1))])]


@pytest.mark.parametrize("place, edit, complaint", [
    ((GPT, "forward"), last_logits_only, "without targets, model.forward must return the logits of all positions"),
    ((train, "make_optimizers"), optimizer_of_another_parameter, "has a parameter that is not one of the model")])
def test_an_edit_that_cannot_hold_is_refused_in_one_line(with_data, monkeypatch, fails, place, edit, complaint):
    monkeypatch.setattr(*place, edit)
    assert complaint in fails(train.main, [*TINY, *STEPS, "--out_dir=out/edited"])


plain_optimizer_step = train.optimizer_step


def noise_in_the_gradient(state):
    for p in state.model.parameters():
        p.grad += 0.1 * torch.randn_like(p)
    return plain_optimizer_step(state)


@pytest.mark.parametrize("place, edit", [
    ((modern, "GPT"), FrozenAndUnused), ((train, "optimizer_step"), noise_in_the_gradient)])
def test_an_edit_on_two_processes(with_data, monkeypatch, large_eps, place, edit):
    monkeypatch.setattr(*place, edit)
    train.main([*TINY, *STEPS, "--out_dir=out/one"])
    for code, _, error in run_ranks(2, train.main, [*TINY, *STEPS, "--out_dir=out/two"]):
        assert code == 0, error
    one, two = (load(f"out/{name}/last.pt")["model"] for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
