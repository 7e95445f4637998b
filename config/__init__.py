"""Every setting once, and how recipes and flags set them.

A recipe is a Python file of plain assignments (`learning_rate = 3e-4`); it may compute. A name that starts with an
underscore is its own business, and so are imported modules, functions and classes; any other name must be a setting.
Flags come after the recipe: `python train.py config/x.py --learning_rate=3e-4 --compile=False`.
"""

import argparse
import difflib
import math
import runpy
import traceback
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np

from errors import Parser, UserError

LENGTHS = ("max_iters", "max_tokens", "max_minutes")  # of a run, in three units


def setting(default, meaning, low=-math.inf, high=math.inf):
    """A field of `Config`: its default, its meaning in one line, and the lowest and highest value allowed."""
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high})


@dataclass(frozen=True)
class Config:
    """All settings of a training run; the defaults are the published 30M TinyStories recipe.

    An *iteration* is one batch of `batch_size` sequences; an *update* is one optimizer step, over
    `gradient_accumulation_steps` iterations.
    """

    dataset: str = setting("tinystories", "the data to train on: a folder under data/")
    out_dir: str = setting("out/tinystories", "the run's folder; a recipe's own is out/<its name>")
    seed: int = setting(1337, "fixes the initial weights, the order of the data and the dropout masks", low=0,
                         high=2**63 - 1)

    init_from: str = setting("scratch", "scratch, or a run's folder: start from its weights, and take its shape")

    n_layer: int = setting(6, "number of blocks", low=1)
    n_head: int = setting(6, "attention heads in each block", low=1)
    n_embd: int = setting(384, "width of the model, a multiple of n_head", low=1)
    block_size: int = setting(128, "length of a sequence in tokens", low=2)
    dropout: float = setting(0.1, "share of activations dropped in training", low=0, high=0.99)
    bias: bool = setting(True, "biases in linear layers and norms")

    batch_size: int = setting(32, "sequences in an iteration", low=1)
    gradient_accumulation_steps: int = setting(32, "iterations in an update", low=1)
    max_iters: int = setting(20_000, "iterations in the whole run", low=1)
    max_tokens: int = setting(0, "tokens in the whole run, in whole updates, in place of max_iters", low=0)
    max_minutes: float = setting(0.0, "minutes that the whole run takes, in place of max_iters", low=0)
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "adamw for everything, or muon for the matrices of the blocks and adamw for the rest")
    learning_rate: float = setting(1e-4, "AdamW's learning rate at the end of warmup", low=1e-9)
    muon_lr: float = setting(
        0.02, "Muon's learning rate at the end of warmup; it ends at muon_lr * min_lr / learning_rate", low=0)
    lr_schedule: Literal["cosine", "linear", "wsd"] = setting(
        "cosine", "the way to min_lr after warmup; wsd: constant until the last decay_fraction, then linear")
    min_lr: float = setting(5e-4, "AdamW's learning rate at the end of the schedule, at lr_decay_iters", low=0)
    warmup_iters: int = setting(1_000, "iterations over which the learning rate rises from zero", low=0)
    lr_decay_iters: int = setting(0, "iteration at which the schedule ends; 0: the end of the run", low=0)
    decay_fraction: float = setting(0.5, "wsd: the last share of the way from warmup's end to lr_decay_iters", low=1e-6,
                                    high=1)
    weight_decay: float = setting(0.1, "decay of weight matrices; biases and norms have none", low=0)
    beta1: float = setting(0.9, "AdamW's momentum", low=0, high=0.9999)
    beta2: float = setting(0.95, "AdamW's memory of squared gradients", low=0, high=0.99999)
    grad_clip: float = setting(0.5, "largest norm of an update's gradient; 0: no clipping", low=0)

    eval_interval: int = setting(500, "iterations between evaluations", low=1)
    eval_iters: int = setting(40, "batches of batch_size windows in an evaluation, of each split", low=1)
    log_interval: int = setting(10, "iterations between log lines", low=1)

    checkpoint_minutes: float = setting(5.0, "minutes between writes of last.pt, which evaluations write too", low=0)

    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "what the arithmetic is done in; auto: bfloat16 where the hardware has it")
    compile: Literal["auto"] | bool = setting("auto", "use torch.compile; auto: on CUDA, where it works and pays")
    device_batch_size: Literal["auto"] | int = setting(
        "auto", "sequences that go through the model at once, a divisor of an update's; auto: by the memory", low=1)

    def __post_init__(self):
        _check_each(asdict(self))
        object.__setattr__(self, "init_from", str(Path(self.init_from)))  # without a slash at its end
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")
        if self.max_tokens:  # as many whole updates as it pays for
            update_tokens = self.sequences_per_update * self.block_size
            if self.max_tokens < update_tokens:
                raise UserError(f"max_tokens = {self.max_tokens} is less than one update of {update_tokens} tokens "
                                "(batch_size * gradient_accumulation_steps * block_size)")
            updates = self.max_tokens // update_tokens
            object.__setattr__(self, "max_iters", updates * self.gradient_accumulation_steps)
        if not self.lr_decay_iters and not self.max_minutes:  # so that a longer run later keeps its schedule
            object.__setattr__(self, "lr_decay_iters", self.max_iters)
        if self.lr_decay_iters and self.warmup_iters >= self.lr_decay_iters:
            raise UserError(f"warmup_iters = {self.warmup_iters} is not below lr_decay_iters = {self.lr_decay_iters} "
                            "(the length of the run unless it is set): lower --warmup_iters, or lengthen the run")
        if self.device_batch_size != "auto" and self.sequences_per_update % self.device_batch_size:
            raise UserError(f"device_batch_size = {self.device_batch_size} does not divide an update's "
                            f"{self.sequences_per_update} sequences (batch_size * gradient_accumulation_steps)")

    @property
    def sequences_per_update(self):
        """Sequences that one optimizer step sees."""
        return self.batch_size * self.gradient_accumulation_steps


