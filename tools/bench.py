"""Measure this program's speed on this machine, against a plain training loop and the hardware's limits.

    python -m tools.bench                              every subject but the race, a few minutes each
    python -m tools.bench train --json                 one subject, as JSON
    python -m tools.bench race config/speedrun.py      the speedrun and its first record (docs/speedrun.md)

Timings are noisy, so the variants of a subject run interleaved, and ratios are more reliable than absolute numbers.
Each training variant runs in its own process, which also gives its own peak memory.
"""

import storygpt  # noqa: F401, I001  (first: it prepares the process for importing torch)

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
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import storygpt.generate as generation
import train
from model import GPT, GPTConfig
from sample import number
from storygpt import checkpoint, fast
from storygpt import loss as loss_module
from storygpt.corpus import nursery
from storygpt.corpus.dataset import Split, data_sha256, evaluation_windows, read_meta, with_checksum
from storygpt.corpus.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer
from storygpt.evaluate import window_losses
from storygpt.generate import generate, prepare_for_generation
from storygpt.run import best_checkpoint
from storygpt.settings import Config, read_config_file
from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line
from storygpt.system.hardware import describe_device, git_commit, pick_device, pick_inference_dtype
from tools import peers

ROOT = Path(__file__).parent.parent
PUBLISHED = GPTConfig(vocab_size=50257)
VOCABULARY_PER_USED_TOKEN = 4  # training data uses a quarter of it, as 8 million tokens of TinyStories do of GPT-2's
TINY = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32)  # for --tiny
BATCH_SIZE = 32
# Dense bf16 TFLOP/s from the vendors' data sheets.
PEAK_TFLOPS = {"H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165}
START_METHOD = "spawn"  # of processes


@exit_with_one_line
def main(argv=None):
    """Measure one subject or all of them and print the results; `argv` as on the command line."""
    args = parse_args(argv)
    results = {"machine": describe_machine(args.device)}
    if args.subject in (None, "machine", "train"):
        results["ceilings"] = measure_ceilings(args.device, args.config, args.rounds)
    try:
        for subject in args.subjects:
            with tempfile.TemporaryDirectory() as folder:
                results[subject] = SUBJECTS[subject](args, results.get("ceilings"), Path(folder))
    finally:  # also what was measured before an error or Ctrl-C
        if args.json:
            print(json.dumps(results, indent=2))
        else:
            print_tables(results)


def parse_args(argv):
    """The command line as a namespace, with the `subjects` and the GPTConfig `config` to measure."""
    parser = Parser(prog="python -m tools.bench", description="Measure this program's speed on this machine.")
    parser.add_argument("subject", nargs="?", choices=["machine", *SUBJECTS], help="what to measure; machine: only the "
                        "hardware's limits (default: everything but the race)")
    parser.add_argument("race_config", nargs="?", metavar="CONFIG", help="race: a config file, or COMMIT:CONFIG for "
                        "the config and the program of a commit")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON, not tables")
    parser.add_argument("--tiny", action="store_true", help="a toy model: only to try the benchmark itself")
    parser.add_argument("--rounds", type=number(int, 1, 1000, "from 1 to 1000"),
                        help="measurements of each variant (default: 3); race: seeds of the config (default: 5)")
    parser.add_argument("--out_dir", help="generate: measure with this run, and also its validation loss in each dtype")
    args = parser.parse_args(argv)
    if (args.subject == "race") != bool(args.race_config):
        parser.error("race needs a config, such as config/speedrun.py, and the other subjects take none")
    args.rounds = args.rounds or (5 if args.subject == "race" else 3)
    args.subjects = [name for name in SUBJECTS if name == (args.subject or name) and (args.subject or name != "race")]
    args.device, args.config = pick_device(args.device), TINY if args.tiny else PUBLISHED
    return args


def describe_machine(device):
    """The hardware, the versions and the date of a measurement, as a dict."""
    gpu = {}
    if device.type == "cuda":
        gpu = {"gpu_memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30,
               "cuda": torch.version.cuda}
    cpuinfo = Path("/proc/cpuinfo")
    model_name = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.M)
    return {"device": describe_device(device), **gpu,
            "processor": model_name[1] if model_name else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "date": date.today().isoformat(), "git": git_commit()}


