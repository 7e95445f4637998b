"""Tests on a GPU: run `python -m pytest -n0 -m cuda` on a machine that has one.

The environment variable TEST_DEVICE (default: cuda) selects the device; TEST_DEVICE=cpu is for developing the tests.
They train on random tokens, so they need no dataset, network or vocabulary.
"""

import copy
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import modern
import sample
import train
from conftest import ROOT, records
from faults.processes import wait_for_steps
from model import GPTConfig
from modern import make_model
from storygpt import checkpoint, generate, loss
from storygpt.generate import prepare_for_generation, uses_cache, window_start
from storygpt.loss import fuse_loss
from storygpt.system.hardware import autocast, to_device
from tools import bench

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
ON_CUDA = DEVICE.startswith("cuda")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="no CUDA here, or "
                                                   "not selected by -m cuda")]
only_cuda = pytest.mark.skipif(not ON_CUDA, reason="CUDA only")
BOTH = pytest.mark.parametrize("architecture", ["gpt2", "modern"])
CONFIG = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=64, dropout=0.0)  # padded to 320 tokens
FLAGS = ("--dataset=bench --n_layer=2 --n_head=2 --n_embd=64 --block_size=16 --batch_size=4 "
         "--gradient_accumulation_steps=2 --max_iters=40 --warmup_iters=1 --learning_rate=1e-2 --min_lr=1e-3 "
         "--eval_interval=20 --eval_iters=2 --log_interval=1 --compile=False --dtype=float32 --dropout=0 "
         f"--device={DEVICE}").split()


@pytest.fixture(scope="module")
def random_data(tmp_path_factory):
    """A folder with bench, a dataset of random tokens."""
    folder = tmp_path_factory.mktemp("data")
    bench.write_random_dataset(folder / "bench", CONFIG)
    return folder


@pytest.fixture(autouse=True)
def prepare(here, random_data):
    """The current folder has data/bench. Undo what train.main sets: TF32 and, on a CPU, deterministic algorithms."""
    (here / "data").symlink_to(random_data)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)


def model_with_large_weights(architecture="gpt2"):
    """A model in eval mode, on the CPU, whose logits differ clearly from token to token."""
    torch.manual_seed(0)
    model = make_model(replace(CONFIG, architecture=architecture)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(8 * p if p.any() or p.dim() == 1 else 0.1 * torch.randn_like(p))
    return model


def losses(name):
    return [r["loss"] for r in records(f"out/{name}", "step")] + [r["val_loss"] for r in records(f"out/{name}", "eval")]


def relative_error(actual, expected):
    return ((actual.float().cpu() - expected).norm() / expected.norm()).item()


# ---- training ----


def mean_loss(logits, y):
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)


def soft_capped_loss(logits, y):
    """A loss that is not fused."""
    logits = 5 * torch.tanh(logits.float() / 5)
    return mean_loss(logits, y) + 1e-3 * logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.03), (torch.float16, 0.01)])
@BOTH
@pytest.mark.parametrize("used, chunk", [(300, 4096), (200, 40)])
@pytest.mark.parametrize("loss_function", [mean_loss, soft_capped_loss])
def test_loss_and_gradients_equal_those_of_the_plain_model_on_the_cpu(dtype, bound, architecture, used, chunk,
                                                                      loss_function, monkeypatch):
    """In one chunk, or in several if some tokens do not occur. On CUDA, 300 columns are padded to 320."""
    monkeypatch.setitem(loss.CHUNK_ROWS, torch.device(DEVICE).type, chunk)
    torch.manual_seed(0)
    model = make_model(replace(CONFIG, architecture=architecture)).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))  # some matrices are initialized to zero
        model.transformer.wte.weight[used:] = 0
    fused = copy.deepcopy(model).to(DEVICE)
    fuse_loss(fused, torch.arange(300) < used)
    x, y = torch.randint(used, (2, 6, 16))
    y[2, 5] = -1
    expected = loss_function(model(x), y)
    expected.backward()
    with autocast(torch.device(DEVICE), dtype):
        actual = loss_function(fused(x.to(DEVICE)), y.to(DEVICE))
    actual.backward()
    assert relative_error(actual.detach(), expected.detach()) < bound
    for (name, p), plain in zip(fused.named_parameters(), model.parameters(), strict=True):
        # The gradient of the keys' third of c_attn.bias is 0: rounding errors only.
        assert name.endswith("c_attn.bias") or relative_error(p.grad, plain.grad) < bound, name


