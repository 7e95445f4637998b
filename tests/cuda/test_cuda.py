"""Tests for a GPU: run `python -m pytest -m cuda` on a machine that has one.

The environment variable TEST_DEVICE (default: cuda) chooses the device; TEST_DEVICE=cpu is for working on the tests
themselves. They train on random tokens, so they need no dataset, network or vocabulary.
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
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import layers
import sample
import train
from conftest import ROOT
from layers import head_loss
from model import GPT, GPTConfig, KVCache, window_start
from tools import bench

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
ON_CUDA = DEVICE.startswith("cuda")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="no CUDA here, or "
                                                   "not asked for by -m cuda")]
only_cuda = pytest.mark.skipif(not ON_CUDA, reason="CUDA only")
SHAPE = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=64, dropout=0.0)  # padded to 320 tokens
FLAGS = ("--dataset=bench --n_layer=2 --n_head=2 --n_embd=64 --block_size=16 --batch_size=4 "
         "--gradient_accumulation_steps=2 --max_iters=40 --warmup_iters=1 --learning_rate=1e-2 --min_lr=1e-3 "
         "--eval_interval=20 --eval_iters=2 --log_interval=1 --compile=False --dtype=float32 --dropout=0 "
         f"--device={DEVICE}").split()


@pytest.fixture(autouse=True)
def reset_global_settings():
    """train.main asks for TF32 and, on a CPU, for deterministic algorithms."""
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def data(here):
    """An empty folder with data/bench, a dataset of random tokens."""
    bench.write_random_dataset(here / "data" / "bench", SHAPE)
    return here


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_with_large_weights():
    """A model in eval mode, on the CPU, whose choices differ clearly from token to token."""
    torch.manual_seed(0)
    model = GPT(SHAPE).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    return model


def records(out_dir, kind):
    return [record for record in checkpoint.read_log(Path(out_dir, "log.jsonl")) if record["kind"] == kind]


def losses(out_dir):
    return [r["loss"] for r in records(out_dir, "step")] + [r["val_loss"] for r in records(out_dir, "eval")]


def relative_error(found, expected):
    return ((found.float().cpu() - expected).norm() / expected.norm()).item()


# ---- arithmetic ----


def loss_and_gradients(model, x, y, dtype=None):
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(x.to(device), y.to(device))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype, bound", [(None, 1e-4), (torch.bfloat16, 0.03), (torch.float16, 0.01)])
def test_loss_and_gradients_are_those_of_the_cpu(dtype, bound):
    torch.manual_seed(0)
    model = GPT(SHAPE).train()
    x, y = torch.randint(300, (2, 6, 16), generator=seeded())
    loss, gradients = loss_and_gradients(copy.deepcopy(model).to(DEVICE), x, y, dtype)
    expected_loss, expected = loss_and_gradients(model, x, y)
    assert relative_error(loss, expected_loss) < bound
    errors = {name: relative_error(gradients[name], expected[name]) for name in expected
              if not name.endswith("c_attn.bias")}  # a third of which, the keys', has a gradient of rounding alone
    assert max(errors.values()) < bound, errors


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.02), (torch.float16, 0.01)])
@pytest.mark.parametrize("rows", [5, 64])
def test_the_fused_loss_with_a_padded_vocabulary_is_cross_entropy(monkeypatch, dtype, bound, rows):
    """Of 64 rows, all at once and in parts; 300 columns are padded to 320 on CUDA."""
    monkeypatch.setitem(layers.HEAD_ROWS, torch.device(DEVICE).type, rows)
    x, weight = torch.randn(64, 32, generator=seeded(3)), 0.2 * torch.randn(300, 32, generator=seeded(5))
    y = torch.randint(300, (64,), generator=seeded(4))
    x.requires_grad_(), weight.requires_grad_()
    plain = F.cross_entropy(x @ weight.T, y, reduction="none")
    expected = plain, *torch.autograd.grad(plain.mean(), (x, weight))
    x, weight, y = x.detach().to(DEVICE).requires_grad_(), weight.detach().to(DEVICE).requires_grad_(), y.to(DEVICE)
    with torch.autocast(DEVICE.split(":")[0], dtype, enabled=dtype != torch.float32):
        mean, each = head_loss(x, weight, y)
    for found, wanted in zip((each, *torch.autograd.grad(mean, (x, weight))), expected, strict=True):
        assert relative_error(found, wanted.detach()) < bound


def test_micro_batches_equal_the_whole(data, large_eps):
    for size in (8, 2):
        train.main([*FLAGS, f"--device_batch_size={size}", f"--out_dir=out/{size}"])
    assert losses("out/2") == pytest.approx(losses("out/8"), rel=1e-3)
    whole, parts = (checkpoint.load(f"out/{size}/last.pt")["model"] for size in (8, 2))
    for name, weight in whole.items():  # in TF32, whose rounding is a thousand times float32's
        torch.testing.assert_close(parts[name], weight, rtol=1e-2, atol=2e-3 if ON_CUDA else 1e-5)


def test_compiled_equals_eager_over_20_steps_without_a_recompile(data, large_eps, monkeypatch):
    """With evaluations on the way, which must not make it compile again."""
    if not ON_CUDA:  # where turning the graphs into C++ takes half a minute
        plain_compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model: plain_compile(model, backend="aot_eager"))
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    for wish in ("False", "True"):
        train.main([*FLAGS, f"--compile={wish}", f"--out_dir=out/{wish}"])
    assert len(records("out/True", "step")) == 20 and records("out/True", "run")[0]["compiled"]
    assert losses("out/True") == pytest.approx(losses("out/False"), rel=2e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_in_float16_is_skipped_by_all_optimizers_and_counted(data, optimizer):
    flags = [*FLAGS, f"--optimizer={optimizer}", "--dtype=float16", "--out_dir=out/x", "--lr_decay_iters=80"]
    train.main([*flags, "--max_iters=4"])
    state = checkpoint.load("out/x/last.pt", checkpoint.LAST_HAS)
    assert state["skipped"] == 0 and state["scaler"]["scale"] == 65536
    before = copy.deepcopy(state)
    state["scaler"]["scale"] = 2.0**120  # far too much
    checkpoint.save(Path("out/x/last.pt"), state)
    train.main([*flags, "--resume", "--max_iters=8"])
    after = checkpoint.load("out/x/last.pt", checkpoint.LAST_HAS)
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
def test_cached_logits_are_the_uncached_ones_past_the_end_of_the_block(prompt):
    model = model_with_large_weights().double().to(DEVICE)
    idx = torch.randint(300, (2, prompt), generator=seeded()).to(DEVICE)
    for token, logits in model.generate(idx, 40, temperature=0, with_logits=True):
        expected = model(idx[:, window_start(idx.size(1), 16):])[:, -1]  # (B, V)
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
        idx = torch.cat([idx, token[:, None]], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stories", [1, 3])
def test_decoding_by_a_recorded_graph_is_eager_decoding(monkeypatch, dtype, stories):
    """The same logits and, from one seed, the same tokens, past the end of the block."""
    model = model_with_large_weights().to(DEVICE, dtype)
    idx = torch.zeros(stories, 1, dtype=torch.long, device=DEVICE)

    def decode():
        generator = torch.Generator(DEVICE).manual_seed(1)
        return [(token.clone(), logits.clone()) for token, logits in
                model.generate(idx, 40, 0.9, top_k=50, generator=generator, with_logits=True)]

    recorded = decode()
    monkeypatch.setattr(GPT, "record_step", lambda self, cache: lambda token: self(token, cache=cache))
    for (token, logits), (eager_token, eager_logits) in zip(recorded, decode(), strict=True):
        torch.testing.assert_close(logits, eager_logits)
        assert torch.equal(token, eager_token)


@only_cuda
def test_a_graph_is_recorded_and_replayed(monkeypatch):
    """So that the test above compares two ways."""
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(1), replay(self)))
    list(model_with_large_weights().to(DEVICE).generate(torch.zeros(1, 1, dtype=torch.long, device=DEVICE), 10))
    assert len(replays) == 9  # the first token comes of reading the prompt


def test_a_batch_has_the_stories_that_each_prompt_has_alone():
    model = model_with_large_weights().double().to(DEVICE)
    prompts = torch.randint(300, (3, 5), generator=seeded()).to(DEVICE)
    batch = torch.stack(list(model.generate(prompts, 30, temperature=0)), 1)  # (3, 30)
    alone = [torch.stack(list(model.generate(prompt[None], 30, temperature=0)), 1) for prompt in prompts]
    assert torch.equal(batch, torch.cat(alone)) and len(set(map(tuple, batch.tolist()))) == 3


def test_the_seed_decides_the_story():
    model = model_with_large_weights().to(DEVICE)

    def story(seed):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        return torch.stack(list(model.generate(torch.zeros(4, 1, dtype=torch.long, device=DEVICE), 30, top_k=50,
                                               generator=generator))).tolist()
    assert story(1) == story(1) != story(2)


@torch.no_grad()
def test_the_cache_keeps_its_shapes_on_cuda():
    cache = KVCache(SHAPE, 2, DEVICE, torch.float32)
    assert cache.fixed_shapes == ON_CUDA
    model_with_large_weights().to(DEVICE)(torch.zeros(2, 3, dtype=torch.long, device=DEVICE), cache=cache)
    assert cache.length.item() == 3 and cache.mask.shape == (3, 16 if ON_CUDA else 3)


# ---- stopping, resuming, other devices ----


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_has_the_losses_of_one_never_stopped(data, large_eps, optimizer):
    flags = [*FLAGS, "--dropout=0.1", "--lr_decay_iters=40", f"--optimizer={optimizer}"]
    train.main([*flags, "--out_dir=out/whole"])
    train.main([*flags, "--out_dir=out/parts", "--max_iters=14"])
    train.main([*flags, "--out_dir=out/parts", "--resume"])
    whole, parts = ({r["tokens"]: r["loss"] for r in records(f"out/{name}", "step")} for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=2e-3)
    assert len(whole) == 20


def start(flags, cwd):
    """train.py in a process of its own, and the path of its log."""
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], cwd=cwd, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    log = cwd / "out" / "x" / "log.jsonl"
    until = time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"kind": "step"') > 5):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_a_run_that_can_then_be_resumed(data, number):
    flags = [*FLAGS, "--out_dir=out/x", "--max_iters=1000000", "--eval_interval=1000000", "--checkpoint_minutes=0.005"]
    process = start(flags, data)
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    update = checkpoint.load("out/x/last.pt")["update"]
    if number == signal.SIGTERM:
        assert process.returncode == 0 and f"stopped after update {update:,}" in out and "Traceback" not in out
    else:
        assert process.returncode == -signal.SIGKILL
    train.main(["--resume", "--out_dir=out/x", f"--max_iters={2 * update + 8}"])
    assert checkpoint.load("out/x/last.pt")["update"] == update + 4


@only_cuda
def test_the_advice_when_memory_runs_out_leads_to_a_run(data):
    """Each time the advice is followed, until it runs: the process may use a little memory only."""
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


def test_a_checkpoint_of_either_device_is_used_on_the_other(data, capsys):
    train.main([*FLAGS, "--out_dir=out/here", "--max_iters=8"])
    train.main([*FLAGS, "--out_dir=out/cpu", "--max_iters=8", "--device=cpu"])
    for run in ("here", "cpu"):
        stories = []
        for device in (DEVICE, "cpu"):
            capsys.readouterr()
            sample.main([f"--out_dir=out/{run}", f"--device={device}", "--dtype=float32", "--temperature=0",
                         "--max_new_tokens=8", "--start=Once"])
            stories.append(capsys.readouterr().out)
        assert stories[0].startswith("Once") and len(stories[0]) > 5
    # and resumed on the other one, with the optimizer's state
    for run, device in (("here", "cpu"), ("cpu", DEVICE)):
        train.main(["--resume", f"--out_dir=out/{run}", f"--device={device}", "--max_iters=16"])
        steps = records(f"out/{run}", "step")
        assert [r["update"] for r in steps] == [1, 2, 3, 4, 5, 6, 7, 8] and math.isfinite(steps[-1]["loss"])


def test_torchrun_with_one_process_is_a_run_like_any_other(data):
    """On CUDA its gradients go through NCCL, which says so at NCCL_DEBUG=VERSION."""
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
