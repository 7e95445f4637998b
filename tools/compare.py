"""Compare runs: a table of the settings that differ and of the results, and a plot of the losses.

    python -m tools.compare out/a out/b                       a table, and the plot out/compare.png
    python -m tools.compare out/*/ --picture docs/losses.svg  save the plot elsewhere
    python -m tools.compare out/a out/b --watch               again after each evaluation, until Ctrl-C
    python -m tools.compare out/sweep                         the runs of a sweep (tools/sweep.py), a row per setting

Runs of a sweep that differ only in the seed are one row, with the mean ± standard deviation of their losses, and one
curve, in a band from the lowest to the highest. It reads only each run's log.jsonl, so a run may still be training.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

import functools
import re
import statistics
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from storygpt.run import read_log
from storygpt.settings import Config
from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line

TICKS = (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.4, 2.6, 2.8, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)  # times powers of ten


class NoLogYet(UserError):
    """A folder has no log, or an empty one: the run in it may be about to start."""


@exit_with_one_line
def main(argv=None):
    """Print the table and save the plot; `argv` as on the command line."""
    parser = Parser(prog="python -m tools.compare", description="Compare runs by their logs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, as out/tinystories, or of a sweep")
    parser.add_argument("--picture", default="out/compare.png", help="the plot, .png, .svg or .pdf (%(default)s)")
    parser.add_argument("--watch", action="store_true", help="wait for runs to begin; again after each evaluation")
    args = parser.parse_args(argv)

    if args.watch:
        return watch(args.runs, args.picture)
    groups, missing = read_all(args.runs)
    if not groups:
        raise next(iter(missing.values()))
    for error in missing.values():
        print(f"note: {error}")
    report(groups, args.picture)


def watch(folders, picture):
    """Report on the runs when one begins and after each evaluation, until Ctrl-C. Runs without a log are waited for."""
    before = None
    while True:
        groups, missing = read_all(folders)
        waiting = [f"waiting for a run in {folder}" for folder in missing]
        now = waiting, [(run["name"], run["config"], run["evals"]) for group in groups for run in group]
        if now != before:
            if groups:
                report(groups, picture)
            print(time.strftime("%H:%M:%S"), *waiting, sep="\n", flush=True)  # it may be a file or a pipe
        before = now
        time.sleep(2)


def report(groups, picture):
    """Print the table of the runs, and save the plot if one of them has been evaluated."""
    runs = [run for group in groups for run in group]
    print(format_table(groups))
    for warning in comparability_warnings(runs):
        print(f"note: {warning}")
    if any(run["evals"] for run in runs):
        plot(groups, picture)
        print(f"plot: {picture}")


def read_all(folders):
    """The `read_groups` of all folders as one list, and for folders without a run a dict, folder → NoLogYet."""
    groups, missing = [], {}
    for folder in folders:
        try:
            groups += read_groups(folder)
        except NoLogYet as error:
            missing[folder] = error
    return groups, missing


def read_groups(folder):
    """The run in a folder or, in that of a sweep, its runs that have begun, as lists that differ only in the seed.

    Raises UserError as `read_run` does.
    """
    logs = [] if Path(folder, "log.jsonl").exists() else sorted(Path(folder).glob("*/log.jsonl"))
    runs, groups = [], {}
    for log in logs:
        with suppress(NoLogYet):
            runs.append(read_run(log.parent))
    for run in runs or [read_run(folder)]:
        settings = run["config"] | {"seed": None, "out_dir": None, "device": None}  # tools/sweep.py may use all GPUs
        groups.setdefault((str(settings), run["data"]), []).append(run)
    return list(groups.values())


def group_name(group):
    """The name of a run, or of several that differ in the seed, with which tools/sweep.py ends a folder's name."""
    name = group[0]["name"]
    return re.sub(r"[,/\\]seed=\d+$", "", name) if len(group) > 1 else name


def read_run(folder):
    """A run's log as a dict: name, settings, hashes of the data (of validation, and of all splits), evaluations, tokens
    and seconds so far, and the reason for which it ended or None.

    Raises NoLogYet if the folder has no log.jsonl or one without a record of a run, UserError for a damaged log.
    """
    path = Path(folder, "log.jsonl")
    if not path.exists() or not path.stat().st_size:
        raise NoLogYet(f"no log in {folder}: name the folders of runs that have begun, such as out/tinystories")
    return read_changed_run(folder, path.stat().st_size, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=256)  # reading again what has not changed would take time from a run in training
def read_changed_run(folder, size, modified):
    """`read_run`, for a log of this size and modification time."""
    records = read_log(Path(folder, "log.jsonl"))
    starts, evals = ([record for record in records if record["kind"] == kind] for kind in ("run", "eval"))
    if not starts:
        raise NoLogYet(f"no record of a run in {folder}/log.jsonl yet")
    config = {f.name: f.default for f in fields(Config)} | starts[-1]["config"]  # it lacks newer settings
    if config["max_minutes"]:
        config |= {"max_iters": "–", "lr_decay_iters": "–"}  # not used
    last = next((record for record in reversed(records) if "seconds" in record), {"tokens": 0, "seconds": 0.0})
    data = starts[-1]["data_sha256"]
    return {"name": str(Path(folder)), "config": config, "data": data.get("validation"), "data_sha256": data,
            "evals": evals, "tokens": last["tokens"], "seconds": last["seconds"], "end": records[-1].get("reason")}


