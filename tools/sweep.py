"""Is it better? Train a config with several values of its settings and several seeds, and compare the losses.

    python -m tools.sweep config/tinystories_fast.py --max_tokens=400_000 --vary learning_rate=3e-3,9e-3 --seeds 3
    python -m tools.sweep config/tinystories_fast.py --max_tokens=400_000 --vary muon_lr=0.005..0.05:log --trials 30

The first is a grid: every combination of the values is compared with the config as it is, on the same seeds. The
second is a search with Optuna (Akiba et al. 2019, arXiv 1907.10902).

    out/<sweep>/learning_rate=0.003,seed=1337/   a run like any other, and output.log with what train.py printed

What is done is read from these folders. Ctrl-C stops all runs; the same command resumes them. See docs/experiments.md.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

import itertools
import math
import os
import shlex
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from model import GPTConfig
from sample import number
from storygpt.checkpoint import load
from storygpt.corpus.dataset import data_sha256, read_meta
from storygpt.run import architecture_of, best_checkpoint
from storygpt.settings import BUDGETS, Config, apply_overrides, parse_value, read_command_line
from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line, shell_word
from storygpt.system.hardware import StopSignals
from tools import compare

EXAMPLE = "learning_rate=1e-3,2e-3 (values) or learning_rate=1e-3..2e-2:log (a range)"
SIGNIFICANCE = 0.05  # probability of at least one wrong "better" or "worse" in a table where nothing differs
MAX_SEEDS = 1_000  # the largest number of additional seeds that a verdict names


@dataclass
class Run:
    """A run of the sweep: what was asked for, and what became of it."""

    settings: dict  # those that vary
    seed: int
    folder: Path
    flags: dict  # all settings that train.py gets
    data: dict  # the hashes of its data, split → hex
    state: str = "not finished"  # or "finished", "pruned", "failed"
    log: dict = None  # from `compare.read_run`; None: it has not begun
    loss: float = math.inf  # its lowest validation loss, once it is finished
    speed: float = math.nan  # tokens per second
    process: subprocess.Popen = None  # train.py, while it runs


@dataclass
class Sweep:
    """A sweep: its command line, and its runs."""

    settings: dict  # of the config file and the flags, for train.py
    base: Config  # all settings of the config as it is: the baseline
    varied: dict  # setting → its values or range as Optuna's distribution, in the order of Config
    planned: list  # the varied settings of the baseline and, in a grid, all other combinations
    metric: str  # the key of the loss in log.jsonl
    seeds: list
    trials: int  # settings to try in a search; 0: a grid
    prune: bool  # whether a search stops runs early that are worse than the median
    jobs: int
    runs: dict = field(default_factory=dict)  # name of the folder → Run
    study: object = None  # optuna.Study of a search: its runs of the first seed that have ended
    suggestions: Iterator = iter(())  # Runs that Optuna suggests, None for one that the sweep has already


@exit_with_one_line
def main(argv=None):
    """Train the runs of a sweep that are missing, and print the comparison; `argv` as on the command line."""
    sweep = parse_args(argv)
    find_runs(sweep)
    kind = f"search, {sweep.trials} settings" if sweep.trials else f"grid, {len(sweep.planned)} settings"
    print(f"{sweep.base.out_dir}: {kind}, seeds {', '.join(map(str, sweep.seeds))}; {count_done(sweep)} runs are done",
          *[f"waiting for the train.py in {run.folder}" for run in sweep.runs.values() if is_left_over(run)],
          sep="\n", flush=True)
    stopped = train_all(sweep)
    print_results(sweep)
    if stopped:
        print("stopped: the same command resumes the sweep", file=sys.stderr)
        sys.exit(130)


# ---- the command line ----


def make_parser():
    """The parser of the flags that are not settings."""
    parser = Parser(prog="python -m tools.sweep", usage="%(prog)s [CONFIG] [--setting=value ...] --vary SETTING=VALUES "
                    "[--vary ...] [--seeds N] [--trials N] [--no_prune] [--jobs N]",
                    description="Train with several values of settings and several seeds, and compare the losses. Each "
                    "run is a folder in --out_dir, by default out/<config>-<the settings that vary>.")
    positive = number(int, 1, 10**6, "1 or more")
    parser.add_argument("--vary", action="append", default=[], metavar="SETTING=VALUES", help=EXAMPLE)
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds per setting (default: 3, in a search 1)")
    parser.add_argument("--trials", type=positive, default=0, metavar="N", help="search: how many settings to try")
    parser.add_argument("--no_prune", action="store_true", help="search: finish also runs worse than the median")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N",
                        help="runs at a time, each on its part of the CPU's threads, or on its own GPU (default: 1)")
    return parser


def parse_args(argv):
    """The Sweep of a command line."""
    parser = make_parser()
    settings, flags, args = read_command_line(argv, {}, parser)
    import optuna
    import scipy.stats  # noqa: F401  (for the verdicts: now is the time to miss it, not after the training)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # this program prints one line per run itself
    try:
        varied = parse_varied(args.vary)
        if not varied and (args.trials or args.seeds in (None, 1)):
            raise UserError(f"nothing to compare: give --vary {EXAMPLE}, or --seeds 2 or more")
        if not args.trials and not all(hasattr(space, "choices") for space in varied.values()):
            raise UserError("a range needs --trials N, the number of settings to try")
    except UserError as error:
        parser.error(str(error))
    flags.setdefault("out_dir", f"{settings.get('out_dir', Config.out_dir)}-{'-'.join(varied) or 'seeds'}")
    settings = with_architecture(apply_overrides(settings, flags))
    base = Config(**settings)
    if base.max_minutes and "max_iters" in varied:
        parser.error("--vary max_iters: the length of the config is max_minutes, so vary that, or max_tokens")
    baseline = {name: parse_value(name, str(getattr(base, name))) for name in varied}
    combinations = itertools.product(*(space.choices for space in varied.values())) if not args.trials else []
    grid = [dict(zip(varied, values)) for values in combinations]
    planned = [baseline, *(settings for settings in grid if settings != baseline)]
    seeds = [base.seed + i for i in range(args.seeds or (1 if args.trials else 3))]
    # Runs of different or unknown lengths have no evaluations at comparable iterations.
    prune = bool(args.trials) and not args.no_prune and not base.max_minutes and not varied.keys() & set(BUDGETS)
    metric = "val_bpb" if "dataset" in varied else "val_loss"  # nats/token depend on the tokenizer
    return Sweep(settings, base, varied, planned, metric, seeds, args.trials, prune, args.jobs)


def with_architecture(settings):
    """These settings, with the architecture of the run that init_from names, which train.py takes from there."""
    if settings.get("init_from", "scratch") == "scratch":
        return settings
    config = GPTConfig(**load(best_checkpoint(settings["init_from"]))["model_config"])
    return architecture_of(config) | settings


def parse_varied(texts):
    """The `varied` of a Sweep from the --vary flags. Raises UserError for a setting or values that cannot be varied."""
    from optuna.distributions import CategoricalDistribution

    varied = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name in ("seed", "out_dir"):
            raise UserError(f"{name} cannot be varied: use --" + ("seeds N" if name == "seed" else "out_dir=FOLDER"))
        if name in varied:
            raise UserError(f"--vary {name} is given twice: give all its values in one")
        if ".." in values and type(getattr(Config, name, None)) in (int, float):  # text, as ../a, may contain dots
            varied[name] = parse_range(name, values)
        else:
            values = dict.fromkeys(parse_value(name, value) for value in values.split(","))  # each once
            varied[name] = CategoricalDistribution(list(values))
    if len(varied.keys() & set(BUDGETS)) > 1:
        raise UserError(f"--vary sets the length of the run in two units: use one of {', '.join(BUDGETS)}")
    return {f.name: varied[f.name] for f in fields(Config) if f.name in varied}


def parse_range(name, text):
    """The distribution that a text such as 1e-3..2e-2:log means. Raises UserError if it means none."""
    from optuna.distributions import FloatDistribution, IntDistribution

    low, high = (parse_value(name, end) for end in text.removesuffix(":log").split("..", 1))
    try:
        return (IntDistribution if isinstance(low, int) else FloatDistribution)(low, high, text.endswith(":log"))
    except ValueError as error:
        raise UserError(f"--vary {name}={text}: {error}") from error


# ---- which runs there are, and which a search adds ----


def find_runs(sweep):
    """Fill `runs`. Raises UserError for settings or data that cannot be trained, or a folder that cannot be used."""
    import optuna

    for settings in sweep.planned:
        read_meta(Path("data", Config(**apply_overrides(sweep.settings, settings)).dataset))
    out_dir = Path(sweep.base.out_dir)
    if (out_dir / "log.jsonl").exists():
        raise UserError(f"{out_dir} is a run: choose another folder for the sweep (--out_dir)")
    out_dir.mkdir(parents=True, exist_ok=True)
    files.acquire_lock(out_dir / ".lock", out_dir)
    # Not in the first half of a run: a high learning rate is worse there, also where it is better in the end.
    sweep.study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_warmup_steps=sweep.base.max_iters // 2))
    # In a search, `learn` adds the other seeds of runs that finish.
    for seed, settings in itertools.product(sweep.seeds[:1] if sweep.trials else sweep.seeds, sweep.planned):
        add_run(sweep, settings, seed)
    if sweep.trials:
        for log in sorted(out_dir.glob("*/log.jsonl")):
            with suppress(compare.NoLogYet):
                config = compare.read_run(log.parent)["config"]
                settings = {name: config[name] for name in sweep.varied}
                if config["seed"] == sweep.seeds[0] and is_searched(sweep, settings):
                    add_run(sweep, settings, sweep.seeds[0])
        begun = sum(run.seed == sweep.seeds[0] for run in sweep.runs.values())
        sweep.suggestions = (suggest_run(sweep) for _ in range(sweep.trials - begun))


def add_run(sweep, settings, seed):
    """Add a run, unless the sweep has it; returns the Run. Raises UserError as `read` does."""
    name = name_of(settings | {"seed": seed})
    if name not in sweep.runs:
        folder = Path(sweep.base.out_dir, name)
        flags = apply_overrides(sweep.settings, settings | {"seed": seed, "out_dir": str(folder)})
        data = data_sha256(read_meta(Path("data", Config(**flags).dataset)))
        sweep.runs[name] = Run(settings, seed, folder, flags, data)
        read(sweep, sweep.runs[name])
        learn(sweep, sweep.runs[name])
    return sweep.runs[name]


def read(sweep, run):
    """Set what the folder of a run tells. Raises UserError if it is of another sweep, or its log is damaged."""
    try:
        run.log = compare.read_run(run.folder)
    except compare.NoLogYet:
        return
    expected = asdict(Config(**run.flags))
    for name, value in run.log["config"].items():
        if name not in ("out_dir", "device") and value not in (expected.get(name), "–"):
            raise UserError(f"{run.folder} is of another sweep ({name} = {value!r}, not {expected.get(name)!r}): "
                            "repeat its command, or choose another folder (--out_dir)")
    if run.log["data_sha256"] != run.data:
        raise UserError(f"{run.folder} was trained on other data than are in data/{expected['dataset']} now: choose "
                        "another folder (--out_dir)")
    if (run.folder / "pruned").exists():
        run.state = "pruned"
    elif run.log["end"] == "finished":
        run.state = "finished"
        run.loss = min(record[sweep.metric] for record in run.log["evals"])
        run.speed = run.log["tokens"] / run.log["seconds"]


def name_of(settings):
    """Settings as the name of a folder: that of a run ends with the seed, for tools/compare.py."""
    return ",".join(f"{name}={urllib.parse.quote(str(value), safe='')}" for name, value in settings.items())


def is_searched(sweep, settings):
    """Whether settings are within the values and ranges of a search."""
    return all(settings[name] in space.choices if hasattr(space, "choices") else
               space.low <= settings[name] <= space.high for name, space in sweep.varied.items())


def suggest_run(sweep):
    """Add the Run that Optuna suggests; returns it, or None if the sweep has it already."""
    settings = sweep.study.ask(sweep.varied).params
    for name, space in sweep.varied.items():
        if isinstance(settings[name], float) and not hasattr(space, "choices"):
            settings[name] = float(f"{settings[name]:g}")  # six digits keep the run's name and flags short
    if name_of(settings | {"seed": sweep.seeds[0]}) not in sweep.runs:
        return add_run(sweep, settings, sweep.seeds[0])


def as_trial(sweep, run):
    """A run as a trial of Optuna."""
    from optuna.trial import TrialState, create_trial

    state = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}.get(run.state, TrialState.RUNNING)
    space = sweep.varied if is_searched(sweep, run.settings) else {}  # a baseline outside counts for the median
    return create_trial(state=state, value=run.loss if run.state == "finished" else None, distributions=space,
                        params={name: run.settings[name] for name in space},
                        intermediate_values={record["iter"]: record[sweep.metric] for record in run.log["evals"]})


def learn(sweep, run):
    """If a run of a search has ended, of the first seed, tell Optuna, and add the other seeds if it is finished."""
    if sweep.trials and run.seed == sweep.seeds[0] and run.state in ("finished", "pruned"):
        sweep.study.add_trial(as_trial(sweep, run))
        for seed in sweep.seeds[1:] if run.state == "finished" else []:
            add_run(sweep, run.settings, seed)


def is_to_be_pruned(sweep, run):
    """Whether a run in training is worse than the median, as Optuna's pruner decides."""
    # Only runs of the first seed: without its unlucky seeds, a setting would look better than it is.
    if not sweep.prune or run.seed != sweep.seeds[0] or run.settings == sweep.planned[0]:
        return False
    with suppress(UserError):  # a damaged log
        read(sweep, run)
    return run.log and run.state == "not finished" and sweep.study.pruner.prune(sweep.study, as_trial(sweep, run))


