"""Try to lose a run, or to get a traceback, again and again.

    python -m tests.faults.soak --kills 100          one subject
    python -m tests.faults.soak                      all, about an hour

Everything runs in forked processes on a model of a few thousand parameters: they start in no time, and what kills them
kills a real process. The figures at the end are `key: value` lines; the first thing that is lost ends it all.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import ROOT, TINY, use_gpt2_vocabulary  # noqa: E402  first: it sets what torch reads on being imported

import torch  # noqa: E402

import checkpoint  # noqa: E402
import prepare  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from errors import Parser  # noqa: E402
from faults.processes import Lost, one_line, run, works  # noqa: E402

# With all that a run has to remember: two optimizers, dropout, accumulation, evaluations between its updates.
RUN = [*TINY, "--optimizer=muon", "--dropout=0.1", "--max_iters=120", "--log_interval=1", "--eval_interval=20",
       "--checkpoint_minutes=0"]


def same_run(one, other):
    """See that two run folders hold the same run, bit for bit: weights, optimizers, best weights, losses, stories."""
    for name, has in (("last.pt", checkpoint.LAST_HAS), ("ckpt.pt", checkpoint.HAS)):
        a, b = (checkpoint.load(Path(folder, name), has) for folder in (one, other))
        for key in ("model", "optimizers", "scaler", "iter", "figures", "best_val_loss"):
            if key in has and not equal(a[key], b[key]):
                raise Lost(f"{other}/{name} differs from {one}/{name} in {key}")
    for kind, keys in (("step", ("iter", "loss", "grad_norm", "lr")), ("eval", ("iter", "val_loss", "train_loss"))):
        a, b = ([[r[key] for key in keys] for r in checkpoint.read_log(Path(folder, "log.jsonl")) if r["kind"] == kind]
                for folder in (one, other))
        if a != b:
            raise Lost(f"the {kind} lines of {other} are not those of {one}")
    if Path(one, "samples.md").read_text() != Path(other, "samples.md").read_text():
        raise Lost(f"{other}/samples.md differs")


def equal(a, b):
    """Whether two nested dicts and lists are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def set_up():
    """Prepare data/nursery-bpe300 in the current folder and train out/whole, the run that nothing happens to."""
    words = ["nursery", "--tokenizer", "bpe:300", "--max_stories", "60", "--validation_fraction", "0.1"]
    works(run(prepare.main, words))
    started = time.monotonic()
    works(run(train.main, [*RUN, "--out_dir=out/whole"]))
    return time.monotonic() - started


def die_at_operation(number, folder):
    """Have this process killed at its number-th opening, renaming, removing or cutting of a file in a folder."""
    count = 0

    def hook(event, args):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.truncate") and folder in str(args[0]):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def kill(rng, figures):
    """Start the run, or go on with it, and kill it somewhere; True when it got to its end first."""
    words = [*RUN, "--out_dir=out/killed", "--resume=auto"]
    at = rng.randint(1, 150)
    signals = rng.choice([[signal.SIGKILL]] * 8 + [[signal.SIGTERM], [signal.SIGINT] * 2])

    def send_signals(pid):
        for number in signals:
            time.sleep(rng.uniform(0, 0.6))
            os.kill(pid, number)

    if rng.random() < 0.5:
        code, out, err = run(train.main, words, before=lambda: die_at_operation(at, "out/killed"))
    else:
        code, out, err = run(train.main, words, meanwhile=send_signals)
    log, folder = Path("out/killed/log.jsonl"), Path("out/killed")
    figures["of them in the middle of writing a checkpoint"] += (folder / "last.pt.tmp").exists() or (
        folder / "ckpt.pt.tmp").exists()
    figures["of them with last.prev.pt alone"] += (folder / "last.prev.pt").exists() and not (
        folder / "last.pt").exists()
    figures["of them in the middle of a log line"] += log.exists() and not log.read_bytes().endswith(b"\n") and (
        log.stat().st_size > 0)
    if "Traceback" in err or code not in (0, -signal.SIGKILL, -signal.SIGTERM, 130):
        raise Lost(f"exit code {code}:\n{out}{err}")
    ended = code == 0 and "stopped after" not in out
    figures["kills"] += not ended
    return ended


def kills(count, rng):
    """Kill runs at random moments and at random file operations; what comes to its end must be the whole run."""
    figures = Counter({"kills": 0})
    while figures["kills"] < count:
        shutil.rmtree("out/killed", ignore_errors=True)
        while not kill(rng, figures):
            pass
        same_run("out/whole", "out/killed")
        figures["runs that they were spread over, each equal to the one never killed"] += 1
    return figures


