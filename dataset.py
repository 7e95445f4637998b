"""The reading side of data/<name>/: token files, the order of training sequences, and fixed evaluation windows."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import tiktoken

from errors import UserError


def prepare_command(name):
    """The command that makes a dataset, as far as its name tells: `nursery-bpe1024` needs `--tokenizer bpe:1024`."""
    encodings = "|".join(tiktoken.list_encoding_names())
    source, tokenizer = re.fullmatch(rf"(.*?)(?:-(bpe\d+|{encodings}))?", name, re.DOTALL).groups()
    words = {"tinystories": "", "nursery": " nursery"}.get(source, f" SOURCE --name {name}")
    return f"python prepare.py{words}" + (f" --tokenizer {tokenizer.replace('bpe', 'bpe:')}" if tokenizer else "")


def seal(meta):
    """meta.json's dict with a checksum of itself, without which nobody would notice a flipped bit in it."""
    body = {name: value for name, value in meta.items() if name != "checksum"}
    return body | {"checksum": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def read_meta(folder):
    """meta.json of a dataset or run folder, as a dict. Raises UserError where it is missing or damaged."""
    folder = Path(folder)
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta != seal(meta):
            raise ValueError("its checksum is wrong")
        meta["tokenizer"], meta["vocab_size"], meta["end_of_text"], meta["dtype"]
        for split in ("train", "validation"):
            meta["splits"][split]["tokens"], meta["splits"][split]["bytes"], meta["splits"][split]["sha256"]
    except FileNotFoundError as error:
        if folder.exists():
            raise UserError(f"{path} is missing: {again(folder)}") from error
        raise UserError(f"no data in {folder}: make it with  {prepare_command(folder.name)}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or of an older version of this program: {again(folder)}") from error
    return meta


def again(folder):
    """How to get a file of a dataset or run folder back, in words."""
    if folder.parent.name == "data":
        return f"remove {folder} and make it again with  {prepare_command(folder.name)}"
    return "copy meta.json and tokenizer.tiktoken from the run's data"


class Split:
    """The tokens of one split (train or validation) of a dataset, memory-mapped, cut into windows of `block_size`.

    A window is `block_size` tokens and the one after them: what the model reads and what it is to predict.
    """

    def __init__(self, folder, split, block_size):
        """Raises UserError where the file is missing, or not the one that meta.json states the size and hash of."""
        meta = read_meta(folder)
        path = Path(folder, f"{split}.bin")
        again = f"make it again with  {prepare_command(Path(folder).name)} --force"
        try:
            # little-endian as the files are, whatever the machine is
            self.tokens = np.memmap(path, mode="r", dtype=np.dtype(meta["dtype"]).newbyteorder("<"))
        except (OSError, ValueError) as error:  # ValueError: an empty file, or one that is no multiple of the dtype
            raise UserError(f"{path} is missing or damaged: {again}") from error
        if len(self.tokens) != meta["splits"][split]["tokens"]:
            raise UserError(f"{path} has {len(self.tokens)} tokens where meta.json says "
                            f"{meta['splits'][split]['tokens']}: {again}")
        with open(path, "rb") as file:  # a second for two gigabytes
            if hashlib.file_digest(file, "sha256").hexdigest() != meta["splits"][split]["sha256"]:
                raise UserError(f"{path} is damaged, its checksum is not the one in meta.json: {again}")
        self.block_size, self.vocab_size = block_size, meta["vocab_size"]
        self.path = path
        self.bytes_per_token = meta["splits"][split]["bytes"] / len(self.tokens)

    def windows(self, starts):
        """Windows that start at the tokens `starts` (B,): inputs and targets, int64 arrays (B, T).

        Raises UserError for a token beyond the vocabulary: the file is damaged, and the model could not read it.
        """
        positions = np.asarray(starts)[:, None] + np.arange(self.block_size + 1)  # (B, T + 1)
        window = self.tokens[positions].astype(np.int64)
        if window.max() >= self.vocab_size:
            raise UserError(f"{self.path} is damaged: it has token {window.max()}, and the vocabulary has only "
                            f"{self.vocab_size}; make it again with  {prepare_command(self.path.parent.name)} --force")
        return window[:, :-1], window[:, 1:]


class TrainingOrder:
    """Which windows of a split are the sequences 0, 1, 2, … of a run: a function of the seed alone.

    Every epoch visits each of its windows once, in a new order, the windows laid end to end from a new random
    offset below `block_size`; their number is the same in every epoch. Nothing is remembered between calls (but the
    latest epoch's order), so a run that goes on, or that is spread over many processes, sees the same sequences.
    """

    def __init__(self, split, seed):
        """Raises UserError where the split has no room for one window at every offset."""
        self.split, self.seed = split, seed
        self.windows_per_epoch = (len(split.tokens) - split.block_size) // split.block_size
        if self.windows_per_epoch < 1:
            raise UserError(f"{split.path} has only {len(split.tokens)} tokens: block_size = {split.block_size} "
                            "needs at least twice as many; use more text or a smaller block_size")
        self._epoch, self._starts = None, None

    def sequences(self, first, count):
        """Sequences first … first + count - 1 of the run: inputs and targets, int64 arrays (count, T)."""
        epochs, places = np.divmod(np.arange(first, first + count), self.windows_per_epoch)
        starts = np.concatenate([self._starts_of(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)])
        return self.split.windows(starts)

    def _starts_of(self, epoch):
        """Where the windows of an epoch start, in the order in which they are visited: (windows_per_epoch,)."""
        if self._epoch != epoch:
            rng = np.random.default_rng([self.seed, int(epoch)])
            offset = rng.integers(self.split.block_size)
            self._starts = offset + self.split.block_size * rng.permutation(self.windows_per_epoch)
            self._epoch = epoch
        return self._starts


def evaluation_windows(split, count=None):
    """Starts of at most `count` windows, evenly spaced over a split, the same at every call; None: all of them.

    Raises UserError where the split is shorter than one window.
    """
    available = (len(split.tokens) - 1) // split.block_size
    if available < 1:
        raise UserError(f"{split.path} has only {len(split.tokens)} tokens, less than one window of block_size = "
                        f"{split.block_size} and the token after it: use more text or a smaller block_size")
    count = min(count or available, available)
    return np.arange(count) * available // count * split.block_size
