"""Compare runs: a table of the settings that differ and of the results, and a plot of the losses.

    python -m tools.compare out/a out/b                      a table, and the plot out/compare.png
    python -m tools.compare out/* --picture docs/losses.svg  save the plot elsewhere
    python -m tools.compare out/a                            a single run
    python -m tools.compare out/a out/b --watch              plot again after each evaluation, until Ctrl-C
    python -m tools.compare out/sweep                        the runs of a sweep (tools/sweep.py), a row per setting

Runs of a sweep that differ only in the seed are one row, with the mean ± standard deviation of their losses, and one
curve, in a band from the lowest to the highest. It reads only each run's log.jsonl, so a run may still be training.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

import functools
import os
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from storygpt.run import read_log
from storygpt.settings import Config
from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line

TICKS = (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.4, 2.6, 2.8, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)  # times powers of ten
REDUNDANT_SETTINGS = {"out_dir", "max_tokens"}  # other columns show them
SEED_SUFFIX = ",seed="  # tools/sweep.py names a run folder after its settings, and then its seed
REQUIRED_KEYS = {"run": {"config", "data_sha256"}, "step": {"tokens", "seconds"},
                 "eval": {"iter", "tokens", "seconds", "train_loss", "val_loss", "val_bpb"}}
WATCH_SECONDS = 2  # between two looks at the logs


class NoLogYet(UserError):
    """A folder has no log, or an empty one: the run in it may be about to start."""


@exit_with_one_line
def main(argv=None):
    """Print the table and save the plot; `argv` as on the command line."""
    parser = Parser(prog="python -m tools.compare", description="Compare runs by their logs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, as out/tinystories, or of a sweep")
    parser.add_argument("--picture", metavar="FILE", default="out/compare.png",
                        help="where to save the plot of the losses: .png, .svg or .pdf (default: %(default)s)")
    parser.add_argument("--watch", action="store_true",
                        help="wait for runs that have not begun, and plot again after each evaluation, until Ctrl-C")
    args = parser.parse_args(argv)

    folders = list(dict.fromkeys(str(Path(folder)) for folder in args.runs))
    if args.watch:
        return watch(folders, args.picture)
    report([group for folder in folders for group in read_groups(folder)], args.picture)


def report(groups, picture):
    """Print the table of the runs, and save the plot if one of them has been evaluated."""
    runs = [run for group in groups for run in group]
    settings = [name for name in differing_settings(runs)
                if name != "seed" or not any(len(group) > 1 for group in groups)]
    print(format_table([table_row(group, settings) for group in groups]))
    for warning in comparability_warnings(runs):
        print(f"note: {warning}")
    if not any(run["evals"] for run in runs):
        return print("no plot: none of these runs has been evaluated yet")
    plot(groups, picture)
    print(f"plot: {picture}")


def watch(folders, picture):
    """Report on the runs whenever one begins, and plot again after each evaluation, with a line each, until Ctrl-C.

    Runs that have no log yet are waited for. Raises UserError for a log that train.py did not write, and for a picture
    that cannot be plotted.
    """
    check_picture(picture)
    runs, missing = {}, []
    while True:
        groups, before, missing_before, missing = [], runs, missing, []
        for folder in folders:
            try:
                groups += read_groups(folder)
            except NoLogYet:
                missing.append(folder)
                if folder not in missing_before:
                    hint = "" if Path(folder).is_dir() else " (there is no such folder yet)"
                    print(f"waiting for a run to begin in {folder}{hint}")
        runs = {run["name"]: run for group in groups for run in group}
        if runs and [identity(run) for run in runs.values()] != [identity(run) for run in before.values()]:
            report(groups, picture)
        elif evaluated := [run for name, run in runs.items() if run["evals"] and run["evals"] != before[name]["evals"]]:
            plot(groups, picture)
            print(time.strftime("%H:%M:%S"), *(f" {run['name']}: {run['tokens']:,} tokens, validation loss "
                                               f"{run['evals'][-1]['val_loss']:.4f}" for run in evaluated))
        sys.stdout.flush()  # it may be a file or a pipe
        time.sleep(WATCH_SECONDS)


def identity(run):
    """What changes if a run is replaced by another one: its name, settings and data."""
    return run["name"], run["config"], run["data"]


def read_groups(folder):
    """The run in a folder or, in that of a sweep, its runs, as lists of runs that differ only in the seed.

    Raises UserError as `read_run` does, but leaves out runs of a sweep that have no log yet.
    """
    logs = [] if Path(folder, "log.jsonl").exists() else sorted(Path(folder).glob("*/log.jsonl"))
    runs, groups = [], {}
    for log in logs:
        with suppress(NoLogYet):
            runs.append(read_run(str(log.parent)))
    for run in runs or [read_run(folder)]:
        config = {name: value for name, value in run["config"].items() if name not in ("seed", "out_dir")}
        groups.setdefault((str(config), str(run["data"])), []).append(run)
    return list(groups.values())


def group_name(group):
    """The name of a run, or of several that differ in the seed."""
    return group[0]["name"] if len(group) == 1 else group[0]["name"].rpartition(SEED_SUFFIX)[0] or group[0]["name"]


def read_run(folder):
    """A run's log as a dict: name, settings, hash of the validation data, evaluations, and tokens and seconds so far.

    Raises NoLogYet if the folder has no log.jsonl or an empty one, UserError for a log that train.py did not write.
    """
    try:
        status = Path(folder, "log.jsonl").stat()
        return read_changed_run(folder, status.st_size, status.st_mtime_ns)
    except OSError as error:
        kind = NoLogYet if isinstance(error, FileNotFoundError) else UserError
        raise kind(f"no log in {folder}: name run folders, such as out/tinystories") from error


@functools.lru_cache(maxsize=256)  # reading again what has not changed would take time from a run in training
def read_changed_run(folder, size, modified):
    """`read_run`, for a log of this size and modification time."""
    records = read_log(Path(folder, "log.jsonl"))
    if not records:
        raise NoLogYet(f"{folder}/log.jsonl is empty: wait until the run has begun, or leave out {folder}")
    starts, steps, evals = ([r for r in records if r["kind"] == kind] for kind in ("run", "step", "eval"))
    if not starts or not all(REQUIRED_KEYS.get(r["kind"], set()) <= r.keys() for r in records):
        raise UserError(f"{folder}/log.jsonl is not a log of train.py: leave out {folder}")
    config = {f.name: f.default for f in fields(Config)} | starts[-1]["config"]  # older logs lack newer settings
    if config["max_minutes"]:
        config |= {"max_iters": "–", "lr_decay_iters": "–"}  # not used
    last = max([{"tokens": 0, "seconds": 0.0}, *steps, *evals], key=lambda record: record["seconds"])
    return {"name": folder, "config": config, "data": starts[-1]["data_sha256"].get("validation"), "evals": evals,
            "tokens": last["tokens"], "seconds": last["seconds"]}


def differing_settings(runs):
    """The names of the settings that are not the same in all runs, in the order of `Config`."""
    configs = [run["config"] for run in runs]
    names = [name for name in configs[0] if any(config.get(name) != configs[0][name] for config in configs)]
    if all(config["lr_decay_iters"] == config["max_iters"] for config in configs):
        names = [name for name in names if name != "lr_decay_iters"]  # the default: shown by max_iters
    return [name for name in names if name not in REDUNDANT_SETTINGS]


def table_row(group, settings):
    """A row of the table, heading → text, with these settings and the best evaluation of a list of runs."""
    best = [min(run["evals"], key=lambda record: record["val_loss"]) for run in group if run["evals"]]
    seeds = {"seeds": str(len(group))} if len(group) > 1 else {}
    return {"run": group_name(group), **{name: str(group[0]["config"].get(name, "–")) for name in settings}, **seeds,
            "tokens": span(run["tokens"] for run in group), "seconds": span(round(run["seconds"]) for run in group),
            "best validation loss": mean_and_deviation([record["val_loss"] for record in best]),
            "at tokens": span(record["tokens"] for record in best),
            "bits per byte": mean_and_deviation([record["val_bpb"] for record in best])}


def span(numbers):
    """The lowest and the highest of these whole numbers, as text: one number if they are equal, – if there is none."""
    numbers = sorted(numbers)
    return "–".join(f"{number:,}" for number in dict.fromkeys((numbers[0], numbers[-1]))) if numbers else "–"


def mean_and_deviation(losses):
    """The mean ± standard deviation of these losses, as text: without the latter for a single one, – for none."""
    if len(losses) > 1:
        return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"
    return f"{losses[0]:.4f}" if losses else "–"


def format_table(rows):
    """Dicts as a Markdown table, with – where one has no such key: a row or a column per dict, whichever is narrower.

    The columns are in the order of the dict that has the most.
    """
    headings = list(max(rows, key=len))
    lines = [headings, *([row.get(heading, "–") for heading in headings] for row in rows)]
    return min(markdown(lines), markdown(list(zip(*lines))), key=lambda text: text.index("\n"))


def markdown(lines):
    """Lists of cells, the first list being the header, as an aligned Markdown table; numbers are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [[cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))]
               for line in lines]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [aligned[0], rule, *aligned[1:]])