def disks(count, rng):
    """Let the disk be full somewhere in a run, and in preparing data; see that it can go on once there is room."""
    figures = Counter({"full disks": 0, "full disks while preparing": 0})
    folder = Path("out/full")
    for _ in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with small_disk(folder, figures) as fill:
            words = [*RUN, f"--out_dir={folder}", "--resume=auto"]
            before = fill(rng.randint(0, 400_000))
            result = run(train.main, words, before)
            while result[0]:
                line = one_line(result)
                if "full" not in line:
                    raise Lost(f"the error does not name the file: {line}")
                figures["full disks"] += 1
                if checkpoint.can_go_on(folder):
                    checkpoint.load(folder / ("last.pt" if (folder / "last.pt").exists() else "last.prev.pt"),
                                    checkpoint.LAST_HAS)
                before = fill(None if rng.random() < 0.5 else rng.randint(0, 400_000))
                result = run(train.main, words, before)
            same_run("out/whole", folder)
    for _ in range(count):
        shutil.rmtree("data/nursery", ignore_errors=True)
        words = ["nursery", "--max_stories", "2000", "--name", "full"]
        line = one_line(run(prepare.main, words, lambda: limit_files(rng.randint(ROOM_FOR_WORDS, 600_000))), "full")
        if Path("data/full").exists():
            raise Lost(f"data/full is there after: {line}")
        figures["full disks while preparing"] += 1
    works(run(prepare.main, words))
    shutil.rmtree("data/full")
    return figures


ROOM_FOR_WORDS = 5_000  # bytes that a limit on files leaves to what a process says


class small_disk:
    """A context with a disk of 1.2 MB mounted on a folder, where this user may mount; else with a limit on files.

    Gives `fill(left)`, which leaves so many bytes of room (None: all) and returns what the process must call first.
    """

    def __init__(self, folder, figures):
        self.folder, self.figures = folder, figures

    def __enter__(self):
        command = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", self.folder]
        self.mounted = bool(shutil.which("mount")) and not subprocess.run(command, capture_output=True).returncode
        self.figures["of them a small disk, the rest a limit on the size of files"] += self.mounted
        return self.fill

    def fill(self, left):
        filler = self.folder / "filler"
        if not self.mounted:
            return lambda: limit_files(left and max(left, ROOM_FOR_WORDS))
        filler.unlink(missing_ok=True)
        if left is not None:
            stat = os.statvfs(self.folder)
            filler.write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - left)))
        return None

    def __exit__(self, *_):
        if self.mounted:
            subprocess.run(["umount", self.folder], check=True)


