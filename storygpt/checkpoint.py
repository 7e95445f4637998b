"""Saving and loading checkpoints: ckpt.pt and last.pt of a run folder."""

import io
import pickle
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from model import GPTConfig
from modern import make_model
from storygpt.corpus.dataset import data_sha256, read_meta
from storygpt.corpus.tokenizer import Tokenizer
from storygpt.fast import skip_init
from storygpt.system import files
from storygpt.system.errors import UserError, out_of_memory

REQUIRED_KEYS = {"model": dict, "model_config": dict, "config": dict, "data_sha256": dict, "tokens": int,
                 "metrics": dict}
LAST_REQUIRED_KEYS = REQUIRED_KEYS | {"iter": int, "step": int, "optimizers": list, "optimized": list, "scaler": dict,
                                      "skipped": int, "best_val_loss": float, "seconds": float, "world_size": int,
                                      "sizes": dict}


class DamagedCheckpoint(UserError):
    """A file that was read, but is not a complete checkpoint."""


def save(path, checkpoint):
    """Write a checkpoint atomically; the previous last.pt is kept as last.prev.pt.

    Raises UserError if it cannot be written, as on a full disk, or could not be loaded again.
    """
    path = Path(path)
    check_loadable(path, checkpoint)
    previous = path.with_name("last.prev.pt") if path.name == "last.pt" else None
    files.atomic_write(path, lambda file: torch.save(checkpoint, file), previous)


def check_loadable(path, checkpoint):
    """Raise UserError for an entry that `load` would refuse because loading it could run code. Tensors are fine."""
    for name, value in checkpoint.items():
        buffer = io.BytesIO()
        try:
            torch.save(tree_map_only(torch.Tensor, lambda tensor: torch.empty(0), value), buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except (pickle.PickleError, AttributeError, TypeError) as error:  # the last two: it cannot be pickled
            raise UserError(f"{path} is not saved, because its {name!r} could not be loaded again: store only Python "
                            "numbers, strings, lists, dicts and tensors in it") from error


def load(path, required=REQUIRED_KEYS):
    """Read a checkpoint into CPU memory: a dict with the required keys and types. Code in the file is not run.

    Raises UserError if it is missing, DamagedCheckpoint if its content is wrong, and OSError if it cannot be read now.
    """
    path = Path(path)
    hint = "use another run, or train again"
    if path.name == "ckpt.pt" and path.with_name("last.pt").exists():
        hint = "remove it to use the run's last.pt, or resume training"
    try:
        data = path.read_bytes()  # all at once: after this, errors are those of the content
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint {path}: train a model first, or name its folder with --out_dir") from error
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.load does not verify checksums
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged content raises a dozen kinds
        if out_of_memory(error):
            raise
        raise DamagedCheckpoint(f"{path} is damaged or not a checkpoint: {hint}") from error
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    if not all(isinstance(entries.get(key), kind) for key, kind in required.items()):
        raise DamagedCheckpoint(f"{path} is not a checkpoint, or was saved by an incompatible version of the program: "
                                f"{hint}")
    return checkpoint


@contextmanager
def reading_checkpoint(path, *errors):
    """Turn these errors into a UserError that says that the checkpoint's content does not fit the program."""
    try:
        yield
    except errors as error:
        raise UserError(f"{path} does not fit this version of the program: use the version that saved it, or another "
                        f"run ({type(error).__name__}: {str(error)[:200]})") from error


def load_weights(path, model, weights):
    """Load a state dict into a model. Raises UserError if it does not fit, or if the model ties weights that differ."""
    with reading_checkpoint(path, RuntimeError):
        model.load_state_dict(weights)
        for name, p in model.state_dict().items():
            if not isinstance(p, torch.Tensor):  # a module's extra state
                continue
            if not torch.equal(p.cpu().nan_to_num(), weights[name].to(p.dtype).nan_to_num()):
                raise RuntimeError(f"the model shares {name} with another parameter")


def load_model(path):
    """Load a checkpoint for inference: the model (eval mode, float32, CPU), its tokenizer and the checkpoint's dict.

    Raises UserError if the checkpoint or the tokenizer next to it is missing, damaged or does not match.
    """
    path = Path(path)
    checkpoint = load(path)
    with reading_checkpoint(path, TypeError):
        config = GPTConfig(**checkpoint["model_config"])
    with skip_init():
        model = make_model(config)
    load_weights(path, model, checkpoint["model"])
    if data_sha256(read_meta(path.parent)) != checkpoint["data_sha256"]:
        raise UserError(f"{path.parent / 'meta.json'} does not belong to the data that {path} was trained on: copy it "
                        "and tokenizer.tiktoken from there")
    return model.eval(), Tokenizer.load(path.parent), checkpoint
