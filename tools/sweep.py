"""Is it better? Train a config with several values of its settings and several seeds, and compare the losses.

    python -m tools.sweep config/tinystories_fast.py --max_tokens=400_000 --vary learning_rate=3e-3,9e-3 --seeds 3
    python -m tools.sweep config/tinystories_fast.py --max_tokens=400_000 --vary muon_lr=0.005..0.05:log --trials 30

The first is a grid: it trains the config as it is and every combination of the values, all with the same seeds, and
compares each combination with the config, seed by seed. The second is a search with Optuna (Akiba et al. 2019, arXiv
1907.10902).

    out/<sweep>/study.db                         the Optuna study: which runs there are, and their results
    out/<sweep>/learning_rate=0.003,seed=1337/   a run like any other, and output.log with what train.py printed

Ctrl-C stops all runs; the same command resumes them. Several of these commands at the same time, also on several
machines (--storage), share the work. docs/experiments.md has examples.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sample import number
from storygpt.corpus.dataset import data_sha256, read_meta
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
HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 60  # after the last heartbeat of a trial, until another process takes it up
POLL_SECONDS = 0.5
WAITING_SECONDS = 5  # without work, until a note about that is printed
PLOTTED = 10  # curves in a plot, as many as matplotlib has colors
SKIPPED = "not a run of this command, or the same run as another trial"
STATES = ("COMPLETE", "PRUNED", "RUNNING", "WAITING", "FAIL")  # of trials of the same run, the first of these counts


class NoResult(Exception):
    """Raised in a trial whose run has no result: it failed, or was stopped."""


@dataclass(frozen=True)
class Range:
    """The values from `low` to `high` of a setting, sampled on a logarithmic scale if `log`."""

    low: float
    high: float
    log: bool

    def __contains__(self, value):
        return self.low <= value <= self.high


@dataclass
class Sweep:
    """A sweep: its command line, the Optuna study, and what the threads that train its runs share."""

    settings: dict  # of the config file and the flags, for train.py
    base: Config  # all settings of the config as it is: the baseline
    varied: dict  # setting → list of values or Range, in the order of Config
    seeds: list
    trials: int  # settings to try in a search; 0: a grid
    prune: bool  # whether a search stops runs early that are worse than the median
    jobs: int
    storage: str  # the URL of Optuna's database
    study: object = None  # optuna.Study
    stop: threading.Event = field(default_factory=threading.Event)  # set once the sweep is to stop
    processes: set = field(default_factory=set)  # of train.py, running

    @property
    def out_dir(self):
        """The folder of the sweep."""
        return Path(self.base.out_dir)

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

    def searches(self, settings):
        """Whether this is a search, and the settings are within its values and ranges."""
        return self.trials > 0 and all(settings[name] in values for name, values in self.varied.items())


@exit_with_one_line
def main(argv=None):
    """Train the runs of a sweep that are missing, and print the comparison; `argv` as on the command line."""
    sweep, picture = parse_args(argv)
    check_settings(sweep)
    with storage_errors(sweep.storage):
        sweep.study = open_study(sweep)
        enqueue_missing(sweep, at_start=True)
        print_plan(sweep)
        stopped = train_all(sweep)
        runs = best_trials(sweep)
        print_results(sweep, runs)
        if picture:
            plot(sweep, runs)
    if stopped:
        print("stopped: the same command resumes the sweep", file=sys.stderr)
        sys.exit(130)


# ---- the command line ----


def make_parser():
    """The parser of the flags that are not settings."""
    parser = Parser(prog="python -m tools.sweep", usage="%(prog)s [CONFIG] [--setting=value ...] --vary SETTING=VALUES "
                    "[--vary ...] [--seeds N] [--trials N] [--no_prune] [--jobs N] [--storage URL] [--picture]",
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
    parser.add_argument("--storage", metavar="URL", help="a database that several machines share, such as "
                        "postgresql://USER:PASSWORD@HOST/DATABASE (default: study.db in the folder of the sweep)")
    parser.add_argument("--picture", action="store_true", help="plot the losses, into the folder of the sweep")
    return parser


def parse_args(argv):
    """The Sweep of a command line, without its study, and whether to plot. Exits with code 2 for a wrong flag."""
    parser = make_parser()
    settings, flags, args = read_command_line(argv, {}, parser)
    try:
        varied = parse_varied(args.vary)
        if not varied and (args.seeds or 1) == 1:
            raise UserError(f"nothing to compare: give --vary {EXAMPLE}, or --seeds 2 or more")
        if not args.trials and any(isinstance(values, Range) for values in varied.values()):
            raise UserError("a range needs --trials N, the number of settings to try")
        if args.trials and not varied:
            raise UserError(f"--trials needs --vary {EXAMPLE}")
    except UserError as error:
        parser.error(str(error))
    flags.setdefault("out_dir", f"{settings.get('out_dir', Config.out_dir)}-{'-'.join(varied) or 'seeds'}")
    settings = apply_overrides(settings, flags)
    base = Config(**settings)
    seeds = [base.seed + i for i in range(args.seeds or (1 if args.trials else 3))]
    storage = args.storage or f"sqlite:///{urllib.parse.quote(Path(base.out_dir, 'study.db').as_posix(), safe='/:')}"
    # Runs of different or unknown lengths have no evaluations at comparable iterations.
    prune = bool(args.trials) and not args.no_prune and not base.max_minutes and not varied.keys() & set(BUDGETS)
    return Sweep(settings, base, varied, seeds, args.trials, prune, args.jobs, storage), args.picture


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
    if low >= high:
        raise UserError(f"--vary {name}={text}: the low end is not below the high end")
    if log and low <= 0:
        raise UserError(f"--vary {name}={text}: the low end of a logarithmic range must be above 0")
    return Range(low, high, log)


def check_settings(sweep):
    """Raise UserError if Config refuses a combination of a grid, or a dataset or a package is missing."""
    try:
        import optuna
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise UserError("sweeps need optuna and scipy:  pip install -r requirements-extra.txt") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # this program prints one line per trial itself
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # of the heartbeat
    for settings in [sweep.baseline] if sweep.trials else sweep.grid:
        try:
            cfg = Config(**apply_overrides(sweep.settings, settings))
        except UserError as error:
            raise UserError(f"{settings_name(settings)}: {error}") from error
        read_meta(Path("data", cfg.dataset))
    if checkpoints(sweep.out_dir):
        raise UserError(f"{sweep.out_dir} contains a run: choose another folder for the sweep (--out_dir)")


# ---- the study: which runs there are ----


@contextmanager
def storage_errors(url):
    """Turn errors of Optuna's database into a UserError, which shows no password."""
    import sqlalchemy

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error  # Optuna raises other errors while it handles one of the database, even an UnboundLocalError
        while cause and not isinstance(cause, sqlalchemy.exc.SQLAlchemyError | ImportError):
            cause = cause.__cause__ or cause.__context__
        if not cause:
            raise
        reason = str(getattr(cause, "orig", None) or cause).partition("\n")[0]
        if isinstance(cause, ImportError):
            reason = f"{cause.__cause__ or cause}: install the driver of the database (docs/experiments.md)"
        shown = sqlalchemy.make_url(url).render_as_string(hide_password=True)
        raise UserError(f"the storage {shown} cannot be used: {reason}") from error


