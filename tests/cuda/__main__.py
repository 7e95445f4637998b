"""Test, benchmark and train on CUDA with one command, and write a report for the documentation.

    python -m tests.cuda                          as many parts as 9 minutes allow; run it twice for all of them
    python -m tests.cuda --only machine,tests     some parts
    python -m tests.cuda --device cpu --tiny      every part at toy size, to try this script itself

All parts together take at most 15 minutes of a GPU. At toy size, most of the time is spent on evaluating the whole
validation split: use the --data of  python prepare.py nursery --tokenizer bpe:300 --max_stories 60

Each part runs in its own processes, and its result is written to report.json and report.md in --out as soon as it
ends. If a part fails or takes longer than its limit, that is reported and the next part starts. When run again, the
command skips completed parts and resumes a training run that was interrupted.

Needs torch, numpy, tiktoken, tqdm, pytest, a C compiler and a prepared dataset; no network. See docs/cuda.md.
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
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line

TINY_FLAGS = ("--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --gradient_accumulation_steps=2 "
              "--max_iters=8 --warmup_iters=1 --eval_interval=4 --eval_iters=1 --compile=False").split()
SAVE_SECONDS = 30  # for a training run to save its checkpoint after SIGTERM


class PartFailed(Exception):
    """The command of a part failed; the message is the end of its output."""


class OutOfTime(Exception):
    """The command of a part was stopped, because its limit or --minutes have passed."""


@dataclass
class Harness:
    """What all parts need: the device, the dataset, the output folder and the deadline."""

    device: str
    tiny: bool
    data: Path  # a prepared dataset folder
    out: Path  # for the report, the logs and the runs
    deadline: float  # in terms of time.monotonic()

    def call(self, name, command, environment=None):
        """Run a Python command in `out`, with stdout in logs/NAME.out and stderr in logs/NAME.log; returns its stdout.

        `environment`: additional variables. Raises PartFailed for an exit code other than 0, and OutOfTime if the
        command is still running at the deadline.
        """
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"} | (environment or {})
        if self.tiny:
            environment["OMP_NUM_THREADS"] = "1"  # models this small are slower with more threads
        with open(log, "w") as stderr, open(log.with_suffix(".out"), "w") as stdout:
            process = subprocess.Popen([sys.executable, *map(str, command)], cwd=self.out, env=environment,
                                       stdout=stdout, stderr=stderr, start_new_session=True)
            try:
                process.wait(max(0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise OutOfTime(f"stopped after {error.timeout:.0f} s, the limit of the part or of --minutes; its "
                                f"output is in {log.parent}") from error
            finally:  # also after Ctrl-C: no process of the part may stay on the GPU
                end_process_group(process)
            texts = [Path(file.name).read_text(encoding="utf-8", errors="replace") for file in (stdout, stderr)]
        if process.returncode:
            end = "\n".join("".join(texts).splitlines()[-40:])
            raise PartFailed(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{end}")
        return texts[0]


def end_process_group(process):
    """End a process and its children: SIGTERM, after which training saves, and SIGKILL after SAVE_SECONDS."""
    try:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(SAVE_SECONDS)
    finally:  # also after a second Ctrl-C
        with suppress(ProcessLookupError):  # its group has no processes any more
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- the parts: each takes a Harness and returns a dict of metrics ----


def bench(subject, harness):
    """The results of tools.bench for a subject; those of the machine and its ceilings only for `machine`."""
    flags = ["--tiny", "--rounds=1"] if harness.tiny else ["--rounds=3"]
    text = harness.call(f"bench-{subject}", ["-m", "tools.bench", subject, "--json", f"--device={harness.device}",
                                             *flags])
    result = json.loads(text)
    return {**result["machine"], **result["ceilings"]} if subject == "machine" else result[subject]


def run_tests(harness):
    """Run the tests marked `cuda`: the numbers of passed and skipped ones. Raises PartFailed also if none passed."""
    tests = ROOT / "tests" / "cuda" / "test_cuda.py"
    text = harness.call("tests", ["-m", "pytest", "-o", "addopts=", "-q", "-m", "cuda", "-p", "no:cacheprovider", "-rs",
                                  f"--rootdir={ROOT}", tests], {"TEST_DEVICE": harness.device})
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|skipped)", text.splitlines()[-1])}
    reasons = sorted(set(re.findall(r"^SKIPPED .*?: (.*)$", text, re.M)))
    if not counts.get("passed"):
        raise PartFailed(f"no test was run: {', '.join(reasons)}")
    return counts | {"skipped_because": reasons}


def train_published(harness):
    """Train config/tinystories.py, starting or resuming it, evaluate it, and generate a story with it.

    Raises OutOfTime if the run was stopped; it has saved a checkpoint then, and the next call resumes it.
    """
    out, common = harness.out / "out" / "published", [f"--device={harness.device}", "--out_dir=out/published"]
    harness.call("published", [ROOT / "train.py", ROOT / "config/tinystories.py", f"--dataset={harness.data.name}",
                               *common, *(TINY_FLAGS if harness.tiny else []), "--resume=auto"])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [record for record in log if record["kind"] == "step"]
    speed = statistics.median(record["tokens_per_s"] for record in steps)
    printed = harness.call("published-eval", [ROOT / "train.py", "--eval_only", *common])
    evaluation = dict(line.split(": ") for line in printed.splitlines() if ": " in line)
    story = harness.call("published-story", [ROOT / "sample.py", *common, "--start=Once upon a time", "--seed=1"])
    return {**{name: float(evaluation[name]) for name in ("loss", "standard_error", "bits_per_byte")},
            "tokens": steps[-1]["tokens"], "seconds": max(record.get("seconds", 0) for record in log),
            "tokens_per_s": speed, "training_seconds": steps[-1]["tokens"] / speed,
            "first_step_seconds": steps[0]["seconds"], "resumed": sum(record["kind"] == "run" for record in log) - 1,
            "story": story.strip()}


# Each part with its limit in minutes on a GPU, 15 together.
PARTS = {
    "machine": (1, functools.partial(bench, "machine")),
    "tests": (4, run_tests),
    "bench-train": (4, functools.partial(bench, "train")),
    "published": (4, train_published),
    "generate": (2, functools.partial(bench, "generate")),
}


# ---- the report ----


def read_report(harness):
    """The report so far, or a new one. Raises UserError if it is damaged, or of another device, dataset or size."""
    subject = {"device": harness.device, "tiny": harness.tiny, "data": harness.data.name}
    path = harness.out / "report.json"
    if not path.exists():
        return {**subject, "parts": {}}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        parts = report["parts"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove it, or choose another folder with --out") from error
    if {**subject, "parts": parts} != report:
        raise UserError(f"{path} is of another device, dataset or size: choose another folder with --out")
    return report


def write_report(harness, report):
    """Write report.json and report.md, each atomically."""
    for name, text in (("report.json", json.dumps(report, indent=2)), ("report.md", as_markdown(report))):
        files.atomic_write(harness.out / name, lambda file: file.write(text.encode()))


def as_markdown(report):
    """The report as Markdown: one section per part, with a table of its metrics, then its story."""
    size = " at toy size (the metrics mean nothing)" if report["tiny"] else ""
    lines = [f"# `python -m tests.cuda --device {report['device']}`{size}, on data/{report['data']}"]
    for name, part in report["parts"].items():
        lines += ["", f"## {name}: {part['status']}, {part['seconds']:.0f} s", ""]
        if "error" in part:
            lines += ["```", part["error"], "```"]
        metrics = list(flatten(part.get("figures", {})))
        if metrics:
            lines += ["| metric | value |", "|---|---|",
                      *(f"| `{key[:160]}` | {format_value(value)} |" for key, value in metrics if key != "story")]
        lines += [f"\n> {paragraph}" for key, text in metrics if key == "story"
                  for paragraph in text.splitlines() if paragraph]
    return "\n".join(lines) + "\n"


def flatten(metrics, prefix=""):
    """The metrics in nested dicts, (name, value) each, without spreads: those are only in report.json."""
    for name, value in metrics.items():
        if isinstance(value, dict) and name != "spreads":
            yield from flatten(value, f"{prefix}{name}: ")
        elif name != "spreads":
            yield f"{prefix}{name}".replace("|", "/"), value


def format_value(value):
    """A metric as the text of a table cell."""
    return f"{value:,.5g}" if isinstance(value, float) else str(value).replace("|", "/")


# ---- the command ----


@exit_with_one_line
def main(argv=None):
    """Run the parts in --only that are not done yet; exit code 1 if one of them failed or did not finish."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the processes of the part too
    out, data = args.out.resolve(), args.data.resolve()
    if not (data / "meta.json").exists():
        raise UserError(f"no dataset in {args.data}: create it with  python prepare.py  or choose another with --data")
    (out / "data").mkdir(parents=True, exist_ok=True)
    link = out / "data" / data.name
    if link.is_symlink() and not link.exists():
        link.unlink()  # its target no longer exists
    if not link.exists():
        link.symlink_to(data, target_is_directory=True)
    if link.resolve() != data:
        raise UserError(f"{args.out} is of another dataset of this name, {link.resolve()}: choose another folder with "
                        "--out")
    harness = Harness(args.device, args.tiny, data, out, time.monotonic() + 60 * args.minutes)
    files.acquire_lock(out / ".lock", args.out)
    report = read_report(harness)
    unfinished = [name for name in args.only if not run_part(name, harness, report)]
    print(f"report: {args.out / 'report.md'}")
    if unfinished:
        raise UserError(f"not done: {', '.join(unfinished)}; read the report, then run the command again")


