"""Measure this program's speed on this machine, against a plain training loop and the hardware's limits.

    python -m tools.bench                              every subject but the race, a few minutes each
    python -m tools.bench train --json                 one subject, as JSON
    python -m tools.bench race config/speedrun.py      the speedrun and its first record (docs/speedrun.md)

Timings are noisy, so the variants of a subject run interleaved, and ratios are more reliable than absolute numbers.
Each training variant runs in its own process, which also gives its own peak memory.
"""

if __name__ == "__main__":
    from runtime import startup

    startup.before_importing_torch()

import collections
import copy
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, chdir, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

import checkpoint
import model as model_module
import train
from config import Config, read_config_file
from data import nursery
from data.dataset import Split, data_sha256, evaluation_windows, read_meta, with_checksum
from data.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer
from layers import linear_cross_entropy
from model import GPT, GPTConfig, KVCache, sample_token, window_start
from modern import count_parameters
from runtime import files, startup
from runtime.distributed import all_reduce_gradients, cleanup_distributed, init_distributed, sync_stop_and_time
from runtime.errors import Parser, UserError, exit_with_one_line
from runtime.hardware import describe_device, git_commit, pick_device, pick_inference_dtype
from tools import peers

ROOT = Path(__file__).parent.parent
PUBLISHED = GPTConfig(vocab_size=50257)
VOCABULARY_PER_USED_TOKEN = 4  # training data uses a quarter of it, as 8 million tokens of TinyStories do of GPT-2's
TINY = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32)  # for --tiny
BATCH_SIZE = 32
FAST = ROOT / "config" / "tinystories_fast.py"  # the config of the subject `small`
RANK_BATCH_SIZE = {"cpu": 32, "cuda": 128}  # sequences per process in the subject `ranks`
NURSERY_STORIES = 140_000  # 102 MB of text
# Dense bf16 TFLOP/s from the vendors' data sheets.
PEAK_TFLOPS = {"H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165}
MORE_SINGLE_STORIES = 7  # after the first one, so that a measurement takes seconds
LIBGOMP_SPIN_COUNT = "300000"  # the default of GNU's OpenMP, which torch's Linux builds use
TABLES_WITH_SPREADS = {"gflops_of_each", "tokens_per_s_of_each", "seconds"}


@exit_with_one_line
def main(argv=None):
    """Measure one subject or all of them and print the results; `argv` as on the command line."""
    args = parse_args(argv)
    device = pick_device(args.device)
    compilers = ("gcc", "clang", "cc") if device.type == "cuda" else ("g++", "clang++", "c++", "cl")
    if args.subject in (None, "train") and not any(map(shutil.which, compilers)):
        raise UserError("the subject train uses torch.compile, which needs a compiler: install one of "
                        f"{', '.join(compilers)}")
    results = {"machine": describe_machine(device)}
    if args.subject != "race":
        results["ceilings"] = measure_ceilings(device, args.config, args.rounds)
    subjects = [name for name in SUBJECTS if name == args.subject or (args.subject is None and name != "race")]
    for subject in subjects:
        with tempfile.TemporaryDirectory() as folder:
            results[subject] = SUBJECTS[subject](args, device, results.get("ceilings"), Path(folder))
    if args.json:
        return print(json.dumps(results, indent=2))
    for subject, result in results.items():
        print_tables(subject, result)


def parse_args(argv):
    """The command line as a namespace, with `config`: the GPTConfig to measure."""
    parser = Parser(prog="python -m tools.bench", description="Measure this program's speed on this machine.")
    parser.add_argument("subject", nargs="?", choices=["machine", *SUBJECTS],
                        help="what to measure; machine: only the hardware's limits (default: everything but "
                             "the race)")
    parser.add_argument("race_config", nargs="?", metavar="CONFIG", help="race: a config file, or COMMIT:CONFIG "
                        "for the config and the program of a commit")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON, with every median and spread, instead of "
                                                            "tables")
    parser.add_argument("--tiny", action="store_true", help="a toy model: only to try the benchmark itself")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant; race: seeds "
                        "of the config (default: 3)")
    parser.add_argument("--out_dir", help="generate: measure with this run, and also its validation loss in each dtype")
    args = parser.parse_args(argv)
    if (args.subject == "race") != bool(args.race_config):
        parser.error("race needs a config, such as config/speedrun.py, and the other subjects take none")
    if args.rounds < 1:
        parser.error(f"argument --rounds: {args.rounds} is not 1 or more")
    if args.out_dir:
        checkpoint.best_checkpoint(args.out_dir)  # fail now rather than after minutes
    args.config = TINY if args.tiny else PUBLISHED
    return args


