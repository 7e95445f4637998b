"""Is it better? Train a config with several values of its settings and several seeds, and compare the losses.

    python -m tools.sweep config/tinystories_fast.py --max_tokens=400_000 --vary learning_rate=3e-3,9e-3 --seeds 3
    python -m tools.sweep config/tinystories_fast.py --max_tokens=400_000 --vary muon_lr=0.005..0.05:log --trials 30

The first is a grid: it trains the config as it is and every combination of the values, all with the same seeds, and
compares each combination with the config, seed by seed. The second is a search with Optuna (Akiba et al. 2019, arXiv
1907.10902).

    out/<sweep>/learning_rate=0.003,seed=1337/   a run like any other, and output.log with what train.py printed

What is done is read from these folders. Ctrl-C stops all runs; the same command resumes them. docs/experiments.md has
examples.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

import itertools
import math
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from sample import number
from storygpt.corpus.dataset import read_meta
from storygpt.run import checkpoints, read_log
from storygpt.settings import BUDGETS, Config, apply_overrides, parse_value, read_command_line
from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line
from storygpt.system.hardware import StopSignals
from tools import compare

ROOT = Path(__file__).parent.parent
EXAMPLE = "learning_rate=1e-3,2e-3 (values) or learning_rate=1e-3..2e-2:log (a range)"
SIGNIFICANCE = 0.05  # probability of at least one wrong "better" or "worse" in a table where nothing differs
MAX_SEEDS = 1_000  # the largest number of additional seeds that a verdict names
POLL_SECONDS = 0.5
PLOTTED = 10  # curves in a plot, as many as matplotlib has colors


@dataclass(frozen=True)
class Range:
    """The values from `low` to `high` of a setting, sampled on a logarithmic scale if `log`."""

    low: float
    high: float
    log: bool


@dataclass
class Run:
    """A run of the sweep: what was asked for, and what became of it."""

    settings: dict  # those that vary
    seed: int
    folder: Path
    log: dict = None  # from `compare.read_run`; None: it has not begun
    state: str = "not finished"  # or "finished", "pruned", "failed"
    error: str = ""  # why it failed
    trial: object = None  # of Optuna, in a search, for the first seed
    reported: int = 0  # evaluations that `trial` knows

    def loss(self, metric):
        """Its lowest validation loss, under this key in the log."""
        return min(record[metric] for record in self.log["evals"])


@dataclass
class Sweep:
    """A sweep: its command line, and what the threads that train its runs share."""

    settings: dict  # of the config file and the flags, for train.py
    base: Config  # all settings of the config as it is: the baseline
    varied: dict  # setting → list of values or Range, in the order of Config
    seeds: list
    trials: int  # settings to try in a search; 0: a grid
    prune: bool  # whether a search stops runs early that are worse than the median
    jobs: int
    study: object = None  # optuna.Study of a search, in memory
    runs: dict = field(default_factory=dict)  # name of the folder → Run
    slots: list = field(default_factory=list)  # numbers of the jobs that train no run now
    processes: set = field(default_factory=set)  # of train.py, running
    signals: StopSignals = None
    lock: threading.RLock = field(default_factory=threading.RLock)  # for study and runs

    @property
    def metric(self):
        """The key of the loss in log.jsonl. Losses in nats/token depend on the tokenizer, and so on the dataset."""
        return "val_bpb" if "dataset" in self.varied else "val_loss"

    @property
    def baseline(self):
        """The varied settings of the config as it is."""
        return {name: parse_value(name, str(getattr(self.base, name))) for name in self.varied}

    @property
    def grid(self):
        """All combinations of the values of a grid, the baseline first."""
        combinations = [dict(zip(self.varied, values)) for values in itertools.product(*self.varied.values())]
        return [self.baseline, *(settings for settings in combinations if settings != self.baseline)]


@exit_with_one_line
def main(argv=None):
    """Train the runs of a sweep that are missing, and print the comparison; `argv` as on the command line."""
    sweep, picture = parse_args(argv)
    check_settings(sweep)
    find_runs(sweep)
    print_plan(sweep)
    stopped = train_all(sweep)
    print_results(sweep)
    if picture:
        plot(sweep)
    if stopped:
        print("stopped: the same command resumes the sweep", file=sys.stderr)
        sys.exit(130)


# ---- the command line ----


def make_parser():
    """The parser of the flags that are not settings."""
    parser = Parser(prog="python -m tools.sweep", usage="%(prog)s [CONFIG] [--setting=value ...] --vary SETTING=VALUES "
                    "[--vary ...] [--seeds N] [--trials N] [--no_prune] [--jobs N] [--picture]",
                    description="Train with several values of settings and several seeds, and compare the losses. Each "
                    "run is a folder in --out_dir, by default out/<config>-<the settings that vary>.")
    positive = number(int, 1, 10**6, "1 or more")
    parser.add_argument("--vary", action="append", default=[], metavar="SETTING=VALUES", help=EXAMPLE)
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds per setting (default: 3, in a search 1)")
    parser.add_argument("--trials", type=positive, default=0, metavar="N",
                        help="search: try N settings, the config as it is among them, instead of all combinations")
    parser.add_argument("--no_prune", action="store_true", help="search: train all runs to their end (otherwise those "
                        "that are worse than the median are stopped in their second half)")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N",
                        help="runs at a time, each on its part of the CPU's threads, or on its own GPU (default: 1)")
    parser.add_argument("--picture", action="store_true", help="plot the losses, into the folder of the sweep")
    return parser


def parse_args(argv):
    """The Sweep of a command line, and whether to plot. Exits with code 2 for a wrong flag."""
    parser = make_parser()
    settings, flags, args = read_command_line(argv, {}, parser)
    try:
        varied = parse_varied(args.vary)
        if not varied and (args.trials or (args.seeds or 1) == 1):
            raise UserError(f"nothing to compare: give --vary {EXAMPLE}, or --seeds 2 or more")
        if not args.trials and any(isinstance(values, Range) for values in varied.values()):
            raise UserError("a range needs --trials N, the number of settings to try")
    except UserError as error:
        parser.error(str(error))
    flags.setdefault("out_dir", f"{settings.get('out_dir', Config.out_dir)}-{'-'.join(varied) or 'seeds'}")
    settings = apply_overrides(settings, flags)
    base = Config(**settings)
    seeds = [base.seed + i for i in range(args.seeds or (1 if args.trials else 3))]
    # Runs of different or unknown lengths have no evaluations at comparable iterations.
    prune = bool(args.trials) and not args.no_prune and not base.max_minutes and not varied.keys() & set(BUDGETS)
    return Sweep(settings, base, varied, seeds, args.trials, prune, args.jobs), args.picture


def parse_varied(texts):
    """The varied settings of all --vary flags, name → list of values or Range, in the order of Config.

    Raises UserError for a setting or values that cannot be varied.
    """
    varied = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals:
            raise UserError(f"--vary {text} has no values: write --vary {EXAMPLE}")
        if name in ("seed", "out_dir"):
            raise UserError(f"{name} cannot be varied: use --" + ("seeds N" if name == "seed" else "out_dir=FOLDER"))
        if name in varied:
            raise UserError(f"--vary {name} is given twice: give all its values in one")
        is_range = ".." in values and not isinstance(getattr(Config, name, ""), str)  # text may contain ..
        varied[name] = parse_range(name, values) if is_range else list(dict.fromkeys(
            parse_value(name, value) for value in values.split(",")))
    if len([name for name in varied if name in BUDGETS]) > 1:
        raise UserError(f"--vary sets the length of the run in two units: use one of {', '.join(BUDGETS)}")
    return {f.name: varied[f.name] for f in fields(Config) if f.name in varied}


def parse_range(name, text):
    """The Range that a text such as 1e-3..2e-2:log means. Raises UserError if it is none, or not one of numbers."""
    match = re.fullmatch(r"(.+?)\.\.(.+?)(:log)?", text)
    if not match:
        raise UserError(f"--vary {name}={text}: a range is LOW..HIGH or LOW..HIGH:log")
    low, high, log = parse_value(name, match[1]), parse_value(name, match[2]), match[3] is not None
    if isinstance(low, bool):
        raise UserError(f"--vary {name}={text}: {name} is no number, so give its values, separated by commas")
    if low >= high or (log and low <= 0):
        raise UserError(f"--vary {name}={text}: the low end must be below the high end and, with :log, above 0")
    return Range(low, high, log)


def check_settings(sweep):
    """Raise UserError if Config refuses a combination of a grid, or a dataset or a package is missing."""
    try:
        import optuna
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise UserError("sweeps need optuna and scipy:  pip install -r requirements-extra.txt") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # this program prints one line per run itself
    for settings in [sweep.baseline] if sweep.trials else sweep.grid:
        try:
            cfg = Config(**apply_overrides(sweep.settings, settings))
        except UserError as error:
            raise UserError(f"{settings_name(settings)}: {error}") from error
        read_meta(Path("data", cfg.dataset))
    if checkpoints(sweep.base.out_dir):
        raise UserError(f"{sweep.base.out_dir} contains a run: choose another folder for the sweep (--out_dir)")


# ---- which runs there are ----


def find_runs(sweep):
    """Fill `runs`, of a search with those that it has begun. UserError: the folder is in use, or of another sweep."""
    out_dir = Path(sweep.base.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    files.acquire_lock(out_dir / ".lock", out_dir)
    if not sweep.trials:
        for seed, settings in itertools.product(sweep.seeds, sweep.grid):
            add_run(sweep, settings, seed)
        return
    import optuna

    # Not in the first half of a run: a high learning rate is worse there, also where it is better in the end.
    sweep.study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_warmup_steps=sweep.base.max_iters // 2))
    add_run(sweep, sweep.baseline, sweep.seeds[0])
    for log in sorted(out_dir.glob("*/log.jsonl")):
        config = compare.read_run(str(log.parent))["config"]
        settings = {name: config[name] for name in sweep.varied}
        if config["seed"] == sweep.seeds[0] and is_searched(sweep, settings):
            add_run(sweep, settings, sweep.seeds[0])


def add_run(sweep, settings, seed, trial=None):
    """Add a run, with Optuna's trial if that suggested it; returns the Run. Raises UserError as `read` does."""
    name = run_name(settings, seed)
    if name not in sweep.runs:
        run = Run(settings, seed, Path(sweep.base.out_dir, name), trial=trial)
        read(sweep, run)
        if sweep.trials and not trial and seed == sweep.seeds[0]:
            if is_searched(sweep, settings):
                sweep.study.enqueue_trial(settings)
                run.trial, _ = new_trial(sweep)
            else:  # the baseline: it counts for the median
                run.trial = sweep.study.ask()
            tell_result(sweep, run)
        sweep.runs[name] = run
    return sweep.runs[name]