def comparability_warnings(runs):
    """Yield a message for each reason why the losses of these runs cannot be compared directly."""
    if not have_same_data(runs):
        yield ("the runs have different validation data: compare bits per byte instead of losses, and only if the "
               "stories are the same")
    windows = {(run["config"]["block_size"], run["config"]["eval_iters"] * run["config"]["batch_size"]) for run in runs}
    if len(windows) > 1:
        yield ("the runs are evaluated on different windows (eval_iters * batch_size of block_size tokens): evaluate "
               "each with train.py --eval_only, which uses the whole split")


def have_same_data(runs):
    """Whether the losses of these runs are of the same validation data."""
    return len({run["data"] for run in runs}) <= 1


def plot(groups, path):
    """Plot the validation loss against tokens and against time; for a single run also the training loss.

    A group of several runs is one curve, their mean, in a band from the lowest to the highest. Runs on different data
    are plotted in bits per byte. Raises UserError if matplotlib is missing or the file cannot be written.
    """
    Figure = import_figure()
    runs = [run for group in groups for run in group]
    same_data = have_same_data(runs)
    has_long_legend = len(groups) > 4
    figure = Figure(figsize=(11, 4.5 + 0.12 * len(groups) * has_long_legend), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    common = os.path.commonpath([Path(group_name(group)).parent for group in groups])
    for group in groups:
        label = os.path.relpath(group_name(group), common).replace("$", r"\$")  # $ begins a formula
        curves = [("val_loss" if same_data else "val_bpb", ".-", label)]
        if len(runs) == 1:
            curves.append(("train_loss", ".--", "training loss"))
        for key, style, label in curves:
            tokens, seconds, lowest, mean, highest = curve(group, key)
            by_tokens.plot(tokens, mean, style, label=label)
            by_time.plot(seconds, mean, style)
            if len(group) > 1:
                by_tokens.fill_between(tokens, lowest, highest, alpha=0.2)
                by_time.fill_between(seconds, lowest, highest, alpha=0.2)
    by_tokens.set(xlabel="training tokens (millions)",
                  ylabel="validation loss (nats/token)" if same_data else "validation loss (bits per byte)")
    by_time.set(xlabel="time (minutes, including evaluations)")
    if has_long_legend:
        figure.legend(loc="outside lower center", ncols=2)
    else:
        by_tokens.legend()
    set_log_scale(by_tokens)  # the two axes share it
    for axes in (by_tokens, by_time):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def curve(group, key):
    """The losses `key` of a list of runs at the evaluations that all of them have, or all but those without any yet.

    Returns five lists: tokens in millions, mean time in minutes, lowest, mean and highest loss.
    """
    records, count = {}, sum(bool(run["evals"]) for run in group)
    for record in (record for run in group for record in run["evals"]):
        records.setdefault(record["tokens"], []).append(record)
    points = [(tokens / 1e6, statistics.mean(record["seconds"] for record in records[tokens]) / 60,
               [record[key] for record in records[tokens]]) for tokens in sorted(records)
              if len(records[tokens]) == count]
    return [list(values) for values in zip(*((tokens, minutes, min(losses), statistics.mean(losses), max(losses))
                                             for tokens, minutes, losses in points))] or [[]] * 5


def check_picture(path):
    """Raise UserError, before hours of waiting, if matplotlib is missing or cannot save a plot under this name."""
    figure = import_figure()()
    if Path(path).is_dir() or (Path(path).suffix[1:] or "png") not in figure.canvas.get_supported_filetypes():
        raise UserError(f"cannot write the plot {path}: give the name of a .png, .svg or .pdf file with --picture")


def import_figure():
    """matplotlib's Figure. Raises UserError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the plot needs matplotlib:  pip install -r requirements-extra.txt") from error
    return Figure


def save_figure(figure, path, **options):
    """Save a matplotlib figure atomically, in the format of the file's name.

    Raises UserError if it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, format=path.suffix[1:] or "png", dpi=110, **options)
        files.rename(partial, path)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a program that the format needs is missing
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"cannot write the plot {path}: {error}") from error


def set_log_scale(axes):
    """Make the y axis logarithmic, which shows the small differences late in a run, with ticks at TICKS."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=TICKS, numticks=50))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


if __name__ == "__main__":
    main()
