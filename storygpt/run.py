"""A run and its folder, out/<run>/: its state, opening it (new, resumed, or from other weights), and its logs.

    ckpt.pt        the weights with the best validation loss so far, and what is needed to use them
    last.pt        the latest weights, the optimizers and everything else needed to resume
    last.prev.pt   the previous last.pt, used if last.pt is damaged (that one is then last.damaged.pt)
    log.jsonl      one JSON object per line: the run, its training steps, its evaluations
    samples.md     a story from each evaluation
    tokenizer.tiktoken, meta.json   copied from the dataset, so that the folder is self-contained
    .lock          locked by the process that trains
"""

import itertools
import json
import math
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn as nn

from model import ModelSettings
from storygpt.checkpoint import (LAST_REQUIRED_KEYS, DamagedCheckpoint, load, load_model, load_weights,
                                 reading_checkpoint, save)
from storygpt.corpus.dataset import Dataset, data_sha256, read_meta
from storygpt.corpus.tokenizer import Tokenizer
from storygpt.settings import SETTINGS, Config, apply_overrides
from storygpt.system import files
from storygpt.system.distributed import sync_stop_and_time
from storygpt.system.errors import QUICKSTART, UserError, shell_word
from storygpt.system.hardware import largest_divisor

# What a run writes, in the order in which a new run removes it: what resuming needs goes first.
RUN_FILES = ("last.prev.pt", "last.pt", "last.damaged.pt", "ckpt.pt", "log.jsonl", "samples.md")
# What can be the name of a GPT-2 on the Hugging Face hub, rather than a run folder.
HUB_NAME = re.compile(r"gpt2(-medium|-large|-xl)?|distilgpt2|(?!out/)\w[\w.-]*/\w[\w.-]*", re.ASCII)
CHANGEABLE_ON_RESUME = {name for name, f in SETTINGS.items() if f.metadata.get("resume")}


# ---- the state of a run ----


@dataclass
class TrainState:
    """A run in training: what the functions of the training loop share, and what a checkpoint stores of it."""

    cfg: Config
    data: Dataset
    model: nn.Module
    scaler: torch.amp.GradScaler  # for float16; otherwise disabled
    device: torch.device
    dtype: torch.dtype  # of matrix products
    micro_batch_size: int  # sequences that go through the model at once
    rank: int = 0
    world_size: int = 1

    optimizers: list = field(default_factory=list)
    optimized: list = field(default_factory=list)  # `describe_optimizers` before the first step
    step: int = 0  # optimizer steps done
    skipped: int = 0  # steps skipped because float16 gradients overflowed
    best_val_loss: float = math.inf
    metrics: dict = field(default_factory=lambda: {"iter": 0})  # of the latest evaluation
    seconds: float = 0.0  # spent on the run, by rank 0's clock at the latest `sync_ranks`
    stop: bool = False  # whether any rank was asked to stop, at the latest `sync_ranks`; an edit may set it

    started: float = 0.0  # `time.perf_counter()` at which `elapsed()` is 0
    logged_step: int = 0  # `step` at the latest log line
    logged_at: float = 0.0  # `time.perf_counter()` at the latest log line
    excluded_seconds: float = 0.0  # spent on evaluations and saves since: the logged speed is that of training alone
    saved_step: int = 0  # `step` at the latest save of last.pt
    saved_seconds: float = 0.0  # `seconds` at the latest save of last.pt

    @property
    def out_dir(self):
        """The run folder."""
        return Path(self.cfg.out_dir)

    @property
    def iteration(self):
        """Iterations done."""
        return self.step * self.cfg.gradient_accumulation_steps

    @property
    def tokens(self):
        """Tokens trained on."""
        return self.step * self.cfg.tokens_per_step

    def start_clock(self):
        """Start counting time. The seconds of earlier sessions of a resumed run are included."""
        self.logged_at = time.perf_counter()
        self.started = self.logged_at - self.seconds
        self.logged_step, self.saved_step, self.saved_seconds = self.step, self.step, self.seconds

    def elapsed(self):
        """Seconds spent on the run up to now, by this rank's clock, evaluations included."""
        return time.perf_counter() - self.started

    def sync_ranks(self, stop):
        """Give all ranks the same `seconds` and `stop`, so that they take the same decisions."""
        self.stop, self.seconds = sync_stop_and_time(stop or self.stop, self.elapsed())

    def log(self, record):
        """Append a record to log.jsonl, on rank 0."""
        if self.rank == 0:
            files.append_line(self.out_dir / "log.jsonl", record)

    def model_dict(self):
        """The content of ckpt.pt. Metrics may be of numpy or torch, and are stored as numbers of Python."""
        metrics = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in self.metrics.items()}
        return {"model": self.model.state_dict(), "model_config": asdict(self.model.config),
                "config": asdict(self.cfg), "data_sha256": self.data.sha256, "iter": self.iteration,
                "step": self.step, "tokens": self.tokens, "metrics": metrics}

    def resume_dict(self):
        """The content of last.pt."""
        return self.model_dict() | {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers], "optimized": self.optimized,
            "scaler": self.scaler.state_dict(), "skipped": self.skipped, "best_val_loss": self.best_val_loss,
            "seconds": self.elapsed(), "world_size": self.world_size, "sizes": flush_logs(self.out_dir)}

    def restore(self, checkpoint):
        """Load the content of a last.pt. Raises UserError if it does not fit the model or the optimizers."""
        path = self.out_dir / "last.pt"
        load_weights(path, self.model, checkpoint["model"])
        check_optimizers(path, checkpoint["optimized"], self.optimized)
        with reading_checkpoint(path, ValueError, KeyError):
            for optimizer, stored in zip(self.optimizers, checkpoint["optimizers"], strict=True):
                for group, stored_group in zip(optimizer.param_groups, stored["param_groups"]):
                    if "fused" in group:  # the device may be another than before
                        stored_group["fused"] = group["fused"]
                optimizer.load_state_dict(stored)
        if checkpoint["scaler"]:  # empty if the run was not in float16 before
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.skipped, self.seconds = checkpoint["step"], checkpoint["skipped"], checkpoint["seconds"]
        self.metrics, self.best_val_loss = checkpoint["metrics"], checkpoint["best_val_loss"]