def limit_files(size):
    """Have every write of this process beyond that size of a file fail, as on a full disk."""
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def damage(path, rng):
    """Damage a file in one of the ways in which files are damaged; what was done, in words."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flipped"] * 4 + ["shortened"] * 2 + ["empty", "foreign", "gone"])
    if kind == "flipped":
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        return f"bit {bit} flipped"
    if kind == "gone":
        path.unlink()
    else:
        foreign = [b"hello\n", b"{}", b"[1]\n", b"\x00" * 1000, rng.randbytes(2000), b"[" * 100_000,
                   Path("data/nursery-bpe300/train.bin").read_bytes(), Path("out/whole/ckpt.pt").read_bytes()[:-1],
                   Path("other.pt").read_bytes(), Path("other.zip").read_bytes()]
        path.write_bytes({"shortened": data[:rng.randrange(len(data))], "empty": b"",
                          "foreign": rng.choice(foreign)}[kind])
    return kind


def damages(count, rng):
    """Damage one file of a run or dataset at a time: its readers work as if nothing were, or name it in one line."""
    figures = Counter({"damaged files": 0, "of them named in one line": 0, "of them without effect on the model": 0})
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    shutil.make_archive("other", "zip", "data/nursery-bpe300")
    works(run(train.main, [*RUN, "--out_dir=out/half", "--max_iters=110", "--lr_decay_iters=120"]))
    commands = {
        "resume": (train.main, ["--resume", "--out_dir=out/damaged", "--max_iters=120"]),
        "eval_only": (train.main, ["--eval_only", "--out_dir=out/damaged"]),
        "sample": (sample.main, ["--out_dir=out/damaged", "--seed=1", "--max_new_tokens=20", "--dtype=float32"]),
    }
    data, kept = Path("data/nursery-bpe300"), Path("kept")
    shutil.copytree(data, kept)
    shutil.copytree("out/half", "out/damaged")
    before = {name: works(run(*command)) for name, command in reversed(commands.items())}
    while figures["damaged files"] < count:
        for folder, source in ((data, kept), (Path("out/damaged"), Path("out/half"))):
            shutil.rmtree(folder)
            shutil.copytree(source, folder)
        paths = [path for folder in (data, Path("out/damaged")) for path in sorted(folder.iterdir())
                 if path.name != ".lock"]
        path = rng.choice(paths)
        done = damage(path, rng)
        name = rng.choice(list(commands))
        figures["damaged files"] += 1
        result = run(*commands[name])
        if result[0]:
            line = one_line(result)
            # A file that is gone, or whose neighbour belongs to it, may be missed under the name of the other.
            if path.name not in line and not (path.parent == data and str(data) in line):
                raise Lost(f"{name} after {path} was {done}: the error does not name it: {line}")
            figures["of them named in one line"] += 1
        elif "Traceback" in result[2]:
            raise Lost(f"{name} after {path} was {done}:\n{result[2]}")
        else:
            same = equal(*(checkpoint.load(Path(folder, "last.pt"))["model"] for folder in ("out/whole", "out/damaged"))
                         ) if name == "resume" else result[1] == before[name]
            if not same and not (name != "resume" and path.name == "ckpt.pt" and done == "gone"):  # then last.pt serves
                raise Lost(f"{name} after {path} was {done}: works, but differently:\n{result[1]}{result[2]}")
            figures["of them without effect on the model"] += 1
    shutil.rmtree(data)
    kept.rename(data)
    return figures


def rank_kills(count, rng):
    """Kill single processes of a run on two, which torchrun starts again with --resume=auto."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [str(ROOT / "train.py"), *RUN, "--resume=auto", f"--max_iters={200 * (count + 1)}", "--eval_interval=100"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([*torchrun, *words, "--out_dir=out/ranks"], timeout=600, **quiet)
    works((done.returncode, done.stdout, ""))
    figures, log, reached = Counter({"killed ranks": 0}), Path("out/ranks_killed/log.jsonl"), 0
    process = subprocess.Popen([*torchrun, "--max-restarts=1000", *words, "--out_dir=out/ranks_killed"], **quiet)
    while figures["killed ranks"] < count:
        reached += rng.randint(1, 100)  # updates: there it is killed next
        while not log.exists() or max([r.get("update", 0) for r in checkpoint.read_log(log)], default=0) < reached:
            time.sleep(0.05)
            if process.poll() is not None:
                raise Lost(f"torchrun gave up:\n{process.communicate()[0]}")
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(rng.choice(workers)), signal.SIGKILL)
        figures["killed ranks"] += 1
    out, _ = process.communicate(timeout=600)
    works((process.returncode, out, ""))
    same_run("out/ranks", "out/ranks_killed")
    return figures


def fuzz_cases(count, rng):
    """Flags, recipes, prompts and texts that nobody thought of."""
    from faults.fuzz import fuzz
    return fuzz(count, rng)


SUBJECTS = {"kills": (kills, 100), "disks": (disks, 50), "damages": (damages, 1000), "rank_kills": (rank_kills, 10),
            "cases": (fuzz_cases, 10_000)}


def main(argv=None):
    """Run the soak; exits with code 1 and says what was lost, where something was."""
    parser = Parser(prog="python -m tests.faults.soak", description="Try to lose a run.")
    for name, (subject, usual) in SUBJECTS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N",
                            help=f"{subject.__doc__.splitlines()[0]} (usual: {usual})")
    parser.add_argument("--seed", type=int, default=0, help="of what is random (default: 0)")
    args = parser.parse_args(argv)
    wanted = {name: getattr(args, name) for name in SUBJECTS if getattr(args, name) is not None}
    os.environ["PYTHONHASHSEED"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        use_gpt2_vocabulary(Path(folder, "tiktoken"))
        os.chdir(folder)
        set_up()
        for name, count in (wanted or {name: usual for name, (_, usual) in SUBJECTS.items()}).items():
            started = time.monotonic()
            try:
                figures = SUBJECTS[name][0](count, random.Random(args.seed))
            except Lost as error:
                print(f"LOST in {name}: {error}", file=sys.stderr)
                sys.exit(1)
            finally:
                os.chdir(folder)
            for key, value in figures.items():
                print(f"{key}: {value}")
            print(f"{name}_seconds: {time.monotonic() - started:.0f}\nlost in {name}: 0", flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()
