"""Test, measure and train on CUDA with one command, and write the figures for the documentation to a report.

    python -m tests.cuda                                 every part; stops after 25 minutes
    python -m tests.cuda --only machine,tests,bench      some parts
    python -m tests.cuda --device cpu --tiny             every part at toy size, to try this script itself

At toy size the evaluation on the whole validation split takes longest. With the --data of
`python prepare.py nursery --tokenizer bpe:300 --max_stories 60` all parts take two minutes on two cores; with
TinyStories each training run takes a minute and a half.

Each part runs in processes of its own, and its result is written to report.json and report.md in --out as soon as it
ends. A part that fails is reported with the end of its output, and the next one starts. Running the command again skips
the parts that are done and resumes a training run that --minutes cut short.

Needs torch, numpy, tiktoken, tqdm, pytest, a C compiler and a prepared dataset; no network. docs/cuda.md says more.
"""

import functools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import files  # noqa: E402  from the project, whatever the current folder is
from errors import Parser, UserError, exit_with_one_line  # noqa: E402

TINY_FLAGS = ("--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --gradient_accumulation_steps=2 "
              "--max_iters=8 --warmup_iters=1 --eval_interval=4 --eval_iters=1 --compile=False").split()
GRACE = 30  # seconds that a training run has to save after SIGTERM


class Failed(Exception):
    """A part's command failed; the message is the end of its output."""


class OutOfTime(Exception):
    """A part's command was stopped because --minutes are over."""