def read(sweep, run):
    """Set what the folder of a run tells. Raises UserError if it is of another sweep, or its log is damaged."""
    if not Path(run.folder, "log.jsonl").exists():
        return
    run.log = compare.read_run(str(run.folder))
    expected = asdict(Config(**train_settings(sweep, run)))
    for name, value in run.log["config"].items():
        if name not in ("out_dir", "device") and value not in (expected.get(name), "–"):
            raise UserError(f"{run.folder} is of another sweep ({name} = {value!r}, not {expected.get(name)!r}): "
                            "repeat its command, or choose another folder (--out_dir)")
    if (run.folder / "pruned").exists():
        run.state = "pruned"
    elif read_log(run.folder / "log.jsonl")[-1].get("reason") == "finished":
        run.state = "finished"


def train_settings(sweep, run):
    """The settings of a run, as train.py gets them."""
    return apply_overrides(sweep.settings, run.settings | {"seed": run.seed, "out_dir": str(run.folder)})


def settings_name(settings):
    """Settings as text, which is also the beginning of a folder's name."""
    return ",".join(f"{name}={urllib.parse.quote(str(value), safe='')}" for name, value in settings.items())


def run_name(settings, seed):
    """The name of the folder of a run; tools/compare.py groups runs by it."""
    return settings_name(settings | {"seed": seed})