def open_study(sweep):
    """Create or load the Optuna study of a sweep. Raises UserError if that one is of another sweep."""
    import optuna

    sweep.out_dir.mkdir(parents=True, exist_ok=True)
    # Not in the first half of a run: a high learning rate is worse there, also where it is better in the end.
    pruner = optuna.pruners.MedianPruner(n_warmup_steps=sweep.base.max_iters // 2)
    study = optuna.create_study(storage=open_storage(sweep.storage), study_name=sweep.out_dir.name, pruner=pruner,
                                load_if_exists=True)
    identity = {name: value for name, value in asdict(sweep.base).items() if name != "out_dir"}
    identity |= {"data": data_sha256(read_meta(Path("data", sweep.base.dataset)))}
    identity |= {f"--vary {name}": str(values) if sweep.trials else "" for name, values in sweep.varied.items()}
    identity = json.loads(json.dumps(identity))  # as it is stored
    stored = study.user_attrs.get("identity", identity)
    for name in identity | stored:
        if identity.get(name) != stored.get(name):
            raise UserError(f"{sweep.out_dir} is another sweep (its {name} differs): repeat its command, or choose "
                            "another folder (--out_dir)")
    study.set_user_attr("identity", identity)
    return study


def open_storage(url):
    """Optuna's storage at a database URL. Raises UserError if that is none, or that of a database in memory."""
    import optuna
    import sqlalchemy

    try:
        parsed = sqlalchemy.make_url(url)
        if not parsed.database:
            raise ValueError
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise UserError("--storage is not the URL of a database, such as postgresql://USER:PASSWORD@HOST/DATABASE"
                        ) from error
    sqlite = parsed.get_backend_name() == "sqlite"
    for attempt in range(10):
        try:
            storage = optuna.storages.RDBStorage(
                url.replace("{", "{{").replace("}", "}}"),  # Optuna calls format() on it
                {"pool_pre_ping": True, "connect_args": {"timeout": 60} if sqlite else {}},
                heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback())
            break
        except sqlalchemy.exc.DBAPIError as error:  # perhaps another process creates the tables at the same time
            created = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error)
            if attempt == 9 or not created:
                raise
            time.sleep(0.2)
    if sqlite:
        # Without these, two jobs can take the same trial: SQLite has no SELECT … FOR UPDATE, and Python starts a
        # transaction only at the first change (docs.sqlalchemy.org, dialects/sqlite, "Transactions with SQLite").
        sqlalchemy.event.listen(storage.engine, "connect", lambda connection, _: setattr(
            connection, "isolation_level", None))
        sqlalchemy.event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql(
            "BEGIN IMMEDIATE"))
        storage.engine.dispose()  # the connections made before
    threading.excepthook = print_thread_error
    return storage