@dataclass
class Harness:
    """What all parts share: the device, the dataset, the output folder and the deadline."""

    device: str
    tiny: bool
    data: Path  # a prepared dataset folder
    out: Path  # gets the report, the logs and the runs
    deadline: float  # of time.monotonic()

    def call(self, name, command, environment=None):
        """Run a Python command in `out` and return its stdout, which is also in logs/NAME.out; stderr is in NAME.log.

        Raises Failed on an exit code other than 0, and OutOfTime if it was still running at the deadline.
        """
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        modules = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": modules, "PYTHONUNBUFFERED": "1"} | (environment or {})
        if self.tiny:
            environment["OMP_NUM_THREADS"] = "1"  # models this small are slower on more
        with open(log, "w") as stderr, open(log.with_suffix(".out"), "w") as stdout:
            process = subprocess.Popen([sys.executable, *map(str, command)], cwd=self.out, env=environment,
                                       stdout=stdout, stderr=stderr, start_new_session=True)
            try:
                process.wait(max(0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise OutOfTime(f"stopped after {error.timeout:.0f} s, as --minutes are over") from error
            finally:  # also on Ctrl-C: nothing of the part may stay on the GPU
                end_group(process)
            texts = [Path(file.name).read_text(encoding="utf-8", errors="replace") for file in (stdout, stderr)]
        if process.returncode:
            end = "\n".join("".join(texts).splitlines()[-40:])
            raise Failed(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{end}")
        return texts[0]


def end_group(process):
    """End a process and all that it has started: SIGTERM, on which training saves, and SIGKILL after GRACE seconds."""
    try:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    finally:  # also at a second Ctrl-C
        with suppress(ProcessLookupError):  # no process of its group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- the parts: each takes a Harness and returns a dict of figures ----


def bench(subject, harness):
    """What tools.bench measures of a subject; the machine and its ceilings stand in the figures of `machine` only."""
    flags = ["--tiny", "--rounds=1"] if harness.tiny else ["--rounds=5"]
    text = harness.call(f"bench-{subject}", ["-m", "tools.bench", subject, "--json", f"--device={harness.device}",
                                             *flags])
    result = json.loads(text)
    return {**result["machine"], **result["ceilings"]} if subject == "machine" else result[subject]


def run_tests(harness):
    """The tests with the mark `cuda`: how many passed and were skipped. Raises Failed also where none passed."""
    tests = ROOT / "tests" / "cuda" / "test_cuda.py"
    text = harness.call("tests", ["-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "-rs",
                                  f"--rootdir={ROOT}", tests], {"TEST_DEVICE": harness.device})
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|skipped)", text.splitlines()[-1])}
    reasons = sorted(set(re.findall(r"^SKIPPED .*?: (.*)$", text, re.M)))
    if not counts.get("passed"):
        raise Failed(f"no test was run: {', '.join(reasons)}")
    return counts | {"skipped_because": reasons}


def train(name, recipe, flags, harness):
    """A training run to its end, its best checkpoint's loss on the whole validation split, and its speed.

    Raises OutOfTime where the run was stopped; it has saved then, and is resumed by the next call.
    """
    if harness.tiny:
        flags = [flag for flag in flags if not flag.startswith(("--max_tokens", "--eval_interval"))] + TINY_FLAGS
    script, here = ROOT / "train.py", [f"--device={harness.device}", f"--out_dir=out/{name}"]
    harness.call(name, [script, ROOT / "config" / recipe, f"--dataset={harness.data.name}", *here, *flags,
                        "--resume=auto"])
    log = [json.loads(line) for line in Path(harness.out, "out", name, "log.jsonl").read_text().splitlines()]
    steps = [record for record in log if record["kind"] == "step"]
    speed = statistics.median(record["tokens_per_s"] for record in steps)
    measured = dict(line.split(": ") for line in harness.call(
        f"{name}-eval", [script, "--eval_only", *here]).splitlines() if ": " in line)
    return {"loss": float(measured["loss"]), "standard_error": float(measured["standard_error"]),
            "bits_per_byte": float(measured["bits_per_byte"]), "tokens": steps[-1]["tokens"],
            "seconds": log[-1]["seconds"], "tokens_per_s": speed, "training_seconds": steps[-1]["tokens"] / speed,
            "first_step_seconds": steps[0]["seconds"], "compiled": log[0]["compiled"],
            "resumed": sum(record["kind"] == "run" for record in log) - 1,
            "command": f"python train.py config/{recipe} {' '.join(flags)}".strip()}


def train_and_sample(name, recipe, flags, harness):
    """A training run as in `train`, and a story sampled from it."""
    figures = train(name, recipe, flags, harness)
    story = harness.call(f"{name}-story", [ROOT / "sample.py", f"--device={harness.device}", f"--out_dir=out/{name}",
                                           "--start=Once upon a time", "--seed=1"])
    return figures | {"story": story.strip()}


def train_seeds(recipe, flags, harness):
    """A training run with each of three seeds: how much the loss varies from run to run."""
    losses = [train(f"seed-{seed}", recipe, [*flags, f"--seed={seed}"], harness)["loss"] for seed in (1, 2, 3)]
    return {"losses": ", ".join(map(str, losses)), "mean": statistics.mean(losses),
            "standard_deviation": statistics.stdev(losses)}


PUBLISHED, FAST = "tinystories.py", "tinystories_fast.py"
LONG = ["--max_tokens=81_920_000", "--eval_interval=8000", "--log_interval=200"]
PARTS = {
    "machine": functools.partial(bench, "machine"),
    "tests": run_tests,
    "bench-train": functools.partial(bench, "train"),
    "bench-small": functools.partial(bench, "small"),
    "bench-generate": functools.partial(bench, "generate"),
    "bench-profile": functools.partial(bench, "profile"),
    "published": functools.partial(train_and_sample, "published", PUBLISHED, []),
    "published-falling": functools.partial(train_and_sample, "published-falling", PUBLISHED,
                                           ["--learning_rate=1e-3"]),
    "fast-3m": functools.partial(train_and_sample, "fast-3m", FAST, []),
    "fast-8m": functools.partial(train_and_sample, "fast-8m", FAST,
                                 ["--max_tokens=8_100_000", "--eval_interval=800"]),
    "seeds": functools.partial(train_seeds, FAST, ["--eval_interval=800"]),
    # Last, because they take by far the longest: 80,000 small steps each.
    "fast-82m": functools.partial(train_and_sample, "fast-82m", FAST, LONG),
    "fast-82m-dropout": functools.partial(train_and_sample, "fast-82m-dropout", FAST, [*LONG, "--dropout=0.1"]),
}


# ---- the report ----


def read_report(harness):
    """The report so far, or a new one. Raises UserError where it is of another device, dataset or size."""
    about = {"device": harness.device, "tiny": harness.tiny, "data": harness.data.name}
    path = harness.out / "report.json"
    if not path.exists():
        return {**about, "parts": {}}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        parts = report["parts"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove it, or name another folder with --out") from error
    if {**about, "parts": parts} != report:
        raise UserError(f"{path} is of another device, dataset or size: name another folder with --out")
    return report


def write_report(harness, report):
    """Write report.json and report.md, each whole or not at all."""
    for name, text in (("report.json", json.dumps(report, indent=2)), ("report.md", as_markdown(report))):
        files.replace(harness.out / name, lambda file: file.write(text.encode()))


def as_markdown(report):
    """The report as Markdown: one section per part, with a table of its figures, then its story."""
    size = " at toy size (no figure means anything)" if report["tiny"] else ""
    lines = [f"# `python -m tests.cuda --device {report['device']}`{size}, on data/{report['data']}"]
    for name, part in report["parts"].items():
        lines += ["", f"## {name}: {part['status']}, {part['seconds']:.0f} s", ""]
        if "error" in part:
            lines += ["```", part["error"], "```"]
        figures = list(flatten(part.get("figures", {})))
        if figures:
            lines += ["| figure | value |", "|---|---|",
                      *(f"| `{key[:160]}` | {format_value(value)} |" for key, value in figures if key != "story")]
        lines += [f"\n> {paragraph}" for key, text in figures if key == "story"
                  for paragraph in text.splitlines() if paragraph]
    return "\n".join(lines) + "\n"


def flatten(figures, prefix=""):
    """The figures of nested dicts, (name, value) each; spreads are in report.json only."""
    for name, value in figures.items():
        if isinstance(value, dict) and name != "spreads":
            yield from flatten(value, f"{prefix}{name}: ")
        elif name != "spreads":
            yield f"{prefix}{name}".replace("|", "/"), value


def format_value(value):
    """A figure as the text of a table cell."""
    return f"{value:,.5g}" if isinstance(value, float) else str(value).replace("|", "/")


# ---- the command ----


@exit_with_one_line
def main(argv=None):
    """Run the parts in --only that are not done yet; exit code 1 if one of them failed or was not finished."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the part's processes too
    out, data = args.out.resolve(), args.data.resolve()
    if not (data / "meta.json").exists():
        raise UserError(f"no dataset in {args.data}: make it with  python prepare.py  or name another with --data")
    (out / "data").mkdir(parents=True, exist_ok=True)
    link = out / "data" / data.name
    if link.is_symlink() and not link.exists():
        link.unlink()  # to what is no longer there
    if not link.exists():
        link.symlink_to(data, target_is_directory=True)
    if link.resolve() != data:
        raise UserError(f"{args.out} is of another dataset of this name, {link.resolve()}: name another folder with "
                        "--out")
    harness = Harness(args.device, args.tiny, data, out, time.monotonic() + 60 * args.minutes)
    files.hold(out / ".lock", args.out)
    report = read_report(harness)
    unfinished = [name for name in args.only if not run_part(name, harness, report)]
    print(f"report: {args.out / 'report.md'}")
    if unfinished:
        raise UserError(f"not done: {', '.join(unfinished)}; see the report, then run the command again")


def run_part(name, harness, report):
    """Run a part unless it is done, and write its result into the report; returns whether it is done now."""
    if report["parts"].get(name, {}).get("status") == "done":
        print(f"{name}: done before")
        return True
    if time.monotonic() >= harness.deadline:
        print(f"{name}: not started, as --minutes are over")
        return False
    print(f"{name}: ", end="", flush=True)
    started = time.monotonic()
    try:
        result = {"status": "done", "figures": PARTS[name](harness)}
    except OutOfTime as error:
        result = {"status": "not finished", "error": str(error)}
    except Failed as error:
        result = {"status": "failed", "error": str(error)}
    except Exception:  # a fault of this script; the next part must start all the same
        result = {"status": "failed", "error": traceback.format_exc()}
    result["seconds"] = time.monotonic() - started
    report["parts"] = {part: result if part == name else report["parts"][part]
                       for part in PARTS if part == name or part in report["parts"]}
    write_report(harness, report)
    print(f"{result['status']} after {result['seconds']:.0f} s", flush=True)
    return result["status"] == "done"


def parse_args(argv):
    """The command line as a namespace; exits with code 2 for wrong flags."""
    parser = Parser(prog="python -m tests.cuda", description="Test and measure this program on CUDA; write a report.")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try this script (default: cuda)")
    parser.add_argument("--minutes", type=float, default=25, help="when to stop; a later call goes on (default: 25)")
    parser.add_argument("--only", default=",".join(PARTS), metavar="NAME,…",
                        help=f"parts, or bench and fast for all that begin so: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--data", type=Path, default=Path("data/tinystories"), help="a prepared dataset "
                                                                                    "(default: data/tinystories)")
    parser.add_argument("--out", type=Path, default=Path("out/cuda"), help="gets the report, the logs and the runs "
                                                                           "(default: out/cuda)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: only to try this script")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.only.split(",")]
    for name in names:
        if name not in {"bench", "fast", *PARTS}:
            parser.error(f"no part {name!r}: the parts are {', '.join(PARTS)}")
    args.only = [part for part in PARTS if part in names or part.split("-")[0] in {"bench", "fast"} & set(names)]
    if not args.minutes > 0:
        parser.error(f"argument --minutes: {args.minutes:g} is not above 0")
    return args


if __name__ == "__main__":
    main()