# ---- training ----


def train_all(sweep):
    """Train until no run is left; returns whether Ctrl-C or SIGTERM has stopped that."""
    jobs = {}  # number of the job → the Run that it trains
    with StopSignals(rank=0) as signals:
        try:
            while not signals.received:
                left = sum(run.state == "not finished" and is_left_over(run) for run in sweep.runs.values())
                for job in sorted(set(range(sweep.jobs)) - jobs.keys())[left:]:
                    if run := next_run(sweep):
                        jobs[job] = run
                        start_training(sweep, run, job)
                if not jobs and all(run.state != "not finished" for run in sweep.runs.values()):
                    break
                time.sleep(0.5)
                for job, run in list(jobs.items()):
                    if run.process.poll() is None and is_to_be_pruned(sweep, run):
                        run.process.terminate()  # train.py then saves and exits
                        run.process.wait()
                        (run.folder / "pruned").touch()
                    if run.process.poll() is not None:
                        end_run(sweep, jobs.pop(job), signals.received)
        finally:  # also after an error: train.py would go on
            for run in jobs.values():
                run.process.terminate()
        for run in jobs.values():
            end_run(sweep, run, signals.received)
    return signals.received


def next_run(sweep):
    """A run that can be trained now, in a search also one that Optuna suggests; None if there is none."""
    for run in sweep.runs.values():
        if run.state == "not finished" and not run.process and not is_left_over(run):
            return run
    return next(filter(None, sweep.suggestions), None)