def test_to_device_keeps_values_and_dtype():
    view = np.arange(12).reshape(3, 4)[:, 1:]  # not contiguous, as the inputs and targets of windows are
    tensor = to_device(view, torch.device(DEVICE))
    assert tensor.device.type == torch.device(DEVICE).type and tensor.dtype == torch.int64
    assert tensor.tolist() == view.tolist()


@BOTH
@pytest.mark.parametrize("variant", ["--device_batch_size=2", "--compile=True"])
def test_micro_batches_and_compiling_change_losses_by_rounding_only(large_eps, monkeypatch, variant, architecture):
    """Nothing is compiled in the last ones of 20 steps, with evaluations in between, in other shapes."""
    if not ON_CUDA:  # on a CPU, the default backend takes half a minute
        original = torch.compile
        monkeypatch.setattr(torch, "compile", lambda *args: original(*args, backend="aot_eager"))
    torch._dynamo.reset()
    graphs, log_step = [], train.log_step
    monkeypatch.setattr(train, "log_step", lambda *args: (
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"]), log_step(*args)))
    flags = [*FLAGS, f"--architecture={architecture}"]
    train.main([*flags, variant, "--out_dir=out/variant"])
    assert len(graphs) == 20 and graphs[0] == graphs[9] and graphs[10] == graphs[19]
    assert (graphs[0] > 0) == (variant == "--compile=True")
    train.main([*flags, "--device_batch_size=8", "--out_dir=out/plain"])
    assert losses("variant") == pytest.approx(losses("plain"), rel=2e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_overflows_in_float16_is_skipped_by_all_optimizers_and_counted(optimizer):
    flags, path = [*FLAGS, f"--optimizer={optimizer}", "--dtype=float16", "--out_dir=out/x"], Path("out/x/last.pt")

    def train_with_scale(state, scale, *more):
        checkpoint.save(path, state | {"scaler": state["scaler"] | {"scale": scale}})
        train.main([*flags, "--lr_decay_iters=80", "--resume", *more])
        return checkpoint.load(path, checkpoint.LAST_REQUIRED_KEYS)

    train.main([*flags, "--lr_decay_iters=80", "--max_iters=4"])
    before = checkpoint.load(path, checkpoint.LAST_REQUIRED_KEYS)
    assert before["skipped"] == 0 and before["scaler"]["scale"] == 65536
    after = train_with_scale(before, 2.0**120, "--max_iters=8")  # far too large
    assert after["skipped"] == 2 and after["scaler"]["scale"] == 2.0**118
    assert len(after["optimizers"]) == (2 if optimizer == "muon" else 1)
    torch.testing.assert_close([after["model"], [o["state"] for o in after["optimizers"]]],
                               [before["model"], [o["state"] for o in before["optimizers"]]], rtol=0, atol=0)
    assert train_with_scale(after, 65536.0)["skipped"] == 2
    assert records("out/x", "step")[-1]["skipped"] == 2 and math.isfinite(records("out/x", "step")[-1]["loss"])


# ---- generation ----


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 16, 40])
def test_cached_logits_equal_uncached_ones_past_the_end_of_the_block(prompt):
    """In float64; each row of the batch has the tokens that it has alone."""
    model = model_with_large_weights().double().to(DEVICE)
    idx = prompts = torch.randint(300, (3, prompt)).to(DEVICE)
    for token, logits in generate.generate(model, idx, 40, temperature=0, with_logits=True):
        expected = model(idx[:, window_start(idx.size(1), 16):])[:, -1]  # (B, V)
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
        idx = torch.cat([idx, token[:, None]], 1)
    for row, story in zip(prompts, idx[:, prompt:].tolist()):
        assert [int(token) for token in generate.generate(model, row[None], 40, temperature=0)] == story


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stories", [1, 3])
@BOTH
def test_decoding_with_a_captured_graph_equals_eager_decoding(monkeypatch, dtype, stories, architecture):
    """The logits and, with the same seed, the tokens are equal, also past the end of the block."""
    monkeypatch.setattr(modern, "WINDOW", 5)
    model = model_with_large_weights(architecture)
    with torch.no_grad():
        model.transformer.wte.weight[100:] = 0  # computed once, as those of tokens that never occurred
    plain = copy.deepcopy(model)
    prepare_for_generation(model, DEVICE, dtype)
    assert uses_cache(model)
    idx, replays = torch.zeros(stories, 1, dtype=torch.long, device=DEVICE), []
    if ON_CUDA:
        replay = torch.cuda.CUDAGraph.replay
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(1), replay(self)))

    def decode():
        generator = torch.Generator(DEVICE).manual_seed(1)
        return [(token.clone(), logits.clone()) for token, logits in
                generate.generate(model, idx, 40, 0.9, top_k=50, generator=generator, with_logits=True)]

    captured = decode()
    assert (len(replays) > 30) == ON_CUDA  # all but those after which the window has moved
    monkeypatch.setattr(generate, "capture_graph", lambda forward, cache: forward)
    for (token, logits), (eager_token, eager_logits) in zip(captured, decode(), strict=True):
        torch.testing.assert_close(logits, eager_logits)
        assert torch.equal(token, eager_token)
    with torch.no_grad():
        tokens = torch.stack([token for token, _ in captured[:15]], 1)  # (stories, 15)
        assert relative_error(captured[15][1], plain(F.pad(tokens.cpu(), (1, 0)))[:, -1]) < 0.1


