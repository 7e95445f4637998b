"""Reading data/<name>/: token files, the sampling order of training sequences, and fixed evaluation windows."""

import functools
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from storygpt.system.errors import QUICKSTART, UserError

RESTORE = ("if it is a run, copy meta.json and tokenizer.tiktoken from its dataset; if it is a dataset, remove it and "
           "prepare it again; for other files, choose another --name")


def prepare_command(name):
    """The command that creates a dataset, guessed from its name: `nursery-bpe1024` needs `--tokenizer bpe:1024`."""
    source, size = re.fullmatch(r"(.*?)(?:-bpe(\d+))?", name, re.DOTALL).groups()
    valid = re.sub(r"[^\w.-]+", "_", name)  # another name is not possible
    words = {"tinystories": "", "nursery": " nursery"}.get(source, f" SOURCE --name {valid}")
    return f"python prepare.py{words}" + (f" --tokenizer bpe:{size}" if size else "")


def with_checksum(meta):
    """meta.json's dict with a checksum of itself, so that `read_meta` detects any change to the file."""
    body = {name: value for name, value in meta.items() if name != "checksum"}
    return body | {"checksum": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def read_meta(folder):
    """meta.json of a dataset or run folder, as a dict. Raises UserError if it is missing or damaged."""
    folder, path = Path(folder), Path(folder, "meta.json")
    if not folder.exists():
        quickstart = f", or begin with a small model on synthetic stories:  {QUICKSTART}"
        raise UserError(f"no data in {folder}: create it with  {prepare_command(folder.name)}"
                        + quickstart * (folder.name == "tinystories"))
    try:
        meta = json.loads(path.read_bytes())
        if meta == with_checksum(meta):
            return meta
    except (FileNotFoundError, ValueError, AttributeError):  # AttributeError: not a dict
        pass
    raise UserError(f"{path} is missing, damaged or from an older version of this program: {RESTORE}")


def data_sha256(meta):
    """The SHA-256 hashes of a dataset's token files, split → hex, from meta.json's dict."""
    return {split: values["sha256"] for split, values in meta["splits"].items()}


def file_sha256(path):
    """The SHA-256 hash of a file, in hex; takes seconds for gigabytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Split:
    """One split of a dataset, memory-mapped, read in windows: `block_size` tokens, and the targets one token later."""

    def __init__(self, folder, split, block_size, verify=True):
        """Raises UserError if the file is missing or empty or, if `verify`, does not have the hash in meta.json."""
        meta = read_meta(folder)
        self.path, self.block_size, self.vocab_size = Path(folder, f"{split}.bin"), block_size, meta["vocab_size"]
        sizes = meta["splits"][split]
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")  # little-endian on every machine
        try:
            if verify and file_sha256(self.path) != sizes["sha256"]:
                raise ValueError("not the hash in meta.json")
            self.tokens = np.memmap(self.path, mode="r", dtype=dtype)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{self.path} is missing or damaged ({error}): create it again with  "
                            f"{prepare_command(self.path.parent.name)} --force") from error
        self.bytes_per_token = sizes["bytes"] / len(self.tokens)

    def used_tokens(self):
        """Whether each token of the vocabulary occurs in the split: a bool array (vocab_size)."""
        used = np.zeros(self.vocab_size, dtype=bool)
        for i in range(0, len(self.tokens), 2**24):  # 16 M tokens at a time: indexing converts them to int64
            used[self.tokens[i:i + 2**24]] = True
        return used

    def windows(self, starts):
        """Inputs and targets, int64 (B, T), of the windows at positions `starts` (B,)."""
        positions = np.asarray(starts)[:, None] + np.arange(self.block_size + 1)  # (B, T + 1)
        window = self.tokens[positions].astype(np.int64)  # (B, T + 1)
        return window[:, :-1], window[:, 1:]


class TrainingOrder:
    """Which windows of a split are sequences 0, 1, 2, … of a run: a function of the seed alone.

    Every epoch visits each window once, in a new order. The windows of an epoch are adjacent and start at a new random
    offset below `block_size`; their number is the same in every epoch. The only state is a cache of the current epoch,
    so a resumed run, or one on several ranks, sees the same sequences.
    """

    def __init__(self, split, seed):
        """Raises UserError if the split is too short to have a window at every offset."""
        self.split, self.seed = split, seed
        self.windows_per_epoch = (len(split.tokens) - split.block_size) // split.block_size
        if self.windows_per_epoch < 1:
            raise UserError(f"{split.path} has only {len(split.tokens)} tokens: block_size = {split.block_size} "
                            f"needs at least {2 * split.block_size}; use more text or a smaller block_size")
        self._starts_of = functools.lru_cache(maxsize=1)(self._starts_of)  # of the current epoch

    def sequences(self, first, count):
        """Sequences first … first + count - 1 of the run: inputs and targets, int64 arrays (count, T)."""
        epochs, places = np.divmod(np.arange(first, first + count), self.windows_per_epoch)
        starts = np.concatenate([self._starts_of(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)])
        return self.split.windows(starts)

    def _starts_of(self, epoch):
        """The start positions of an epoch's windows, in the order of visits: (windows_per_epoch,)."""
        rng = np.random.default_rng([self.seed, int(epoch)])
        offset = rng.integers(self.split.block_size)
        return offset + self.split.block_size * rng.permutation(self.windows_per_epoch)


def evaluation_windows(split, count=None):
    """Start positions of `count` windows (None: all), evenly spaced, always the same. UserError: there is none."""
    available = (len(split.tokens) - 1) // split.block_size
    if available < 1:
        larger = ", a larger --validation_fraction of prepare.py" * (split.path.stem == "validation")
        raise UserError(f"{split.path} has only {len(split.tokens)} tokens: block_size = {split.block_size} needs at "
                        f"least {split.block_size + 1}; use more text{larger} or a smaller block_size")
    count = min(count or available, available)
    return np.arange(count) * available // count * split.block_size


class Dataset:
    """A prepared dataset as training reads it: both splits, the sampling order and the evaluation windows."""

    def __init__(self, cfg, verify=True):
        """`verify`: hash the token files, once a machine. Raises UserError if one is damaged or has too few tokens."""
        self.folder = Path("data", cfg.dataset)
        meta = read_meta(self.folder)
        self.vocab_size, self.sha256 = meta["vocab_size"], data_sha256(meta)
        self.train, self.validation = (Split(self.folder, s, cfg.block_size, verify) for s in ("train", "validation"))
        self.order = TrainingOrder(self.train, cfg.seed)
        self.eval_windows = {split: evaluation_windows(split, cfg.eval_iters * cfg.batch_size)
                             for split in (self.train, self.validation)}  # split → start positions (N,)
        self.tokens_per_epoch = self.order.windows_per_epoch * cfg.block_size