def is_left_over(run):
    """Whether a train.py of an earlier command still trains a run: it goes on if only the sweep was killed."""
    return not run.process and files.is_locked(run.folder / ".lock")


def start_training(sweep, run, job):
    """Start train.py, or resume it, with the job's share of the threads, or its own GPU; it prints to output.log."""
    command = [sys.executable, str(Path(__file__).parent.parent / "train.py"), "--resume=auto"]
    command += [f"--{name}={value}" for name, value in run.flags.items()]
    if sweep.base.device in ("auto", "cuda") and torch.cuda.is_available():
        command += [f"--device=cuda:{job % torch.cuda.device_count()}"]
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // sweep.jobs))}
    run.folder.mkdir(exist_ok=True)
    with open(run.folder / "output.log", "ab") as output:
        run.process = subprocess.Popen(command, env=os.environ | threads, stdin=subprocess.DEVNULL, stdout=output,
                                       stderr=subprocess.STDOUT)


def end_run(sweep, run, stopped):
    """Wait for the train.py of a run; set what became of the run, and print it."""
    code = run.process.wait()
    run.process = None
    with suppress(UserError):  # a damaged log
        read(sweep, run)
    learn(sweep, run)
    result = f"loss {run.loss:.4f}, {run.speed:,.0f} tokens/s" if run.state == "finished" else run.state
    if run.state == "not finished" and not stopped:
        run.state = "failed"
        printed = (run.folder / "output.log").read_text(encoding="utf-8", errors="replace").strip()
        # Ended by a signal, as of the system when memory runs out, train.py has printed no reason.
        reason = printed.split("\n")[-1].removeprefix("error: ") if code > 0 else f"train.py ended with code {code}"
        result = f"failed: {reason}"
    print(f"{count_done(sweep)} {run.folder.name}: {result}", flush=True)


