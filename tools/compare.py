"""Compare runs: a table of the settings that differ and of the results, and a plot of the losses.

    python -m tools.compare out/a out/b                      a table, and the plot out/compare.png
    python -m tools.compare out/* --picture docs/losses.svg  save the plot elsewhere
    python -m tools.compare out/a                            a single run

It reads only each run's log.jsonl, so a run may still be training.
"""

if __name__ == "__main__":
    from runtime import startup

    startup.before_importing_torch()

from dataclasses import fields
from pathlib import Path

from checkpoint import read_log
from config import Config
from runtime.errors import Parser, UserError, exit_with_one_line

TICKS = (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.4, 2.6, 2.8, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)  # times powers of ten
REDUNDANT_SETTINGS = {"out_dir", "max_tokens"}  # other columns show them
REQUIRED_KEYS = {"run": {"config", "data_sha256"}, "step": {"tokens", "seconds"},
                 "eval": {"tokens", "seconds", "train_loss", "val_loss", "val_bpb"}}


@exit_with_one_line
def main(argv=None):
    """Print the table and save the plot; `argv` as on the command line."""
    parser = Parser(prog="python -m tools.compare", description="Compare runs by their logs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, such as out/tinystories")
    parser.add_argument("--picture", metavar="FILE", default="out/compare.png",
                        help="where to save the plot of the losses: .png, .svg or .pdf (default: %(default)s)")
    args = parser.parse_args(argv)

    runs = [read_run(folder) for folder in dict.fromkeys(str(Path(folder)) for folder in args.runs)]
    print(format_table([table_row(run, differing_settings(runs)) for run in runs]))
    for warning in comparability_warnings(runs):
        print(f"note: {warning}")
    if not any(run["evals"] for run in runs):
        return print("no plot: none of these runs has been evaluated yet")
    plot(runs, args.picture)
    print(f"plot: {args.picture}")


def read_run(folder):
    """A run's log as a dict: name, settings, hash of the validation data, evaluations, and tokens and seconds so far.

    Raises UserError if the folder has no log.jsonl, or one that train.py did not write.
    """
    try:
        records = read_log(Path(folder, "log.jsonl"))
    except OSError as error:
        raise UserError(f"no log in {folder}: name run folders, such as out/tinystories") from error
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


def table_row(run, settings):
    """A run's row of the table, heading → text, with these settings and the best evaluation."""
    best = min(run["evals"], key=lambda record: record["val_loss"], default=None)
    return {"run": run["name"], **{name: str(run["config"].get(name, "–")) for name in settings},
            "tokens": f"{run['tokens']:,}", "seconds": f"{run['seconds']:,.0f}",
            "best validation loss": f"{best['val_loss']:.4f}" if best else "–",
            "at tokens": f"{best['tokens']:,}" if best else "–",
            "bits per byte": f"{best['val_bpb']:.4f}" if best else "–"}


def format_table(rows):
    """Dicts with the same keys as a Markdown table: a row or a column per dict, whichever is narrower."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
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
    if any(run["data"] != runs[0]["data"] for run in runs):
        yield ("the runs have different validation data: compare bits per byte instead of losses, and only if the "
               "stories are the same")
    windows = {(run["config"]["block_size"], run["config"]["eval_iters"] * run["config"]["batch_size"]) for run in runs}
    if len(windows) > 1:
        yield ("the runs are evaluated on different windows (eval_iters * batch_size of block_size tokens): evaluate "
               "each with train.py --eval_only, which uses the whole split")


def plot(runs, path):
    """Plot the validation loss against tokens and against time; for a single run also the training loss.

    Runs on different data are plotted in bits per byte. Raises UserError if matplotlib is missing or the file cannot
    be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the plot needs matplotlib:  pip install -r requirements-extra.txt") from error
    same_data = all(run["data"] == runs[0]["data"] for run in runs)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    for run in runs:
        curves = [("val_loss" if same_data else "val_bpb", ".-", run["name"].replace("$", r"\$"))]  # $ begins a formula
        if len(runs) == 1:
            curves.append(("train_loss", ".--", "training loss"))
        for key, style, label in curves:
            losses = [record[key] for record in run["evals"]]
            by_tokens.plot([record["tokens"] / 1e6 for record in run["evals"]], losses, style, label=label)
            by_time.plot([record["seconds"] / 60 for record in run["evals"]], losses, style)
    by_tokens.set(xlabel="training tokens (millions)",
                  ylabel="validation loss (nats/token)" if same_data else "validation loss (bits per byte)")
    by_time.set(xlabel="time (minutes, including evaluations)")
    by_tokens.legend()
    set_log_scale(by_tokens)  # the two axes share it
    for axes in (by_tokens, by_time):
        axes.grid(alpha=0.3)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format=Path(path).suffix[1:] or "png", dpi=110)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a program that the format needs is missing
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
