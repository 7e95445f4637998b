"""Tests on a GPU: run `python -m pytest -m cuda` on a machine that has one.

The environment variable TEST_DEVICE (default: cuda) selects the device; TEST_DEVICE=cpu is for developing the tests.
They train on random tokens, so they need no dataset, network or vocabulary.
"""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
import train
from conftest import ROOT
from model import GPTConfig
from modern import make_model
from storygpt import checkpoint, generate, loss
from storygpt.generate import KVCache, prepare_for_generation, uses_cache, window_start
from storygpt.loss import fuse_loss, fused_linear_cross_entropy
from storygpt.run import read_log
from storygpt.system.hardware import autocast, to_device
from tools import bench

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
ON_CUDA = DEVICE.startswith("cuda")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="no CUDA here, or "
                                                   "not selected by -m cuda")]
only_cuda = pytest.mark.skipif(not ON_CUDA, reason="CUDA only")
CONFIG = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=64, dropout=0.0)  # padded to 320 tokens
FLAGS = ("--dataset=bench --n_layer=2 --n_head=2 --n_embd=64 --block_size=16 --batch_size=4 "
         "--gradient_accumulation_steps=2 --max_iters=40 --warmup_iters=1 --learning_rate=1e-2 --min_lr=1e-3 "
         "--eval_interval=20 --eval_iters=2 --log_interval=1 --compile=False --dtype=float32 --dropout=0 "
         f"--device={DEVICE}").split()


@pytest.fixture(autouse=True)
def reset_global_settings():
    """train.main enables TF32 and, on a CPU, deterministic algorithms."""
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def data(here):
    """A folder with data/bench, a dataset of random tokens."""
    bench.write_random_dataset(here / "data" / "bench", CONFIG)
    return here


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_with_large_weights(architecture="gpt2"):
    """A model in eval mode, on the CPU, whose logits differ clearly from token to token."""
    torch.manual_seed(0)
    model = make_model(replace(CONFIG, architecture=architecture)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(8 * p if p.any() or p.dim() == 1 else 0.1 * torch.randn_like(p))
    return model


def records(out_dir, kind):
    return [record for record in read_log(Path(out_dir, "log.jsonl")) if record["kind"] == kind]


def losses(out_dir):
    return [r["loss"] for r in records(out_dir, "step")] + [r["val_loss"] for r in records(out_dir, "eval")]


def relative_error(actual, expected):
    return ((actual.float().cpu() - expected).norm() / expected.norm()).item()


# ---- arithmetic ----


def mean_loss(logits, y):
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)


def soft_capped_loss(logits, y):
    """A loss that is not fused."""
    logits = 5 * torch.tanh(logits.float() / 5)
    return mean_loss(logits, y) + 1e-3 * logits.logsumexp(-1).square().mean()


def loss_and_gradients(model, x, y, loss_function, dtype=torch.float32):
    device = next(model.parameters()).device
    with autocast(device, dtype):
        loss = loss_function(model(x.to(device)), y.to(device))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.03), (torch.float16, 0.01)])
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
@pytest.mark.parametrize("used", [300, 200])
@pytest.mark.parametrize("loss_function", [mean_loss, soft_capped_loss])
def test_loss_and_gradients_equal_those_of_the_plain_model_on_the_cpu(dtype, bound, architecture, used, loss_function):
    torch.manual_seed(0)
    model = make_model(replace(CONFIG, architecture=architecture)).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))  # some matrices are initialized to zero
        model.transformer.wte.weight[used:] = 0
    fused = copy.deepcopy(model).to(DEVICE)
    fuse_loss(fused, torch.arange(300) < used)
    x, y = torch.randint(used, (2, 6, 16), generator=seeded())
    y[2, 5] = -1
    actual_loss, gradients = loss_and_gradients(fused, x, y, loss_function, dtype)
    expected_loss, expected = loss_and_gradients(model, x, y, loss_function)
    assert relative_error(actual_loss, expected_loss) < bound
    errors = {name: relative_error(gradients[name], expected[name]) for name in expected
              if not name.endswith("c_attn.bias")}  # the gradient of the keys' third is 0: rounding errors only
    assert max(errors.values()) < bound, errors


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.02), (torch.float16, 0.01)])
@pytest.mark.parametrize("rows", [5, 64])
def test_the_fused_loss_with_a_padded_vocabulary_equals_cross_entropy(monkeypatch, dtype, bound, rows):
    """With 64 rows, in one chunk and in several; on CUDA, 300 columns are padded to 320."""
    monkeypatch.setitem(loss.CHUNK_ROWS, torch.device(DEVICE).type, rows)
    x, weight = torch.randn(64, 32, generator=seeded(3)), 0.2 * torch.randn(300, 32, generator=seeded(5))
    y = torch.randint(300, (64,), generator=seeded(4))
    x.requires_grad_(), weight.requires_grad_()
    losses = F.cross_entropy(x @ weight.T, y, reduction="none")
    expected = losses, *torch.autograd.grad(losses.mean(), (x, weight))
    x, weight, y = x.detach().to(DEVICE).requires_grad_(), weight.detach().to(DEVICE).requires_grad_(), y.to(DEVICE)
    with torch.autocast(DEVICE.split(":")[0], dtype, enabled=dtype != torch.float32):
        mean, losses = fused_linear_cross_entropy(x, weight, y)
    for a, b in zip((losses, *torch.autograd.grad(mean, (x, weight))), expected, strict=True):
        assert relative_error(a, b.detach()) < bound


