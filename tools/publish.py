"""A run's losses, settings and stories in TensorBoard or in Weights & Biases, once it has ended or while it trains.

    python -m tools.publish out/x --to tensorboard       into out/x/tensorboard; to look: tensorboard --logdir out
    python -m tools.publish out/x --to wandb             a run named x in W&B's project tinystories (or WANDB_PROJECT)
    WANDB_MODE=offline python -m tools.publish out/x --to wandb        into out/x/wandb; to upload: wandb sync

It reads log.jsonl and samples.md and nothing else, so that training needs neither package and waits for neither. A run
that is still going is followed until its process ends; Ctrl-C ends that before. Publishing again replaces what is in
out/x/tensorboard; on W&B, where nothing can be replaced, it makes another run.
"""

import html
import itertools
import os
import re
import shlex
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import checkpoint
import files
from errors import Parser, UserError, exit_with_one_line
from tools.compare import markdown

FIGURES = {"step": ("train", ("loss", "lr", "grad_norm", "tokens_per_s", "skipped")),
           "eval": ("eval", ("train_loss", "val_loss", "val_bpb"))}  # a record's kind → their group, and its keys
STORY = re.compile(r"## iteration (\d+): validation loss \S+\n\n(.*?)\n\n(?=## iteration |\Z)", re.DOTALL)
POLL_SECONDS = 1


@exit_with_one_line
def main(argv=None):
    """Publish a run, to its end if it is still going; `argv` as on the command line."""
    parser = Parser(prog="python -m tools.publish", description="Publish a run's log, also while it trains.")
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as out/tinystories")
    parser.add_argument("--to", choices=["tensorboard", "wandb"], required=True,
                        help="event files in RUN/tensorboard, or a run on Weights & Biases")
    args = parser.parse_args(argv)

    target = {"tensorboard": TensorBoard, "wandb": WandB}[args.to](Path(args.run))
    published = []
    try:
        follow(Path(args.run), target, published)
    except KeyboardInterrupt:
        tell(target, published)
        raise  # for the exit code: who reads it learns that the run may have had more to come
    tell(target, published)


def tell(target, published):
    """Close the target, and print what was published and how to look at it."""
    steps, evals, stories = (sum(name in values for *_, values in published)
                             for name in ("train/loss", "eval/val_loss", "story"))
    look = target.close()
    if published:
        print(f"published: to iteration {published[-1][0]:,}, {steps:,} log lines of training, {evals:,} evaluations, "
              f"{stories:,} stories\n{look}")


def follow(folder, target, published):
    """Publish what a run's folder says, and what comes to it until no process trains there, listing it in `published`.

    What is published has to be the beginning of what the log says. Where it is not, as after a run was resumed from an
    earlier checkpoint, or was overwritten, the target begins again. Raises UserError where there is no log.
    """
    seen = None
    for poll in itertools.count():
        held = files.is_held(folder / ".lock")  # asked before reading: so what came until the end is read after it
        if seen != (there := sizes_and_times(folder)) or held is False:
            seen = there
            records, stories, written = read(folder)
            now = entries(folder, records, stories)
            if not (now or published) and (held is False or not folder.is_dir()):
                raise UserError(f"no log in {folder}: name the folder of a run, such as out/tinystories")
            if now and published and now[:len(published)] != published:
                print(f"note: the log of {folder} has been cut back or replaced: from now on it is published as it is")
                published.clear()
            if now and not published:
                target.begin(records[0], written - now[-1][1])
            if new := now[len(published):]:
                target.add(new)
                published += new
        if held is False:
            return
        if not poll:
            print(f"following {folder}" + (" until its training ends" if held else ": Ctrl-C ends that"), flush=True)
        time.sleep(POLL_SECONDS)