# ---- a search ----


def is_searched(sweep, settings):
    """Whether settings are within the values and ranges of a search."""
    return all(values.low <= settings[name] <= values.high if isinstance(values, Range) else settings[name] in values
               for name, values in sweep.varied.items())


def new_trial(sweep):
    """A new trial of Optuna, and the settings that it suggests: those queued, if there are any."""
    trial = sweep.study.ask()
    return trial, {name: suggest(trial, name, values) for name, values in sweep.varied.items()}


def suggest_run(sweep):
    """The Run that Optuna suggests, None if the sweep has it already."""
    from optuna.trial import TrialState

    with sweep.lock:
        trial, settings = new_trial(sweep)
        if run_name(settings, sweep.seeds[0]) not in sweep.runs:
            return add_run(sweep, settings, sweep.seeds[0], trial)
        sweep.study.tell(trial, state=TrialState.FAIL)


def suggest(trial, name, values):
    """Optuna's suggestion for a setting, a number with six digits: the run's name and flags are then short."""
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    if isinstance(values.low, int):
        return trial.suggest_int(name, values.low, values.high, log=values.log)
    return float(f"{trial.suggest_float(name, values.low, values.high, log=values.log):g}")


def report_losses(sweep, run):
    """Report new evaluations of a run to Optuna; returns whether the run is to be pruned.

    Only runs of the first seed are: without its unlucky seeds, a setting would look better than it is.
    """
    with suppress(compare.NoLogYet):
        evals = compare.read_run(str(run.folder))["evals"]
        for record in evals[run.reported:]:
            run.trial.report(record[sweep.metric], record["iter"])
        run.reported = len(evals)
    return sweep.prune and run.settings != sweep.baseline and run.trial.should_prune()


