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
import itertools
import os
import re
import shlex
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from storygpt.run import read_log
from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line
from tools.compare import markdown

METRICS = {"step": ("train", ("loss", "lr", "grad_norm", "tokens_per_s", "skipped")),
           "eval": ("eval", ("train_loss", "val_loss", "val_bpb"))}  # kind of log record → prefix, keys
STORY = re.compile(r"## iteration (\d+): validation loss \S+\n\n(.*?)\n\n(?=## iteration |\Z)", re.DOTALL)
POLL_SECONDS = 1


@exit_with_one_line
def main(argv=None):
    """Publish a run until its training ends. `argv`: the command line, by default sys.argv's."""
    parser = Parser(prog="python -m tools.publish", description="Publish a run's log, also while it trains.")
    parser.add_argument("run", metavar="RUN", help="a run folder, such as out/tinystories")
    parser.add_argument("--to", choices=["tensorboard", "wandb"], required=True,
                        help="event files in RUN/tensorboard, or a run on Weights & Biases")
    args = parser.parse_args(argv)

    target = {"tensorboard": TensorBoard, "wandb": WandB}[args.to](Path(args.run))
    published = []
    try:
        publish(Path(args.run), target, published)
    except KeyboardInterrupt:
        close(target, published)
        raise  # exit code 130: the run may not be complete
    close(target, published)


def close(target, published):
    """Close the target, and print how much was published and how to view it."""
    steps, evals, stories = (sum(name in values for *_, values in published)
                             for name in ("train/loss", "eval/val_loss", "story"))
    how_to_view = target.close()
    if published:
        print(f"published up to iteration {published[-1][0]:,}: {steps:,} training records, {evals:,} evaluations, "
              f"{stories:,} stories\n{how_to_view}")


def publish(folder, target, published):
    """Publish the events of a run, polling for new ones until no process trains it; append them to `published`.

    Raises UserError if there is no log.
    """
    previous = None
    for poll in itertools.count():
        locked = files.is_locked(folder / ".lock")  # checked before reading, so that the last records are not missed
        current = sizes_and_times(folder)
        if current != previous or locked is False:
            previous = current
            publish_new_events(folder, target, published)
            if not published and (locked is False or not folder.is_dir()):
                raise UserError(f"no log in {folder}: give a run folder, such as out/tinystories")
        if locked is False:
            return
        if not poll:
            print(f"publishing {folder} until " + ("its training ends" if locked else "Ctrl-C"), flush=True)
        time.sleep(POLL_SECONDS)


def publish_new_events(folder, target, published):
    """Publish the events of a run that are not in `published` yet, and append them to it.

    If the log does not begin with the published events, because the run was resumed from an earlier checkpoint or
    overwritten, everything is published again.
    """
    records, stories, modified = read_run(folder)
    events = events_of(folder, records, stories)
    if events and published and events[:len(published)] != published:
        print(f"note: the log of {folder} was truncated or replaced: publishing it again")
        published.clear()
    if events and not published:
        target.begin(records[0], modified - events[-1][1])
    if new := events[len(published):]:
        target.add(new)
        published += new


def sizes_and_times(folder):
    """Sizes and modification times of a run's log and samples, to skip reading unchanged ones (slow if long)."""
    paths = [path for path in (folder / "log.jsonl", folder / "samples.md") if path.exists()]
    return [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def read_run(folder):
    """A run's log records, its stories (iteration → text), and the modification time of its log; empty if missing."""
    records, stories, modified = [], {}, 0
    try:
        records, modified = read_log(folder / "log.jsonl"), (folder / "log.jsonl").stat().st_mtime
        # Read after the log: a story is written before the records that follow its evaluation.
        stories = read_stories(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    return records, stories, modified


def read_stories(folder):
    """The stories in a run's samples.md, iteration → text."""
    return dict(STORY.findall((folder / "samples.md").read_bytes().decode("utf-8", "replace")))


def events_of(folder, records, stories):
    """The events of a run in order: (iteration, seconds since the start of the run, {name: value}).

    The values are metrics, a story (str) or settings (dict). Raises UserError if the log is of another program.
    """
    events, seconds, settings = [], 0.0, None
    try:
        if records and records[0]["kind"] != "run":
            raise ValueError("the first record is not of kind run")
        for record in records:
            kind = record["kind"]
            if kind == "run" and record["config"] != settings:
                settings = dict(record["config"])
                events.append((record["resumed_at"] or 0, seconds, {"settings": settings}))
            elif kind in METRICS:
                seconds = float(record["seconds"])
                events.append((int(record["iter"]), seconds, metrics_of(record, *METRICS[kind])))
                if kind == "eval" and str(record["iter"]) in stories:
                    events.append((record["iter"], seconds, {"story": stories[str(record["iter"])]}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}/log.jsonl is not a log of this program: give a run folder, such as out/tinystories"
                        ) from error
    return events


def metrics_of(record, prefix, keys):
    """The metrics of a log record as {"prefix/key": value}.

    Missing ones are left out (grad_norm after a float16 overflow, keys that older logs lack), and `skipped` if it is 0.
    """
    return {f"{prefix}/{key}": float(record[key]) for key in keys
            if record.get(key) is not None and (record[key] or key != "skipped")}


class TensorBoard:
    """Write event files to the folder tensorboard/ of a run, replacing existing ones."""

    def __init__(self, folder):
        """Raises UserError if tensorboard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--to tensorboard needs tensorboard:  pip install -r requirements-extra.txt") from error
        self.folder, self.make_writer, self.writer = folder / "tensorboard", SummaryWriter, None
        threading.excepthook = lambda args: None  # the writer's thread would also print the errors it raises here

    def begin(self, run_record, start_time):
        """Replace all event files by a new one. `start_time`: when the run started, in seconds since the epoch.

        Raises UserError if it cannot be written, or another process is publishing to this folder.
        """
        with self.errors_as_user_errors():
            self.folder.mkdir(exist_ok=True)
            files.acquire_lock(self.folder / ".lock", self.folder)  # two processes would delete each other's files
            if self.writer:
                self.writer.close()
            for path in self.folder.glob("events.out.tfevents.*"):
                path.unlink()
            self.writer, self.start_time = self.make_writer(str(self.folder)), start_time

    def add(self, events):
        """Write events (see events_of). Raises UserError if the disk is full."""
        with self.errors_as_user_errors():
            for iteration, seconds, values in events:
                for name, value in values.items():
                    if name == "settings":
                        value = markdown([("setting", "value"), *((key, str(value[key])) for key in value)])
                    write = self.writer.add_text if isinstance(value, str) else self.writer.add_scalar
                    write(name, value, iteration, self.start_time + seconds)
            self.writer.flush()

    @contextmanager
    def errors_as_user_errors(self):
        """Convert errors of writing, such as a full disk, into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.folder} ({error.strerror or error}): fix that, then publish again"
                            ) from error

    def close(self):
        """Close the event file. Returns a message for the user: where it is and how to view it."""
        if self.writer:
            with self.errors_as_user_errors():
                self.writer.close()
        root = shlex.quote(os.path.relpath(os.path.dirname(os.path.abspath(self.folder.parent))))
        return f"event files: {self.folder}\nview: tensorboard --logdir {root}"


