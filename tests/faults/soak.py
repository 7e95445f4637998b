"""Soak test: inject faults into runs of a tiny model, and check that nothing is lost and no traceback is printed.

    python -m tests.faults.soak --kills 100          one kind of fault
    python -m tests.faults.soak                      all kinds, about an hour

All runs are forked processes of a model with 12 thousand parameters: they start at once, and a kill ends a real
process. The counts are printed as `key: value` lines; the first failure ends the test.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import ROOT, TINY, load_last, use_gpt2_vocabulary

import torch

import prepare
import sample
import train
from faults.processes import (Failure, at_file_operation, check_one_line_error, check_success, kill_this_process,
                              limit_file_size, run)
from storygpt import checkpoint
from storygpt.run import checkpoints, read_log
from storygpt.system.errors import Parser

# With all the state that a run can have: two optimizers, dropout, accumulation, evaluations between its steps.
RUN = [*TINY, "--optimizer=muon", "--dropout=0.1", "--max_iters=120", "--log_interval=1", "--eval_interval=20",
       "--checkpoint_minutes=0"]


def main(argv=None):
    """Run the soak test; exits with code 1 and a message at the first failure."""
    parser = Parser(prog="python -m tests.faults.soak", description="Inject faults and check that nothing is lost.")
    for name, (function, default) in FAULTS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N",
                            help=f"{function.__doc__.splitlines()[0].rstrip('.')} (if no kind is given: {default})")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    args = parser.parse_args(argv)
    wanted = {name: getattr(args, name) for name in FAULTS if getattr(args, name) is not None}
    os.environ["PYTHONHASHSEED"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        use_gpt2_vocabulary(Path(folder, "tiktoken"))
        os.chdir(folder)
        flags = ["nursery", "--tokenizer", "bpe:300", "--max_stories", "60", "--validation_fraction", "0.1"]
        check_success(run(prepare.main, flags))
        check_success(run(train.main, [*RUN, "--out_dir=out/whole"]))
        for name, count in (wanted or {name: default for name, (_, default) in FAULTS.items()}).items():
            started = time.monotonic()
            try:
                counts = FAULTS[name][0](count, random.Random(args.seed))
            except Failure as error:
                sys.exit(f"FAILED in {name}: {error}")
            for key, value in counts.items():
                print(f"{key}: {value}")
            print(f"{name}_seconds: {time.monotonic() - started:.0f}\nfailures in {name}: 0", flush=True)
        os.chdir("/")


def check_same_run(expected, actual):
    """Raise Failure unless two run folders are equal bit for bit: checkpoints, logged losses and samples."""
    a, b = map(what_must_be_equal, (expected, actual))
    for name in a:
        if not equal(a[name], b[name]):
            raise Failure(f"{actual}/{name} differs from {expected}/{name}")


def what_must_be_equal(folder):
    """The content of a run folder without its settings and times, name of the file → content."""
    last, best = load_last(folder), checkpoint.load(Path(folder, "ckpt.pt"))
    logged = {"step": ("iter", "loss", "grad_norm", "lr"), "eval": ("iter", "val_loss", "train_loss"),
              "end": ("iter", "reason")}
    return {
        "last.pt": [last[key] for key in ("model", "optimizers", "scaler", "iter", "metrics", "best_val_loss")],
        "ckpt.pt": [best[key] for key in ("model", "iter", "metrics")],
        "log.jsonl": [[r[key] for key in logged[r["kind"]]] for r in read_log(Path(folder, "log.jsonl"))
                      if r["kind"] in logged],
        "samples.md": Path(folder, "samples.md").read_text(),
    }


def equal(a, b):
    """Whether two nested dicts and lists are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def soak_kills(count, rng):
    """Kill runs at random moments and file operations, and resume them: the result equals the run never killed."""
    counts, folder = Counter({"kills": 0}), Path("out/killed")
    flags = [*RUN, f"--out_dir={folder}", "--resume=auto"]

    def send_signals(pid):
        for number in signals:
            time.sleep(rng.uniform(0, 0.6))
            os.kill(pid, number)

    while counts["kills"] < count or folder.exists():
        operation = rng.randint(1, 150)
        signals = rng.choice([[signal.SIGKILL]] * 8 + [[signal.SIGTERM], [signal.SIGINT] * 2])
        how = ({"setup": lambda: at_file_operation(operation, str(folder), kill_this_process)} if rng.random() < 0.5
               else {"while_running": send_signals})
        code, out, err = run(train.main, flags, **how)
        if "Traceback" in err or code not in (0, -signal.SIGKILL, -signal.SIGTERM, 130):
            raise Failure(f"exit code {code}:\n{out}{err}")
        names = {path.name for path in folder.glob("*.pt*")}
        counts["of these, while writing a checkpoint"] += bool(names & {"last.pt.tmp", "ckpt.pt.tmp"})
        counts["of these, between the two renames"] += "last.prev.pt" in names and "last.pt" not in names
        complete = code == 0 and "stopped after" not in out
        counts["kills"] += not complete
        if complete:
            check_same_run("out/whole", folder)
            counts["runs completed in this way, each equal to the run never killed"] += 1
            shutil.rmtree(folder)
    return counts