def tell_result(sweep, run):
    """Tell Optuna how a run of a search has ended, if it has."""
    from optuna.trial import TrialState

    states = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    if run.trial and run.state in states:
        report_losses(sweep, run)
        loss = run.loss(sweep.metric) if run.state == "finished" else None
        sweep.study.tell(run.trial, loss, state=states[run.state])


# ---- training ----


def train_all(sweep):
    """Train until no run is left; returns whether a signal has stopped that."""
    sweep.slots = list(range(sweep.jobs))
    with StopSignals(rank=0) as sweep.signals, ThreadPoolExecutor(sweep.jobs) as pool:
        tasks = [pool.submit(work, sweep, run) for run in sweep.runs.values()]
        tasks += [pool.submit(work, sweep) for _ in range(sweep.trials - len(sweep.runs))]
        try:
            for task in as_completed(tasks):
                task.result()  # raises its exception
        except BaseException:  # a bug, or the second Ctrl-C
            sweep.signals.received = True
            for process in sweep.processes.copy():
                process.kill()
            raise
    return sweep.signals.received


def work(sweep, run=None):
    """Train a run, by default one that the search suggests; in a search, also with the other seeds if it finishes."""
    if run := run or suggest_run(sweep):
        train_run(sweep, run)
        if sweep.trials and run.state == "finished":
            for seed in sweep.seeds[1:]:
                train_run(sweep, add_run(sweep, run.settings, seed))