def print_tables(results, indent=0):
    """Print nested dicts: one value per line, a pair as `lowest to highest`."""
    for key, value in results.items():
        if isinstance(value, dict):
            print(f"{'':{indent}}{key}")
            print_tables(value, indent + 2)
        else:
            values = value if isinstance(value, (tuple, list)) else (value,)
            text = " to ".join(f"{each:,.5g}" if isinstance(each, float) else str(each) for each in values)
            print(f"{'':{indent}}{key:40}{text:>14}")


# ---- timing ----


def interleave(variants, rounds):
    """Call each variant (name → function) once as warm-up, then once in each round: name → all that it returned."""
    results = {name: [] for name in variants}
    for _ in range(1 + rounds):
        for name, run in variants.items():
            results[name].append(run())
    return results


def measure_rates(variants, rounds):
    """Medians and spreads of amount / seconds of variants, name → (amount, function, *args), interleaved."""
    seconds = interleave({name: partial(time_call, *call) for name, (_, *call) in variants.items()}, rounds)
    return medians_and_spreads({name: [amount / each for each in seconds[name][1:]]
                                for name, (amount, *_) in variants.items()})


def time_call(function, *args):
    """The seconds that a call takes."""
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


def medians_and_spreads(values):
    """Of lists of numbers, by name: their medians and their (lowest, highest), two dicts."""
    return ({name: float(np.median(numbers)) for name, numbers in values.items()},
            {name: (min(numbers), max(numbers)) for name, numbers in values.items()})


def interleave_processes(jobs, device, rounds):
    """`interleave` of jobs, name → (function, *args), each in its own process: name → all (seconds, peak MB).

    The function is called once, with `end_round` and the args: it calls end_round() after each round, without end.
    """
    context, pipes, processes = multiprocessing.get_context(START_METHOD), {}, []
    try:
        for name, job in jobs.items():
            pipes[name], child_pipe = context.Pipe()
            processes.append(context.Process(target=run_job, args=(child_pipe, device, *job), daemon=True))
            processes[-1].start()
            child_pipe.close()
        return interleave({name: partial(ask_for_round, name, pipe) for name, pipe in pipes.items()}, rounds)
    finally:
        for pipe, process in zip(pipes.values(), processes):
            pipe.close()  # which ends the process
            process.join()


def ask_for_round(name, pipe):
    """The (seconds, peak MB) of the next round of a process. Raises UserError if the process has failed."""
    try:
        pipe.send("go")
        return pipe.recv()
    except (EOFError, OSError) as error:
        raise UserError(f"the process of '{name}' failed: its error message is above") from error


def run_job(pipe, device, function, *args):
    """A child process of `interleave_processes`."""
    rounds = report_rounds(pipe, device)
    next(rounds)
    function(partial(next, rounds), *args)