class WandB:
    """Log to a run on Weights & Biases, or with WANDB_MODE=offline to the folder wandb/ of the run."""

    def __init__(self, folder):
        """Raises UserError if wandb is not installed."""
        os.environ.setdefault("WANDB_SILENT", "true")  # also disables the prompt for an API key
        os.environ.setdefault("WANDB_CONSOLE", "off")
        try:
            import wandb
            self.wandb, self.errors = wandb, (wandb.Error, ValueError)  # ValueError: an invalid environment variable
        except (ImportError, AttributeError) as error:  # AttributeError: a folder named wandb was imported instead
            raise UserError("--to wandb needs wandb:  pip install -r requirements-extra.txt") from error
        self.folder, self.run, self.run_record, self.skipped, self.messages = folder, None, None, 0, []

    def begin(self, run_record, start_time):
        """Create a W&B run with the settings of `run_record`, the log's first record.

        If the log was truncated but begins with the same record, the current W&B run is kept: the resumed run repeats
        the same losses, and W&B accepts each step only once.
        """
        self.start_time = start_time
        if run_record == self.run_record:
            return
        if self.run:
            self.run.finish()
        name = os.path.basename(os.path.abspath(self.folder))
        try:
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tinystories"), name=os.environ.get("WANDB_NAME", name),
                dir=os.environ.get("WANDB_DIR", os.path.abspath(self.folder)), config=run_record["config"],
                settings=self.wandb.Settings(x_disable_stats=True))  # it would measure this process, not training
        except self.errors as error:
            raise UserError(f"cannot create a W&B run: {error} Fix that, or set WANDB_MODE=offline and upload it later "
                            "with  wandb sync") from error
        self.run_record, self.added, self.last_step = run_record, set(), 0
        upload = f"upload: wandb sync {shlex.quote(os.path.relpath(Path(self.run.dir).parent))}"
        self.messages.append("note: nothing was kept, because WANDB_MODE=disabled" if self.run.disabled else
                             upload if self.run.offline else f"view: {self.run.url}")

    def add(self, events):
        """Log events (see events_of), except those that the W&B run already has."""
        for iteration, seconds, values in events:
            is_new = any((iteration, name) not in self.added for name in values)
            self.added.update((iteration, name) for name in values)
            if "settings" in values:
                self.run.config.update(values["settings"], allow_val_change=True)
            elif is_new and iteration < self.last_step:
                self.skipped += 1
            elif is_new:
                self.last_step = iteration
                if "story" in values:
                    text = f'<pre style="white-space:pre-wrap">{html.escape(values["story"])}</pre>'
                    values = {"story": self.wandb.Html(text)}
                self.run.log({**values, "_timestamp": self.start_time + seconds}, step=iteration)

    def close(self):
        """Finish the W&B run. Returns a message for the user: how to view or upload it."""
        if self.run:
            self.run.finish()
            self.wandb.teardown()  # wait for its process, which may still be writing
        if self.skipped:  # after a run was resumed with a different log_interval
            self.messages.append(f"note: skipped {self.skipped} records, because W&B accepts steps only in increasing "
                                 "order: publish again to get all of them in a new W&B run")
        return "\n".join(self.messages)


if __name__ == "__main__":
    main()