def print_thread_error(error):
    """Print an exception that ended a thread, but not of Optuna's heartbeat: other threads report the same error."""
    if "heartbeat" not in error.thread.name:
        threading.__excepthook__(error)


def enqueue_missing(sweep, at_start=False):
    """Add the runs of a sweep that its study lacks, at the start also those that failed, to Optuna's queue.

    The seeds after the first of a search are for the settings that were not pruned.
    """
    runs = best_trials(sweep)
    known = {name for name, trial in runs.items() if not (at_start and trial.state.name == "FAIL")}
    if sweep.trials:
        wanted = [sweep.baseline, *(trial.user_attrs["settings"] for trial in runs.values()
                                    if trial.state.name == "COMPLETE" and trial.user_attrs["seed"] == sweep.seeds[0])]
    else:
        wanted = sweep.grid
    for seed, settings in itertools.product(sweep.seeds, wanted):
        if run_name(settings, seed) not in known:
            known.add(run_name(settings, seed))
            params = settings if sweep.searches(settings) else {}  # what Optuna learns from
            sweep.study.enqueue_trial(params, {"settings": settings, "seed": seed})
    if at_start:
        for _ in range(sweep.trials - len(counted_trials(sweep))):
            sweep.study.enqueue_trial({}, {"seed": sweep.seeds[0]})  # Optuna suggests the settings when it is its turn


def counted_trials(sweep):
    """The numbers of the trials that count towards --trials: those of the first seed that did not fail.

    A suggestion that was skipped, because the search has had it, counts, or a small space could be searched forever.
    """
    return [trial.number for trial in sweep.study.get_trials(deepcopy=False)
            if trial.user_attrs.get("seed") == sweep.seeds[0]
            and (trial.state.name != "FAIL" or trial.user_attrs.get("error") == SKIPPED)]


def best_trials(sweep):
    """The trials of a sweep, name of the run → trial. Of several for one run, the one whose state is first in STATES.

    There are several if a run was stopped or failed, or if two processes queued it at the same time. Of those that
    failed it is the last one, of others the first one. Runs that an earlier command wanted and this one does not, as
    after a typo, are left out.
    """
    found, grid = {}, [] if sweep.trials else sweep.grid
    trials = sorted(sweep.study.get_trials(deepcopy=False), key=lambda trial: (
        STATES.index(trial.state.name), -trial.number if trial.state.name == "FAIL" else trial.number))
    for trial in trials:
        settings, seed = trial.user_attrs.get("settings"), trial.user_attrs.get("seed")
        if seed in sweep.seeds and (sweep.trials or settings in grid) and trial.user_attrs.get("error") != SKIPPED:
            found.setdefault(f"trial {trial.number}" if settings is None else run_name(settings, seed), trial)
    return dict(sorted(found.items(), key=lambda item: item[1].number))