def comparability_warnings(runs):
    """Yield a message for each reason why the losses of these runs cannot be compared directly."""
    if not have_same_data(runs):
        yield "the runs have different validation data: compare bits per byte, and only if the stories are the same"
    windows = {(run["config"]["block_size"], run["config"]["eval_iters"] * run["config"]["batch_size"]) for run in runs}
    if len(windows) > 1:
        yield "the runs are evaluated on different windows: evaluate each with train.py --eval_only, on the whole split"


def have_same_data(runs):
    """Whether the losses of these runs are of the same validation data."""
    return len({run["data"] for run in runs}) <= 1


def format_table(groups):
    """The settings that differ and the results as a Markdown table: a row or a column per group, what is narrower."""
    configs = [run["config"] for group in groups for run in group]
    columns = {"run": [group_name(group) for group in groups]}
    for name, value in configs[0].items():
        if name not in ("out_dir", "max_tokens") and any(config.get(name) != value for config in configs):
            columns[name] = [str(group[0]["config"].get(name, "–")) for group in groups]
    if columns.get("lr_decay_iters") == columns.get("max_iters"):
        columns.pop("lr_decay_iters", None)  # the default
    if any(len(group) > 1 for group in groups):
        columns.pop("seed", None)
        columns.pop("device", None)
        columns["seeds"] = [str(len(group)) for group in groups]
    best = [[min(run["evals"], key=lambda record: record["val_loss"]) for run in group if run["evals"]]
            for group in groups]
    columns["tokens"] = [span([run["tokens"] for run in group]) for group in groups]
    columns["seconds"] = [span([round(run["seconds"]) for run in group]) for group in groups]
    columns["best validation loss"] = [mean_and_deviation([record["val_loss"] for record in group]) for group in best]
    columns["at tokens"] = [span([record["tokens"] for record in group]) for group in best]
    columns["bits per byte"] = [mean_and_deviation([record["val_bpb"] for record in group]) for group in best]
    lines = [[heading, *cells] for heading, cells in columns.items()]
    return min(markdown(list(zip(*lines))), markdown(lines), key=lambda text: text.index("\n"))


def span(numbers):
    """The lowest and the highest of these whole numbers, as text: one number if they are equal, – if there is none."""
    return "–".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)})) if numbers else "–"


def mean_and_deviation(losses):
    """The mean ± standard deviation of these losses, as text: without the latter for a single one, – for none."""
    if len(losses) > 1:
        return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"
    return f"{losses[0]:.4f}" if losses else "–"


def markdown(lines):
    """Lists of cells, the first list being the header, as an aligned Markdown table; numbers are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [[cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))]
               for line in lines]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [aligned[0], rule, *aligned[1:]])


def plot(groups, path):
    """Plot the validation loss against tokens and against time; for a single run also the training loss.

    A group of several runs is one curve, their mean, in a band from the lowest to the highest. Runs on different data
    are plotted in bits per byte. Raises UserError if the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
    runs = [run for group in groups for run in group]
    key, unit = ("val_loss", "nats/token") if have_same_data(runs) else ("val_bpb", "bits per byte")
    figure = Figure(figsize=(11, 4.5 + 0.12 * len(groups)), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    curves = [(group, key, ".-", group_name(group)) for group in groups]
    if len(runs) == 1:
        curves.append((groups[0], "train_loss", ".--", "training loss"))
    for group, key, style, label in curves:
        tokens, minutes, lowest, mean, highest = curve(group, key)
        for axes, x in ((by_tokens, tokens), (by_time, minutes)):
            line, = axes.plot(x, mean, style, label=label)
            axes.fill_between(x, lowest, highest, color=line.get_color(), alpha=0.2, linewidth=0)
    by_tokens.set(xlabel="training tokens (millions)", ylabel=f"validation loss ({unit})")
    by_time.set_xlabel("time (minutes, including evaluations)")
    figure.legend(*by_tokens.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    by_tokens.set_yscale("log")  # shows the small differences late in a run; the two axes share it
    by_tokens.yaxis.set_major_locator(LogLocator(subs=TICKS, numticks=50))
    by_tokens.yaxis.set_major_formatter("{x:g}")
    for axes in (by_tokens, by_time):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def curve(group, key):
    """The losses `key` of a list of runs at the evaluations that all of them have, or all but those without any yet.

    Returns five lists: tokens in millions, mean time in minutes, lowest, mean and highest loss.
    """
    runs = [{record["tokens"] / 1e6: record for record in run["evals"]} for run in group if run["evals"]]
    tokens = sorted(set.intersection(*map(set, runs))) if runs else []
    minutes = [statistics.mean(run[x]["seconds"] for run in runs) / 60 for x in tokens]
    losses = [[run[x][key] for run in runs] for x in tokens]
    return tokens, minutes, list(map(min, losses)), list(map(statistics.mean, losses)), list(map(max, losses))


def save_figure(figure, path):
    """Save a matplotlib figure atomically, in the format of the file's name. Raises UserError if that fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix[1:] or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"cannot write the plot {path}: give the name of a .png, .svg or .pdf file with --picture")
    files.atomic_write(path, lambda file: figure.savefig(file, format=kind, dpi=110))


if __name__ == "__main__":
    main()