def run_part(name, harness, report):
    """Run a part unless it is done, and add its result to the report; returns whether it is done now."""
    if report["parts"].get(name, {}).get("status") == "done":
        print(f"{name}: already done")
        return True
    if time.monotonic() >= harness.deadline:
        print(f"{name}: not started, as --minutes have passed")
        return False
    print(f"{name}: ", end="", flush=True)
    started, (minutes, part) = time.monotonic(), PARTS[name]
    try:
        deadline = min(harness.deadline, started + 60 * minutes)
        result = {"status": "done", "figures": part(harness if harness.tiny else replace(harness, deadline=deadline))}
    except OutOfTime as error:
        result = {"status": "not finished", "error": str(error)}
    except PartFailed as error:
        result = {"status": "failed", "error": str(error)}
    except Exception:  # a bug in this script; the next part should still run
        result = {"status": "failed", "error": traceback.format_exc()}
    result["seconds"] = time.monotonic() - started
    report["parts"] = {part: result if part == name else report["parts"][part]
                       for part in PARTS if part == name or part in report["parts"]}
    write_report(harness, report)
    print(f"{result['status']} after {result['seconds']:.0f} s", flush=True)
    return result["status"] == "done"


def parse_args(argv):
    """The command line as a namespace; exits with code 2 for wrong flags."""
    parser = Parser(prog="python -m tests.cuda", description="Test and benchmark on CUDA, and write a report.")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try this script (default: cuda)")
    parser.add_argument("--minutes", type=float, default=9, help="stop after this time; run again for the remaining "
                                                                 "parts (default: 9)")
    parser.add_argument("--only", default=",".join(PARTS), metavar="NAME,…",
                        help=f"parts to run, of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--data", type=Path, default=Path("data/tinystories"), help="a prepared dataset "
                                                                                    "(default: data/tinystories)")
    parser.add_argument("--out", type=Path, default=Path("out/cuda"), help="folder for the report, the logs and the "
                                                                           "runs (default: out/cuda)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: only to try this script")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.only.split(",")]
    if unknown := set(names) - PARTS.keys():
        parser.error(f"unknown part {min(unknown)!r}: the parts are {', '.join(PARTS)}")
    args.only = [part for part in PARTS if part in names]
    if not args.minutes > 0:
        parser.error(f"argument --minutes: {args.minutes:g} is not above 0")
    return args


if __name__ == "__main__":
    main()