def test_to_device_keeps_values_and_dtype():
    view = np.arange(12).reshape(3, 4)[:, 1:]  # not contiguous, as the inputs and targets of windows are
    tensor = to_device(view, torch.device(DEVICE))
    assert tensor.device.type == torch.device(DEVICE).type and tensor.dtype == torch.int64
    assert tensor.tolist() == view.tolist()


def test_micro_batches_equal_the_whole_batch(data, large_eps):
    for size in (8, 2):
        train.main([*FLAGS, f"--device_batch_size={size}", f"--out_dir=out/{size}"])
    assert losses("out/2") == pytest.approx(losses("out/8"), rel=1e-3)
    whole, parts = (checkpoint.load(f"out/{size}/last.pt")["model"] for size in (8, 2))
    for name, weight in whole.items():  # in TF32, whose rounding is a thousand times float32's
        torch.testing.assert_close(parts[name], weight, rtol=1e-2, atol=2e-3 if ON_CUDA else 1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_compiled_equals_eager_over_20_steps_without_recompiling_in_the_last_ones(data, large_eps, monkeypatch,
                                                                                  architecture):
    """There are evaluations in between, for which the layers are compiled too: in other shapes and without dropout."""
    if not ON_CUDA:  # on a CPU, the default backend takes half a minute
        original = torch.compile
        monkeypatch.setattr(torch, "compile", lambda *args: original(*args, backend="aot_eager"))
    torch._dynamo.reset()
    graphs, log_step = [], train.log_step
    monkeypatch.setattr(train, "log_step", lambda *args: (
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"]), log_step(*args)))
    flags = [*FLAGS, f"--architecture={architecture}"]
    train.main([*flags, "--compile=True", "--out_dir=out/True"])
    assert len(graphs) == 20 and graphs[0] > 0 and graphs[0] == graphs[9] and graphs[10] == graphs[19]
    train.main([*flags, "--compile=False", "--out_dir=out/False"])
    assert graphs[20] == graphs[-1] and losses("out/True") == pytest.approx(losses("out/False"), rel=2e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_overflows_in_float16_is_skipped_by_all_optimizers_and_counted(data, optimizer):
    flags = [*FLAGS, f"--optimizer={optimizer}", "--dtype=float16", "--out_dir=out/x", "--lr_decay_iters=80"]
    train.main([*flags, "--max_iters=4"])
    state = checkpoint.load("out/x/last.pt", checkpoint.LAST_REQUIRED_KEYS)
    assert state["skipped"] == 0 and state["scaler"]["scale"] == 65536
    before = copy.deepcopy(state)
    state["scaler"]["scale"] = 2.0**120  # far too large
    checkpoint.save(Path("out/x/last.pt"), state)
    train.main([*flags, "--resume", "--max_iters=8"])
    after = checkpoint.load("out/x/last.pt", checkpoint.LAST_REQUIRED_KEYS)
    assert after["skipped"] == 2 and after["scaler"]["scale"] == 2.0**118
    assert all(torch.equal(after["model"][name], weight) for name, weight in before["model"].items())
    assert len(after["optimizers"]) == (2 if optimizer == "muon" else 1)
    for old, new in zip(before["optimizers"], after["optimizers"]):
        for key, states in old["state"].items():
            assert all(torch.equal(new["state"][key][name], value) for name, value in states.items())
    after["scaler"]["scale"] = 65536.0
    checkpoint.save(Path("out/x/last.pt"), after)
    train.main([*flags, "--resume", "--max_iters=40"])
    steps = records("out/x", "step")
    assert steps[-1]["skipped"] == 2 and math.isfinite(steps[-1]["loss"])


# ---- generation ----


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 16, 40])
def test_cached_logits_equal_uncached_ones_past_the_end_of_the_block(prompt):
    model = model_with_large_weights().double().to(DEVICE)
    idx = torch.randint(300, (2, prompt), generator=seeded()).to(DEVICE)
    for token, logits in generate.generate(model, idx, 40, temperature=0, with_logits=True):
        expected = model(idx[:, window_start(idx.size(1), 16):])[:, -1]  # (B, V)
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
        idx = torch.cat([idx, token[:, None]], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stories", [1, 3])
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_decoding_with_a_captured_graph_equals_eager_decoding(monkeypatch, dtype, stories, architecture):
    """The logits and, with the same seed, the tokens are equal, also past the end of the block."""
    model = model_with_large_weights(architecture)
    with torch.no_grad():
        model.transformer.wte.weight[100:] = 0  # computed once, as those of tokens that never occurred
    plain = copy.deepcopy(model)
    prepare_for_generation(model, DEVICE, dtype)
    assert uses_cache(model)
    idx = torch.zeros(stories, 1, dtype=torch.long, device=DEVICE)

    def decode():
        generator = torch.Generator(DEVICE).manual_seed(1)
        return [(token.clone(), logits.clone()) for token, logits in
                generate.generate(model, idx, 40, 0.9, top_k=50, generator=generator, with_logits=True)]

    captured = decode()
    monkeypatch.setattr(generate, "capture_graph", lambda forward, cache: forward)
    for (token, logits), (eager_token, eager_logits) in zip(captured, decode(), strict=True):
        torch.testing.assert_close(logits, eager_logits)
        assert torch.equal(token, eager_token)
    with torch.no_grad():
        tokens = torch.stack([token for token, _ in captured[:15]], 1)  # (stories, 15)
        assert relative_error(captured[15][1], plain(F.pad(tokens.cpu(), (1, 0)))[:, -1]) < 0.1


@only_cuda
def test_a_graph_is_captured_and_replayed(monkeypatch):
    """Otherwise the test above would compare eager decoding with itself."""
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(1), replay(self)))
    list(generate.generate(model_with_large_weights().to(DEVICE), torch.zeros(1, 1, dtype=torch.long, device=DEVICE),
                           10))
    assert len(replays) == 9  # the first token comes from processing the prompt


def test_a_batch_generates_the_same_stories_as_single_prompts():
    model = model_with_large_weights().double().to(DEVICE)
    prompts = torch.randint(300, (3, 5), generator=seeded()).to(DEVICE)

    def stories(prompts):
        return torch.stack(list(generate.generate(model, prompts, 30, temperature=0)), 1)  # (B, 30)

    batch = stories(prompts)
    assert torch.equal(batch, torch.cat([stories(prompt[None]) for prompt in prompts]))
    assert len(set(map(tuple, batch.tolist()))) == 3


def test_the_seed_determines_the_story():
    model = model_with_large_weights().to(DEVICE)

    def story(seed):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        idx = torch.zeros(4, 1, dtype=torch.long, device=DEVICE)
        return torch.stack(list(generate.generate(model, idx, 30, top_k=50, generator=generator))).tolist()
    assert story(1) == story(1) != story(2)


@torch.no_grad()
def test_the_cache_has_fixed_shapes_on_cuda():
    model, cache = model_with_large_weights().to(DEVICE), KVCache(CONFIG.block_size, DEVICE)
    assert cache.fixed_shapes == ON_CUDA
    for T in (3, 2):
        model(torch.zeros(2, T, dtype=torch.long, device=DEVICE), cache=cache)
    assert cache.length.item() == 5 and cache.mask.shape == (2, 16 if ON_CUDA else 5)


# ---- stopping, resuming, other devices ----


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(data, large_eps, optimizer):
    flags = [*FLAGS, "--dropout=0.1", "--lr_decay_iters=40", f"--optimizer={optimizer}"]
    train.main([*flags, "--out_dir=out/whole"])
    train.main([*flags, "--out_dir=out/resumed", "--max_iters=14"])
    train.main([*flags, "--out_dir=out/resumed", "--resume"])
    whole, resumed = ({r["tokens"]: r["loss"] for r in records(f"out/{name}", "step")} for name in ("whole", "resumed"))
    assert resumed == pytest.approx(whole, rel=2e-3)
    assert len(whole) == 20


def start(flags, cwd):
    """Start train.py in its own process with --out_dir=out/x, and wait until it has logged some steps."""
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], cwd=cwd, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    log = cwd / "out" / "x" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"kind": "step"') > 5):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_ended_by_a_signal_can_be_resumed(data, number):
    flags = [*FLAGS, "--out_dir=out/x", "--max_iters=1000000", "--eval_interval=1000000", "--checkpoint_minutes=0.005"]
    process = start(flags, data)
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    step = checkpoint.load("out/x/last.pt")["step"]
    if number == signal.SIGTERM:
        assert process.returncode == 0 and f"stopped after step {step:,}" in out and "Traceback" not in out
    else:
        assert process.returncode == -signal.SIGKILL
    train.main(["--resume", "--out_dir=out/x", f"--max_iters={2 * step + 8}"])
    assert checkpoint.load("out/x/last.pt")["step"] == step + 4