def report_rounds(pipe, device):
    """A generator: each next() ends a round, sends its (seconds, peak MB) and waits until the parent starts another.

    The first next() only starts. Exits the process once the parent has closed the pipe.
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


def synchronize(device):
    """Wait until a GPU has finished all work submitted to it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_mb(device):
    """This process's peak memory in MB: on the GPU, or its resident set on a CPU with Linux."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024 / 1e6 if status.exists() else math.nan


def run_script(command, **options):
    """Run a script silently; returns what it printed. Raises UserError with the last line of its stderr if it fails."""
    done = subprocess.run(command, capture_output=True, encoding="utf-8", **options)
    if done.returncode:
        raise UserError(f"{Path(command[1]).name} failed: {(done.stderr.splitlines() or ['no error message'])[-1]}")
    return done.stdout


# ---- hardware limits ----


def measure_ceilings(device, config, rounds):
    """Roofline ceilings of the device: GFLOP/s of large matrix products and GB/s of memory reads."""
    side = 256 if config is TINY else 8192 if device.type == "cuda" else 4096
    count = 20 if device.type == "cuda" else 1  # on a GPU, one product is too short compared with its launch
    block = torch.ones(2**20 if config is TINY else 2**28, device=device)  # 1 GiB, larger than any cache
    variants = {"read_gb_per_s": (count * 4 * block.numel() / 1e9, repeat, count, device, torch.sum, block)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(side, side, device=device, dtype=dtype)
        variants[f"matmul_{name}_gflops"] = count * 2 * side**3 / 1e9, repeat, count, device, torch.mm, a, a.T
    medians, spreads = measure_rates(variants, rounds)
    return {**medians, "spreads": spreads}


def repeat(count, device, function, *args):
    """Call a function `count` times and wait for the device."""
    for _ in range(count):
        function(*args)
    synchronize(device)


# ---- training ----


def bench_train(args, ceilings, folder):
    """Training speed at the published shape: this project, two baselines, and this project with parts replaced."""
    device, config, on_gpu = args.device, args.config, args.device.type == "cuda"
    write_random_dataset(folder / "data" / "bench", config)
    accumulation = 32 if on_gpu else 1  # micro-batches in a step; on a CPU, the published 32 would take a minute
    # What is the same as "this project" on this device is not measured again.
    same = {"compiled", "torch's dropout", "torch's attention"} if on_gpu else {"eager"}
    names = [name for name in VARIANTS if name not in same][:3 if args.tiny else None]
    # A GPU has too little memory for all variants at once, and is less noisy: there only the first three interleave.
    groups, answers = [names[:3], *([name] for name in names[3:])] if on_gpu else [names], {}
    for group in groups:
        jobs = {name: (run_variant, name, folder, device, config, accumulation) for name in group}
        answers |= interleave_processes(jobs, device, args.rounds)
    tokens_per_step = BATCH_SIZE * accumulation * config.block_size
    rates, spreads = medians_and_spreads(
        {name: [tokens_per_step / seconds for seconds, _ in values[1:]] for name, values in answers.items()})
    own = rates["this project"]
    return {"tokens_per_s": own, **flops_utilization(own, device, config, ceilings), "tokens_per_step": tokens_per_step,
            "times_each": {name: own / rate for name, rate in rates.items()}, "tokens_per_s_of_each": rates,
            "peak_mb_of_each": {name: values[-1][1] for name, values in answers.items()},
            "first_step_s_of_each": {name: values[0][0] for name, values in answers.items()}, "spreads": spreads}


def flops_utilization(tokens_per_s, device, config, ceilings):
    """Model FLOP/s utilization (MFU; Chowdhery et al. 2022, arXiv 2204.02311) of training.

    `mfu` is relative to the data sheet of a GPU in PEAK_TFLOPS, `mfu_of_measured` to the fastest product measured. Of
    the vocabulary, only the tokens of the data are counted.
    """
    with torch.device("meta"):  # without memory for the parameters
        model = GPT(replace(config, vocab_size=config.vocab_size // VOCABULARY_PER_USED_TOKEN))
    flops = tokens_per_s * (6 * model.num_parameters() + 12 * config.n_layer * config.block_size * config.n_embd)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    measured = max(ceilings["matmul_bf16_gflops"], ceilings["matmul_fp32_gflops"]) * 1e9  # bf16 is slow on some CPUs
    peak = next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", gpu)), measured)
    return {"mfu": flops / peak, "mfu_of_tflops": peak / 1e12, "mfu_of_measured": flops / measured}


def run_variant(end_round, name, folder, *workload):
    """A job of `interleave_processes`: train as one of VARIANTS, an optimizer step in each round."""
    os.chdir(folder)
    sys.stdout = open(os.devnull, "w")
    function, *args = VARIANTS[name]
    function(end_round, *workload, *args)


def train_plainly(end_round, device, config, accumulation, compiled=False):
    """Train as a plain script does, with torch's own functions, one micro-batch at a time.

    On a GPU it does what nanoGPT does: bf16, TF32, fused AdamW, the vocabulary padded to a multiple of 64.
    """
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    padded = replace(config, vocab_size=64 * math.ceil(config.vocab_size / 64))
    model = GPT(padded if on_gpu else config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu)
    backend = "aot_eager" if config == TINY else "inductor"  # the latter takes half a minute to compile
    step_model = torch.compile(model, backend=backend) if compiled else model
    while True:
        for _ in range(accumulation):
            x, y = torch.randint(config.vocab_size, (2, BATCH_SIZE, config.block_size), device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=compiled or on_gpu):
                loss = step_model(x, y) / accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end_round()


def train_project(end_round, device, config, accumulation, flags=(), *patches):
    """Train with train.py and further flags; a patch is (owner, attribute, replacement)."""
    for replacement in patches:
        setattr(*replacement)
    # Instead of writing to its log, train.py ends a round after each step; it saves nothing.
    files.append_line = lambda path, record: end_round() if record["kind"] == "step" else None
    train.save_last = train.check_saved_model = lambda *_: None
    train.main([*(f"--{name}={getattr(config, name)}" for name in ("n_layer", "n_head", "n_embd", "block_size")),
                "--dataset=bench", f"--out_dir=out/{os.getpid()}", f"--device={device}", "--min_lr=1e-5",
                f"--gradient_accumulation_steps={accumulation}", "--log_interval=1", "--max_iters=1000000",
                "--eval_interval=1000000", "--checkpoint_minutes=1e9", *flags])


def unfused_loss(x, weight, targets, last_row_tokens=1, dtype=None):
    """`fused_linear_cross_entropy` by two of torch's functions, which make all logits; without its second result.

    No target is the last row if that stands for several tokens, as these do not occur.
    """
    bias = F.pad(weight.new_zeros(len(weight) - 1), (0, 1), value=math.log(last_row_tokens))  # (V)
    return F.cross_entropy(F.linear(x, weight, bias), targets, ignore_index=loss_module.IGNORED_TARGET), None


# name → the function that trains, and its last arguments. Patches replace something faster of this project by torch's.
VARIANTS = {
    "baseline": (train_plainly,),
    "baseline, bf16, compiled": (train_plainly, True),
    "this project": (train_project,),
    "compiled": (train_project, ["--compile=True"]),
    "eager": (train_project, ["--compile=False"]),
    "float32": (train_project, ["--dtype=float32"]),
    "dropout 0": (train_project, ["--dropout=0"]),
    "torch's dropout": (train_project, [], (fast, "dropout", fast.torch_dropout)),
    "torch's attention": (train_project, [], (fast, "attention", fast.torch_attention)),
    "whole vocabulary": (train_project, [], (train, "fuse_loss", lambda model, *_, **__: loss_module.fuse_loss(model))),
    "unfused loss": (train_project, ["--device_batch_size=32"],  # the logits of a whole step would fill a GPU
                     (loss_module, "fused_linear_cross_entropy", unfused_loss)),
}


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


# ---- generation ----


def bench_generate(args, ceilings, folder):
    """Generation speed with 1, 32 and 512 concurrent stories by dtype, with and without the KV cache, and that of other
    programs; of a run also its loss in nats/token over 64 windows of its validation split, by dtype.
    """
    path = best_checkpoint(args.out_dir) if args.out_dir else write_random_run(folder / "run", args.config)
    picked = str(pick_inference_dtype("auto", args.device, math.inf)).removeprefix("torch.")
    counts = (1, 32) if args.tiny else (1, 32, 512)
    variants, losses = {}, {}
    for dtype in sorted({"float32", "bfloat16", picked}):  # picked is float16 on older GPUs
        model, _, state = checkpoint.load_model(path)
        prepare_for_generation(model, args.device, getattr(torch, dtype))
        for stories in counts:
            variants |= generation_variants(f"{dtype} {stories}", model, stories, args.device, dtype == picked)
        if args.out_dir:
            split = Split(Path("data", state["config"]["dataset"]), "validation", model.config.block_size)
            losses[dtype] = window_losses(model, split, evaluation_windows(split, 64), batch_size=1).mean().item()
    medians, spreads = measure_rates(variants, args.rounds)
    command = [sys.executable, ROOT / "sample.py", "--out_dir", path.parent, "--start", "Once upon a time",
               "--max_new_tokens", "1", "--device", str(args.device)]
    first_token = interleave({"s": partial(time_call, run_script, command)}, args.rounds)["s"][1:]
    result = {"dtype": picked, **{f"tokens_per_s_{stories}": medians[f"{picked} {stories}"] for stories in counts},
              "first_token_s": float(np.median(first_token)), "tokens_per_s_of_each": medians, "spreads": spreads}
    if args.device.type == "cpu":
        result["programs"] = compare_with_peers(path, folder, args.rounds)
    return result | ({"validation_loss": losses} if losses else {})


def generation_variants(name, model, stories, device, picked):
    """Variants for `measure_rates`; on a CPU, those of many stories would take minutes and are left out."""
    few_or_gpu, idx = stories <= 32 or device.type == "cuda", torch.zeros(stories, 1, dtype=int, device=device)
    block_size = model.config.block_size
    new_tokens = 2 * block_size  # a typical story, and long enough to move the context window
    lengths = range(block_size // 8, new_tokens, block_size // 4)
    variants = {}
    if few_or_gpu or picked:
        variants[name] = stories * new_tokens, generate_stories, model, idx, [1], new_tokens
    if few_or_gpu:  # the first token after a prompt reads the whole context window
        variants[f"{name} no cache"] = stories * len(lengths), generate_stories, model, idx, lengths, 1
    if device.type == "cuda":
        variants[f"{name} no graph"] = stories * new_tokens, generate_without_graph, model, idx, [1], new_tokens
    return variants


def generate_stories(model, idx, lengths, new_tokens):
    """Generate that many tokens after prompts of each length, idx (B, 1) repeated."""
    for length in lengths:
        for _ in generate(model, idx.expand(-1, length), new_tokens, temperature=0.8, top_k=200):
            pass
    synchronize(idx.device)


# Without a CUDA graph, which is captured once per call.
generate_without_graph = patch.object(generation, "capture_graph", lambda forward, cache: forward)(generate_stories)


def write_random_run(folder, config):
    """Write a run of random weights, whose embeddings of unused tokens are equal, and return its checkpoint's path."""
    torch.manual_seed(0)
    model = GPT(config)
    model.transformer.wte.weight.data[config.vocab_size // VOCABULARY_PER_USED_TOKEN:] = 0
    write_random_dataset(folder, config)
    checkpoint.save(folder / "ckpt.pt", {"model": model.state_dict(), "model_config": asdict(config),
                                         "data_sha256": data_sha256(read_meta(folder)), "config": {}, "tokens": 0,
                                         "metrics": {}})
    return folder / "ckpt.pt"


def compare_with_peers(path, folder, rounds):
    """Generation with a checkpoint by this program and by those of tools/peers.py, in turn, each in its own process.

    Returns tokens/s by program and number of stories, and their spreads.
    """
    model, _, _ = checkpoint.load_model(path)
    new_tokens = model.config.block_size - 1  # the others cannot move the context window
    programs = peers.programs(model.config)
    runs = {f"{name}, {stories}": (stories, name) for stories in (1, 32) for name in programs
            if stories == 1 or name != "llama.cpp"}
    answers = interleave_processes({run: (run_program, path, folder, new_tokens, *runs[run]) for run in runs},
                                   torch.device("cpu"), rounds)
    medians, spreads = medians_and_spreads({run: [stories * new_tokens / seconds for seconds, _ in answers[run][1:]]
                                            for run, (stories, _) in runs.items()})
    return {"tokens_per_s": medians, "spreads": spreads}


def run_program(end_round, path, folder, new_tokens, stories, name):
    """A job of `interleave_processes`: generate stories with one of the programs."""
    model, tokenizer, _ = checkpoint.load_model(path)
    program = peers.programs(model.config)[name](model, tokenizer.end_of_text, Path(tempfile.mkdtemp(dir=folder)))
    while True:
        program.generate(stories, new_tokens)
        end_round()


# ---- preparation ----


def bench_prepare(args, ceilings, folder):
    """MB/s of prepare.py on 100 MB of nursery stories, and of the tokenizer alone in one thread, on some of them."""
    stories = list(nursery.stories(1500 if args.tiny else 140_000, seed=1))
    (folder / "nursery.txt").write_text("".join(f"{story}\n{END_OF_TEXT}\n" for story in stories), encoding="utf-8")
    command = [sys.executable, ROOT / "prepare.py", "nursery.txt", "--tokenizer", "gpt2", "--force"]
    run, tokenizer, some = partial(run_script, cwd=folder), Tokenizer.named("gpt2"), stories[:20_000]
    megabytes = [sum(len(story.encode()) for story in part) / 1e6 for part in (stories, some)]
    medians, spreads = measure_rates({
        "mb_per_s": (megabytes[0], run, command),
        "tokenizer_mb_per_s": (megabytes[1], tokenizer.encode_stories, some)}, args.rounds)
    return {"mb_of_text": megabytes[0], **medians, "spreads": spreads}


# ---- the speedrun ----

TARGET_BITS_PER_BYTE = 0.815  # on the whole validation split (docs/speedrun.md)
FIRST_RECORD = "bdf37bb051fc:config/tinystories_cpu.py"


def bench_race(args, ceilings, folder):
    """Seconds from the command `train.py CONFIG` to its end, and the loss on the whole validation split.

    CONFIG runs `rounds` times, with the default seed and the seeds 1, 2, …, and the first record once, after the first
    of them.
    """
    own, first = find_program(args.race_config, folder), find_program(FIRST_RECORD, folder)
    runs = [(f"{args.race_config} --seed={seed}", own, seed) for seed in (Config.seed, *range(1, args.rounds))]
    runs.insert(1, ("the first record", first, 1))
    results = {}
    for name, program, seed in runs:
        results[name] = race(*program, seed, args.device, folder)
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    own_results = [result for name, result in results.items() if name != "the first record"]
    seconds, bits_per_byte = ([result[name] for result in own_results] for name in ("seconds", "bits_per_byte"))
    reached = sum(value <= TARGET_BITS_PER_BYTE for value in bits_per_byte)
    median = float(np.median(seconds))
    return {"seconds": median, "times_first_record": median / results["the first record"]["seconds"],
            "mean_bits_per_byte": float(np.mean(bits_per_byte)), "worst_bits_per_byte": max(bits_per_byte),
            f"reached_{TARGET_BITS_PER_BYTE}": f"{reached} of {len(own_results)}", **results}


def race(script, config, seed, device, folder):
    """Train with a train.py: seconds, bits per byte on the whole validation split, its standard error over windows."""
    command = [sys.executable, script, f"--out_dir={tempfile.mkdtemp(dir=folder)}", f"--device={device}"]
    seconds = time_call(run_script, [*command, config, f"--seed={seed}"])
    return {"seconds": seconds, **read_evaluation(run_script([*command, "--eval_only"]))}


def read_evaluation(text):
    """The bits per byte, and their standard error over windows, in what `train.py --eval_only` prints."""
    loss, error, bits_per_byte = (float(re.search(rf"^{name}: (.*)$", text, re.M)[1])
                                  for name in ("loss", "standard_error", "bits_per_byte"))
    return {"bits_per_byte": bits_per_byte, "standard_error": error * bits_per_byte / loss}


def find_program(config, folder):
    """The paths of train.py and of the config for CONFIG or COMMIT:CONFIG, whose program is unpacked in `folder`.

    Raises UserError if there is no such commit or config, or its dataset is not prepared.
    """
    commit, _, name = config.rpartition(":")
    program, path = ROOT, Path(config)
    if commit and not path.exists():
        program = Path(tempfile.mkdtemp(dir=folder))
        archive, path = program.with_suffix(".zip"), program / name
        run_script(["git", "archive", f"--output={archive}", commit], cwd=ROOT)
        shutil.unpack_archive(archive, program)
    read_meta(Path("data", read_config_file(path).get("dataset", Config.dataset)))
    return program / "train.py", path


SUBJECTS = {"train": bench_train, "generate": bench_generate, "prepare": bench_prepare, "race": bench_race}

if __name__ == "__main__":
    main()
