"""Measure this program's speed on this machine, against a plain training loop and the hardware's limits.

    python -m tools.bench                              every subject but the race, a few minutes each
    python -m tools.bench train --json                 one subject, as JSON
    python -m tools.bench race config/speedrun.py      the speedrun and its first record (docs/speedrun.md)

Timings are noisy, so the variants of a subject run interleaved, and ratios are more reliable than absolute numbers.
Each training variant runs in its own process, which also gives its own peak memory.
"""

import storygpt  # noqa: F401, I001  (first: it prepares the process for importing torch)

import copy
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import storygpt.generate as generation
import train
from model import GPT, GPTConfig
from storygpt import checkpoint, fast
from storygpt import loss as loss_module
from storygpt.corpus import nursery
from storygpt.corpus.dataset import Split, data_sha256, evaluation_windows, read_meta, with_checksum
from storygpt.corpus.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer
from storygpt.evaluate import window_losses
from storygpt.generate import KVCache, generate, prepare_for_generation, sample_token, window_start
from storygpt.run import best_checkpoint
from storygpt.settings import Config, read_config_file
from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line
from storygpt.system.hardware import (autocast, describe_device, git_commit, pick_device, pick_dtype,
                                      pick_inference_dtype)
from tools import peers

ROOT = Path(__file__).parent.parent
PUBLISHED = GPTConfig(vocab_size=50257)
VOCABULARY_PER_USED_TOKEN = 4  # training data uses a quarter of it, as 8 million tokens of TinyStories do of GPT-2's
TINY = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32)  # for --tiny
BATCH_SIZE = 32
FAST = ROOT / "config" / "tinystories_fast.py"  # the config of the subject `small`
NURSERY_STORIES = 140_000  # 102 MB of text
# Dense bf16 TFLOP/s from the vendors' data sheets.
PEAK_TFLOPS = {"H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165}
MORE_SINGLE_STORIES = 7  # after the first one, so that a measurement takes seconds
TABLES_WITH_SPREADS = {"gflops_of_each", "tokens_per_s_of_each", "seconds"}


@exit_with_one_line
def main(argv=None):
    """Measure one subject or all of them and print the results; `argv` as on the command line."""
    args = parse_args(argv)
    device = pick_device(args.device)
    results = {"machine": describe_machine(device)}
    if args.subject != "race":
        results["ceilings"] = measure_ceilings(device, args.config, args.rounds)
    for subject, measure in SUBJECTS.items():
        if subject == args.subject or (args.subject is None and subject != "race"):
            with tempfile.TemporaryDirectory() as folder:
                results[subject] = measure(args, device, results.get("ceilings"), Path(folder))
    if args.json:
        return print(json.dumps(results, indent=2))
    for subject, result in results.items():
        print_tables(subject, result)


def parse_args(argv):
    """The command line as a namespace, with `config`: the GPTConfig to measure."""
    parser = Parser(prog="python -m tools.bench", description="Measure this program's speed on this machine.")
    parser.add_argument("subject", nargs="?", choices=["machine", *SUBJECTS], help="what to measure; machine: only the "
                        "hardware's limits (default: everything but the race)")
    parser.add_argument("race_config", nargs="?", metavar="CONFIG", help="race: a config file, or COMMIT:CONFIG for "
                        "the config and the program of a commit")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON with every median and spread, not tables")
    parser.add_argument("--tiny", action="store_true", help="a toy model: only to try the benchmark itself")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant; race: seeds of the config "
                        "(default: 3)")
    parser.add_argument("--out_dir", help="generate: measure with this run, and also its validation loss in each dtype")
    args = parser.parse_args(argv)
    if (args.subject == "race") != bool(args.race_config):
        parser.error("race needs a config, such as config/speedrun.py, and the other subjects take none")
    if args.rounds < 1:
        parser.error(f"argument --rounds: {args.rounds} is not 1 or more")
    if args.out_dir:
        best_checkpoint(args.out_dir)  # fail now rather than after minutes
    args.config = TINY if args.tiny else PUBLISHED
    return args