@only_cuda
def test_following_the_out_of_memory_advice_leads_to_a_run(data):
    """The process may use only a little memory. The advice is followed until training works."""
    code = ("import sys, torch; import train; device = torch.device(sys.argv[1]); torch.zeros(1, device=device); "
            "total = torch.cuda.get_device_properties(device).total_memory; "
            "torch.cuda.set_per_process_memory_fraction(300e6 / total); train.main(sys.argv[2:])")
    flags = [*FLAGS, "--batch_size=4096", "--max_iters=2", "--eval_iters=1", "--out_dir=out/x", "--overwrite"]
    size, tried = 8192, []
    for _ in range(10):
        done = subprocess.run([sys.executable, "-c", code, DEVICE, *flags, f"--device_batch_size={size}"], text=True,
                              capture_output=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        tried.append(size)
        if done.returncode == 0:
            break
        advice = re.search(r"^error: out of memory on .*: try --device_batch_size=(\d+)", done.stderr, re.M)
        assert advice and "Traceback" not in done.stderr, done.stderr
        size = int(advice[1])
    assert done.returncode == 0 and len(tried) > 1, tried


def test_a_checkpoint_of_one_device_can_be_used_on_another(data, capsys):
    train.main([*FLAGS, "--out_dir=out/device", "--max_iters=8"])
    train.main([*FLAGS, "--out_dir=out/cpu", "--max_iters=8", "--device=cpu"])
    for run in ("device", "cpu"):
        stories = []
        for device in (DEVICE, "cpu"):
            capsys.readouterr()
            sample.main([f"--out_dir=out/{run}", f"--device={device}", "--dtype=float32", "--temperature=0",
                         "--max_new_tokens=8", "--start=Once"])
            stories.append(capsys.readouterr().out)
        assert stories[0].startswith("Once") and len(stories[0]) > 5
    for run, device in (("device", "cpu"), ("cpu", DEVICE)):  # resumed with the state of the optimizer
        train.main(["--resume", f"--out_dir=out/{run}", f"--device={device}", "--max_iters=16"])
        steps = records(f"out/{run}", "step")
        assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6, 7, 8] and math.isfinite(steps[-1]["loss"])


def test_torchrun_with_one_process_equals_a_run_without_it(data):
    """On CUDA its gradients are reduced by NCCL, which prints its version with NCCL_DEBUG=VERSION."""
    train.main([*FLAGS, "--out_dir=out/plain", "--max_iters=8"])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
                           ROOT / "train.py", *FLAGS, "--out_dir=out/torchrun", "--max_iters=8"], cwd=data, text=True,
                          capture_output=True, env=os.environ | {"NCCL_DEBUG": "VERSION"}, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses("out/torchrun") == pytest.approx(losses("out/plain"), rel=1e-3)
    assert not ON_CUDA or "NCCL version" in done.stdout + done.stderr


@only_cuda
def test_the_log_names_the_gpu(data):
    train.main([*FLAGS, "--out_dir=out/x", "--max_iters=2", "--dtype=auto"])
    (run,) = records("out/x", "run")
    assert run["device"] == torch.cuda.get_device_name() and run["dtype"] in ("bfloat16", "float16"), json.dumps(run)