def describe_optimizers(model, optimizers):
    """How each parameter is optimized: a list of dicts with its name, its optimizer and the hyperparameters, as text.

    In the order of the optimizers' state dicts, which have no names. Raises UserError for a parameter that is not one
    of the model.
    """
    names = {p: name for name, p in model.named_parameters()}
    if not all(p in names for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]):
        raise UserError("an optimizer of train.py: make_optimizers has a parameter that is not one of the model, so it "
                        "would not be saved: make it an attribute of the model")
    depend_on_device = {"params", "fused", "foreach", "capturable"}
    return [{"parameter": names[p], "optimizer": type(optimizer).__name__}
            | {key: str(value) for key, value in group.items() if key not in depend_on_device}
            for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def check_optimizers(path, stored, current):
    """Raise UserError if the optimizers of a last.pt differ from the current ones (`describe_optimizers` of each)."""
    for before, now in zip(stored, current):
        for key in now:
            if before.get(key, now[key]) != now[key]:  # another version of PyTorch may have other hyperparameters
                raise UserError(f"{path} has {key} = {before[key]} where the program now has {now[key]} (of "
                                f"{now['parameter']}): undo that edit of the model or of train.py: make_optimizers, or "
                                f"start a new run from its weights with --init_from={shell_word(path.parent)}")


# ---- opening a run ----


def open_run(settings, flags, args, world_size):
    """Resolve a command line to (Config, checkpoint to resume from, checkpoint to initialize from).

    Each checkpoint is a dict or None: a run is resumed (--resume), starts from the weights of another run (init_from)
    or is new. `settings`: those of the config file. Locks a run to resume and replaces its last.pt if that is damaged;
    changes nothing else. Raises UserError if the run cannot be opened.
    """
    wanted = apply_overrides(settings, flags)
    out_dir = wanted.get("out_dir") or (newest_run() if args.resume else Config.out_dir)
    resume_checkpoint = init_checkpoint = None
    if args.resume or (vars(args)["resume=auto"] and is_resumable(out_dir)):
        cfg, resume_checkpoint = _resume(out_dir, settings, flags, world_size)
    elif wanted.get("init_from", "scratch") != "scratch":
        cfg, init_checkpoint = _init_from(wanted)
    else:
        cfg = Config(**wanted)
    if not resume_checkpoint and not args.overwrite:
        check_no_run(cfg.out_dir)
    if cfg.sequences_per_step % world_size:
        raise UserError(f"{world_size} processes cannot divide a step's {cfg.sequences_per_step} sequences evenly: use "
                        f"{largest_divisor(cfg.sequences_per_step, world_size)}, or another batch_size")
    return cfg, resume_checkpoint, init_checkpoint


def _resume(out_dir, settings, flags, world_size):
    """The Config of a run to resume, its stored settings overridden by the flags, and its checkpoint."""
    checkpoint = load_resume_checkpoint(out_dir)
    with reading_checkpoint(Path(out_dir, "last.pt"), TypeError):
        stored = asdict(Config(**checkpoint["config"]))
    cfg = Config(**apply_overrides(stored, flags) | {"out_dir": str(out_dir)})
    check_resume_settings(stored, asdict(cfg), apply_overrides(settings, flags))
    if checkpoint["world_size"] != world_size:
        print(f"changed: the world size is now {world_size}, was {checkpoint['world_size']}")
    data_dir = Path("data", cfg.dataset)
    if data_sha256(read_meta(data_dir)) != checkpoint["data_sha256"]:
        raise UserError(f"{data_dir} is not the data that {out_dir} was trained on: prepare that data again, or start "
                        "a new run with another --out_dir")
    return cfg, checkpoint


def check_resume_settings(stored, current, settings):
    """Print which settings differ from the stored ones of a resumed run; raise UserError for those that may not."""
    if bool(stored["max_minutes"]) != bool(current["max_minutes"]):
        raise UserError("the length of a run with max_minutes can be changed by --max_minutes only, that of any other "
                        "run by --max_iters or --max_tokens: use that flag, or start a new run with another --out_dir")
    # A longer run, whose schedule has already ended at a learning rate of 0.
    if current["min_lr"] == 0 and max(stored["max_iters"], current["lr_decay_iters"]) < current["max_iters"]:
        raise UserError(f"the learning rate is 0 from iteration {current['lr_decay_iters']} on, so more iterations "
                        "would not train the model: start a new run of that length with another --out_dir")
    for name in current:
        if current[name] != stored[name] and name not in CHANGEABLE_ON_RESUME:
            raise UserError(f"{name} = {current[name]!r} cannot change when a run is resumed (it is {stored[name]!r}): "
                            "leave it out, or start a new run with another --out_dir")
        if current[name] != stored[name]:
            print(f"changed: {name} is now {current[name]!r}, was {stored[name]!r}")
        elif settings.get(name, stored[name]) != stored[name]:
            print(f"note: the run keeps {name} = {stored[name]!r}; the config file has {settings[name]!r}")


def _init_from(settings):
    """The Config of a new run with the architecture of the run that init_from names, and that run's checkpoint.

    block_size may be smaller than that run's, and dropout may differ. Raises UserError for any other difference.
    """
    source = Path(settings["init_from"])
    model, tokenizer, checkpoint = load_model(best_checkpoint(source))
    architecture = architecture_of(model.config)
    cfg = Config(**architecture | settings)
    for name, value in architecture.items():
        wanted = getattr(cfg, name)
        if wanted != value and not (name == "block_size" and wanted < value):
            raise UserError(f"{name} = {wanted!r} differs from that of init_from = {cfg.init_from!r}, {value!r}: leave "
                            f"it out, or set --{name}={value}" + " or less" * (name == "block_size"))
    if source.resolve() == Path(cfg.out_dir).resolve():
        raise UserError(f"init_from = {cfg.init_from!r} is also the folder of the new run: choose another --out_dir")
    if Tokenizer.load(Path("data", cfg.dataset)) != tokenizer:
        raise UserError(f"data/{cfg.dataset} has a different tokenizer from init_from = {cfg.init_from!r}: prepare it "
                        "with that one, or start from scratch")
    return cfg, checkpoint


def architecture_of(config):
    """The settings that a run with init_from takes from the GPTConfig of the other run: all of them but dropout."""
    return {f.name: getattr(config, f.name) for f in fields(ModelSettings) if f.name != "dropout"}


def check_no_run(out_dir):
    """Raise UserError if a folder already contains a run."""
    if checkpoints(out_dir):
        resume = "resume it (--resume), " if is_resumable(out_dir) else ""
        raise UserError(f"{out_dir} already contains a run: {resume}replace it (--overwrite), or choose another folder "
                        "(--out_dir)")


def claim_run_folder(out_dir, overwrite):
    """Create and lock the folder of a new run; an earlier run in it stays until `start_run_folder`."""
    out_dir.mkdir(parents=True, exist_ok=True)
    files.acquire_lock(out_dir / ".lock", out_dir)
    if not overwrite:
        check_no_run(out_dir)  # again: another process may have created one in the meantime


def start_run_folder(out_dir, data_dir):
    """Remove what an earlier run left in a run folder, and copy the tokenizer and meta.json of a dataset into it."""
    for name in RUN_FILES:
        (out_dir / name).unlink(missing_ok=True)
    for name in ("tokenizer.tiktoken", "meta.json"):
        files.atomic_write(out_dir / name, lambda file: file.write((data_dir / name).read_bytes()))


def reopen_run_folder(state, sizes):
    """Truncate the logs of a resumed run to their `sizes` at its last.pt, and check its ckpt.pt.

    If ckpt.pt cannot be used, the best loss is forgotten, so that the next evaluation writes a new one.
    """
    path = state.out_dir / "ckpt.pt"
    if math.isfinite(state.best_val_loss):
        try:
            load(path)
        except UserError as error:  # missing or damaged
            print(f"note: {error}\nnote: if the run is trained further, its next evaluation writes a new {path}")
            state.best_val_loss = math.inf
    truncate_logs(state.out_dir, sizes)


# ---- checkpoints of a run ----


def save_last(state):
    """Save last.pt, so that the run can be resumed from here."""
    started = time.perf_counter()
    state.saved_step, state.saved_seconds = state.step, state.seconds
    if state.rank == 0:
        save(state.out_dir / "last.pt", state.resume_dict())
    state.excluded_seconds += time.perf_counter() - started


def load_resume_checkpoint(out_dir):
    """Load last.pt or, if it is missing or damaged, last.prev.pt, which is then renamed to last.pt. Locks the folder.

    A damaged last.pt is kept as last.damaged.pt. Raises UserError if neither can be used, OSError if reading fails.
    """
    last, previous = Path(out_dir, "last.pt"), Path(out_dir, "last.prev.pt")
    if is_resumable(out_dir):
        files.acquire_lock(Path(out_dir, ".lock"), out_dir)
    try:
        if last.exists() or not previous.exists():
            return load(last, LAST_REQUIRED_KEYS)
    except DamagedCheckpoint:
        if not previous.exists():
            raise
    loaded = load(previous, LAST_REQUIRED_KEYS)
    print(f"note: {last} is missing or damaged: resuming from {previous}, the one before it", file=sys.stderr)
    if last.exists():
        files.rename(last, last.with_name("last.damaged.pt"))
    files.rename(previous, last)  # or the next save would replace it
    return loaded


# ---- finding runs ----


def checkpoints(out_dir, names=("ckpt.pt", "last.pt", "last.prev.pt")):
    """The paths of a run's checkpoints that exist, the best one first; none before its first step."""
    return [Path(out_dir, name) for name in names if Path(out_dir, name).exists()]


def is_resumable(out_dir):
    """Whether a folder contains a run that can be resumed."""
    return bool(checkpoints(out_dir, ("last.pt", "last.prev.pt")))


def list_runs():
    """The run folders under out/ and in the folders of sweeps there that have a checkpoint, the newest first."""
    written = {}
    for path in itertools.chain.from_iterable(map(checkpoints, [*Path("out").glob("*"), *Path("out").glob("*/*")])):
        with suppress(FileNotFoundError):  # renamed by a run that is saving
            written[path.parent] = max(written.get(path.parent, 0), path.stat().st_mtime)
    return sorted(written, key=written.get, reverse=True)


def newest_run():
    """The run folder under out/ with the most recently written checkpoint. Raises UserError if there is none."""
    if not (found := list_runs()):
        raise UserError(f"no trained model under out/: train one first, for example  {QUICKSTART}")
    return found[0]


def best_checkpoint(out_dir):
    """The path of a run's best checkpoint: ckpt.pt or, before the first evaluation, last.pt or last.prev.pt.

    Raises UserError if there is none.
    """
    if found := checkpoints(out_dir):
        return found[0]
    if Path(out_dir, "config.json").exists():
        raise UserError(f"{out_dir} is a model for transformers: convert it to a run with  "
                        f"python -m tools.hf import {shell_word(out_dir)} out/NAME")
    name = Path(out_dir).as_posix()
    from_hub = ""
    if not Path(out_dir).exists() and HUB_NAME.fullmatch(name):
        from_hub = (", or make a run of a model of the Hugging Face hub with  "
                    f"python -m tools.hf import {name} out/{Path(name).name}")
    raise UserError(f"no checkpoint in {out_dir}: train a model first, or name the folder of another run{from_hub}")


# ---- logs ----


def read_log(path, size=None):
    """The records of a log.jsonl, or of its first `size` bytes, oldest first.

    An incomplete last line, which a killed run can leave, is ignored. Raises UserError for any other invalid line.
    """
    records = []
    lines = Path(path).read_bytes()[:size].split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # after the last line feed: nothing, or an incomplete line
        try:
            records.append(json.loads(line))
            records[-1]["kind"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is damaged: repair it, or move the file away") from error
    return records


def flush_logs(out_dir):
    """Flush log.jsonl and samples.md to the disk; returns their sizes in bytes, name → size."""
    sizes = {"log.jsonl": 0, "samples.md": 0}
    for name in sizes:
        if Path(out_dir, name).exists():
            with open(Path(out_dir, name), "ab") as file:
                os.fsync(file.fileno())  # or a power cut could leave less than the checkpoint says
                sizes[name] = file.tell()
    return sizes


def truncate_logs(out_dir, sizes):
    """Truncate log.jsonl and samples.md to their sizes at a checkpoint, so that resuming repeats no entry.

    Raises UserError if one has become shorter since, or the log is damaged.
    """
    for name, size in sizes.items():
        path = Path(out_dir, name)
        if not path.exists():
            continue
        if path.stat().st_size < size:
            raise UserError(f"{path} is shorter than at the last checkpoint: restore it, or move it away to resume "
                            "without it")
        if name == "log.jsonl":
            read_log(path, size)  # raises UserError if the log is damaged
        os.truncate(path, size)