def describe_machine(device):
    """The hardware, the versions and the date of a measurement, as a dict."""
    gpu = {}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        gpu = {"gpu_memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30,
               "driver": run_script(query).strip() if shutil.which(query[0]) else None, "cuda": torch.version.cuda}
    return {"device": describe_device(device), **gpu, "processor": processor_name(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "date": date.today().isoformat(), "git": git_commit()}


def processor_name():
    """The processor's model name from /proc/cpuinfo, or what Python knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.M)
    return found[1] if found else platform.processor() or platform.machine()


def print_tables(subject, result):
    """Print a subject's result: one value per line, with the lowest and the highest of its rounds if it has them."""
    print(f"\n{subject}")
    spreads = result.get("spreads", {})
    for key, value in ((key, value) for key, value in result.items() if key != "spreads"):
        is_table = isinstance(value, dict)
        if is_table:
            print(f"  {key}")
        for name, number in value.items() if is_table else [(key, value)]:
            text = f"{number:,.5g}" if isinstance(number, float) else str(number)
            low, high = spreads.get(name, (0, 0)) if not is_table or key in TABLES_WITH_SPREADS else (0, 0)
            print(f"    {name:36}{text:>14}" + (f"   {low:,.5g} to {high:,.5g}" if high else ""))


def time_interleaved(variants, rounds):
    """Run each variant (name → function) once as warm-up, then once in each of `rounds`: name → list of seconds.

    A function that returns a float has timed itself; that number is used.
    """
    seconds = {name: [] for name in variants}
    for round in range(rounds + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            own = run()
            if round:
                seconds[name].append(own if isinstance(own, float) else time.perf_counter() - started)
    return seconds


def measure_rates(variants, rounds):
    """Medians and spreads of amount / seconds of variants, name → (amount, function), run by `time_interleaved`."""
    seconds = time_interleaved({name: run for name, (_, run) in variants.items()}, rounds)
    return medians_and_spreads({name: amount / np.array(seconds[name]) for name, (amount, _) in variants.items()})


def medians_and_spreads(values):
    """Of lists of numbers, by name: their medians and their (lowest, highest), two dicts."""
    return ({name: float(np.median(numbers)) for name, numbers in values.items()},
            {name: (float(min(numbers)), float(max(numbers))) for name, numbers in values.items()})


def run_script(command, **options):
    """Run a script silently; returns what it printed. Raises UserError with the last line of its stderr if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise UserError(f"{Path(command[1]).name} failed: {(done.stderr.splitlines() or ['no error message'])[-1]}")
    return done.stdout


def synchronize(device):
    """Wait until a GPU has finished all work submitted to it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def child_processes(targets):
    """Spawn a process that calls target(pipe, *args) for each name → (target, *args).

    Yields name → pipe to it. The processes end with the `with` block.
    """
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name, (target, *args) in targets.items():
        pipes[name], child_pipe = context.Pipe()
        processes.append(context.Process(target=target, args=(child_pipe, *args), daemon=True))
        processes[-1].start()
        child_pipe.close()
    try:
        yield pipes
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join(10)
            process.kill()


def ask(pipes, name, message="go"):
    """Send a message to one of `child_processes` and return the answer. Raises UserError if the process has failed."""
    try:
        pipes[name].send(message)
        return pipes[name].recv()
    except (EOFError, OSError) as error:
        raise UserError(f"the process of '{name}' failed: its error message is above") from error


# ---- hardware limits ----


def measure_ceilings(device, config, rounds):
    """Roofline ceilings of the device: GFLOP/s of matrix products and GB/s of memory reads.

    One product is large and square; the others are those of a batch in a GPTConfig's model.
    """
    C, rows = config.n_embd, BATCH_SIZE * config.block_size
    side = 256 if config is TINY else 8192 if device.type == "cuda" else 4096
    shapes = {f"{side}³": (side, side, side), "c_attn": (rows, C, 3 * C), "attn.c_proj": (rows, C, C),
              "c_fc": (rows, C, 4 * C), "mlp.c_proj": (rows, 4 * C, C), "head": (rows, C, config.vocab_size)}
    repeats = 20 if device.type == "cuda" else 1  # on a GPU, one product is too short compared with its launch
    block = torch.ones(2**20 if config is TINY else 2**28, device=device)  # 1 GiB, larger than any cache
    variants = {"read": (repeats * 4 * block.numel() / 1e9, partial(repeat, repeats, device, torch.sum, block))}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for product, (m, k, n) in shapes.items():
            a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((m, k), (n, k)))
            variants[f"{name} {product}"] = (repeats * 2 * m * k * n / 1e9,
                                             partial(repeat, repeats, device, F.linear, a, b))
    medians, spreads = measure_rates(variants, rounds)
    read = medians.pop("read")
    best = {dtype: max(rate for name, rate in medians.items() if name.startswith(dtype)) for dtype in ("fp32", "bf16")}
    return {"matmul_fp32_gflops": best["fp32"], "matmul_bf16_gflops": best["bf16"], "read_gb_per_s": read,
            "gflops_of_each": medians, "spreads": spreads | {"read_gb_per_s": spreads["read"]}}


def repeat(count, device, function, *args):
    """Call a function `count` times and wait for the device."""
    for _ in range(count):
        function(*args)
    synchronize(device)


# ---- training ----


def unfused_loss(x, weight, targets, last_row_tokens=1, dtype=None):
    """`fused_linear_cross_entropy` by two of torch's functions, which make all logits; without its second result.

    No target is the last row if that stands for several tokens, as these do not occur.
    """
    bias = F.pad(weight.new_zeros(len(weight) - 1), (0, 1), value=math.log(last_row_tokens))  # (V)
    return F.cross_entropy(F.linear(x, weight, bias), targets, ignore_index=loss_module.IGNORED_TARGET), None


LOSSES = {"fused": lambda *args: loss_module.fused_linear_cross_entropy(*args)[0],
          "unfused": lambda *args: unfused_loss(*args)[0]}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13 or later; these options compute it in chunks
    LOSSES["torch's linear_cross_entropy"] = partial(
        F.linear_cross_entropy, ignore_index=loss_module.IGNORED_TARGET, options=nn.LinearCrossEntropyOptions())

# name → flags for train.py, or None for `baseline_loop` instead, then patches, (owner, attribute, replacement): each
# replaces something faster of this project by torch's.
VARIANTS = {
    "baseline": (None,),
    "baseline, bf16, compiled": (None,),
    "this project": ([],),
    "compiled": (["--compile=True"],),
    "eager": (["--compile=False"],),
    "float32": (["--dtype=float32"],),
    "dropout 0": (["--dropout=0"],),
    "torch's dropout": ([], (fast, "dropout", fast.torch_dropout)),
    "torch's attention": ([], (fast, "causal_attention", fast.torch_attention)),
    "whole vocabulary": ([], (train, "fuse_loss", lambda model, used, equalize: loss_module.fuse_loss(model))),
    "unfused loss": (["--device_batch_size=32"],  # the logits of a whole step would fill a GPU
                     (loss_module, "fused_linear_cross_entropy", unfused_loss)),
    "eager, AdamW alone": (["--compile=False", "--optimizer=adamw", "--learning_rate=1e-3"],),  # only in `small`
}


def bench_train(args, device, ceilings, folder):
    """Training speed at the published shape: this project, two baselines, and this project with parts replaced."""
    on_gpu = device.type == "cuda"
    # What "this project" does on this device anyway is not measured again.
    same = {"compiled", "torch's dropout", "torch's attention"} if on_gpu else {"eager"}
    names = [name for name in VARIANTS if name not in same | {"eager, AdamW alone"}][:3 if args.tiny else None]
    # A GPU has too little memory for all variants at once, and is less noisy: there only the first three interleave.
    groups = [names[:3], *([name] for name in names[3:])] if on_gpu else [names]
    result = measure_training(groups, "this project", make_workload(folder, device, args.config), args.rounds, ceilings)
    rates, peaks = result["tokens_per_s_of_each"], result["peak_mb_of_each"]
    own, baseline, compiled = (rates[name] for name in ("this project", "baseline", "baseline, bf16, compiled"))
    return {"baseline_tokens_per_s": baseline, "baseline_bf16_compiled_tokens_per_s": compiled, "tokens_per_s": own,
            "times_baseline": own / baseline, "times_baseline_bf16_compiled": own / compiled,
            "baseline_peak_mb": peaks["baseline"], "peak_mb": peaks["this project"], **result}


def bench_small(args, device, ceilings, folder):
    """Training speed at the small steps of config/tinystories_fast.py, dominated by kernel launches and optimizers."""
    names = ["compiled"] * (device.type == "cuda") + ["eager", "eager, AdamW alone"]
    workload = make_workload(folder, device, args.config, small=True)
    result = measure_training([names], names[0], workload, args.rounds, ceilings)
    ms_per_step = 1000 * result["tokens_per_step"] / result["tokens_per_s"]
    return {"of": names[0], "tokens_per_s": result["tokens_per_s"], "ms_per_step": ms_per_step, **result}


@dataclass(frozen=True)
class Workload:
    """The training to measure."""

    folder: Path  # contains data/bench
    device: torch.device
    config: GPTConfig
    accumulation: int  # iterations per optimizer step
    steps: int  # optimizer steps per round
    tokens_per_step: int
    flags: list  # for train.py


def make_workload(folder, device, config, small=False):
    """Write a dataset in a folder and return the Workload: steps of the published config, or the small ones of FAST."""
    write_random_dataset(folder / "data" / "bench", config)
    on_gpu = device.type == "cuda"
    accumulation = 32 if on_gpu and not small else 1  # on a CPU, the published 32 would take a minute
    sequences = read_config_file(FAST)["batch_size"] if small else BATCH_SIZE * accumulation
    steps = (20 if on_gpu else 2) if small else 1
    flags = [str(FAST)] if small else [f"--gradient_accumulation_steps={accumulation}", "--min_lr=1e-5"]
    flags += [f"--{name}={getattr(config, name)}" for name in ("n_layer", "n_head", "n_embd", "block_size")]
    flags += ["--dataset=bench", f"--device={device}", "--max_iters=1000000", "--eval_interval=1000000",
              "--checkpoint_minutes=1e9", f"--log_interval={steps}"]
    return Workload(folder, device, config, accumulation, steps, sequences * config.block_size, flags)


def measure_training(groups, own, workload, rounds, ceilings):
    """Speed and memory of training variants, interleaved within a group; `tokens_per_s` is that of `own`."""
    answers = {}
    for group in groups:
        answers |= time_variants(group, workload, rounds)
    tokens = workload.steps * workload.tokens_per_step
    medians, spreads = medians_and_spreads(
        {name: [tokens / seconds for seconds, _ in values[1:]] for name, values in answers.items()})
    return {"tokens_per_s": medians[own], **flops_utilization(medians[own], workload, ceilings),
            "tokens_per_step": workload.tokens_per_step, "tokens_per_s_of_each": medians,
            "peak_mb_of_each": {name: values[-1][1] for name, values in answers.items()},
            "first_round_s_of_each": {name: values[0][0] for name, values in answers.items()}, "spreads": spreads}


def count_parameters(config):
    """Number of parameters of a GPT, counted without memory for them."""
    with torch.device("meta"):
        return GPT(config).num_parameters()


def flops_utilization(tokens_per_s, workload, ceilings):
    """Model FLOP/s utilization (MFU; Chowdhery et al. 2022, arXiv 2204.02311) of training.

    `mfu` is relative to the data sheet of a GPU in PEAK_TFLOPS, `mfu_of_measured` to the fastest product measured. Of
    the vocabulary, only the tokens of the data are counted.
    """
    config = replace(workload.config, vocab_size=workload.config.vocab_size // VOCABULARY_PER_USED_TOKEN)
    attention = 12 * config.n_layer * config.block_size * config.n_embd
    flops = tokens_per_s * (6 * count_parameters(config) + attention)
    gpu = torch.cuda.get_device_name(workload.device) if workload.device.type == "cuda" else ""
    measured = max(ceilings["matmul_bf16_gflops"], ceilings["matmul_fp32_gflops"]) * 1e9  # bf16 is slow on some CPUs
    peak = next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", gpu)), measured)
    return {"mfu": flops / peak, "mfu_of_tflops": peak / 1e12, "mfu_of_measured": flops / measured}


def time_variants(names, workload, rounds):
    """Run training variants interleaved, each in its own process: name → (seconds, peak MB) of warm-up and rounds."""
    answers = {name: [] for name in names}
    with child_processes({name: (run_variant, name, workload) for name in names}) as pipes:
        for name in names * (rounds + 1):
            answers[name].append(ask(pipes, name))
    return answers


def run_variant(pipe, name, workload):
    """A child process of `time_variants`: train until the parent closes the pipe."""
    os.chdir(workload.folder)
    sys.stdout = open(os.devnull, "w")
    flags, *patches = VARIANTS[name]
    for replacement in patches:
        setattr(*replacement)
    if workload.config == TINY:  # the default backend takes half a minute to compile
        torch.compile = partial(torch.compile, backend="aot_eager")
    rounds = report_rounds(pipe, workload.device)
    next(rounds)
    if flags is None:
        baseline_loop(workload, "compiled" in name, rounds)

    def end_round(path, record):
        """Called by train.py instead of writing to its log: after every `steps` steps, and after the first one."""
        if record["kind"] == "step" and record["step"] % workload.steps == 0:
            next(rounds)

    files.append_line, train.save_last, train.check_saved_model = end_round, lambda state: None, lambda *_: None
    train.main([*workload.flags, f"--out_dir=out/{os.getpid()}", *flags])


def report_rounds(pipe, device):
    """A generator: each next() ends a round, sends its (seconds, peak MB) and waits for the message to start another.

    The first next() only starts. Exits the process once the other end of the pipe is closed.
    """
    while True:
        try:
            pipe.recv()
        except EOFError:
            sys.exit()
        started = time.perf_counter()
        yield
        synchronize(device)
        pipe.send((time.perf_counter() - started, peak_memory_mb(device)))


def peak_memory_mb(device):
    """This process's peak memory in MB: on the GPU, or its resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:  # on Linux getrusage returns the parent's peak if that is higher
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource  # not available on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def baseline_loop(workload, compiled, rounds):
    """Train as a plain script does, with torch's own functions, one micro-batch at a time. Does not return.

    On a GPU it does what nanoGPT does: bf16, TF32, fused AdamW, the vocabulary padded to a multiple of 64. `rounds`
    is a `report_rounds` generator.
    """
    torch.manual_seed(0)
    config, device, on_gpu = workload.config, workload.device, workload.device.type == "cuda"
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    padded = replace(config, vocab_size=64 * math.ceil(config.vocab_size / 64))
    model = GPT(padded if on_gpu else config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu)
    step_model = torch.compile(model) if compiled else model
    while True:
        for _ in range(workload.accumulation):
            x, y = torch.randint(config.vocab_size, (2, BATCH_SIZE, config.block_size), device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=compiled or on_gpu):
                loss = step_model(x, y) / workload.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        next(rounds)


def write_random_dataset(folder, config):
    """Write a dataset of random tokens, with a tokenizer of a GPTConfig's vocab_size."""
    folder.mkdir(parents=True)
    size = config.vocab_size
    ranks = {bytes([i]) if i < 256 else bytes(divmod(i, 256)): i for i in range(size - 1)}  # single bytes, then pairs
    tokenizer = Tokenizer("bench", GPT2_PATTERN, ranks, {END_OF_TEXT: size - 1})
    splits = {}
    for split, count in (("train", 4_000_000), ("validation", 100_000)):
        tokens = np.random.default_rng(0).integers(size // VOCABULARY_PER_USED_TOKEN, size=count, dtype=np.uint16)
        tokens.tofile(folder / f"{split}.bin")
        splits[split] = {"stories": 1, "tokens": count, "bytes": 4 * count,
                         "sha256": hashlib.sha256(tokens).hexdigest()}
    meta = {"vocab_size": size, "end_of_text": size - 1, "dtype": "uint16", "splits": splits,
            "tokenizer": tokenizer.save(folder)}
    (folder / "meta.json").write_text(json.dumps(with_checksum(meta)))


# ---- the output head and the loss ----


def bench_loss(args, device, ceilings, folder):
    """Seconds of the output head and the loss of a batch, forward and backward: this project's way and torch's two."""
    config, rows, dtype = args.config, BATCH_SIZE * args.config.block_size, pick_dtype("auto", device)
    x, weight = (torch.randn(n, config.n_embd, device=device, requires_grad=True) for n in (rows, config.vocab_size))
    targets = torch.randint(config.vocab_size, (rows,), device=device)

    def both_passes(function):
        """The loss, in the dtype of training, and its gradients."""
        with autocast(device, dtype):
            loss = function(x.to(dtype), 0.02 * weight.to(dtype), targets)
        torch.autograd.grad(loss, (x, weight))
        synchronize(device)

    medians, spreads = medians_and_spreads(time_interleaved(
        {name: partial(both_passes, function) for name, function in LOSSES.items()}, args.rounds))
    return {"rows": rows, "dtype": str(dtype).removeprefix("torch."), "seconds": medians, "spreads": spreads}


# ---- generation ----


def bench_generate(args, device, ceilings, folder):
    """Generation speed with 1, 32 and 512 concurrent stories by dtype, with and without the KV cache, and that of other
    programs.
    """
    path = best_checkpoint(args.out_dir) if args.out_dir else write_random_run(folder / "run", args.config)
    model, tokenizer, _ = checkpoint.load_model(path)
    block_size = model.config.block_size
    counts = (1, 32) if args.tiny else (1, 32, 512)
    picked = str(pick_inference_dtype("auto", device)).removeprefix("torch.")
    dtypes = sorted({"float32", "bfloat16", picked})  # picked is float16 on older GPUs
    models = {name: prepare_for_generation(copy.deepcopy(model), device, getattr(torch, name)) for name in dtypes}
    new_tokens = 2 * block_size  # a typical story, and long enough to move the context window
    lengths = [n - window_start(n, block_size) for n in range(block_size // 8, new_tokens, block_size // 4)]
    variants = {}  # name → (tokens, function)
    for dtype in models:
        for stories in counts if dtype == picked or device.type == "cuda" else counts[:2]:
            name, inputs = f"{dtype} {stories}", (models[dtype], torch.zeros(stories, 1, dtype=int, device=device))
            variants[name] = stories * new_tokens, partial(generate_stories, *inputs, new_tokens)
            if stories <= 32 or device.type == "cuda":  # on a CPU it would take minutes
                variants[f"{name} no cache"] = stories * len(lengths), partial(generate_uncached, *inputs, lengths)
            if device.type == "cuda":
                variants[f"{name} no graph"] = stories * new_tokens, partial(generate_without_graph, *inputs,
                                                                             new_tokens)
    medians, spreads = measure_rates(variants, args.rounds)
    command = [sys.executable, ROOT / "sample.py", "--out_dir", path.parent, "--start", "Once upon a time",
               "--max_new_tokens", "1", "--device", str(device)]
    first_token = time_interleaved({"seconds": partial(run_script, command)}, args.rounds)

    # The weights that are read once per token: all but the embeddings, and of the head one of the equal rows.
    linear = [module for module in models[picked].modules() if isinstance(module, fast.FastLinear)]
    weights_gb = sum(module.row_weight.numel() for module in linear) * getattr(torch, picked).itemsize / 1e9
    result = {"dtype": picked, **{f"tokens_per_s_{stories}": medians[f"{picked} {stories}"] for stories in counts},
              "bandwidth_fraction_1": medians[f"{picked} 1"] * weights_gb / ceilings["read_gb_per_s"],
              "first_token_s": float(np.median(first_token["seconds"])),
              "tokens_per_s_of_each": medians, "spreads": spreads}
    if device.type == "cpu":
        result |= compare_with_peers(path, counts[:2], args.rounds)
    if args.out_dir:
        result["validation_loss"] = losses_by_dtype(args.out_dir, device)
    return result


def generate_stories(model, idx, new_tokens):
    """Generate that many tokens after each prompt, idx (B, T), with the KV cache."""
    for _ in generate(model, idx, new_tokens, temperature=0.8, top_k=200):
        pass
    synchronize(idx.device)


def generate_without_graph(model, idx, new_tokens):
    """`generate_stories` without a CUDA graph, which is captured once per call."""
    with patch.object(generation, "capture_graph", lambda forward, cache: forward):
        generate_stories(model, idx, new_tokens)


@torch.inference_mode()
def generate_uncached(model, idx, lengths):
    """Generate one token at each context length by reading the whole context, idx (B, 1) repeated."""
    for length in lengths:
        cache = KVCache(model.config.block_size, idx.device)  # empty; with it, only the last logits
        sample_token(model(idx.expand(-1, length), cache=cache)[:, -1], 0.8, 200, 1.0, None)
    synchronize(idx.device)


def write_random_run(folder, config):
    """Write a run folder with a model of random weights; returns the path of its checkpoint.

    As after training on TinyStories, three quarters of the vocabulary have equal embeddings.
    """
    torch.manual_seed(0)
    model = GPT(config)
    model.transformer.wte.weight.data[config.vocab_size // VOCABULARY_PER_USED_TOKEN:] = 0
    write_random_dataset(folder, config)
    checkpoint.save(folder / "ckpt.pt", {"model": model.state_dict(), "model_config": asdict(config),
                                         "data_sha256": data_sha256(read_meta(folder)), "config": {}, "tokens": 0,
                                         "metrics": {}})
    return folder / "ckpt.pt"


def compare_with_peers(path, counts, rounds):
    """Generation with a checkpoint by this program and by those of tools/peers.py, in turn, each in its own process.

    Returns tokens/s by program and number of stories, their spreads, and where each one's greedy story first differs
    from that of this program in float32.
    """
    model, tokenizer, _ = checkpoint.load_model(path)
    new_tokens = model.config.block_size - 1  # the others cannot move the context window
    names = peers.programs(model.config)
    # llama.cpp only with one story: on the machine it was tried on, several crashed it.
    runs = [(name, count) for count in counts for name in names if count == 1 or name != "llama.cpp"]
    with child_processes({name: (run_program, name, path) for name in names}) as pipes:
        stories = {name: ask(pipes, name, (1, new_tokens, True))[0] for name in names}  # (new_tokens) each
        medians, spreads = measure_rates({f"{name}, {count}": (
            new_tokens * (1 + MORE_SINGLE_STORIES if count == 1 else count),
            partial(ask, pipes, name, (count, new_tokens, False))) for name, count in runs}, rounds)
    return {"peers_tokens_per_s": medians, "peers_spreads": spreads,
            "first_greedy_difference": {name: first_difference(model, tokenizer.end_of_text, story)
                                        for name, story in stories.items()}}


def run_program(pipe, name, path):
    """A child process of `compare_with_peers`: answer (stories, new_tokens, greedy) with seconds, or greedy tokens."""
    model, tokenizer, _ = checkpoint.load_model(path)
    with tempfile.TemporaryDirectory() as folder, suppress(EOFError):  # the parent has closed the pipe
        program = peers.programs(model.config)[name](model, tokenizer.end_of_text, Path(folder))
        while message := pipe.recv():
            stories, new_tokens, greedy = message
            started = time.perf_counter()
            for _ in range(1 + MORE_SINGLE_STORIES * (stories == 1 and not greedy)):
                tokens = program.generate(stories, new_tokens, greedy)
            pipe.send(tokens if greedy else time.perf_counter() - started)


@torch.inference_mode()
def first_difference(model, end_of_text, story):
    """Where a greedy story, token ids (n), first differs from the model's most likely tokens, and by which logits."""
    idx = torch.tensor([[end_of_text, *story]])  # (1, n + 1)
    logits = model(idx[:, :-1])[0]  # (n, V)
    different = (logits.argmax(-1) != idx[0, 1:]).nonzero()
    if not len(different):
        return f"none in {len(story)} tokens"
    i = int(different[0])
    gap = float(logits[i].max() - logits[i, story[i]])
    return f"token {i + 1}, whose logit is {gap:.3f} below the largest"


def losses_by_dtype(out_dir, device, count=64):
    """A run's loss in nats/token over `count` windows of its validation split, with the weights in each dtype."""
    losses = {}
    for dtype in ("float32", "bfloat16", "int8") if device.type == "cpu" else ("float32", "bfloat16"):
        model, _, state = checkpoint.load_model(best_checkpoint(out_dir))
        prepare_for_generation(model, device, getattr(torch, dtype))
        split = Split(Path("data", state["config"]["dataset"]), "validation", model.config.block_size)
        losses[dtype] = window_losses(model, split, evaluation_windows(split, count), batch_size=1).mean().item()
    return losses


# ---- preparation ----


def bench_prepare(args, device, ceilings, folder):
    """MB/s of prepare.py on 100 MB of nursery stories, and of the tokenizer alone in one thread, on some of them."""
    path, stories = folder / "nursery.txt", []
    with open(path, "w", encoding="utf-8") as file:
        for story in nursery.stories(1500 if args.tiny else NURSERY_STORIES, seed=1):
            file.write(f"{story}\n{END_OF_TEXT}\n")
            stories.append(story)
    try:
        name, tokenizer = "gpt2", Tokenizer.named("gpt2")
    except UserError:  # no network; then prepare.py's time includes training a vocabulary
        name, tokenizer = "bpe:4096", Tokenizer.train(stories[:20_000], 4096)
    megabytes = {count: sum(len(story.encode()) for story in stories[:count]) / 1e6 for count in (None, 20_000)}
    command = [sys.executable, ROOT / "prepare.py", path, "--tokenizer", name, "--force"]
    medians, spreads = measure_rates({
        "mb_per_s": (megabytes[None], partial(run_script, command, cwd=folder)),
        "tokenizer_mb_per_s": (megabytes[20_000], partial(tokenizer.encode_stories, stories[:20_000]))}, args.rounds)
    return {"tokenizer": name, "mb_of_text": megabytes[None], **medians, "spreads": spreads}


# ---- the speedrun ----

TARGET_BITS_PER_BYTE = 0.815  # on the whole validation split (docs/speedrun.md)
FIRST_RECORD = "bdf37bb051fc:config/tinystories_cpu.py"


def bench_race(args, device, ceilings, folder):
    """Seconds from the command `train.py CONFIG` to its end, and the loss on the whole validation split.

    CONFIG runs `rounds` times, with the seeds 1, 2, …, and the first record once, between the first two of them.
    """
    own, first = find_program(args.race_config, folder), find_program(FIRST_RECORD, folder)
    runs = [(f"{args.race_config} --seed={seed}", own, seed) for seed in range(1, args.rounds + 1)]
    own_names, first_name = [name for name, _, _ in runs], "the first record"
    runs.insert(1, (first_name, first, 1))
    seconds, losses, errors = {}, {}, {}
    for name, program, seed in runs:
        print(name, end=": ", file=sys.stderr, flush=True)
        seconds[name], losses[name], errors[name] = race(*program, seed, device, folder)
        print(f"{seconds[name]:.1f} s, {losses[name]:.4f} ± {errors[name]:.4f} bits per byte", file=sys.stderr)
    own_seconds = float(np.median([seconds[name] for name in own_names]))
    reached = sum(losses[name] <= TARGET_BITS_PER_BYTE for name in own_names)
    return {"seconds": own_seconds, "first_record_seconds": seconds[first_name],
            "times_first_record": own_seconds / seconds[first_name],
            f"reached_{TARGET_BITS_PER_BYTE}": f"{reached} of {len(own_names)}",
            "seconds_of_each": seconds, "bits_per_byte_of_each": losses, "standard_error_of_each": errors}


def race(script, config, seed, device, folder):
    """Train with a train.py: (seconds, bits per byte on the whole validation split, standard error over windows)."""
    command = [sys.executable, script, f"--out_dir={tempfile.mkdtemp(dir=folder)}", f"--device={device}"]
    started = time.perf_counter()
    run_script([*command, config, f"--seed={seed}"])
    seconds = time.perf_counter() - started
    result = dict(re.findall(r"^(\w+): (.*)$", run_script([*command, "--eval_only"]), re.M))
    loss, bits_per_byte = float(result["loss"]), float(result["bits_per_byte"])
    return seconds, bits_per_byte, float(result.get("standard_error", "nan")) * bits_per_byte / loss


def find_program(config, folder):
    """The paths of train.py and of the config for CONFIG or COMMIT:CONFIG, whose program is unpacked in `folder`.

    Raises UserError if there is no such commit or config, or its dataset is not prepared.
    """
    commit, _, name = config.rpartition(":")
    program, path = ROOT, Path(config)
    if commit and not path.exists():
        program = Path(tempfile.mkdtemp(dir=folder))
        archive, path = program.with_suffix(".zip"), program / name
        command = ["git", "archive", f"--output={archive}", commit]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"git cannot find commit {commit} of this program: use a clone with its whole history "
                            f"({done.stderr.strip()})")
        shutil.unpack_archive(archive, program)
        if not path.is_file():
            raise UserError(f"commit {commit} has no config file {name!r}: name one, such as "
                            f"{commit}:config/speedrun.py")
    settings = read_config_file(path)
    read_meta(Path("data", settings.get("dataset", Config.dataset)))
    return program / "train.py", path


SUBJECTS = {"train": bench_train, "small": bench_small, "loss": bench_loss, "generate": bench_generate,
            "prepare": bench_prepare, "race": bench_race}

if __name__ == "__main__":
    main()
