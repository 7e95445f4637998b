"""Publish a run's losses, settings and stories to TensorBoard or Weights & Biases, also while it trains.

    python -m tools.publish out/x --to tensorboard       to out/x/tensorboard; view: tensorboard --logdir out
    python -m tools.publish out/x --to wandb             a run named x in W&B's project tinystories (or WANDB_PROJECT)
    WANDB_MODE=offline python -m tools.publish out/x --to wandb        to out/x/wandb; upload: wandb sync

It reads only log.jsonl and samples.md, so training depends on neither package. If the run is still training, new
records are published until training ends or Ctrl-C. Publishing a run again replaces its TensorBoard files; on W&B,
where nothing can be replaced, it creates another run.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

import html
import os
import re
import time
from contextlib import contextmanager
from pathlib import Path

from storygpt.run import read_log
from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line, shell_word
from tools.compare import markdown

METRICS = {"step": ("train", ("loss", "lr", "grad_norm", "tokens_per_s")),
           "eval": ("eval", ("train_loss", "val_loss", "val_bpb"))}  # kind of log record → prefix, keys
STORY = re.compile(r"## iteration (\d+): validation loss \S+\n\n(.*?)\n\n(?=## iteration |\Z)", re.DOTALL)
POLL_SECONDS = 5


@exit_with_one_line
def main(argv=None):
    """Publish a run until its training ends. `argv`: the command line, by default sys.argv's."""
    parser = Parser(prog="python -m tools.publish", description="Publish a run's log, also while it trains.")
    parser.add_argument("run", metavar="RUN", help="a run folder, such as out/tinystories")
    parser.add_argument("--to", choices=["tensorboard", "wandb"], required=True,
                        help="event files in RUN/tensorboard, or a run on Weights & Biases")
    args = parser.parse_args(argv)

    folder = Path(args.run)
    locked = files.is_locked(folder / ".lock")
    if not locked and not (folder / "log.jsonl").exists():
        raise UserError(f"no log in {folder}: give a run folder, such as out/tinystories")
    if not locked:
        read_log(folder / "log.jsonl")  # a damaged one is an error before anything is replaced
    with {"tensorboard": tensorboard_writer, "wandb": wandb_writer}[args.to](folder) as write:
        print(f"publishing {folder}" + " until its training ends, or Ctrl-C" * (locked is not False), flush=True)
        publish(folder, write)


def publish(folder, write):
    """Publish what a run has logged, polling for more until no process trains it.

    After a run is resumed, it logs again what came after its checkpoint; that is not published again. Raises UserError
    if another run replaces this one.
    """
    first_record, published, iteration = [], set(), 0
    while True:
        locked = files.is_locked(folder / ".lock")  # before the log is read, so that its last records are not missed
        records = read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
        if first_record and records[:1] != first_record:
            raise UserError(f"the run in {folder} was replaced by another one: publish that one")
        first_record = records[:1]
        for iteration, timestamp, values in read_events(folder, records) if records else []:
            new = {name: value for name, value in values.items() if (iteration, name) not in published}
            if new:
                write(iteration, timestamp, new)
            published.update((iteration, name) for name in new)
        if locked is False:  # None: unknown, because the file system has no locks; then until Ctrl-C
            return print(f"published up to iteration {iteration:,}")
        time.sleep(POLL_SECONDS)


def read_events(folder, records):
    """Yield the events in the records of a run's log: (iteration, time in seconds since the epoch, {name: value}).

    A value is a metric, a story (str) or the settings (dict). Metrics that a record lacks are left out, such as
    grad_norm after an overflow in float16.
    """
    stories = read_stories(folder) if (folder / "samples.md").exists() else {}  # after the log: stories are complete
    start = (folder / "log.jsonl").stat().st_mtime - max(record.get("seconds", 0) for record in records)
    seconds = 0
    for record in records:
        seconds = record.get("seconds", seconds)
        if record["kind"] == "run":
            yield record["resumed_at"] or 0, start + seconds, {"settings": record["config"]}
        elif record["kind"] in METRICS:
            prefix, keys = METRICS[record["kind"]]
            values = {f"{prefix}/{key}": record[key] for key in keys if record.get(key) is not None}
            if record["kind"] == "eval" and str(record["iter"]) in stories:
                values["story"] = stories[str(record["iter"])]
            yield record["iter"], start + seconds, values


def read_stories(folder):
    """The stories in a run's samples.md, iteration → text."""
    return dict(STORY.findall((folder / "samples.md").read_bytes().decode("utf-8", "replace")))


@contextmanager
def tensorboard_writer(folder):
    """Replace the event files in tensorboard/ in a run folder by new ones; yields a function that writes an event.

    Raises UserError if another process publishes to this folder.
    """
    from torch.utils.tensorboard import SummaryWriter
    (folder / "tensorboard").mkdir(exist_ok=True)
    files.acquire_lock(folder / "tensorboard/.lock", folder / "tensorboard")  # two would delete each other's files
    for path in (folder / "tensorboard").glob("events.out.tfevents.*"):
        path.unlink()

    def write(iteration, timestamp, values):
        for name, value in values.items():
            if name == "settings":
                value = markdown([("setting", "value"), *((key, str(setting)) for key, setting in value.items())])
            write_value = writer.add_text if isinstance(value, str) else writer.add_scalar
            write_value(name, value, iteration, timestamp)

    with SummaryWriter(folder / "tensorboard", flush_secs=POLL_SECONDS) as writer:
        print(f"view: tensorboard --logdir {shell_word(folder.parent)}")
        yield write


@contextmanager
def wandb_writer(folder):
    """Create a run on Weights & Biases, which prints how to view or upload it; yields a function that logs an event.

    Raises UserError if the run cannot be created.
    """
    import wandb
    try:
        run = wandb.init(project=os.environ.get("WANDB_PROJECT", "tinystories"), name=folder.resolve().name, dir=folder,
                         settings=wandb.Settings(console="off", x_disable_stats=True))  # stats: of this process
    except (wandb.Error, ValueError) as error:  # ValueError: an invalid environment variable
        raise UserError(f"cannot create a W&B run: {error} Fix that, or set WANDB_MODE=offline and upload it later "
                        "with  wandb sync") from error

    def write(iteration, timestamp, values):  # W&B ignores iterations before the latest one
        if "settings" in values:
            run.config.update(values["settings"], allow_val_change=True)
            return
        if "story" in values:
            values["story"] = wandb.Html(f'<pre style="white-space:pre-wrap">{html.escape(values["story"])}</pre>')
        run.log(values | {"_timestamp": timestamp}, step=iteration)

    try:
        yield write
    finally:
        run.finish()  # as a success, also after Ctrl-C


if __name__ == "__main__":
    main()