# ---- the results ----


def count_done(sweep):
    """How many runs are done, of how many, as text."""
    done = sum(run.state != "not finished" and not run.process for run in sweep.runs.values())
    return f"{done} of {max(len(sweep.runs), sweep.trials)}"


def print_results(sweep):
    """Print the table of the settings and how to read it. Raises UserError if all runs failed."""
    if all(run.state == "failed" for run in sweep.runs.values()):
        raise UserError("all runs failed, for the reasons above")
    print(compare.markdown(table_lines(sweep)))
    print("difference: from the first row, seed by seed, ± its standard error\nbetter, worse: by a paired t-test, at "
          f"{SIGNIFICANCE:.0%} for the whole table (Bonferroni), if the number of seeds was fixed beforehand")
    for warning in compare.comparability_warnings([run.log for run in sweep.runs.values() if run.state == "finished"]):
        print(f"note: {warning}")
    if sweep.trials:
        print(confirmation(sweep))


def table_lines(sweep):
    """The cells of the table, a list for each line; the first one is the header."""
    loss = "bits per byte" if sweep.metric == "val_bpb" else "validation loss"
    lines = [[*sweep.varied, "seeds", loss, "difference", "tokens/s", "verdict"]]
    groups = group_runs(sweep)
    for runs in groups:
        finished = [run for run in runs if run.state == "finished"]
        losses = {run.seed: run.loss for run in finished}
        difference, verdict = "–", "no result of the baseline" if losses else runs[0].state
        if runs is groups[0]:
            baseline, verdict = losses, "baseline"
        elif losses.keys() & baseline.keys():
            mean, error, verdict = paired_difference(losses, baseline, len(groups) - 1)
            difference = f"{mean:+.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")
        speed = f"{np.mean([run.speed for run in finished]):,.0f}" if finished else "–"
        lines.append([*map(str, runs[0].settings.values()), str(len(finished)),
                      compare.mean_and_deviation(list(losses.values())), difference, speed, verdict])
    return lines