def train_run(sweep, run):
    """Train a run, or resume it, unless it has ended; sets its state. What train.py prints goes to output.log."""
    while files.is_locked(run.folder / ".lock") and not sweep.signals.received:
        time.sleep(POLL_SECONDS)  # train.py goes on if only the sweep is killed
    if run.state != "not finished" or sweep.signals.received:
        return
    run.folder.mkdir(exist_ok=True)
    slot = sweep.slots.pop()
    with open(run.folder / "output.log", "ab") as output:
        start = output.tell()
        process = start_training(sweep, slot, run, output)
        pruned = False
        while process.poll() is None and not pruned and not sweep.signals.received:
            time.sleep(POLL_SECONDS)
            pruned = bool(run.trial) and report_losses(sweep, run)
        process.terminate()  # train.py then saves and exits
        code = process.wait()
    sweep.processes.discard(process)
    sweep.slots.append(slot)
    if pruned:
        (run.folder / "pruned").touch()
    read(sweep, run)
    if code and run.state == "not finished" and not sweep.signals.received:
        printed = (run.folder / "output.log").read_bytes()[start:].decode("utf-8", "replace").strip().splitlines()
        run.error = (printed or [f"train.py ended with code {code}"])[-1].removeprefix("error: ")
        run.state = "failed"
    with sweep.lock:
        tell_result(sweep, run)
    print_progress(sweep, run)


def start_training(sweep, slot, run, output):
    """Start train.py for a run in a process with its share of the threads, or its own GPU; it prints to a file."""
    command = [sys.executable, str(ROOT / "train.py"), "--resume=auto"]
    command += [f"--{name}={value}" for name, value in train_settings(sweep, run).items()]
    if sweep.base.device in ("auto", "cuda") and torch.cuda.is_available():
        command += [f"--device=cuda:{slot % torch.cuda.device_count()}"]
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // sweep.jobs))}
    process = subprocess.Popen(command, env=os.environ | threads, stdin=subprocess.DEVNULL, stdout=output,
                               stderr=subprocess.STDOUT)
    sweep.processes.add(process)
    return process


# ---- what is printed ----


def print_plan(sweep):
    """Print what the sweep consists of, and how much of it is done."""
    kind = f"search, {sweep.trials} settings" if sweep.trials else f"grid, {len(sweep.grid)} settings"
    print(f"{sweep.base.out_dir}: {kind}, seeds {', '.join(map(str, sweep.seeds))}; {count_done(sweep)} runs are done",
          flush=True)


def count_done(sweep):
    """How many runs are done, of how many, as text."""
    number = sum(run.state != "not finished" for run in sweep.runs.values())
    return f"{number} of {max(len(sweep.runs), sweep.trials)}"


def print_progress(sweep, run):
    """Print a line about a run that has ended."""
    result = f"failed: {run.error}" if run.state == "failed" else run.state
    if run.state == "finished":
        result = f"loss {run.loss(sweep.metric):.4f}, {speed(run):,.0f} tokens/s"
    print(f"{count_done(sweep)} {run.folder.name}: {result}", flush=True)


def speed(run):
    """The speed of a run, in tokens per second."""
    return run.log["tokens"] / run.log["seconds"]


def print_results(sweep):
    """Print the table of the settings, and why runs failed. Raises UserError if all runs failed."""
    failed = [run for run in sweep.runs.values() if run.state == "failed"]
    if failed and len(failed) == len(sweep.runs):
        raise UserError(f"all {len(failed)} runs failed, the last one with: {failed[-1].error}")
    rows = table_rows(sweep)
    print(compare.markdown([list(rows[0]), *(list(row.values()) for row in rows)]))
    for run in failed:
        print(f"failed: {run.folder.name}: {run.error}")
    print("difference: from the first row, seed by seed, ± its standard error\nbetter, worse: by a paired t-test, at "
          f"{SIGNIFICANCE:.0%} for the whole table (Bonferroni), if the number of seeds was fixed beforehand")
    for warning in compare.comparability_warnings([run.log for run in sweep.runs.values() if run.state == "finished"]):
        print(f"note: {warning}")
    if sweep.trials:
        print(confirmation(sweep))