# ---- stopping, resuming, other devices ----


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(large_eps, optimizer):
    flags = [*FLAGS, "--dropout=0.1", "--lr_decay_iters=40", f"--optimizer={optimizer}"]
    train.main([*flags, "--out_dir=out/whole"])
    train.main([*flags, "--out_dir=out/resumed", "--max_iters=14"])
    train.main([*flags, "--out_dir=out/resumed", "--resume"])
    whole, resumed = ({r["tokens"]: r["loss"] for r in records(f"out/{name}", "step")} for name in ("whole", "resumed"))
    assert resumed == pytest.approx(whole, rel=2e-3) and len(whole) == 20
    assert not ON_CUDA or records("out/whole", "run")[0]["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_ended_by_a_signal_can_be_resumed(number):
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *FLAGS, "--out_dir=out/x", "--max_iters=1000000",
                                "--eval_interval=1000000", "--checkpoint_minutes=0.005"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_steps("out/x", 5)
    process.send_signal(number)
    out = process.communicate(timeout=300)[0]
    step = checkpoint.load("out/x/last.pt")["step"]
    assert process.returncode == (0 if number == signal.SIGTERM else -number) and "Traceback" not in out
    assert number == signal.SIGKILL or f"stopped after step {step:,}" in out
    train.main(["--resume", "--out_dir=out/x", f"--max_iters={2 * step + 8}"])
    assert checkpoint.load("out/x/last.pt")["step"] == step + 4


@only_cuda
def test_following_the_out_of_memory_advice_leads_to_a_run():
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


def test_a_checkpoint_of_one_device_can_be_used_on_another(capsys):
    """For generating, and for training with the state of its optimizer."""
    for first, second in ((DEVICE, "cpu"), ("cpu", DEVICE)):
        flags = ["--dtype=float32", "--out_dir=out/x"]
        train.main([*FLAGS, *flags, "--max_iters=8", f"--device={first}", "--overwrite"])
        stories = []
        for device in (first, second):
            capsys.readouterr()
            sample.main([*flags, f"--device={device}", "--temperature=0", "--max_new_tokens=8", "--start=Once"])
            stories.append(capsys.readouterr().out)
        assert all(story.startswith("Once") and len(story) > 5 for story in stories)
        train.main(["--resume", "--out_dir=out/x", f"--device={second}", "--max_iters=16"])
        steps = records("out/x", "step")
        assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6, 7, 8] and math.isfinite(steps[-1]["loss"])


def test_torchrun_with_one_process_equals_a_run_without_it():
    """On CUDA its gradients are reduced by NCCL, which prints its version with NCCL_DEBUG=VERSION."""
    train.main([*FLAGS, "--out_dir=out/plain", "--max_iters=8"])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
                           ROOT / "train.py", *FLAGS, "--out_dir=out/torchrun", "--max_iters=8"], text=True,
                          capture_output=True, env=os.environ | {"NCCL_DEBUG": "VERSION"}, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses("torchrun") == pytest.approx(losses("plain"), rel=1e-3)
    assert not ON_CUDA or "NCCL version" in done.stdout + done.stderr
