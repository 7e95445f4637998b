"""Runs beside each other: a table of their settings that differ and what came of them, and a picture of their losses.

    python -m tools.compare out/a out/b                      a table, and the picture out/compare.png
    python -m tools.compare out/* --picture docs/losses.svg  another picture
    python -m tools.compare out/a                            one run alone

It reads each run's log.jsonl and nothing else, so a run may still be going.
"""

from dataclasses import fields
from pathlib import Path

import checkpoint
from config import Config
from errors import Parser, UserError, exit_with_one_line

TICKS = (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.4, 2.6, 2.8, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)  # times powers of ten
SAID_ELSEWHERE = {"out_dir", "max_tokens"}  # settings that other columns tell already
RECORDS_HAVE = {"run": {"config", "data_sha256"}, "step": {"tokens", "seconds"},
                "eval": {"tokens", "seconds", "train_loss", "val_loss", "val_bpb"}}


@exit_with_one_line
def main(argv=None):
    """Print the table and draw the picture; `argv` as on the command line."""
    parser = Parser(prog="python -m tools.compare", description="Compare runs by their logs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, such as out/tinystories")
    parser.add_argument("--picture", metavar="FILE", default="out/compare.png",
                        help="where to draw the losses: .png, .svg or .pdf (default: %(default)s)")
    args = parser.parse_args(argv)

    runs = [read_run(folder) for folder in dict.fromkeys(str(Path(folder)) for folder in args.runs)]
    print(table([columns(run, differing(runs)) for run in runs]))
    for note in notes(runs):
        print(f"note: {note}")
    if not any(run["evals"] for run in runs):
        return print("no picture yet: none of these runs has been evaluated")
    draw(runs, args.picture)
    print(f"picture: {args.picture}")


def read_run(folder):
    """What a run's log says, as a dict: its name, settings, validation data, evaluations, tokens and seconds so far.

    Raises UserError where the folder holds no log, or something else under its name.
    """
    try:
        records = checkpoint.read_log(Path(folder, "log.jsonl"))
    except OSError as error:
        raise UserError(f"no log in {folder}: name the folders of runs, such as out/tinystories") from error
    starts, steps, evals = ([r for r in records if r["kind"] == kind] for kind in ("run", "step", "eval"))
    if not starts or not all(RECORDS_HAVE.get(r["kind"], set()) <= r.keys() for r in records):
        raise UserError(f"{folder}/log.jsonl is not a log of this program: leave {folder} out")
    config = {f.name: f.default for f in fields(Config)} | starts[-1]["config"]  # a log may be older than a setting
    if config["max_minutes"]:
        config |= {"max_iters": "–", "lr_decay_iters": "–"}  # the clock decides
    last = max([{"tokens": 0, "seconds": 0.0}, *steps, *evals], key=lambda record: record["seconds"])
    return {"name": folder, "config": config, "data": starts[-1]["data_sha256"].get("validation"), "evals": evals,
            "tokens": last["tokens"], "seconds": last["seconds"]}


def differing(runs):
    """The names of the settings that are not the same in all runs, in the order of the settings."""
    configs = [run["config"] for run in runs]
    names = [name for name in configs[0] if any(config.get(name) != configs[0][name] for config in configs)]
    if all(config["lr_decay_iters"] == config["max_iters"] for config in configs):
        names = [name for name in names if name != "lr_decay_iters"]  # the schedule ends with the run, as it does
    return [name for name in names if name not in SAID_ELSEWHERE]


def columns(run, names):
    """A run's line of the table: heading → text."""
    best = min(run["evals"], key=lambda record: record["val_loss"], default=None)
    return {"run": run["name"], **{name: str(run["config"].get(name, "–")) for name in names},
            "tokens": f"{run['tokens']:,}", "seconds": f"{run['seconds']:,.0f}",
            "best validation loss": f"{best['val_loss']:.4f}" if best else "–",
            "at tokens": f"{best['tokens']:,}" if best else "–",
            "bits per byte": f"{best['val_bpb']:.4f}" if best else "–"}


def table(rows):
    """Dicts with the same headings as a Markdown table: a line for each, or a column, whichever is less wide."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    return min(markdown(lines), markdown(list(zip(*lines))), key=lambda text: text.index("\n"))


def markdown(lines):
    """Lists of cells, the first of them the heading, as an aligned Markdown table; figures stand at the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [[cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))]
               for line in lines]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [aligned[0], rule, *aligned[1:]])


def notes(runs):
    """What makes the figures of these runs hard to compare, in words."""
    if any(run["data"] != runs[0]["data"] for run in runs):
        yield ("the runs have different validation data: losses do not compare, bits per byte do where the stories are "
               "the same")
    windows = {(run["config"]["block_size"], run["config"]["eval_iters"] * run["config"]["batch_size"]) for run in runs}
    if len(windows) > 1:
        yield ("the runs are evaluated on different windows (eval_iters * batch_size of block_size tokens): "
               "train.py --eval_only measures them all on the whole split")


def draw(runs, path):
    """Draw the validation loss against tokens and against time; of one run alone also the training loss.

    Runs on different data are drawn in bits per byte. Raises UserError where matplotlib is missing or the picture
    cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError as error:
        raise UserError("the picture needs matplotlib:  pip install -r requirements-extra.txt") from error
    same_data = all(run["data"] == runs[0]["data"] for run in runs)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    for run in runs:
        tokens = [record["tokens"] / 1e6 for record in run["evals"]]
        minutes = [record["seconds"] / 60 for record in run["evals"]]
        losses = [record["val_loss" if same_data else "val_bpb"] for record in run["evals"]]
        by_tokens.plot(tokens, losses, ".-", label=run["name"].replace("$", r"\$"))  # a dollar would begin a formula
        by_time.plot(minutes, losses, ".-")
        if len(runs) == 1:
            losses = [record["train_loss"] for record in run["evals"]]
            by_tokens.plot(tokens, losses, ".--", label="the same, on training data")
            by_time.plot(minutes, losses, ".--")
    by_tokens.set(xlabel="training tokens (millions)",
                  ylabel="validation loss (nats a token)" if same_data else "validation loss (bits a byte)")
    by_time.set(xlabel="time (minutes, evaluations included)")
    by_tokens.legend()
    for axes in (by_tokens, by_time):
        axes.grid(alpha=0.3)
    by_tokens.set_yscale("log")  # late in a run small differences count, and losses begin high; both axes share it
    by_tokens.yaxis.set_major_locator(LogLocator(subs=TICKS, numticks=50))
    by_tokens.yaxis.set_minor_locator(NullLocator())
    by_tokens.yaxis.set_major_formatter("{x:g}")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format=Path(path).suffix[1:] or "png", dpi=110)
    except (OSError, ValueError, RuntimeError) as error:  # the last: a format's own programs are missing
        raise UserError(f"cannot draw {path}: {error}") from error


if __name__ == "__main__":
    main()
