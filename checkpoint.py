"""Writing and reading run folders (out/<run>/) safely.

    ckpt.pt     the weights with the best validation loss so far, and what is needed to use them
    last.pt     the same of the latest update, and the optimizers' states and whatever else resuming needs
    last.prev.pt   the last.pt before it, for the case that something happens to that one
    log.jsonl   one JSON object a line: the run, its log steps, its evaluations
    samples.md  a story from each evaluation
    tokenizer.tiktoken, meta.json   the dataset's, so that the folder is complete in itself
    .lock       held by the process that trains
"""

import json
import os
import pickle
import struct
import sys
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import files
from dataset import read_meta
from errors import UserError
from model import GPT, GPTConfig
from tokenizer import Tokenizer

HAS = {"model": dict, "model_config": dict, "config": dict, "data_sha256": dict, "tokens": int, "figures": dict}
LAST_HAS = HAS | {"iter": int, "update": int, "optimizers": list, "scaler": dict, "skipped": int,
                  "best_val_loss": float, "seconds": float, "ranks": int, "sizes": dict}


def save(path, state):
    """Write a checkpoint so that there is always a whole one: the new one or, of last.pt, the one before as well.

    Raises UserError where it cannot be written, as on a full disk.
    """
    path = Path(path)
    previous = path.with_name("last.prev.pt") if path.name == "last.pt" else None
    files.replace(path, lambda file: torch.save(state, file), previous)


def load(path, has=HAS):
    """Read a checkpoint, a dict with the keys and types of `has`, into CPU memory; no code in the file is run.

    Raises UserError where it is missing, damaged or something else.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself would not notice a flipped bit
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}: train a model first, or name its folder with --out_dir") from error
    except (PermissionError, IsADirectoryError):
        raise
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError,
            OverflowError, ImportError, struct.error, zlib.error, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or not a checkpoint: {what_else_is_there(path)}") from error
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in has.items()):
        raise UserError(f"{path} is not a checkpoint of this program, or of an older version of it: "
                        f"{what_else_is_there(path)}")
    return state


def what_else_is_there(path):
    """What to do when a checkpoint is no good, in words."""
    if path.name == "ckpt.pt" and can_go_on(path.parent):
        return "remove it to use the run's last.pt, or train on with --resume"
    return "use another run, or train again"


def load_last(out_dir):
    """The checkpoint to go on from: last.pt or, where that is no good, last.prev.pt, which then takes its name.

    Raises UserError where neither is good.
    """
    last, previous = Path(out_dir, "last.pt"), Path(out_dir, "last.prev.pt")
    if can_go_on(out_dir):
        files.hold(Path(out_dir, ".lock"), out_dir)
    try:
        return load(last, LAST_HAS)
    except UserError as error:
        if not previous.exists():
            raise
        print(f"note: {error}\nnote: going on from {previous}, the checkpoint before it", file=sys.stderr)
    state = load(previous, LAST_HAS)
    previous.replace(last)  # or the next save would put the damaged one in its place
    return state


@contextmanager
def taking_from(path):
    """Turn what can go wrong where a checkpoint's contents are put to use into a UserError that names it."""
    try:
        yield
    except (TypeError, AttributeError, RuntimeError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not a checkpoint of this program, or of another version of it: "
                        f"{what_else_is_there(Path(path))}") from error


def holds_run(out_dir):
    """Whether a folder holds a run, be it one that died before its first checkpoint."""
    return any(Path(out_dir, name).exists() for name in ("log.jsonl", "last.pt", "last.prev.pt", "ckpt.pt"))


def can_go_on(out_dir):
    """Whether a folder holds a run that can be resumed."""
    return any(Path(out_dir, name).exists() for name in ("last.pt", "last.prev.pt"))


def runs(root="out"):
    """The run folders under `root` that have a checkpoint, the one whose checkpoint was written last first."""
    written = {}
    for name in ("ckpt.pt", "last.pt", "last.prev.pt"):
        for path in Path(root).glob(f"*/{name}"):
            with suppress(FileNotFoundError):  # a run that is saving has renamed it
                written[path.parent] = max(written.get(path.parent, 0), path.stat().st_mtime)
    return sorted(written, key=written.get, reverse=True)


def newest_run(root="out"):
    """The run folder under `root` whose checkpoint was written last. Raises UserError where there is none."""
    if not (found := runs(root)):
        raise UserError(f"no trained model under {root}/: train one first, for example  "
                        "python train.py config/quickstart.py")
    return found[0]


def best_in(out_dir):
    """The path of a run's checkpoint to use: ckpt.pt, or last.pt where no evaluation has written a ckpt.pt yet.

    Raises UserError where there is neither.
    """
    for name in ("ckpt.pt", "last.pt", "last.prev.pt"):
        if Path(out_dir, name).exists():
            return Path(out_dir, name)
    if Path(out_dir, "config.json").exists():
        raise UserError(f"{out_dir} is a model for transformers: make a run of it with  "
                        f"python -m tools.hf import {out_dir} out/NAME")
    raise UserError(f"no checkpoint in {out_dir}: train a model first, or name the folder of another run")


def load_model(path):
    """The model (in eval mode, fp32, on the CPU), its tokenizer and the checkpoint's dict, from a run's checkpoint.

    Raises UserError where the checkpoint or the tokenizer beside it is missing, damaged or of something else.
    """
    path = Path(path)
    state = load(path)
    with taking_from(path):
        model = GPT(GPTConfig(**state["model_config"]))
        model.load_state_dict(state["model"])
    if data_sha256(read_meta(path.parent)) != state["data_sha256"]:
        raise UserError(f"{path.parent / 'meta.json'} is not of the data that {path} was trained on: copy it and "
                        "tokenizer.tiktoken from there")
    return model.eval(), Tokenizer.load(path.parent), state


def data_sha256(meta):
    """The hashes of a dataset's token files, split → hex, from its meta.json's dict."""
    return {split: figures["sha256"] for split, figures in meta["splits"].items()}


def read_log(path, size=None):
    """The records of a log.jsonl, or of its first `size` bytes, oldest first.

    A torn last line, which a run that died can leave, is passed over; UserError is raised for any other line that is no
    record.
    """
    records = []
    lines = Path(path).read_bytes()[:size].split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # behind the last line end: nothing, or a torn line
        try:
            records.append(json.loads(line))
            records[-1]["kind"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is damaged: put it right, or move the file away") from error
    return records


def sizes(out_dir):
    """The sizes of log.jsonl and samples.md in bytes, name → size, once they are on the disk: for a checkpoint."""
    sizes = {"log.jsonl": 0, "samples.md": 0}
    for name in sizes:
        if Path(out_dir, name).exists():
            with open(Path(out_dir, name), "ab") as file:
                os.fsync(file.fileno())  # or a power cut could leave less than the checkpoint says
                sizes[name] = file.tell()
    return sizes


def cut_back(out_dir, sizes):
    """Cut log.jsonl and samples.md back to the sizes they had at a checkpoint, so that nothing is in them twice.

    Raises UserError where one has been shortened since, or the log damaged.
    """
    for name, size in sizes.items():
        path = Path(out_dir, name)
        if not path.exists():
            continue
        if path.stat().st_size < size:
            raise UserError(f"{path} is shorter than it was at the last checkpoint: put it back, or move it away to go "
                            "on without it")
        if name == "log.jsonl":
            read_log(path, size)
        os.truncate(path, size)
