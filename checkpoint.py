"""Writing and reading run folders (out/<run>/) safely.

    ckpt.pt     the weights with the best validation loss so far, and what is needed to use them
    last.pt     the same of the latest update, and the optimizers' and random states that resuming needs
    log.jsonl   one JSON object a line: the run, its log steps, its evaluations
    samples.md  a story from each evaluation
    tokenizer.tiktoken, meta.json   the dataset's, so that the folder is complete in itself
"""

import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch

from errors import UserError
from model import GPT, GPTConfig
from tokenizer import Tokenizer


def save(path, state):
    """Write a checkpoint so that under its name there is always a whole one: the new one or the one before.

    Raises UserError where it cannot be written, as on a full disk.
    """
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name changes hands, or a power cut could leave neither
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's word for a write that failed
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"cannot write {path} ({reason}): what was there before is kept; make room, then --resume "
                        "(--overwrite where there is no last.pt yet)") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path, needed=("model", "model_config", "config", "tokens", "figures")):
    """Read a checkpoint, a dict with at least the keys needed, into CPU memory; no code in the file is run.

    Raises UserError where it is missing, broken or something else.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}: train a model first, or name its folder with --out_dir") from error
    except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is broken or not a checkpoint: use another run, or train again") from error
    if not isinstance(state, dict) or not state.keys() >= set(needed):
        raise UserError(f"{path} is not a checkpoint of this program, or of an older version of it: use another run, "
                        "or train again")
    return state


def holds_run(out_dir):
    """Whether a folder holds a run, be it one that died before its first checkpoint."""
    return any(Path(out_dir, name).exists() for name in ("log.jsonl", "last.pt", "ckpt.pt"))


def newest_run(root="out"):
    """The run folder under `root` whose checkpoint was written last. Raises UserError where there is none."""
    checkpoints = [*Path(root).glob("*/ckpt.pt"), *Path(root).glob("*/last.pt")]
    if not checkpoints:
        raise UserError(f"no trained model under {root}/: train one first, for example  "
                        "python train.py config/quickstart.py")
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent


def best_in(out_dir):
    """The path of a run's checkpoint to use: ckpt.pt, or last.pt where no evaluation has written a ckpt.pt yet.

    Raises UserError where there is neither.
    """
    for name in ("ckpt.pt", "last.pt"):
        if Path(out_dir, name).exists():
            return Path(out_dir, name)
    raise UserError(f"no checkpoint in {out_dir}: train a model first, or name its folder with --out_dir")


def load_model(path):
    """The model (in eval mode, fp32, on the CPU), its tokenizer and the checkpoint's dict, from a run's checkpoint.

    Raises UserError where the checkpoint or the tokenizer beside it is missing or broken.
    """
    state = load(path)
    try:
        model = GPT(GPTConfig(**state["model_config"]))
        model.load_state_dict(state["model"])
    except (TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is not a checkpoint of this program: use another run, or train again") from error
    return model.eval(), Tokenizer.load(Path(path).parent), state


def append_line(path, record):
    """Append one JSON object as a line to a log."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_log(path):
    """The records of a log.jsonl, oldest first; a torn last line, which a run that died can leave, is passed over.

    Raises UserError for any other line that is no record.
    """
    records = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # behind the last line end: nothing, or a torn line
        try:
            records.append(json.loads(line))
            records[-1]["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is damaged: take it out") from error
    return records


def cut_back(out_dir, iteration, evaluated):
    """Cut log.jsonl and samples.md back to a checkpoint: made at `iteration`, its last evaluation at `evaluated`."""
    until = {"run": 0, "step": iteration, "eval": evaluated}
    log = Path(out_dir, "log.jsonl")
    if log.exists():
        kept = [record for record in read_log(log) if record.get("iter", 0) <= until.get(record["kind"], iteration)]
        replace_text(log, "".join(json.dumps(record) + "\n" for record in kept))
    samples = Path(out_dir, "samples.md")
    if samples.exists():
        # text before the first heading, then a heading's iteration and its section in turn
        start, *rest = re.split(r"(?m)^## iteration (\d+):", samples.read_text(encoding="utf-8"))
        kept = [f"## iteration {i}:{section}" for i, section in zip(rest[::2], rest[1::2]) if int(i) <= evaluated]
        replace_text(samples, "".join([start, *kept]))


def replace_text(path, text):
    """Write a text file under a temporary name and rename it."""
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