def count_finished(runs):
    """How many of these trials, name of the run → trial, are complete, pruned or failed."""
    return sum(trial.state.is_finished() for trial in runs.values())


def settings_name(settings):
    """Settings as text, which is also the beginning of a folder's name."""
    return ",".join(f"{name}={urllib.parse.quote(str(value), safe='')}" for name, value in settings.items())


def run_name(settings, seed):
    """The name of the folder of a run; tools/compare.py groups runs by it."""
    return settings_name(settings | {"seed": seed})


# ---- training ----


def train_all(sweep):
    """Train until no run is left, also in other processes; returns whether a signal has stopped that."""
    runs = best_trials(sweep)
    with (StopSignals(rank=0) as signals, ThreadPoolExecutor(sweep.jobs) as pool,
          tqdm(total=len(runs), initial=count_finished(runs), unit=" runs", dynamic_ncols=True,
               disable=not sys.stderr.isatty()) as bar):
        workers = [pool.submit(work, sweep, slot, bar) for slot in range(sweep.jobs)]
        try:
            while not all(worker.done() for worker in workers):
                if signals.received or any(worker.done() and worker.exception() for worker in workers):
                    sweep.stop.set()
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:  # the second Ctrl-C
            for process in sweep.processes.copy():
                process.kill()
            raise
        finally:
            sweep.stop.set()
    for worker in workers:
        worker.result()  # raises its exception
    return signals.received


def work(sweep, slot, bar):
    """Train runs of the queue, one after the other, until no process trains any; `slot` numbers the job from 0."""
    import optuna

    polls = 0  # in a row without a run in this process
    while not sweep.stop.is_set():
        optuna.storages.fail_stale_trials(sweep.study)  # queues the runs of processes that died again
        states = {trial.state.name for trial in best_trials(sweep).values()}
        if not states & {"WAITING", "RUNNING"}:
            return
        if "WAITING" in states:
            try:
                sweep.study.optimize(lambda trial: train_run(sweep, slot, trial), n_trials=1, catch=NoResult,
                                     callbacks=[lambda study, trial: after_trial(sweep, trial, bar)])
            except ValueError as error:
                if not str(error).startswith("Cannot tell a "):
                    raise
                # This process did not run for a while, as when a laptop sleeps, so that another took the trial up.
        else:
            polls = 0 if sweep.processes else polls + 1
            if slot == 0 and polls * POLL_SECONDS == WAITING_SECONDS:
                tqdm.write(f"waiting for runs of other processes; those of one that was killed are taken up within "
                           f"{GRACE_SECONDS} s")
            sweep.stop.wait(POLL_SECONDS)


def train_run(sweep, slot, trial):
    """Train the run of an Optuna trial, or resume it; returns its lowest validation loss.

    Raises TrialPruned if the run was pruned and NoResult if it has no result.
    """
    import optuna

    trial.set_user_attr("error", "")  # of an earlier trial of this run, which Optuna copies
    settings, seed = choose_settings(sweep, trial), trial.user_attrs.get("seed")
    trial.set_user_attr("settings", settings)
    best = best_trials(sweep).get(run_name(settings, seed))
    if best is None or best.number != trial.number:
        no_result(trial, SKIPPED)
    folder = sweep.out_dir / run_name(settings, seed)
    try:
        pruned, code, printed = run_training(sweep, slot, trial, folder)
        if pruned:
            raise optuna.TrialPruned
        check_finished(sweep, trial, code, printed, folder / "log.jsonl")
        run = compare.read_run(folder)
    except (UserError, OSError) as error:  # such as a damaged log
        no_result(trial, str(error))
    trial.set_user_attr("tokens_per_s", run["tokens"] / run["seconds"])
    return min(record[sweep.metric] for record in run["evals"])