def sizes_and_times(folder):
    """What changes with a run's log and samples: a long log takes a second to read, which training can use."""
    paths = [path for path in (folder / "log.jsonl", folder / "samples.md") if path.exists()]
    return [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def read(folder):
    """A run's records so far, its stories (iteration → text), and when its log was written; empty where none is.

    The stories are read last: what is logged behind an evaluation comes after its story.
    """
    records, stories, written = [], b"", 0
    try:
        records, written = checkpoint.read_log(folder / "log.jsonl"), (folder / "log.jsonl").stat().st_mtime
        stories = (folder / "samples.md").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        pass
    return records, dict(STORY.findall(stories.decode("utf-8", "replace"))), written


def entries(folder, records, stories):
    """What a run's records and stories say, in order: a list of (iteration, seconds of the run, {name: value}).

    Raises UserError where the records are of something else.
    """
    found, seconds, settings = [], 0.0, None
    try:
        if records and records[0]["kind"] != "run":
            raise ValueError("no run has begun")
        for record in records:
            kind = record["kind"]
            if kind == "run" and record["config"] != settings:
                settings = dict(record["config"])
                found.append((record["resumed_at"] or 0, seconds, {"settings": settings}))
            elif kind in FIGURES:
                seconds = float(record["seconds"])
                found.append((int(record["iter"]), seconds, figures(record, *FIGURES[kind])))
                if kind == "eval" and str(record["iter"]) in stories:
                    found.append((record["iter"], seconds, {"story": stories[str(record["iter"])]}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}/log.jsonl is not a log of this program: name the folder of a run, such as "
                        "out/tinystories") from error
    return found


def figures(record, group, keys):
    """A record's figures by the names that they are published under.

    In float16 some updates have no gradient norm. An older log does not count those that were skipped.
    """
    return {f"{group}/{key}": float(record[key]) for key in keys
            if record.get(key) is not None and (record[key] or key != "skipped")}


class TensorBoard:
    """Event files in a run's folder tensorboard/, in place of those of an earlier publishing."""

    def __init__(self, folder):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("--to tensorboard needs tensorboard:  pip install -r requirements-extra.txt") from error
        self.folder, self.make_writer, self.writer = folder / "tensorboard", SummaryWriter, None
        threading.excepthook = lambda args: None  # the writer's thread would print what it also raises here

    def begin(self, first, start):
        """Make a new event file, and delete those before; the run's clock began at `start`."""
        with self.writing():
            self.folder.mkdir(exist_ok=True)
            files.hold(self.folder / ".lock", self.folder)  # another publishing would delete this one's file
            if self.writer:
                self.writer.close()
            for path in self.folder.glob("events.out.tfevents.*"):
                path.unlink()
            self.writer, self.start = self.make_writer(str(self.folder)), start

    def add(self, entries):
        """Write entries. Raises UserError where the disk is full."""
        with self.writing():
            for iteration, seconds, values in entries:
                for name, value in values.items():
                    if name == "settings":
                        value = markdown([("setting", "value"), *((key, str(value[key])) for key in value)])
                    write = self.writer.add_text if isinstance(value, str) else self.writer.add_scalar
                    write(name, value, iteration, self.start + seconds)
            self.writer.flush()

    @contextmanager
    def writing(self):
        """Turn a full disk and its like into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.folder} ({error.strerror or error}): make room, then publish again"
                            ) from error

    def close(self):
        """Close the event file; the words for how to look at it."""
        if self.writer:
            with self.writing():
                self.writer.close()
        root = shlex.quote(os.path.relpath(os.path.dirname(os.path.abspath(self.folder.parent))))
        return f"events: {self.folder}\nlook at them: tensorboard --logdir {root}"


class WandB:
    """A run on Weights & Biases, or with WANDB_MODE=offline one in a run's folder wandb/, to be uploaded later."""

    def __init__(self, folder):
        os.environ.setdefault("WANDB_SILENT", "true")  # also: no prompt for a key
        os.environ.setdefault("WANDB_CONSOLE", "off")
        try:
            import wandb
            self.wandb, self.errors = wandb, (wandb.Error, ValueError)  # the latter: a variable's value is wrong
        except (ImportError, AttributeError) as error:  # the latter: what it found is a folder of that name
            raise UserError("--to wandb needs wandb:  pip install -r requirements-extra.txt") from error
        self.folder, self.run, self.first, self.left_out, self.look = folder, None, None, 0, []

    def begin(self, first, start):
        """Make a run of the settings in the record `first`, or keep the one at hand where it is of the same record.

        A run that was resumed comes to the same losses again, and W&B takes no step twice.
        """
        self.start = start
        if first == self.first:
            return
        if self.run:
            self.run.finish()
        name = os.path.basename(os.path.abspath(self.folder))
        try:
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tinystories"), name=os.environ.get("WANDB_NAME", name),
                dir=os.environ.get("WANDB_DIR", os.path.abspath(self.folder)), config=first["config"],
                settings=self.wandb.Settings(x_disable_stats=True))  # they would be of this process, not of training
        except self.errors as error:
            raise UserError(f"W&B takes no run: {error} Put that right, or set WANDB_MODE=offline and upload it later "
                            "with  wandb sync") from error
        self.first, self.added, self.step = first, set(), 0
        upload = f"upload it: wandb sync {shlex.quote(os.path.relpath(Path(self.run.dir).parent))}"
        self.look.append("note: WANDB_MODE=disabled: W&B has thrown it away" if self.run.disabled else
                         upload if self.run.offline else f"look at it: {self.run.url}")

    def add(self, entries):
        """Hand entries on, without those that the run has already."""
        for iteration, seconds, values in entries:
            is_new = any((iteration, name) not in self.added for name in values)
            self.added.update((iteration, name) for name in values)
            if "settings" in values:
                self.run.config.update(values["settings"], allow_val_change=True)
            elif is_new and iteration < self.step:
                self.left_out += 1
            elif is_new:
                self.step = iteration
                if "story" in values:
                    text = f'<pre style="white-space:pre-wrap">{html.escape(values["story"])}</pre>'
                    values = {"story": self.wandb.Html(text)}
                self.run.log({**values, "_timestamp": self.start + seconds}, step=iteration)

    def close(self):
        """End the run; the words for how to look at it."""
        if self.run:
            self.run.finish()
            self.wandb.teardown()  # it has a process that may still be writing
        if self.left_out:  # a run that was resumed with another log_interval
            self.look.append(f"note: {self.left_out} entries lie between those that W&B has already, and it takes "
                             "steps in their order alone: publish again to have them in another run")
        return "\n".join(self.look)


if __name__ == "__main__":
    main()