def soak_disks(count, rng):
    """Fill the disk during runs and while preparing data: both can be repeated once there is space.

    A limit on file sizes stands for the full disk, as it needs no privileges. It leaves 5,000 bytes to stdout and
    stderr, which are files too.
    """
    counts = Counter({"full disks": 0, "full disks while preparing": 0})
    folder = Path("out/full")
    for _ in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        size = rng.randint(5_000, 200_000)
        while (result := run(train.main, [*RUN, f"--out_dir={folder}", "--resume=auto"],
                             setup=lambda: limit_file_size(size)))[0]:
            check_one_line_error(result, str(folder))
            counts["full disks"] += 1
            if found := checkpoints(folder, ("last.pt", "last.prev.pt")):
                checkpoint.load(found[0], checkpoint.LAST_REQUIRED_KEYS)
            size = None if rng.random() < 0.5 else rng.randint(5_000, 200_000)
        check_same_run("out/whole", folder)
    flags = ["nursery", "--max_stories", "2000", "--name", "full"]
    for _ in range(count):
        limit = rng.randint(5_000, 600_000)
        line = check_one_line_error(run(prepare.main, flags, setup=lambda: limit_file_size(limit)), "data/full")
        if Path("data/full").exists():
            raise Failure(f"data/full exists after: {line}")
        counts["full disks while preparing"] += 1
    check_success(run(prepare.main, flags))
    shutil.rmtree("data/full")
    return counts


READERS = {  # of files of the run out/damaged and its data
    "sample": (sample.main, ["--out_dir=out/damaged", "--seed=1", "--max_new_tokens=20", "--dtype=float32"]),
    "eval_only": (train.main, ["--eval_only", "--out_dir=out/damaged"]),
    "resume": (train.main, ["--resume", "--out_dir=out/damaged", "--max_iters=120"]),
}


def soak_damages(count, rng):
    """Damage files of a run or dataset: their readers work as before, or name the file in a one-line error."""
    counts = Counter({"damaged files": 0, "of these, named in one line": 0, "of these, without effect on the model": 0})
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    shutil.make_archive("other", "zip", "data/nursery-bpe300")
    check_success(run(train.main, [*RUN, "--out_dir=out/half", "--max_iters=110", "--lr_decay_iters=120"]))
    copies = {Path("data/nursery-bpe300"): Path("intact_data"), Path("out/damaged"): Path("out/half")}
    shutil.copytree("data/nursery-bpe300", "intact_data")

    def restore():
        for folder, copy in copies.items():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(copy, folder)

    restore()
    expected = {name: check_success(run(*READERS[name])) for name in READERS}
    for _ in range(count):
        restore()
        path = rng.choice([path for folder in copies for path in sorted(folder.iterdir()) if path.name != ".lock"])
        damage = damage_file(path, rng)
        name = rng.choice(list(READERS))
        counts["damaged files"] += 1
        has_error = check_reader(name, run(*READERS[name]), expected[name], path, damage)
        counts["of these, named in one line" if has_error else "of these, without effect on the model"] += 1
    restore()
    return counts