def run_training(sweep, slot, trial, folder):
    """Run train.py for a trial until it ends, is pruned, or the sweep stops; what it prints goes to output.log.

    Returns whether the run was pruned, the exit code, and the lines that were printed.
    """
    while files.is_locked(folder / ".lock") and not sweep.stop.is_set():  # by a process whose sweep was killed
        sweep.stop.wait(POLL_SECONDS)
    folder.mkdir(exist_ok=True)
    with open(folder / "output.log", "ab") as output:
        start = output.tell()
        settings = trial.user_attrs["settings"] | {"seed": trial.user_attrs["seed"], "out_dir": str(folder)}
        process = start_training(sweep, slot, settings, output)
        try:
            pruned = report_losses(sweep, trial, process, folder / "log.jsonl")
        finally:
            process.terminate()  # train.py then saves and exits
            process.wait()
            sweep.processes.discard(process)
    printed = (folder / "output.log").read_bytes()[start:].decode("utf-8", "replace")
    return pruned, process.returncode, printed.strip().splitlines()


def choose_settings(sweep, trial):
    """The varied settings of a trial: those that it was queued with, otherwise Optuna's suggestions.

    Raises NoResult if the trial is none of the queue, because another job took that one, or more than --trials.
    """
    queued = trial.user_attrs.get("settings")
    if "seed" not in trial.user_attrs or (
            queued is None and sum(number < trial.number for number in counted_trials(sweep)) >= sweep.trials):
        no_result(trial, SKIPPED)
    if queued is not None and not sweep.searches(queued):
        return queued
    suggested = {name: suggest(trial, name, values) for name, values in sweep.varied.items()}  # Optuna learns from it
    return queued or suggested


def suggest(trial, name, values):
    """Optuna's suggestion for a setting, a number with six digits: the run's name and flags are then short."""
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    if isinstance(values.low, int):
        return trial.suggest_int(name, values.low, values.high, log=values.log)
    return float(f"{trial.suggest_float(name, values.low, values.high, log=values.log):g}")


def start_training(sweep, slot, settings, output):
    """Start train.py with these settings in a process that has its share of the machine; it prints to a file."""
    command = [sys.executable, str(ROOT / "train.py"), "--resume=auto"]
    command += [f"--{name}={value}" for name, value in apply_overrides(sweep.settings, settings).items()]
    share = share_of_machine(slot, sweep.jobs, visible_gpus(sweep.base.device), torch.get_num_threads())
    process = subprocess.Popen(command, env=os.environ | share, stdin=subprocess.DEVNULL, stdout=output,
                               stderr=subprocess.STDOUT)
    sweep.processes.add(process)
    return process