def group_runs(sweep):
    """The runs as lists of the same settings: the baseline, then the others, in a search from the lowest mean loss."""
    groups = {}
    for run in sweep.runs.values():
        groups.setdefault(name_of(run.settings), []).append(run)
    baseline, *others = groups.values()
    return [baseline, *(sorted(others, key=mean_loss) if sweep.trials else others)]


def mean_loss(runs):
    """The mean loss of these runs; infinity if one of them is not finished."""
    return float(np.mean([run.loss for run in runs]))


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
    # Whether so many seeds tell, if the mean and the standard deviation stay the same.
    tells = abs(mean) > stats.t.ppf(1 - SIGNIFICANCE / comparisons / 2, seeds - 1) * deviation / np.sqrt(seeds)
    more = int(tells.argmax())  # also 0 if no number of them does
    if tells[0]:
        verdict = "better" if mean < 0 else "worse"
    elif more:
        verdict = f"not distinguishable ({more} more seed{'s' * (more > 1)} would tell)"
    else:
        verdict = f"not distinguishable ({MAX_SEEDS:,} more seeds would not tell)"
    return mean, deviation / math.sqrt(n), verdict


def confirmation(sweep):
    """How to confirm the best settings of a search, as text."""
    baseline, *others = group_runs(sweep)  # from the lowest loss
    if not others or mean_loss(others[0]) >= mean_loss(baseline):
        return "no settings have a lower loss than the config as it is"
    flags = " ".join(f"--vary {name}={shlex.quote(str(value))}" for name, value in others[0][0].settings.items())
    return ("the lowest of many losses is partly luck; to confirm it with new seeds, run the same command with these "
            f"flags instead of its --vary and --trials:\n{flags} --seeds 5 --seed={sweep.seeds[-1] + 1} "
            f"--out_dir={shell_word(f'{sweep.base.out_dir}-best')}")


if __name__ == "__main__":
    main()
