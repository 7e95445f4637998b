"""Test, benchmark and train on CUDA with one command, and write a report for the documentation.

    python -m tests.cuda                          as many parts as 9 minutes allow; run it twice for all of them
    python -m tests.cuda --only machine,tests     some parts
    python -m tests.cuda --device cpu --tiny      every part at toy size, to try this script itself

Each part runs in its own processes, and its result is written to report.json and report.md in --out as soon as it
ends. If a part fails or takes longer than its limit, that is reported and the next part starts. When run again, the
command skips completed parts and resumes a training run that was interrupted. See docs/cuda.md for what it needs.

At toy size, use the --data of  python prepare.py nursery --tokenizer bpe:300 --max_stories 60
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


@dataclass
class Harness:
    """What all parts need: the device, the dataset, the output folder and the deadline."""

    device: str
    tiny: bool
    data: Path  # a prepared dataset folder
    out: Path  # for the report, the logs and the runs
    deadline: float  # in terms of time.monotonic()

    def call(self, name, *command):
        """Run a Python command in `out`, with stdout in logs/NAME.out and stderr in logs/NAME.log; returns its stdout.

        Raises RuntimeError for an exit code other than 0, with the end of the output, and subprocess.TimeoutExpired if
        the command is still running at the deadline.
        """
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                                    "PYTHONUNBUFFERED": "1", "TEST_DEVICE": self.device}
        with open(log, "w") as stderr, open(log.with_suffix(".out"), "w") as stdout:
            process = subprocess.Popen([sys.executable, *map(str, command)], cwd=self.out, env=environment,
                                       stdout=stdout, stderr=stderr, start_new_session=True)
            try:
                process.wait(max(0, self.deadline - time.monotonic()))
            finally:  # also after Ctrl-C: no process of the part may stay on the GPU
                end_process_group(process)
        output = log.with_suffix(".out").read_text(encoding="utf-8", errors="replace")
        if process.returncode:
            lines = (output + log.read_text(encoding="utf-8", errors="replace")).splitlines()
            raise RuntimeError("\n".join([f"{name}: exit code {process.returncode}", *lines[-40:]]))
        return output


def end_process_group(process):
    """End a process and its children: SIGTERM, after which training saves, and SIGKILL after SAVE_SECONDS."""
    try:
        process.terminate()  # does nothing if it has ended
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
    result = json.loads(harness.call(f"bench-{subject}", "-m", "tools.bench", subject, "--json",
                                     f"--device={harness.device}", *flags))
    return {**result["machine"], **result["ceilings"]} if subject == "machine" else result[subject]


def run_tests(harness):
    """Run the tests marked `cuda`: the numbers of passed and skipped ones. Raises RuntimeError if none passed."""
    text = harness.call("tests", "-m", "pytest", "-o", "addopts=", "-q", "-m", "cuda", "-p", "no:cacheprovider", "-rs",
                        f"--rootdir={ROOT}", ROOT / "tests" / "cuda" / "test_cuda.py")
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|skipped)", text.splitlines()[-1])}
    reasons = sorted(set(re.findall(r"^SKIPPED .*?: (.*)$", text, re.M)))
    if not counts.get("passed"):
        raise RuntimeError(f"no test was run: {', '.join(reasons)}")
    return counts | {"skipped_because": reasons}


def train_published(harness):
    """Train config/tinystories.py, starting or resuming it, evaluate it, and generate a story with it."""
    common = [f"--device={harness.device}", "--out_dir=out/published"]
    harness.call("published", ROOT / "train.py", ROOT / "config/tinystories.py", f"--dataset={harness.data.name}",
                 *common, *(TINY_FLAGS if harness.tiny else []), "--resume=auto")
    log = [json.loads(line) for line in (harness.out / "out/published/log.jsonl").read_text().splitlines()]
    steps = [record for record in log if record["kind"] == "step"]
    speed = statistics.median(record["tokens_per_s"] for record in steps)
    printed = harness.call("published-eval", ROOT / "train.py", "--eval_only", *common)
    evaluation = dict(line.split(": ") for line in printed.splitlines() if ": " in line)
    story = harness.call("published-story", ROOT / "sample.py", *common, "--start=Once upon a time", "--seed=1")
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
    """The report so far, or a new one. Raises UserError if it is of another device, dataset or size."""
    subject = {"device": harness.device, "tiny": harness.tiny, "data": str(harness.data)}
    path = harness.out / "report.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else subject | {"parts": {}}
    if report | subject != report:
        raise UserError(f"{path} is of another device, dataset or size: choose another folder with --out")
    return report


def as_markdown(report):
    """The report as Markdown: one section per part, with a table of its metrics, then its story."""
    size = " at toy size (the metrics mean nothing)" if report["tiny"] else ""
    lines = [f"# `python -m tests.cuda --device {report['device']}`{size}, on {Path(report['data']).name}"]
    for name, part in report["parts"].items():
        lines += ["", f"## {name}: {part['status']}, {part['seconds']:.0f} s", ""]
        if "error" in part:
            lines += ["```", part["error"], "```"]
        metrics = dict(flatten(part.get("figures", {})))
        story = metrics.pop("story", "")
        if metrics:
            lines += ["| metric | value |", "|---|---|"]
        for key, value in metrics.items():
            lines.append(f"| `{key}` | {f'{value:,.5g}' if isinstance(value, float) else value} |")
        lines += [f"\n> {paragraph}" for paragraph in story.splitlines() if paragraph]
    return "\n".join(lines) + "\n"


def flatten(metrics, prefix=""):
    """The metrics in nested dicts, (name, value) each, without spreads: those are only in report.json."""
    for name, value in metrics.items():
        if isinstance(value, dict) and name != "spreads":
            yield from flatten(value, f"{prefix}{name}: ")
        elif name != "spreads":
            yield f"{prefix}{name}", value


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
    files.acquire_lock(out / ".lock", args.out)
    harness = Harness(args.device, args.tiny, data, out, time.monotonic() + 60 * args.minutes)
    report = read_report(harness)
    (out / "data" / data.name).unlink(missing_ok=True)
    (out / "data" / data.name).symlink_to(data, target_is_directory=True)
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
    except subprocess.TimeoutExpired as error:
        result = {"status": "not finished", "error": f"stopped after {error.timeout:.0f} s, the limit of the part or "
                                                     "of --minutes; its output is in the folder logs"}
    except Exception:  # also for a bug in this script the next part should still run
        result = {"status": "failed", "error": traceback.format_exc()}
    report["parts"][name] = result | {"seconds": time.monotonic() - started}
    for file_name, text in (("report.json", json.dumps(report, indent=2)), ("report.md", as_markdown(report))):
        files.atomic_write(harness.out / file_name, lambda file: file.write(text.encode()))
    print(f"{result['status']} after {time.monotonic() - started:.0f} s", flush=True)
    return result["status"] == "done"


def parse_args(argv):
    """The command line as a namespace; exits with code 2 for wrong flags."""
    parser = Parser(prog="python -m tests.cuda", description="Test and benchmark on CUDA, and write a report.")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try this script (default: cuda)")
    parser.add_argument("--minutes", type=float, default=9, help="stop after this time (default: %(default)s)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[*PARTS], metavar="NAME,…",
                        help=f"parts to run, of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--data", type=Path, default=Path("data/tinystories"), help="dataset (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/cuda"), help="for all results (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: only to try this script")
    args = parser.parse_args(argv)
    if unknown := set(args.only) - PARTS.keys():
        parser.error(f"unknown part {min(unknown)!r}: the parts are {', '.join(PARTS)}")
    return args


if __name__ == "__main__":
    main()