def describe_machine(device):
    """The hardware, the versions and the date of a measurement, as a dict."""
    gpu = describe_gpu() if device.type == "cuda" else {}
    return {"device": describe_device(device), **gpu, "processor": processor_name(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "date": date.today().isoformat(), "git": git_commit()}


def describe_gpu():
    """Memory, driver and CUDA version of the current GPU; the driver is None if nvidia-smi is not installed."""
    index = torch.cuda.current_device()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={index}"]
    driver = None
    if shutil.which(query[0]):
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() or None
    memory = torch.cuda.get_device_properties(index).total_memory
    return {"gpu_memory_gib": memory / 2**30, "driver": driver, "cuda": torch.version.cuda}


def processor_name():
    """The processor's model name from /proc/cpuinfo, or what Python knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.M)
    return found[1] if found else platform.processor() or platform.machine()


def print_tables(subject, result):
    """Print a subject's result: one value per line, with the lowest and the highest of its rounds if it has them."""
    print(f"\n{subject}")
    spreads = result.get("spreads", {})
    for key, value in result.items():
        if key == "spreads":
            continue
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


def median_rates(amounts, seconds):
    """Amounts (name → number) per second (name → list): their medians and their (lowest, highest), by name."""
    rates = {name: amounts[name] / np.array(values) for name, values in seconds.items()}
    return ({name: float(np.median(values)) for name, values in rates.items()},
            {name: (float(values.min()), float(values.max())) for name, values in rates.items()})


def run_script(command, **options):
    """Run a script silently; returns what it printed. Raises UserError with the last line of its stderr if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise UserError(f"{Path(command[1]).name} failed: {(done.stderr.splitlines() or ['no error message'])[-1]}")
    return done.stdout


def synchronize(device):
    """Wait until a GPU has finished all work submitted to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def child_processes(targets):
    """Spawn a process that calls target(pipe, *args) for each name → (target, *args); yields name → pipe to it.

    The processes end with the `with` block.
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
    return ask_at_once(pipes, [name], message)[0]


def ask_at_once(pipes, names, message="go"):
    """Send a message to several of `child_processes` and return the list of their answers, as `ask` does."""
    try:
        for name in names:
            pipes[name].send(message)
        return [pipes[name].recv() for name in names]
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
    variants, work = {}, {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for product, (m, k, n) in shapes.items():
            a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((m, k), (n, k)))
            variants[f"{name} {product}"] = partial(repeat, repeats, device, F.linear, a, b)
            work[f"{name} {product}"] = repeats * 2 * m * k * n / 1e9
    block = torch.ones(2**20 if config is TINY else 2**28, device=device)  # 1 GiB, larger than any cache
    variants["read"] = partial(repeat, repeats, device, torch.sum, block)
    work["read"] = repeats * 4 * block.numel() / 1e9
    medians, spreads = median_rates(work, time_interleaved(variants, rounds))
    best = {dtype: max(rate for name, rate in medians.items() if name.startswith(dtype)) for dtype in ("fp32", "bf16")}
    return {"matmul_fp32_gflops": best["fp32"], "matmul_bf16_gflops": best["bf16"],
            "read_gb_per_s": medians.pop("read"), "gflops_of_each": medians,
            "spreads": spreads | {"read_gb_per_s": spreads["read"]}}


def repeat(count, device, function, *args):
    """Call a function `count` times and wait for the device."""
    for _ in range(count):
        function(*args)
    synchronize(device)


# ---- training ----

# Patches, (owner, attribute, replacement): each replaces a faster layer of this project by torch's.
TORCH_DROPOUT = (model_module, "Dropout", nn.Dropout)
TORCH_ATTENTION = (model_module, "causal_attention", lambda q, k, v, dropout: F.scaled_dot_product_attention(
    q, k, v, is_causal=True, dropout_p=dropout.p))
UNFUSED_LOSS = (GPT, "loss_function", staticmethod(linear_cross_entropy))
WHOLE_VOCABULARY = (GPT, "skip_unused_tokens", lambda self, used, equalize: None)
TORCH_LAYERS = [TORCH_DROPOUT, TORCH_ATTENTION, UNFUSED_LOSS]
# name → (patches, flags for train.py); flags None: `baseline_loop` instead of train.py
VARIANTS = {
    "baseline": (TORCH_LAYERS, None),
    "baseline, bf16, compiled": (TORCH_LAYERS, None),
    "this project": ([], []),
    "compiled": ([], ["--compile=True"]),
    "eager": ([], ["--compile=False"]),
    "float32": ([], ["--dtype=float32"]),
    "dropout 0": ([], ["--dropout=0"]),
    "torch's dropout": ([TORCH_DROPOUT], []),
    "torch's attention": ([TORCH_ATTENTION], []),
    "whole vocabulary": ([WHOLE_VOCABULARY], []),
    "unfused loss": ([UNFUSED_LOSS], ["--device_batch_size=32"]),  # the logits of a whole step would fill a GPU
    "eager, AdamW alone": ([], ["--compile=False", "--optimizer=adamw", "--learning_rate=1e-3"]),  # only in `small`
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
    seconds, peaks, first = {}, {}, {}
    for group in groups:
        for total, part in zip((seconds, peaks, first), time_variants(group, workload, rounds)):
            total.update(part)
    medians, spreads = median_rates(dict.fromkeys(seconds, workload.steps * workload.tokens_per_step), seconds)
    return {"tokens_per_s": medians[own], **flops_utilization(medians[own], workload, ceilings),
            "tokens_per_step": workload.tokens_per_step, "tokens_per_s_of_each": medians, "peak_mb_of_each": peaks,
            "first_round_s_of_each": first, "spreads": spreads}


def flops_utilization(tokens_per_s, workload, ceilings):
    """Model FLOP/s utilization (MFU; Chowdhery et al. 2022, arXiv 2204.02311) of training.

    `mfu` is relative to the data sheet of a GPU in PEAK_TFLOPS, `mfu_of_measured` to the fastest product measured. Of
    the vocabulary, only the tokens of the data are counted.
    """
    config = replace(workload.config, vocab_size=workload.config.vocab_size // VOCABULARY_PER_USED_TOKEN)
    flops = tokens_per_s * (6 * count_parameters(config) + 12 * config.n_layer * config.block_size * config.n_embd)
    gpu = torch.cuda.get_device_name(workload.device) if workload.device.type == "cuda" else ""
    measured = max(ceilings["matmul_bf16_gflops"], ceilings["matmul_fp32_gflops"]) * 1e9  # bf16 is slow on some CPUs
    peak = next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", gpu)), measured)
    return {"mfu": flops / peak, "mfu_of_tflops": peak / 1e12, "mfu_of_measured": flops / measured}


def time_variants(names, workload, rounds):
    """Run training variants interleaved, each in its own process.

    Returns three dicts by name: the seconds of each round, the peak memory in MB, and the seconds of the warm-up round.
    """
    answers = {name: [] for name in names}  # (seconds, peak MB) of each round
    with child_processes({name: (run_variant, name, workload) for name in names}) as pipes:
        for name in names * (rounds + 1):
            answers[name].append(ask(pipes, name))
    return ({name: [seconds for seconds, _ in answers[name][1:]] for name in names},
            {name: answers[name][-1][1] for name in names}, {name: answers[name][0][0] for name in names})


def run_variant(pipe, name, workload):
    """A child process of `time_variants`: train until the parent closes the pipe."""
    os.chdir(workload.folder)
    sys.stdout = open(os.devnull, "w")
    patches, flags = VARIANTS[name]
    for patch in patches:
        setattr(*patch)
    if workload.config == TINY:  # the default backend takes half a minute to compile
        torch.compile = partial(torch.compile, backend="aot_eager")
    rounds = report_rounds(pipe, workload.device)
    next(rounds)
    if flags is None:
        baseline_loop(workload, "compiled" in name, rounds)

    def end_round(path, record):
        """Called by train.py instead of writing to its log: after every `steps` steps, and after the first one."""
        if record["kind"] == "step" and record["update"] % workload.steps == 0:
            next(rounds)

    files.append_line = end_round
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
    """Train as a plain script does, with torch's own layers, one micro-batch at a time. Does not return.

    On a GPU it does what nanoGPT does: bf16, TF32, fused AdamW, the vocabulary padded to a multiple of 64, and the next
    micro-batch copied while the device computes. `rounds` is a `report_rounds` generator.
    """
    torch.manual_seed(0)
    config, device, on_gpu = workload.config, workload.device, workload.device.type == "cuda"
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    padded = replace(config, vocab_size=64 * math.ceil(config.vocab_size / 64))
    model = GPT(padded if on_gpu else config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu)
    step_model = torch.compile(model) if compiled else model
    x, y = random_batch(workload)
    while True:
        for _ in range(workload.accumulation):
            with torch.autocast(device.type, torch.bfloat16, enabled=compiled or on_gpu):
                loss = step_model(x, y) / workload.accumulation
            x, y = random_batch(workload)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        next(rounds)


def random_batch(workload):
    """Random inputs and targets on the device, (2, BATCH_SIZE, T); on a GPU the copy is asynchronous."""
    tokens = torch.randint(workload.config.vocab_size, (2, BATCH_SIZE, workload.config.block_size))
    return tokens.pin_memory().to(workload.device, non_blocking=True) if workload.device.type == "cuda" else tokens


def write_random_dataset(folder, config):
    """Write a dataset of random tokens, with a tokenizer of a GPTConfig's vocab_size."""
    folder.mkdir(parents=True)
    size = config.vocab_size
    ranks = {bytes([i]) if i < 256 else bytes(divmod(i, 256)): i for i in range(size - 1)}  # single bytes, then pairs
    tokenizer = Tokenizer(tiktoken.Encoding("bench", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                            special_tokens={END_OF_TEXT: size - 1}))
    tokenizer.save(folder)
    splits = {}
    for split, count in (("train", 4_000_000), ("validation", 100_000)):
        tokens = np.random.default_rng(0).integers(size // VOCABULARY_PER_USED_TOKEN, size=count, dtype=np.uint16)
        tokens.tofile(folder / f"{split}.bin")
        splits[split] = {"stories": 1, "tokens": count, "bytes": 4 * count,
                         "sha256": hashlib.sha256(tokens).hexdigest()}
    meta = {"vocab_size": size, "end_of_text": size - 1, "dtype": "uint16", "splits": splits,
            "tokenizer": tokenizer.describe()}
    (folder / "meta.json").write_text(json.dumps(with_checksum(meta)))


# ---- generation ----


def bench_generate(args, device, ceilings, folder):
    """Generation speed with 1, 32 and 512 concurrent stories by dtype, with and without the KV cache, and that of other
    programs.
    """
    path = checkpoint.best_checkpoint(args.out_dir) if args.out_dir else write_random_run(folder / "run", args.config)
    model, tokenizer, _ = checkpoint.load_model(path)
    block_size = model.config.block_size
    counts = (1, 32) if args.tiny else (1, 32, 512)
    picked = str(pick_inference_dtype("auto", device)).removeprefix("torch.")
    dtypes = sorted({"float32", "bfloat16", picked})  # picked is float16 on older GPUs
    models = {dtype: copy.deepcopy(model).for_inference(device, getattr(torch, dtype)) for dtype in dtypes}
    new_tokens = 2 * block_size  # a typical story, and long enough to move the context window
    lengths = [n - window_start(n, block_size) for n in range(block_size // 8, new_tokens, block_size // 4)]
    variants, amounts = {}, {}
    for dtype in models:
        for stories in counts if dtype == picked or device.type == "cuda" else counts[:2]:
            idx, name = torch.zeros(stories, 1, dtype=torch.long, device=device), f"{dtype} {stories}"
            variants[name] = partial(generate_stories, models[dtype], idx, new_tokens)
            amounts[name] = stories * new_tokens
            if stories <= 32 or device.type == "cuda":  # on a CPU it would take minutes
                variants[f"{name} no cache"] = partial(generate_uncached, models[dtype], idx, lengths)
                amounts[f"{name} no cache"] = stories * len(lengths)
            if device.type == "cuda":
                variants[f"{name} no graph"] = partial(generate_without_graph, models[dtype], idx, new_tokens)
                amounts[f"{name} no graph"] = stories * new_tokens
    medians, spreads = median_rates(amounts, time_interleaved(variants, args.rounds))

    # The weights that are read once per token: all but the embeddings, of which the head reads the trained ones.
    embeddings = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".h." not in name)
    read = count_parameters(model.config) - embeddings + len(models[picked].head_tokens) * model.config.n_embd
    weights_gb = read * getattr(torch, picked).itemsize / 1e9
    result = {"dtype": picked, **{f"tokens_per_s_{stories}": medians[f"{picked} {stories}"] for stories in counts},
              "bandwidth_fraction_1": medians[f"{picked} 1"] * weights_gb / ceilings["read_gb_per_s"],
              "first_token_s": time_to_first_token(path.parent, device, args.rounds),
              "tokens_per_s_of_each": medians, "spreads": spreads}
    if device.type == "cpu":
        result |= compare_with_peers(path, counts[:2], args.rounds)
    if args.out_dir:
        result["validation_loss"] = losses_by_dtype(args.out_dir, device)
    return result


def generate_stories(model, idx, new_tokens):
    """Generate that many tokens after each prompt, idx (B, T), with the KV cache."""
    for _ in model.generate(idx, new_tokens, temperature=0.8, top_k=200):
        pass
    synchronize(idx.device)


def generate_without_graph(model, idx, new_tokens):
    """`generate_stories` without a CUDA graph, which is captured once per call."""
    model = copy.copy(model)
    model.capture_decode_graph = lambda cache: lambda token: model(token, cache=cache)
    generate_stories(model, idx, new_tokens)


@torch.inference_mode()
def generate_uncached(model, idx, lengths):
    """Generate one token at each context length by reading the whole context, idx (B, 1) repeated."""
    weight = model.transformer.wte.weight
    for length in lengths:
        cache = KVCache(model.config, len(idx), idx.device, weight.dtype)  # empty; with it, only the last logits
        logits = model(idx.expand(-1, length), cache=cache)[:, -1]  # (B, V)
        sample_token(logits, 0.8, 200, 1.0, None)
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
                                         "figures": {}})
    return folder / "ckpt.pt"


def time_to_first_token(out_dir, device, rounds):
    """Median seconds of sample.py generating one token, from the start of its process to the end."""
    command = [sys.executable, ROOT / "sample.py", "--out_dir", out_dir, "--start", "Once upon a time",
               "--max_new_tokens", "1", "--device", str(device)]
    return float(np.median(time_interleaved({"sample.py": partial(run_script, command)}, rounds)["sample.py"]))


def compare_with_peers(path, counts, rounds):
    """Generation with a checkpoint by this program and by those of tools/peers.py, in turn, each in its own process.

    Returns tokens/s by program and number of stories, their spreads, and where each one's greedy story first differs
    from that of this program in float32.
    """
    model, tokenizer, _ = checkpoint.load_model(path)
    new_tokens = model.config.block_size - 1  # the others cannot move the context window
    names, seconds = peers.programs(model.config), collections.defaultdict(list)
    with child_processes({name: (run_program, name, path) for name in names}) as pipes:
        stories = {name: ask(pipes, name, (1, new_tokens, True))[1][0] for name in names}  # (new_tokens) each
        for count in counts:
            # llama.cpp only with one story: on the machine it was tried on, several crashed it.
            for name in [name for name in names if count == 1 or name != "llama.cpp"] * (rounds + 1):
                seconds[f"{name}, {count}"].append(ask(pipes, name, (count, new_tokens, False))[0])
    seconds = {name: values[1:] for name, values in seconds.items()}
    stories_of = {name: int(name.rsplit(" ", 1)[1]) for name in seconds}
    amounts = {name: (1 + MORE_SINGLE_STORIES if n == 1 else n) * new_tokens for name, n in stories_of.items()}
    medians, spreads = median_rates(amounts, seconds)
    return {"peers_tokens_per_s": medians, "peers_spreads": spreads,
            "first_greedy_difference": {name: first_difference(model, tokenizer.end_of_text, story)
                                        for name, story in stories.items()}}


def run_program(pipe, name, path):
    """A child process of `compare_with_peers`: answer (stories, new_tokens, greedy) with the seconds and the tokens."""
    model, tokenizer, _ = checkpoint.load_model(path)
    with tempfile.TemporaryDirectory() as folder:
        program = peers.programs(model.config)[name](model, tokenizer.end_of_text, Path(folder))
        with suppress(EOFError):  # the parent has closed the pipe
            while message := pipe.recv():
                started = time.perf_counter()
                tokens = program.generate(*message)
                for _ in range(MORE_SINGLE_STORIES * (message[0] == 1)):
                    program.generate(*message)
                pipe.send((time.perf_counter() - started, tokens))


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


@torch.inference_mode()
def losses_by_dtype(out_dir, device, count=64):
    """A run's loss in nats/token over `count` windows of its validation split, with the weights in each dtype.

    Without the targets that never occurred in training: see `GPT.for_inference`.
    """
    losses = {}
    for dtype in ("float32", "bfloat16", "int8") if device.type == "cpu" else ("float32", "bfloat16"):
        model, _, state = checkpoint.load_model(checkpoint.best_checkpoint(out_dir))
        model.for_inference(device, getattr(torch, dtype))
        split = Split(Path("data", state["config"]["dataset"]), "validation", model.config.block_size)
        x, y = (torch.from_numpy(tokens).to(device) for tokens in split.windows(evaluation_windows(split, count)))
        columns = torch.full((model.config.vocab_size,), -100, device=device)  # -100: ignored
        columns[model.head_tokens] = torch.arange(len(model.head_tokens), device=device)
        window_losses = [F.cross_entropy(model(a[None])[0].float(), columns[b]) for a, b in zip(x, y)]
        losses[dtype] = torch.stack(window_losses).mean().item()
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
    batches = [stories[i:i + 1000] for i in range(0, min(len(stories), 20_000), 1000)]
    megabytes = {"mb_per_s": sum(len(story.encode()) for story in stories) / 1e6,
                 "tokenizer_mb_per_s": sum(len(story.encode()) for batch in batches for story in batch) / 1e6}
    command = [sys.executable, ROOT / "prepare.py", path, "--tokenizer", name, "--force"]
    medians, spreads = median_rates(megabytes, time_interleaved({
        "mb_per_s": partial(run_script, command, cwd=folder),
        "tokenizer_mb_per_s": lambda: [tokenizer.encode_stories(batch) for batch in batches]}, args.rounds))
    return {"tokenizer": name, "mb_of_text": megabytes["mb_per_s"], **medians, "spreads": spreads}


# ---- several processes ----


def bench_ranks(args, device, ceilings, folder):
    """The cost of all-reducing gradients between all GPUs, or two CPU processes, and of saving a checkpoint."""
    world_size = torch.cuda.device_count() if device.type == "cuda" else 2
    if world_size < 2:
        return {"processes": "one GPU: no all-reduce"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with child_processes({f"rank {rank}": (run_rank, rank, world_size, port, device.type, args.config, args.rounds)
                          for rank in range(world_size)}) as pipes:
        seconds = [ask(pipes, name) for name in pipes][0]
    medians, spreads = median_rates(dict.fromkeys(seconds, 1), seconds)
    parameters = count_parameters(args.config)
    weights = torch.zeros(3, parameters)  # the model and AdamW's two moments
    saves = time_interleaved({"save": lambda: checkpoint.save(folder / "last.pt", {"model": weights})}, args.rounds)
    return {"processes": world_size, "sequences_of_each": RANK_BATCH_SIZE[device.type],
            "exchanged_mb": 4 * parameters / 1e6,
            "seconds": {name: 1 / rate for name, rate in medians.items()},
            "saved_mb": 12 * parameters / 1e6, "save_seconds": float(np.median(saves["save"])),
            "spreads": {name: (1 / high, 1 / low) for name, (low, high) in spreads.items()}}


def run_rank(pipe, rank, world_size, port, device_type, config, rounds):
    """A child process of `bench_ranks`: time the variants and send name → list of seconds."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    init_distributed()
    device = pick_device(device_type)
    if device_type == "cpu":
        torch.set_num_threads(max(1, os.cpu_count() // world_size))
    model = GPT(config).to(device)
    ddp_model = DistributedDataParallel(GPT(config).to(device), gradient_as_bucket_view=True)
    idx = torch.randint(config.vocab_size, (2, RANK_BATCH_SIZE[device_type], config.block_size), device=device)
    pipe.send(time_interleaved({
        "all-reduce": partial(time_rank_step, model, idx, passes=False, all_reduce=True),
        "forward and backward": partial(time_rank_step, model, idx),
        "forward, backward, all-reduce": partial(time_rank_step, model, idx, all_reduce=True),
        "DistributedDataParallel": partial(time_rank_step, ddp_model, idx),
    }, rounds))
    cleanup_distributed()


def time_rank_step(model, idx, passes=True, all_reduce=False):
    """Seconds of a forward and backward pass, idx (2, B, T) being inputs and targets, and of a gradient all-reduce.

    Without `passes`, gradients of ones are made before the timing starts.
    """
    for p in model.parameters():
        p.grad = None if passes else torch.ones_like(p)
    synchronize(idx.device)
    sync_stop_and_time(False, 0.0)  # a barrier: all ranks start together
    started = time.perf_counter()
    if passes:
        with torch.autocast(idx.device.type, torch.bfloat16):
            loss = model(idx[0], idx[1])
        loss.backward()
    if all_reduce:
        all_reduce_gradients(model.parameters())
    synchronize(idx.device)
    return time.perf_counter() - started


# ---- two runs at once ----


def bench_two_runs(args, device, ceilings, folder):
    """Training speed on a CPU of one run and of two at once, by how long threads spin before they sleep."""
    if device.type != "cpu":
        return {"runs": "on a CPU only"}
    workload = make_workload(folder, device, args.config, small=True)
    spins = {"": startup.SPIN_COUNT, ", OpenMP's default": LIBGOMP_SPIN_COUNT}
    seconds = {f"{runs}{name}": [] for runs in ("one run", "two runs") for name in spins}
    with ExitStack() as stack:
        pipes = {name: stack.enter_context(two_processes(workload, count)) for name, count in spins.items()}
        for round in range(args.rounds + 1):
            for name in spins:
                for runs, names in (("one run", ["first"]), ("two runs", ["first", "second"])):
                    slowest = max(answer[0] for answer in ask_at_once(pipes[name], names))
                    if round:  # the first one is a warm-up
                        seconds[f"{runs}{name}"].append(slowest)
    tokens = workload.steps * workload.tokens_per_step
    medians, spreads = median_rates({name: tokens * (1 + name.startswith("two")) for name in seconds}, seconds)
    default = medians["one run, OpenMP's default"]
    return {"one_run_times_default": medians["one run"] / default,
            "two_runs_times_one_default": medians["two runs"] / default, "tokens_per_s_of_each": medians,
            "spreads": spreads}


@contextmanager
def two_processes(workload, spin_count):
    """Two child processes that train, with OpenMP's threads spinning so often before they sleep."""
    before = os.environ.get("GOMP_SPINCOUNT")
    os.environ["GOMP_SPINCOUNT"] = spin_count  # read when a process loads torch
    with child_processes(dict.fromkeys(("first", "second"), (run_variant, "eager", workload))) as pipes:
        os.environ.pop("GOMP_SPINCOUNT") if before is None else os.environ.update(GOMP_SPINCOUNT=before)
        yield pipes


# ---- profile ----


def bench_profile(args, device, ceilings, folder):
    """The most expensive kernels (on a CPU, operations) of a published step, a small step and a story."""
    result = {}
    for name, small in (("published step", False), ("small step", True)):
        workload = make_workload(folder / name, device, args.config, small)
        result |= summarize_profile(name, device, *profile_training(workload, 20 if small else 4))
    model = GPT(args.config).eval().for_inference(device, pick_inference_dtype("auto", device))
    idx = torch.zeros(1, 1, dtype=torch.long, device=device)
    generate_stories(model, idx, args.config.block_size)
    with torch.profiler.profile() as profiler:
        started = time.perf_counter()
        generate_stories(model, idx, args.config.block_size)
        seconds = time.perf_counter() - started
    return result | summarize_profile("one story", device, profiler, seconds)


def profile_training(workload, count, warmup=8):
    """(profiler, seconds) of `count` optimizer steps of train.py after `warmup` others, compiled on a GPU."""
    schedule = torch.profiler.schedule(wait=warmup - 2, warmup=2, active=count)
    steps = StepProfiler(torch.profiler.profile(schedule=schedule), workload.device, warmup, warmup + count)
    hook = register_optimizer_step_post_hook(steps)
    try:
        with chdir(workload.folder), steps.profiler, open(os.devnull, "w") as null, redirect_stdout(null):
            train.main([*workload.flags, "--log_interval=1000000", "--eval_iters=1", "--warmup_iters=0",
                        f"--max_iters={(warmup + count + 1) * workload.accumulation}",
                        f"--compile={workload.device.type == 'cuda' and workload.config != TINY}"])
    finally:
        hook.remove()
    return steps.profiler, steps.seconds


class StepProfiler:
    """An optimizer hook that advances a profiler at each training step and times those after `first` up to `last`."""

    def __init__(self, profiler, device, first, last):
        self.profiler, self.device, self.first, self.last = profiler, device, first, last
        self.step, self.started, self.seconds = 0, 0.0, 0.0

    def __call__(self, optimizer, args, kwargs):
        """Count a training step; called after each step of any optimizer."""
        if not isinstance(optimizer, torch.optim.AdamW):  # every training step has one AdamW step; Muon's comes after
            return
        self.step += 1
        if self.step in (self.first, self.last):
            synchronize(self.device)  # time the kernels, not only their launches
        if self.step == self.last:
            self.seconds = time.perf_counter() - self.started
        self.profiler.step()
        if self.step == self.first:  # now that the profiler has started, which takes time itself
            self.started = time.perf_counter()


def summarize_profile(name, device, profiler, seconds, count=10):
    """The `count` most expensive kernels of a profile, kernel → share of all kernels' time, and the GPU's idle share.

    The GPU is idle while no kernel runs, which profiling itself increases. On a CPU, operations stand for kernels, and
    the idle share is None. Raises UserError if the profiler recorded nothing on a GPU.
    """
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA
               and not event.is_user_annotation]
    if device.type == "cuda" and not kernels:
        raise UserError("torch.profiler recorded no kernels: CUDA's profiling library (CUPTI) does not work here")
    times = collections.Counter()  # microseconds
    for event in kernels:
        times[event.name] += event.time_range.elapsed_us()
    if not kernels:
        times.update({row.key: row.self_cpu_time_total for row in profiler.key_averages()
                      if not row.key.startswith("ProfilerStep")})
    busy = end = 0.0  # microseconds; kernels may overlap
    for span in sorted((event.time_range for event in kernels), key=lambda span: span.start):
        busy += max(0.0, span.end - max(end, span.start))
        end = max(end, span.end)
    return {f"{name}: share of the kernels' time": {kernel: us / times.total() for kernel, us in
                                                    times.most_common(count)},
            f"{name}: milliseconds profiled": 1000 * seconds,
            f"{name}: idle": 1 - busy / 1e6 / seconds if kernels else None}


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
    """The paths of train.py and of the config for CONFIG or COMMIT:CONFIG, which is unpacked in `folder`.

    Raises UserError if there is no such commit or config, or its dataset is not prepared.
    """
    commit, _, name = config.rpartition(":")
    if not commit or Path(config).exists():
        program, path = ROOT, Path(config)
    else:
        program = unpack_commit(commit, folder)
        path = program / name
        if not path.is_file():
            raise UserError(f"commit {commit} has no config file {name!r}: name one, such as "
                            f"{commit}:config/speedrun.py")
    settings = read_config_file(path)
    read_meta(Path("data", settings.get("dataset", Config.dataset)))
    return program / "train.py", path


def unpack_commit(commit, folder):
    """Unpack the program of a git commit in a new folder in `folder`; returns it. Raises UserError if there is none."""
    program = Path(tempfile.mkdtemp(dir=folder))
    archive = program.with_suffix(".zip")
    if not shutil.which("git"):
        raise UserError("the race needs git, for the program of the first record: install git")
    done = subprocess.run(["git", "archive", f"--output={archive}", commit], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git cannot find commit {commit} of this program: use a clone with its whole history "
                        f"({done.stderr.strip()})")
    shutil.unpack_archive(archive, program)
    return program


SUBJECTS = {"train": bench_train, "small": bench_small, "generate": bench_generate, "profile": bench_profile,
            "prepare": bench_prepare, "ranks": bench_ranks, "two-runs": bench_two_runs, "race": bench_race}

if __name__ == "__main__":
    main()