def visible_gpus(device):
    """The GPUs that runs with this setting of `device` can be given, as CUDA_VISIBLE_DEVICES names them."""
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def share_of_machine(slot, jobs, gpus, threads):
    """The environment variables that give a job its GPU or, without GPUs, its part of the threads."""
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    return {"OMP_NUM_THREADS": str(max(1, threads // jobs))}


def report_losses(sweep, trial, process, log):
    """Report the evaluations in a run's log to Optuna until the run ends or is to be stopped.

    Returns whether it is pruned. Only runs of the first seed are: without its unlucky seeds, a setting would look
    better than it is.
    """
    settings, seed = trial.user_attrs["settings"], trial.user_attrs["seed"]
    prune = sweep.prune and settings != sweep.baseline and seed == sweep.seeds[0]
    reported, size = set(), 0
    while True:
        ended = process.poll() is not None  # before reading the log, which is then complete
        previous, size = size, log.stat().st_size if log.exists() else 0
        for record in read_log(log) if size != previous else []:
            if record["kind"] == "eval" and record["iter"] not in reported:
                reported.add(record["iter"])
                trial.report(record[sweep.metric], record["iter"])
                if prune and not ended and trial.should_prune():
                    return True
        if ended or sweep.stop.wait(POLL_SECONDS):
            return False


def check_finished(sweep, trial, code, printed, log):
    """Raise NoResult if train.py did not finish its run: it exited with this code after it printed these lines."""
    stopped = (code in (130, -signal.SIGINT, -signal.SIGTERM)
               or (code == 0 and read_log(log)[-1].get("reason") == "stopped"))
    if stopped or (code and sweep.stop.is_set()):
        raise NoResult
    if code < 0:
        no_result(trial, f"train.py was killed by signal {-code} (9: perhaps for lack of memory)")
    if code:
        no_result(trial, printed[-1].removeprefix("error: ") if printed else f"train.py exited with code {code}")


def no_result(trial, error):
    """Raise NoResult, and record why: without a reason, `after_trial` queues the run again."""
    trial.set_user_attr("error", error)
    raise NoResult(error)


def after_trial(sweep, trial, bar):
    """Queue a stopped run again and, in a search, more seeds; show the progress."""
    import optuna

    if trial.state.name == "FAIL" and not trial.user_attrs.get("error"):
        return optuna.storages.RetryHeartbeatStaleTrialCallback()(sweep.study, trial)
    if trial.user_attrs.get("error") == SKIPPED:
        return
    if sweep.trials:
        enqueue_missing(sweep)
    runs = best_trials(sweep)
    finished, name = count_finished(runs), run_name(trial.user_attrs["settings"], trial.user_attrs["seed"])
    if trial.state.name == "FAIL":
        result = f"failed: {trial.user_attrs['error']}"
    elif trial.state.name == "PRUNED":
        result = f"pruned at iteration {trial.last_step:,}, loss {trial.intermediate_values[trial.last_step]:.4f}"
    else:
        result = f"loss {trial.value:.4f}, {trial.user_attrs['tokens_per_s']:,.0f} tokens/s"
    if bar.disable or trial.state.name == "FAIL":
        tqdm.write(f"{finished}/{len(runs)} {name}: {result}")
    best = min((run for run in runs.values() if run.value is not None), key=lambda run: run.value, default=None)
    if best:
        bar.set_postfix_str(f"best {best.value:.4f} {settings_name(best.user_attrs['settings'])}", refresh=False)
    bar.total, bar.n = len(runs), finished
    bar.refresh()


# ---- results ----


def print_plan(sweep):
    """Print what the sweep consists of, and how much of it is done."""
    runs = best_trials(sweep)
    kind = f"search, {sweep.trials} settings" if sweep.trials else f"grid, {len(sweep.grid)} settings"
    print(f"{sweep.out_dir}: {kind}, seeds {', '.join(map(str, sweep.seeds))}; {count_finished(runs)} of {len(runs)} "
          f"runs are finished; {sweep.jobs} at a time", flush=True)


def print_results(sweep, runs):
    """Print the table of the settings, and why runs failed. Raises UserError if all runs failed."""
    failed = {name: trial.user_attrs.get("error") or "its process ended" for name, trial in runs.items()
              if trial.state.name == "FAIL"}
    if failed and len(failed) == len(runs):
        raise UserError(f"all {len(failed)} runs failed, the last one with: {list(failed.values())[-1]}")
    rows = table_rows(sweep, runs)
    print(compare.markdown([list(rows[0]), *(list(row.values()) for row in rows)]))
    for name, error in failed.items():
        print(f"failed: {name}: {error}")
    print("difference: from the first row, seed by seed, ± its standard error\nbetter, worse: by a paired t-test, at "
          f"{SIGNIFICANCE:.0%} for the whole table (Bonferroni), if the number of seeds was fixed beforehand")
    for warning in compare.comparability_warnings(read_runs(sweep, runs.values())):
        print(f"note: {warning}")
    if sweep.trials:
        print(confirmation(sweep, runs))


def group_trials(sweep, runs):
    """The trials whose settings are known, as a dict: settings as text → list of trials. The baseline is the first.

    The others are in the order of the grid or, in a search, from the lowest loss.
    """
    groups = {}
    for trial in runs.values():
        if "settings" in trial.user_attrs:
            groups.setdefault(settings_name(trial.user_attrs["settings"]), []).append(trial)
    baseline = settings_name(sweep.baseline)
    names = sorted(groups, key=lambda name: mean_loss(groups[name])) if sweep.trials else map(settings_name, sweep.grid)
    return {baseline: groups.get(baseline, [])} | {name: groups[name] for name in names if name in groups}


def losses_of(trials):
    """The losses of those of these trials that are complete, seed → loss."""
    return {trial.user_attrs["seed"]: trial.value for trial in trials if trial.state.name == "COMPLETE"}


def read_runs(sweep, trials):
    """The logs of those of these trials that are complete and were trained on this machine (see compare.read_run)."""
    folders = [sweep.out_dir / run_name(trial.user_attrs["settings"], trial.user_attrs["seed"])
               for trial in trials if trial.state.name == "COMPLETE"]
    return [compare.read_run(str(folder)) for folder in folders if (folder / "log.jsonl").exists()]


def mean_loss(trials):
    """The mean loss of those of these trials that are complete; infinity if none is."""
    return float(np.mean(list(losses_of(trials).values()) or [math.inf]))


def table_rows(sweep, runs):
    """The rows of the table, each heading → text."""
    groups = group_trials(sweep, runs)
    baseline = losses_of(next(iter(groups.values())))
    comparisons = max(1, len(groups) - 1)
    rows = []
    for trials in groups.values():
        losses = losses_of(trials)
        speeds = [trial.user_attrs["tokens_per_s"] for trial in trials if trial.state.name == "COMPLETE"]
        settings = trials[0].user_attrs["settings"] if trials else sweep.baseline
        difference, verdict = "–", missing_result(trials)
        if not rows:
            verdict = "baseline"
        elif losses.keys() & baseline.keys():
            mean, error, verdict = paired_difference(losses, baseline, comparisons)
            difference = f"{mean:+.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")
        rows.append({name: str(value) for name, value in settings.items()} | {
            "seeds": str(len(losses)), "bits per byte" if sweep.metric == "val_bpb" else "validation loss":
            compare.mean_and_deviation(list(losses.values())), "difference": difference,
            "tokens/s": f"{np.mean(speeds):,.0f}" if speeds else "–", "verdict": verdict})
    return rows


def missing_result(trials):
    """Why settings with these trials cannot be compared with the baseline."""
    states = {trial.state.name for trial in trials}
    if "COMPLETE" in states:
        return "no result of the baseline"
    return "pruned" if "PRUNED" in states else "failed" if states == {"FAIL"} else "not finished"


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


def confirmation(sweep, runs):
    """How to confirm the best settings of a search, as text."""
    baseline, *others = group_trials(sweep, runs).values()  # from the lowest loss
    if not others or mean_loss(others[0]) >= mean_loss(baseline):
        return "no settings have a lower loss than the config as it is"
    flags = " ".join(f"--vary {name}={value}" for name, value in others[0][0].user_attrs["settings"].items())
    return ("the lowest of many losses is partly luck; to confirm it with new seeds, run the same command with these "
            f"flags instead of its --vary and --trials:\n{flags} --seeds 5 --seed={sweep.seeds[-1] + 1} "
            f"--out_dir={sweep.out_dir}-best")


def plot(sweep, runs):
    """Plot the losses of the best settings and, of a search, Optuna's plots, into the folder of the sweep."""
    path = sweep.out_dir / "losses.png"
    baseline, *others = group_trials(sweep, runs).values()
    groups = [read_runs(sweep, trials) for trials in [baseline, *sorted(others, key=mean_loss)]]
    groups = [group for group in groups if group]  # the others have no result, or only on other machines
    if not groups:
        return print("no plot: no run on this machine is complete")
    compare.plot(groups[:PLOTTED], path)
    print(f"plot: {path}" + f", the baseline and the {PLOTTED - 1} best settings" * (len(groups) > PLOTTED))
    if sweep.trials:
        plot_search(sweep)


def plot_search(sweep):
    """Save Optuna's plots of a search: how much each setting matters, and all settings in parallel coordinates."""
    from optuna.visualization import matplotlib as optuna_plots

    for name, draw in (("importances", optuna_plots.plot_param_importances),
                       ("parallel_coordinate", optuna_plots.plot_parallel_coordinate)):
        path = sweep.out_dir / f"{name}.png"
        try:
            with warnings.catch_warnings(action="ignore"):  # where settings have too few values for a nice axis
                compare.save_figure(draw(sweep.study).figure, path, bbox_inches="tight")  # or it cuts off long names
        except (ValueError, RuntimeError) as error:
            print(f"no plot {path}: {error}")  # too few trials
        else:
            print(f"plot: {path}")


if __name__ == "__main__":
    main()
