"""Measure the figures of README.md on one commit: its runs, and the speed of training and generation.

    python -m tools.figures --fast      those of less than five minutes each
    python -m tools.figures             all of them, in hours; what this commit has already is not measured again

Of a run: its seconds, the `key: value` lines of its evaluation, and the share of its stories with one consistent hero.
The datasets of the configs must be prepared, and the machine idle. Runs go to out/figures/, results after each one to
out/figures.json.
"""

import storygpt  # noqa: F401, I001  (first: it prepares the process for importing torch)

import json
import re
import sys
import time
from functools import partial
from pathlib import Path

from storygpt.system import files
from storygpt.system.errors import Parser, exit_with_one_line
from storygpt.system.hardware import pick_device
from tools import judge
from tools.bench import ROOT, describe_machine, print_tables, run_script

PREPARE = ["prepare.py", "nursery", "--tokenizer=bpe:2048", "--force"]
SAMPLE = ["sample.py", "--out_dir=out/figures/quickstart", "--start=Once upon a time"]
# name → the arguments of train.py, and whether it takes less than five minutes
RUNS = {
    "quickstart": (["config/quickstart.py"], True),
    "speedrun": (["config/speedrun.py"], True),
    "tinystories_cpu_5min": (["config/tinystories_cpu.py", "--n_layer=4", "--max_minutes=4.75"], False),
    "tinystories_cpu": (["config/tinystories_cpu.py"], False),
    "tinystories_fast": (["config/tinystories_fast.py"], False),
    "tinystories_cpu_1h": (["config/tinystories_cpu_1h.py"], False),
}
SPEEDS = {"training_speed": ["train"], "generation_speed": ["generate"]}  # name → the arguments of tools.bench
RESULTS = Path("out/figures.json")


@exit_with_one_line
def main(argv=None):
    """Measure what is missing, and print the table; `argv` as on the command line."""
    parser = Parser(prog="python -m tools.figures", description="Measure the figures of README.md on this commit.")
    parser.add_argument("--fast", action="store_true", help="only those of less than five minutes each")
    args = parser.parse_args(argv)
    machine = describe_machine(pick_device("auto"))
    has_changes = not machine["git"] or machine["git"].endswith("+")  # then it does not name the code
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    measurements = {name: partial(measure_run, name, arguments)
                    for name, (arguments, is_fast) in RUNS.items() if is_fast or not args.fast}
    if not args.fast:
        measurements |= {name: partial(measure_speed, arguments) for name, arguments in SPEEDS.items()}
    for name, measure in measurements.items():
        if has_changes or results.get(name, {}).get("git") != machine["git"]:
            results[name] = machine | measure()
            print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
            files.atomic_write(RESULTS, lambda file: file.write(json.dumps(results, indent=1).encode()))
    print_tables(results)


def measure_run(name, arguments):
    """Train a run, evaluate it on the whole validation split and judge its stories: key → number.

    The seconds are those of train.py; of the quickstart, those of all its commands.
    """
    out_dir = f"out/figures/{name}"
    commands = [["train.py", *arguments, f"--out_dir={out_dir}", "--overwrite"]]
    if name == "quickstart":
        commands = [PREPARE, *commands, SAMPLE]
    started = time.perf_counter()
    for script, *arguments in commands:
        run_script([sys.executable, ROOT / script, *arguments])
    seconds = time.perf_counter() - started
    text = run_script([sys.executable, ROOT / "train.py", f"--out_dir={out_dir}", "--eval_only"])
    judge.main([out_dir])
    one_hero = json.loads(Path(out_dir, "judge.json").read_text(encoding="utf-8"))["measures"]["one_hero"] or {}
    values = {key: float(value) for key, value in re.findall(r"^(\w+): ([\d.]+)$", text, re.M)}
    return {"seconds": seconds, **values, **{f"one_hero_{name}": value for name, value in one_hero.items()}}


def measure_speed(arguments):
    """What a subject of tools.bench measures, as a dict: key → value or dict."""
    text = run_script([sys.executable, "-mtools.bench", *arguments, "--json"], cwd=ROOT)
    return json.loads(text)[arguments[0]]


if __name__ == "__main__":
    main()