def damage_file(path, rng):
    """Damage a file in one of the ways in which files are damaged; returns which."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(["a bit flipped"] * 4 + ["truncated"] * 2 + ["emptied", "replaced", "removed"])
    if kind == "a bit flipped":
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
    elif kind == "truncated":
        content = content[:rng.randrange(len(content))]
    elif kind == "replaced":
        files = [Path(name).read_bytes() for name in ("data/nursery-bpe300/train.bin", "other.pt", "other.zip")]
        content = rng.choice([b"hello\n", b"{}", b"[1]\n", rng.randbytes(2000), b"[" * 100_000, *files])
    path.write_bytes(b"" if kind == "emptied" else content)
    if kind == "removed":
        path.unlink()
    return kind


def check_reader(name, result, expected, path, damage):
    """Check how a command ended that read a damaged file; returns whether with an error.

    Raises Failure unless the error names the file or, without an error, the output or the resumed model is correct.
    """
    case = f"{name} after {path} was damaged ({damage})"
    if result[0]:
        line = check_one_line_error(result)
        # If a file is missing or does not match another one next to it, the error may name that one.
        if path.name not in line and not (path.parent.parent == Path("data") and str(path.parent) in line):
            raise Failure(f"{case}: the error does not name it: {line}")
    elif name == "resume":
        if not equal(load_last("out/whole")["model"], load_last("out/damaged")["model"]):
            raise Failure(f"{case}: another model")
    elif result[1] != expected and (path.name, damage) != ("ckpt.pt", "removed"):  # then they use last.pt
        raise Failure(f"{case}: works, but with another result:\n{result[1]}{result[2]}")
    return result[0] != 0


def soak_rank_kills(count, rng):
    """Kill single processes of a run on two, which torchrun restarts with --resume=auto: the result is the same."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [str(ROOT / "train.py"), *RUN, "--resume=auto", f"--max_iters={200 * (count + 1)}", "--eval_interval=100"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([*torchrun, *flags, "--out_dir=out/ranks"], timeout=600, **options)
    check_success((done.returncode, done.stdout, ""))
    counts, log, next_kill = Counter({"killed ranks": 0}), Path("out/ranks_killed/log.jsonl"), 0
    process = subprocess.Popen([*torchrun, "--max-restarts=1000", *flags, "--out_dir=out/ranks_killed"], **options)
    while counts["killed ranks"] < count:
        next_kill += rng.randint(1, 100)  # steps
        while not log.exists() or max([r.get("step", 0) for r in read_log(log)], default=0) < next_kill:
            time.sleep(0.05)
            if process.poll() is not None:
                raise Failure(f"torchrun ended:\n{process.communicate()[0]}")
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(rng.choice(ranks)), signal.SIGKILL)
        counts["killed ranks"] += 1
    out, _ = process.communicate(timeout=600)
    check_success((process.returncode, out, ""))
    check_same_run("out/ranks", "out/ranks_killed")
    return counts


def soak_cases(count, rng):
    """Try unusual flags, config files, prompts and texts: each works or gives a one-line error."""
    from faults.fuzz import fuzz  # needs hypothesis
    return fuzz(count, rng)


FAULTS = {  # name → (function, default count)
    "kills": (soak_kills, 100), "disks": (soak_disks, 50), "damages": (soak_damages, 1000),
    "rank_kills": (soak_rank_kills, 10), "cases": (soak_cases, 10_000),
}


if __name__ == "__main__":
    main()