def table_rows(sweep):
    """The rows of the table, each heading → text."""
    groups = group_runs(sweep)
    baseline, rows = losses_of(sweep, groups[0]), []
    for runs in groups:
        losses = losses_of(sweep, runs)
        speeds = [speed(run) for run in runs if run.state == "finished"]
        difference, verdict = "–", "no result of the baseline" if losses else runs[0].state
        if not rows:
            verdict = "baseline"
        elif losses.keys() & baseline.keys():
            mean, error, verdict = paired_difference(losses, baseline, len(groups) - 1)
            difference = f"{mean:+.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")
        rows.append({name: str(value) for name, value in runs[0].settings.items()} | {
            "seeds": str(len(losses)), "bits per byte" if sweep.metric == "val_bpb" else "validation loss":
            compare.mean_and_deviation(list(losses.values())), "difference": difference,
            "tokens/s": f"{np.mean(speeds):,.0f}" if speeds else "–", "verdict": verdict})
    return rows


def group_runs(sweep):
    """The runs as lists of the same settings: the baseline, then the others, in a search from the lowest mean loss."""
    groups = {}
    for run in sweep.runs.values():
        groups.setdefault(settings_name(run.settings), []).append(run)
    baseline, *others = groups.values()
    return [baseline, *(sorted(others, key=lambda runs: mean_loss(sweep, runs)) if sweep.trials else others)]


def losses_of(sweep, runs):
    """The losses of those of these runs that are finished, seed → loss."""
    return {run.seed: run.loss(sweep.metric) for run in runs if run.state == "finished"}


def mean_loss(sweep, runs):
    """The mean loss of those of these runs that are finished; infinity if none is."""
    return float(np.mean(list(losses_of(sweep, runs).values()) or [math.inf]))


def paired_difference(losses, baseline, comparisons):
    """Compare the losses of two settings, seed → loss, on the seeds that both have, at least one.

    Returns the mean difference, its standard error (NaN for one seed) and a verdict. A paired t-test decides, at
    SIGNIFICANCE / comparisons, so that SIGNIFICANCE holds for all comparisons together (Bonferroni).
    """
    from scipy import stats

    differences = np.array([losses[seed] - baseline[seed] for seed in losses.keys() & baseline.keys()])
    n, mean = len(differences), float(differences.mean())
    if n == 1:
        return mean, math.nan, "not distinguishable (one seed)"
    deviation = float(differences.std(ddof=1))
    seeds = np.arange(n, n + MAX_SEEDS + 1)
    # The difference that is significant with so many seeds, if its mean and deviation stay the same.
    needed = stats.t.ppf(1 - SIGNIFICANCE / comparisons / 2, seeds - 1) * deviation / np.sqrt(seeds)
    enough = abs(mean) > needed
    more = int(enough.argmax())  # 0 also if it is never enough
    if enough[0]:
        verdict = "better" if mean < 0 else "worse"
    elif more:
        verdict = f"not distinguishable ({more} more seed{'s' * (more > 1)} would tell)"
    else:
        verdict = f"not distinguishable ({MAX_SEEDS:,} more seeds would not tell)"
    return mean, deviation / math.sqrt(n), verdict


def confirmation(sweep):
    """How to confirm the best settings of a search, as text."""
    baseline, *others = group_runs(sweep)  # from the lowest loss
    if not others or mean_loss(sweep, others[0]) >= mean_loss(sweep, baseline):
        return "no settings have a lower loss than the config as it is"
    flags = " ".join(f"--vary {name}={value}" for name, value in others[0][0].settings.items())
    return ("the lowest of many losses is partly luck; to confirm it with new seeds, run the same command with these "
            f"flags instead of its --vary and --trials:\n{flags} --seeds 5 --seed={sweep.seeds[-1] + 1} "
            f"--out_dir={sweep.base.out_dir}-best")


def plot(sweep):
    """Plot the losses of the best settings into the folder of the sweep."""
    path = Path(sweep.base.out_dir, "losses.png")
    baseline, *others = group_runs(sweep)
    groups = [baseline, *sorted(others, key=lambda runs: mean_loss(sweep, runs))][:PLOTTED]
    groups = [[run.log for run in runs if run.state == "finished"] for runs in groups]
    if not any(groups):
        return print("no plot: no run is finished")
    compare.plot([group for group in groups if group], path)
    print(f"plot: {path}" + f", the baseline and the {PLOTTED - 1} best settings" * (len(others) >= PLOTTED))


if __name__ == "__main__":
    main()
