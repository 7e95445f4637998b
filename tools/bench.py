"""How fast this program is on this machine, next to a plain baseline and to what the machine could do.

    python -m tools.bench                   everything, a few minutes a subject
    python -m tools.bench train --json      one subject, as JSON

Machines are noisy, so contenders take turns within one run, and ratios tell more than figures. Each training contender
is a process of its own, which also gives its own peak of memory.
"""

import collections
import copy
import functools
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
from contextlib import chdir
from dataclasses import asdict, dataclass, replace
from datetime import date
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
import files
import model as model_py
import train
from config import read_recipe
from data import nursery
from dataset import Split, evaluation_windows, read_meta, seal
from errors import Parser, UserError, exit_with_one_line
from hardware import pick_device, pick_dtype, pick_weights
from model import GPT, GPTConfig, KVCache, choose_token, window_start
from ranks import add_up_gradients, agree, join, leave
from tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer

ROOT = Path(__file__).parent.parent
PUBLISHED = GPTConfig(vocab_size=50257)
TINY = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32)  # for trying the bench itself
BATCH_SIZE = 32
FAST = ROOT / "config" / "tinystories_fast.py"  # the recipe whose small steps are measured
RANK_BATCH = {"cpu": 32, "cuda": 128}  # sequences of a process in the bench of several
NURSERY_STORIES = 140_000  # 102 MB of text
# Dense bf16 TFLOP/s by the makers' data sheets.
PEAK_TFLOPS = {"H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165}
WITH_SPREADS = {"gflops_of_each", "tokens_per_s_of_each", "seconds"}  # tables, each row of which is a contender
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@exit_with_one_line
def main(argv=None):
    """Measure and print; `argv` as on the command line."""
    parser = Parser(prog="python -m tools.bench", description="Measure this program's speed on this machine.")
    parser.add_argument("subject", nargs="?", choices=["machine", *SUBJECTS],
                        help="one of them alone, or what the machine can do (default: all)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON, with every median and spread, in place of "
                                                            "tables")
    parser.add_argument("--tiny", action="store_true", help="a toy model: only to try the bench itself")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--out_dir", help="generate: also this run's validation loss in each dtype")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"argument --rounds: {args.rounds} is not 1 or more")
    if args.out_dir:
        checkpoint.best_in(args.out_dir)  # now rather than after minutes
    device = pick_device(args.device)
    compilers = ("gcc", "clang", "cc") if device.type == "cuda" else ("g++", "clang++", "c++", "cl")
    if args.subject in (None, "train") and not any(map(shutil.which, compilers)):
        raise UserError("the training bench compares with torch.compile, which needs a compiler: install one of "
                        f"{', '.join(compilers)}")

    args.shape = TINY if args.tiny else PUBLISHED
    result = {"machine": describe_machine(device), "ceilings": measure_ceilings(device, args.shape, args.rounds)}
    for subject in SUBJECTS if args.subject is None else {args.subject} & SUBJECTS.keys():
        with tempfile.TemporaryDirectory() as folder:
            result[subject] = SUBJECTS[subject](args, device, result["ceilings"], Path(folder))
    if args.json:
        return print(json.dumps(result, indent=2))
    for subject, figures in result.items():
        print_table(subject, figures)


def describe_machine(device):
    """The machine, versions and date, without which no figure means anything."""
    gpu = gpu_and_driver() if device.type == "cuda" else {}
    return {"device": train.describe(device), **gpu, "processor": processor_name(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "date": date.today().isoformat(), "git": train.git_commit()}


def gpu_and_driver():
    """Memory, driver and CUDA of the current GPU; the driver is None where nvidia-smi is not to be found."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
    driver = None
    if shutil.which(query[0]):
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() or None
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return {"gpu_memory_gib": memory / 2**30, "driver": driver, "cuda": torch.version.cuda}


def processor_name():
    """The processor's name as Linux tells it, elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_table(subject, figures):
    """One table of a subject: a figure a line, with the lowest and highest of its rounds where there are some."""
    print(f"\n{subject}")
    spreads = figures.get("spreads", {})
    for name, value in figures.items():
        if name == "spreads":
            continue
        if isinstance(value, dict):
            print(f"  {name}")
        for row, number in value.items() if isinstance(value, dict) else [(name, value)]:
            text = f"{number:,.5g}" if isinstance(number, float) else str(number)
            low, high = spreads.get(row, (0, 0)) if name in WITH_SPREADS | {row} else (0, 0)
            print(f"    {row:36}{text:>14}" + (f"   {low:,.5g} to {high:,.5g}" if high else ""))


def take_turns(contenders, rounds):
    """Run each contender (name → function) once as a warm-up, then `rounds` times in turn: name → list of seconds.

    A function may return the seconds itself, where it does more than is to be timed.
    """
    seconds = {name: [] for name in contenders}
    for round in range(rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            own = run()
            if round:
                seconds[name].append(own if isinstance(own, float) else time.perf_counter() - started)
    return seconds


def rates(amounts, seconds):
    """Medians and spreads (lowest, highest) of amounts a second: two dicts by name."""
    each = {name: amounts[name] / np.array(values) for name, values in seconds.items()}
    return ({name: float(np.median(values)) for name, values in each.items()},
            {name: (float(values.min()), float(values.max())) for name, values in each.items()})


def run_quietly(command, **options):
    """Run a script; its output is shown only where it fails, as the UserError's last line."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise UserError(f"{Path(command[1]).name} failed: {(done.stderr.splitlines() or ['no word of why'])[-1]}")


def wait_for(device):
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# ---- what the machine can do ----


def products(shape, device):
    """The matrix products to time, name → (rows, inside, columns): a large one, then those of a GPTConfig's batch."""
    C, rows = shape.n_embd, BATCH_SIZE * shape.block_size
    side = 256 if shape is TINY else 8192 if device.type == "cuda" else 4096
    return {f"{side}³": (side, side, side), "c_attn": (rows, C, 3 * C), "attn.c_proj": (rows, C, C),
            "c_fc": (rows, C, 4 * C), "mlp.c_proj": (rows, 4 * C, C), "head": (rows, C, shape.vocab_size)}


def measure_ceilings(device, shape, rounds):
    """The rates of matrix products at a GPTConfig's shapes and of reading memory; the best stand first."""
    repeats = 20 if device.type == "cuda" else 1  # one product on a GPU is over before its launch can be neglected

    def multiply(a, b):
        def run():
            for _ in range(repeats):
                F.linear(a, b)
            wait_for(device)
        return run

    def read():
        for _ in range(repeats):
            block.sum()
        wait_for(device)

    contenders, flops = {}, {}
    for dtype in ("fp32", "bf16"):
        for name, (m, k, n) in products(shape, device).items():
            kind = torch.float32 if dtype == "fp32" else torch.bfloat16
            a, b = (torch.randn(shape, device=device, dtype=kind) for shape in ((m, k), (n, k)))
            contenders[f"{dtype} {name}"] = multiply(a, b)
            flops[f"{dtype} {name}"] = repeats * 2 * m * k * n / 1e9
    block = torch.ones(2**20 if shape is TINY else 2**28, device=device)  # 1 GiB: no cache holds it
    contenders["read"], flops["read"] = read, repeats * 4 * block.numel() / 1e9
    medians, spreads = rates(flops, take_turns(contenders, rounds))
    best = {dtype: max(rate for name, rate in medians.items() if name.startswith(dtype)) for dtype in ("fp32", "bf16")}
    return {"matmul_fp32_gflops": best["fp32"], "matmul_bf16_gflops": best["bf16"],
            "read_gb_per_s": medians.pop("read"), "gflops_of_each": medians,
            "spreads": spreads | {"read_gb_per_s": spreads["read"]}}


# ---- training ----


def torchs_dropout():
    """Put torch's dropout in the place of this project's."""
    model_py.Dropout = nn.Dropout


def torchs_attention():
    """Put torch's fused attention in the place of the one written out for training on a CPU."""
    model_py.attend = lambda q, k, v, dropout: F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                                              dropout_p=dropout.p)


def whole_head():
    """Put all logits at once, and torch's cross-entropy of them, in the place of the head's loss in parts."""
    train.head_loss = lambda x, weight, targets: (F.cross_entropy(F.linear(x, weight), targets), None)
    GPT.head_loss = staticmethod(train.head_loss)


# name → the pieces to take away, and flags for train.py; None: the plain loop, in bf16 and compiled, or not
CONTENDERS = {
    "plain": ([torchs_dropout, torchs_attention, whole_head], None),
    "plain, bf16, compiled": ([torchs_dropout, torchs_attention, whole_head], None),
    "this project": ([], []),
    "… compiled": ([], ["--compile=True"]),
    "… eager": ([], ["--compile=False"]),
    "… in float32": ([], ["--dtype=float32"]),
    "… dropout 0": ([], ["--dropout=0"]),
    "… with torch's dropout": ([torchs_dropout], []),
    "… with torch's attention": ([torchs_attention], []),
    "… with all logits at once": ([whole_head], ["--device_batch_size=32"]),  # of a whole step they fill a GPU
}
# The same for small steps, at FAST's settings.
SMALL_CONTENDERS = {
    "compiled": ([], ["--compile=True"]),
    "eager": ([], ["--compile=False"]),
    "eager, AdamW alone": ([], ["--compile=False", "--optimizer=adamw", "--learning_rate=1e-3"]),
}


@dataclass(frozen=True)
class Training:
    """The training that is measured: the published steps, or the small ones of config/tinystories_fast.py."""

    folder: str  # which has data/bench
    device: str
    shape: GPTConfig
    small: bool = False

    @property
    def on_gpu(self):
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def accumulation(self):
        """Micro-batches in a published step: all 32 on a GPU, but one on a CPU, which takes a minute for 32."""
        return 32 if self.on_gpu else 1

    @property
    def steps(self):
        """Optimizer steps in a turn."""
        return (20 if self.on_gpu else 2) if self.small else 1

    @property
    def tokens(self):
        """Tokens in a turn."""
        return self.steps * self.shape.block_size * (
            read_recipe(FAST)["batch_size"] if self.small else BATCH_SIZE * self.accumulation)

    def flags(self):
        """The command line of train.py for it."""
        shape = [f"--{name}={getattr(self.shape, name)}" for name in ("n_layer", "n_head", "n_embd", "block_size")]
        recipe = [str(FAST)] if self.small else [f"--gradient_accumulation_steps={self.accumulation}", "--min_lr=1e-5"]
        return [*recipe, *shape, "--dataset=bench", f"--device={self.device}", "--max_iters=1000000",
                "--eval_interval=1000000", "--checkpoint_minutes=1e9", f"--log_interval={self.steps}"]


def bench_train(args, device, ceilings, folder):
    """The project's own update next to a plain loop's, and with each of its pieces changed or taken away."""
    training = Training(str(folder), str(device), args.shape)
    on_gpu = training.on_gpu
    write_random_dataset(folder / "data" / "bench", args.shape)
    same = "… compiled" if on_gpu else "… eager"  # what auto picks, so the project itself again
    names = [name for name in CONTENDERS if name != same and not (on_gpu and "torch's" in name)]  # a GPU's always are
    names = names[:3] if args.tiny else names
    # All in turn on a CPU. A GPU has not the memory for all, and is less noisy: there the first three, then each alone.
    alone = [[name] for name in names[3:]] if on_gpu else []
    seconds, peaks, starts = {}, {}, {}
    for group in [names[:3] if on_gpu else names, *alone]:
        seconds |= race(group, training, args.rounds, peaks, starts)
    medians, spreads = rates(dict.fromkeys(names, training.tokens), seconds)

    own, plain, compiled = (medians[name] for name in ("this project", "plain", "plain, bf16, compiled"))
    return {"baseline_tokens_per_s": plain, "baseline_bf16_compiled_tokens_per_s": compiled, "tokens_per_s": own,
            "times_baseline": own / plain, "times_baseline_bf16_compiled": own / compiled,
            **utilisation(own, args.shape, device, ceilings),
            "baseline_peak_mb": peaks["plain"], "peak_mb": peaks["this project"], "tokens_an_update": training.tokens,
            "tokens_per_s_of_each": medians, "peak_mb_of_each": peaks, "first_update_s_of_each": starts,
            "spreads": spreads}


def bench_small(args, device, ceilings, folder):
    """The small steps of config/tinystories_fast.py, where launching and the optimizers count more than products."""
    training = Training(str(folder), str(device), args.shape, small=True)
    write_random_dataset(folder / "data" / "bench", args.shape)
    names = [name for name in SMALL_CONTENDERS if training.on_gpu or name != "compiled"]
    peaks, starts = {}, {}
    medians, spreads = rates(dict.fromkeys(names, training.tokens), race(names, training, args.rounds, peaks, starts))
    own = medians[names[0]]
    return {"of": names[0], "tokens_per_s": own, "ms_a_step": 1000 * training.tokens / training.steps / own,
            "tokens_a_step": training.tokens // training.steps, **utilisation(own, args.shape, device, ceilings),
            "tokens_per_s_of_each": medians, "peak_mb_of_each": peaks, "first_turn_s_of_each": starts,
            "spreads": spreads}


def utilisation(tokens_per_s, shape, device, ceilings):
    """Model FLOP/s utilisation (MFU) of training: over a known GPU's data sheet, and over the best product measured."""
    flops = tokens_per_s * (6 * shape.num_parameters() + 12 * shape.n_layer * shape.block_size * shape.n_embd)
    measured = max(ceilings["matmul_bf16_gflops"], ceilings["matmul_fp32_gflops"]) * 1e9  # bf16 is slow on some CPUs
    peak = data_sheet_peak(device) or measured
    return {"mfu": flops / peak, "mfu_of_tflops": peak / 1e12, "mfu_of_measured": flops / measured}


def race(names, training, rounds, peaks, starts):
    """Let contenders take turns, an update each; their seconds. Into `peaks` and `starts` go memory and first updates.

    Raises UserError where one dies.
    """
    context = multiprocessing.get_context("spawn")
    pipes, children = {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        children.append(context.Process(target=contend, args=(theirs, name, training), daemon=True))
        children[-1].start()
        theirs.close()

    def turn(name):
        try:
            pipes[name].send("go")
            seconds, peaks[name] = pipes[name].recv()
        except (EOFError, OSError) as error:
            raise UserError(f"the contender '{name}' died; what it died of stands above") from error
        starts.setdefault(name, seconds)
        return seconds

    try:
        return take_turns({name: functools.partial(turn, name) for name in names}, rounds)
    finally:
        for pipe in pipes.values():
            pipe.close()
        for child in children:
            child.join(10)
            child.kill()


def contend(pipe, name, training):
    """A contender's process: a turn for each message of the pipe; sends its seconds and the peak of memory back."""
    os.chdir(training.folder)
    sys.stdout = open(os.devnull, "w")
    pieces, flags = (SMALL_CONTENDERS if training.small else CONTENDERS)[name]
    for take_away in pieces:
        take_away()
    if training.shape == TINY:  # turning its graphs into C++ would take half a minute
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    device = torch.device(training.device)
    started = None

    def turn():
        nonlocal started
        if started is not None:
            wait_for(device)
            pipe.send((time.perf_counter() - started, peak_mb(device)))
        try:
            pipe.recv()
        except EOFError:  # the parent has had enough
            sys.exit()
        started = time.perf_counter()

    turn()
    if flags is None:
        return plain_loop(training, device, "compiled" in name, turn)
    # train.py's own loop: its log line, one in so many steps (and one of the first), is where a turn ends.
    files.append_line = lambda path, record: (
        turn() if record["kind"] == "step" and record["update"] % training.steps == 0 else None)
    train.main([*training.flags(), f"--out_dir=out/{os.getpid()}", *flags])


def peak_mb(device):
    """The most memory this process has held, in MB: on the GPU, or altogether."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:  # getrusage on Linux would give the parent's, where that is higher
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource  # not on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


def plain_loop(training, device, compiled, turn):
    """What a straightforward script does: the same model of torch's own layers, one micro-batch at a time.

    On a GPU with all that nanoGPT does there: bf16, TF32, fused AdamW, a vocabulary padded to a multiple of 64, and the
    next micro-batch on its way while the device computes.
    """
    torch.manual_seed(0)
    on_gpu, shape = training.on_gpu, training.shape
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    model = GPT(replace(shape, vocab_size=64 * math.ceil(shape.vocab_size / 64)) if on_gpu else shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu)
    step = torch.compile(model) if compiled else model

    def fetch():
        tokens = torch.randint(shape.vocab_size, (2, BATCH_SIZE, shape.block_size))
        return tokens.pin_memory().to(device, non_blocking=True) if on_gpu else tokens

    x, y = fetch()
    while True:
        for _ in range(training.accumulation):
            with torch.autocast(device.type, torch.bfloat16, enabled=compiled or on_gpu):
                loss = step(x, y) / training.accumulation
            x, y = fetch()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turn()


def data_sheet_peak(device):
    """Dense bf16 FLOP/s of a GPU by its maker's data sheet; None for another one, and for a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def write_random_dataset(folder, shape):
    """A dataset of random tokens, with a tokenizer of a GPTConfig's size whose tokens are any pairs of bytes."""
    folder.mkdir(parents=True)
    size = shape.vocab_size
    ranks = {bytes([i]) if i < 256 else bytes(divmod(i, 256)): i for i in range(size - 1)}
    tokenizer = Tokenizer(tiktoken.Encoding("bench", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                            special_tokens={END_OF_TEXT: size - 1}))
    tokenizer.save(folder)
    splits = {}
    for split, count in (("train", 4_000_000), ("validation", 100_000)):
        tokens = np.random.default_rng(0).integers(size, size=count, dtype=np.uint16)
        tokens.tofile(folder / f"{split}.bin")
        splits[split] = {"stories": 1, "tokens": count, "bytes": 4 * count,
                         "sha256": hashlib.sha256(tokens).hexdigest()}
    meta = {"vocab_size": size, "end_of_text": size - 1, "dtype": "uint16", "splits": splits,
            "tokenizer": tokenizer.describe()}
    (folder / "meta.json").write_text(json.dumps(seal(meta)))


# ---- generation ----


def bench_generate(args, device, ceilings, folder):
    """Stories by one, by 32 and on a GPU by 512, with and without the cache, in each dtype; and the first token."""
    torch.manual_seed(0)
    net = GPT(args.shape).eval()
    counts = (1, 32, 512) if device.type == "cuda" else (1, 32)
    picked = {stories: str(pick_weights("auto", device, stories)).removeprefix("torch.") for stories in counts}
    dtypes = sorted({"float32", "bfloat16", picked[32]})  # an older GPU's is float16
    models = {dtype: copy.deepcopy(net).to(device, getattr(torch, dtype)) for dtype in dtypes}
    if device.type == "cpu":
        models["int8"] = copy.deepcopy(net).to_int8()
    block_size = args.shape.block_size
    story = 2 * block_size  # a usual length, and the window moves on the way
    lengths = [n - window_start(n, block_size) for n in range(block_size // 8, story, block_size // 4)]
    contenders, amounts = {}, {}
    for dtype, model in models.items():
        for stories in counts:
            idx = torch.zeros(stories, 1, dtype=torch.long, device=device)
            contenders[f"{dtype} {stories}"] = functools.partial(with_cache, model, idx, story)
            contenders[f"{dtype} {stories} no cache"] = functools.partial(without_cache, model, idx, lengths)
            amounts[f"{dtype} {stories}"] = stories * story
            amounts[f"{dtype} {stories} no cache"] = stories * len(lengths)
    medians, spreads = rates(amounts, take_turns(contenders, args.rounds))

    weights = net.num_parameters() * BYTES[picked[1]]
    result = {f"dtype_{stories}": dtype for stories, dtype in picked.items()}
    for stories, dtype in picked.items():
        result[f"tokens_per_s_{stories}"] = medians[f"{dtype} {stories}"]
        result[f"no_cache_tokens_per_s_{stories}"] = medians[f"{dtype} {stories} no cache"]
    result |= {"bandwidth_fraction_1": result["tokens_per_s_1"] * weights / 1e9 / ceilings["read_gb_per_s"],
               "int8_tokens_per_s_1": medians.get("int8 1"),
               "first_token_s": first_token_seconds(net, device, folder, args.rounds),
               "tokens_per_s_of_each": medians, "spreads": spreads}
    if args.out_dir:
        result["validation_loss"] = losses_by_dtype(args.out_dir, device)
    return result


def with_cache(model, idx, story):
    """Tell whole stories, of so many tokens."""
    for _ in model.generate(idx, story, temperature=0.8, top_k=200):
        pass
    wait_for(idx.device)


@torch.inference_mode()
def without_cache(model, idx, lengths):
    """Tell one token at some lengths of the window, all of which is read for it, the head on the last alone."""
    weight = model.transformer.wte.weight
    for length in lengths:
        cache = KVCache(model.config, len(idx), idx.device, weight.dtype)  # empty: nothing is taken from it
        logits = model(idx.expand(-1, length), cache=cache)[:, -1]  # (B, V)
        choose_token(logits, 0.8, 200, 1.0, None)
    wait_for(idx.device)


def first_token_seconds(model, device, folder, rounds):
    """From the command to the end of a story of one token, in a process of its own: the median."""
    write_random_dataset(folder / "run", model.config)
    checkpoint.save(folder / "run" / "ckpt.pt", {"model": model.state_dict(), "model_config": asdict(model.config),
                                                 "data_sha256": checkpoint.data_sha256(read_meta(folder / "run")),
                                                 "config": {}, "tokens": 0, "figures": {}})
    command = [sys.executable, ROOT / "sample.py", "--out_dir", folder / "run", "--start", "Once upon a time",
               "--max_new_tokens", "1", "--device", str(device)]
    runs = take_turns({"first": lambda: run_quietly(command)}, rounds)
    return float(np.median(runs["first"]))


@torch.inference_mode()
def losses_by_dtype(out_dir, device, count=64):
    """The loss of a run, in nats a token, over 64 windows of its validation split, with weights in each dtype."""
    losses = {}
    for dtype in ("float32", "bfloat16", "int8") if device.type == "cpu" else ("float32", "bfloat16"):
        model, _, state = checkpoint.load_model(checkpoint.best_in(out_dir))
        model = model.to_int8() if dtype == "int8" else model.to(device, getattr(torch, dtype))
        split = Split(Path("data", state["config"]["dataset"]), "validation", model.config.block_size)
        x, y = (torch.from_numpy(tokens).to(device) for tokens in split.windows(evaluation_windows(split, count)))
        each = [F.cross_entropy(model(a[None])[0].float(), b) for a, b in zip(x, y)]
        losses[dtype] = torch.stack(each).mean().item()
    return losses


# ---- preparation ----


def bench_prepare(args, device, ceilings, folder):
    """The whole of prepare.py on 100 MB of nursery stories, and the tokenizer alone on a part, in one thread."""
    path, stories = folder / "nursery.txt", []
    with open(path, "w", encoding="utf-8") as file:
        for story in nursery.stories(1500 if args.tiny else NURSERY_STORIES, seed=1):
            file.write(f"{story}\n{END_OF_TEXT}\n")
            stories.append(story)
    whole = sum(len(story.encode()) for story in stories) / 1e6
    try:
        name, tokenizer = "gpt2", Tokenizer.named("gpt2")
    except UserError:  # no network; a vocabulary trained here takes its training's time too
        name, tokenizer = "bpe:4096", Tokenizer.train(stories[:20_000], 4096)
    batches = [stories[i:i + 1000] for i in range(0, min(len(stories), 20_000), 1000)]
    part = sum(len(story.encode()) for batch in batches for story in batch) / 1e6
    command = [sys.executable, ROOT / "prepare.py", path, "--tokenizer", name, "--force"]
    medians, spreads = rates({"mb_per_s": whole, "tokenizer_mb_per_s": part}, take_turns({
        "mb_per_s": lambda: run_quietly(command, cwd=folder),
        "tokenizer_mb_per_s": lambda: [tokenizer.encode_stories(batch) for batch in batches]}, args.rounds))
    return {"tokenizer": name, "mb_of_text": whole, **medians, "spreads": spreads}


# ---- several processes ----

def bench_ranks(args, device, ceilings, folder):
    """An update on every GPU, or on two processes of a CPU: what the exchange of gradients costs, ours and torch's."""
    count = torch.cuda.device_count() if device.type == "cuda" else 2
    if count < 2:
        return {"processes": "one GPU: nothing to exchange"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    processes = [context.Process(target=rank_seconds, daemon=True, args=(
        rank, count, port, device.type, args.shape, args.rounds, None if rank else theirs))
                 for rank in range(count)]
    for process in processes:
        process.start()
    theirs.close()
    try:
        seconds = mine.recv()
    except EOFError as error:
        raise UserError("bench ranks: a process failed; see above") from error
    finally:
        for process in processes:
            process.join()
    medians, spreads = rates(dict.fromkeys(seconds, 1), seconds)
    megabytes = 4 * args.shape.num_parameters() / 1e6
    weights = torch.zeros(3, args.shape.num_parameters())  # and AdamW's two means
    saves = take_turns({"save": lambda: checkpoint.save(folder / "last.pt", {"model": weights})}, args.rounds)["save"]
    return {"processes": count, "sequences_of_each": RANK_BATCH[device.type], "exchanged_mb": megabytes,
            "seconds": {name: 1 / rate for name, rate in medians.items()},
            "saved_mb": 3 * megabytes, "save_seconds": float(np.median(saves)),
            "spreads": {name: (1 / high, 1 / low) for name, (low, high) in spreads.items()}}


def rank_seconds(rank, ranks, port, kind, shape, rounds, pipe):
    """What one process of `bench_ranks` does with a model of that shape; rank 0 sends name → list of seconds."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    join()
    device = pick_device(kind)
    if kind == "cpu":
        torch.set_num_threads(max(1, os.cpu_count() // ranks))
    model = GPT(shape).to(device)
    theirs = DistributedDataParallel(GPT(shape).to(device), gradient_as_bucket_view=True)
    idx = torch.randint(shape.vocab_size, (2, RANK_BATCH[kind], shape.block_size), device=device)

    def update(model):
        with torch.autocast(kind, torch.bfloat16):
            loss = model(idx[0], idx[1])
        loss.backward()

    def timed(work):
        def run():
            for p in [*model.parameters(), *theirs.parameters()]:
                p.grad = None
            agree(False, 0.0)  # all begin together
            return work()
        return run

    def exchange():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        wait_for(device)
        started = time.perf_counter()
        add_up_gradients(model.parameters())
        wait_for(device)
        return time.perf_counter() - started

    def whole(model, and_then=lambda: None):
        started = time.perf_counter()
        update(model)
        and_then()
        wait_for(device)
        return time.perf_counter() - started

    seconds = take_turns({
        "the exchange alone": timed(exchange),
        "an update without exchange": timed(lambda: whole(model)),
        "… with one exchange": timed(lambda: whole(model, lambda: add_up_gradients(model.parameters()))),
        "… with DistributedDataParallel": timed(lambda: whole(theirs)),
    }, rounds)
    if pipe:
        pipe.send(seconds)
    leave()


# ---- where the time goes ----

def bench_profile(args, device, ceilings, folder):
    """The most expensive kernels (on a CPU operations) of a published step, of a small one and of a story."""
    write_random_dataset(folder / "data" / "bench", args.shape)
    result = {}
    for name, small in (("published step", False), ("small step", True)):
        training = Training(str(folder), str(device), args.shape, small)
        result |= most_expensive(name, device, *profile_training(training, name.replace(" ", "_")))
    model = GPT(args.shape).eval().to(device, pick_dtype("auto", device))
    idx = torch.zeros(1, 1, dtype=torch.long, device=device)
    with_cache(model, idx, args.shape.block_size)
    with torch.profiler.profile() as profiler:
        started = time.perf_counter()
        with_cache(model, idx, args.shape.block_size)
        seconds = time.perf_counter() - started
    return result | most_expensive("one story", device, profiler, seconds)


def profile_training(training, name):
    """(profiler, seconds) of some optimizer steps of train.py, compiled on a GPU, after some others."""
    warm, active = 8, 20 if training.small else 4
    compiled = training.on_gpu and training.shape != TINY
    profiler = torch.profiler.profile(schedule=torch.profiler.schedule(wait=warm - 2, warmup=2, active=active))
    done, began, seconds = 0, 0.0, 0.0

    def after_step(optimizer, args, kwargs):  # AdamW's is the first or the only one of a training step
        nonlocal done, began, seconds
        if not isinstance(optimizer, torch.optim.AdamW):
            return
        done += 1
        if done in (warm, warm + active):
            wait_for(torch.device(training.device))  # the seconds are those of the work, not of its launches
        if done == warm + active:
            seconds = time.perf_counter() - began
        profiler.step()
        if done == warm:  # behind the profiler's own start
            began = time.perf_counter()

    hook = register_optimizer_step_post_hook(after_step)
    stdout = sys.stdout
    try:
        with chdir(training.folder), profiler, open(os.devnull, "w") as sys.stdout:
            train.main([*training.flags(), f"--out_dir=out/{name}", "--log_interval=1000000", "--eval_iters=1",
                        f"--max_iters={(warm + active + 1) * (1 if training.small else training.accumulation)}",
                        "--warmup_iters=0", f"--compile={compiled}"])
    finally:
        sys.stdout = stdout
        hook.remove()
    return profiler, seconds


def most_expensive(name, device, profiler, seconds, count=10):
    """Figures of a profile: its kernels that take longest (name → share of all their time), and the idle share.

    A GPU is idle while no kernel runs; profiling itself adds to that. A CPU has operations for kernels, and no idle
    share. Raises UserError where the profiler saw nothing of a GPU.
    """
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA
               and not event.is_user_annotation]
    times = collections.Counter()
    for event in kernels:
        times[event.name] += event.time_range.elapsed_us()
    if device.type == "cuda" and not kernels:
        raise UserError("torch.profiler saw no kernels: CUDA's profiling library (CUPTI) does not work here")
    if not kernels:
        times.update({row.key: row.self_cpu_time_total for row in profiler.key_averages()
                      if not row.key.startswith("ProfilerStep")})
    busy = end = 0.0
    for span in sorted((event.time_range for event in kernels), key=lambda span: span.start):
        busy += max(0.0, span.end - max(end, span.start))
        end = max(end, span.end)
    whole = sum(times.values())
    return {f"{name}: share of the kernels' time": {key: us / whole for key, us in times.most_common(count)},
            f"{name}: milliseconds profiled": 1000 * seconds,
            f"{name}: idle": 1 - busy / 1e6 / seconds if kernels else None}


SUBJECTS = {"train": bench_train, "small": bench_small, "generate": bench_generate, "profile": bench_profile,
            "prepare": bench_prepare, "ranks": bench_ranks}

if __name__ == "__main__":
    main()