def over(settings, flags):
    """Settings with flags over them, as a dict. A flag that sets the run's length does so alone, in whatever unit."""
    replaced = LENGTHS if _lengths(flags) else ()
    return {name: value for name, value in settings.items() if name not in replaced} | flags


def read_command_line(argv, actions):
    """What the user asked for: (the recipe's settings, the flags' settings, both dicts, and all parsed arguments).

    `actions`: the flags that are not settings, name → meaning (`{"resume": "go on with the run"}`). A recipe names
    the run's folder, out/<name of the recipe>, unless it sets `out_dir` itself.
    Exits with code 2 for a wrong flag; raises UserError for a recipe that is missing or wrong.
    """
    parser = Parser(usage="%(prog)s [RECIPE] [--setting=value ...] " + " ".join(f"[--{name}]" for name in actions))
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a file of settings, such as config/tinystories.py")
    for name, meaning in actions.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    group = parser.add_argument_group("settings, over the recipe's")
    for f in fields(Config):
        group.add_argument(f"--{f.name}", metavar="VALUE", default=argparse.SUPPRESS,
                           help=f"{f.metadata['meaning']} ({_allowed(f)}; default: {f.default})")
    args = parser.parse_args(argv)

    flags = {f.name: _from_text(f, getattr(args, f.name)) for f in fields(Config) if hasattr(args, f.name)}
    try:
        _check_each(flags)
        _lengths(flags)
    except UserError as error:
        parser.error(str(error))
    recipe = {"out_dir": f"out/{Path(args.recipe).stem}"} | read_recipe(args.recipe) if args.recipe else {}
    return recipe, flags, args


def read_recipe(path):
    """The settings that a recipe file assigns, as a dict. Raises UserError where it is missing, broken or wrong."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [recipe.stem for recipe in Path("config").glob("[a-z]*.py")], 1)
        hint = f"did you mean config/{near[0]}.py?" if near else "config/ has the recipes; settings start with --"
        raise UserError(f"no recipe file {path}: {hint}")
    try:
        names = runpy.run_path(str(path))
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:  # a recipe is the user's own code and may fail in any way
        line = next((frame.lineno for frame in reversed(traceback.extract_tb(error.__traceback__))
                     if Path(frame.filename) == path), "?")
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in names.items()
              if not name.startswith("_") and not callable(value) and not isinstance(value, types.ModuleType)}
    try:
        _check_each(values)
        _lengths(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return values


def _lengths(values):
    """The settings among these that say how long the run is. Raises UserError where they are more than one."""
    names = [name for name in LENGTHS if values.get(name)]
    if len(names) > 1:
        raise UserError(f"{names[0]} and {names[1]} are both set: a run has one length, so leave one of them out")
    return names


def _words_and_type(f):
    """The words that a setting allows ("auto") and the type of its other values (None: only the words)."""
    parts = typing.get_args(f.type) if typing.get_origin(f.type) is typing.Union else (f.type,)
    words = [word for part in parts for word in typing.get_args(part)]
    return words, next((part for part in parts if isinstance(part, type)), None)


def _from_text(f, text):
    """A flag's text as a value of the setting's type, or as it is where that fails: `_check_each` then complains."""
    words, kind = _words_and_type(f)
    if text in words or kind in (str, None):
        return text
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def _allowed(f):
    """What a setting takes, in words."""
    words, kind = _words_and_type(f)
    low, high = f.metadata["low"], f.metadata["high"]
    numbers = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}.get(kind, "")
    if low > -math.inf:
        numbers += f" from {low} to {high}" if high < math.inf else f" from {low}"
    return " or ".join(words + [numbers] if numbers else words)


def _check_each(values):
    """Raise UserError for the first name that is no setting, or value that its setting does not allow."""
    settings = {f.name: f for f in fields(Config)}
    for name, value in values.items():
        if name not in settings:
            near = difflib.get_close_matches(name, settings, 1)
            hint = f"did you mean {near[0]}?" if near else "train.py --help lists them"
            raise UserError(f"unknown setting {name}: {hint} (a helper's name starts with an underscore)")
        f = settings[name]
        words, kind = _words_and_type(f)
        allowed = value in words
        if kind in (bool, str):
            allowed |= type(value) is kind and value != ""
        elif kind in (int, float) and type(value) in (int, kind):
            longest = 2**63 if kind is int else 1e300  # beyond these, arithmetic fails: among them infinity
            allowed |= f.metadata["low"] <= value <= f.metadata["high"] and abs(value) <= longest
        if not allowed:
            raise UserError(f"{name} = {value!r} is not allowed: it takes {_allowed(f)}")
