"""All settings, and how config files and command-line flags set them.

A config file is a Python file of assignments such as `learning_rate = 3e-4`; the values may be any expression. Every
name in it must be a setting, except names that start with an underscore, imported modules, functions and classes.
Flags override the config file: `python train.py config/x.py --learning_rate=3e-4 --compile=False`.
"""

import argparse
import difflib
import math
import runpy
import traceback
import types
import typing
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from model import GPTConfig, ModelSettings, setting
from storygpt.system.errors import Parser, UserError

BUDGETS = ("max_iters", "max_tokens", "max_minutes")  # the length of a run, in three units
# The settings that --help lists; --help-all lists all of them.
COMMON_SETTINGS = ("dataset", "out_dir", "init_from", "n_layer", "n_embd", "block_size", "batch_size", "max_tokens",
                   "max_minutes", "learning_rate")


@dataclass(frozen=True)
class Config(ModelSettings):
    """All settings of a training run. The defaults are the published 30M TinyStories recipe.

    An iteration is one batch of `batch_size` sequences; an optimizer step is `gradient_accumulation_steps` iterations.
    `resume=True` marks what may change when a run is resumed: settings that affect an optimizer step only by
    rounding or by other dropout masks, and the length of the run.
    """

    dataset: str = setting("tinystories", "dataset to train on: a folder under data/")
    out_dir: str = setting("out/tinystories", "run folder; with a config file, out/<its name>", resume=True)
    seed: int = setting(1337, "determines initial weights, order of the data and dropout masks", low=0, high=2**63 - 1)
    init_from: str = setting("scratch", "scratch, or a run folder to start from; its weights and architecture")
    init_embeddings: Literal["random", "cooccurrence"] = setting(
        "random", "random, or cooccurrence: token embeddings computed from the text of the run, see embeddings.py")

    batch_size: int = setting(32, "sequences per iteration", low=1)
    gradient_accumulation_steps: int = setting(32, "iterations per optimizer step", low=1)
    max_iters: int = setting(20_000, "length of the run in iterations", low=1, resume=True)
    max_tokens: int = setting(0, "length of the run in tokens; whole steps, instead of max_iters", low=0, resume=True)
    max_minutes: float = setting(0.0, "length of the run in minutes; instead of max_iters", low=0, resume=True)
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "adamw for all parameters, or muon for the matrices of the blocks and adamw for the rest")
    learning_rate: float = setting(1e-4, "AdamW's learning rate at the end of warmup", low=1e-9)
    muon_lr: float = setting(0.02, "Muon's learning rate at the end of warmup; scaled by the same schedule", low=0)
    lr_schedule: Literal["cosine", "linear", "wsd"] = setting(
        "cosine", "shape of the decay to min_lr; wsd: constant, then linear over the last decay_fraction")
    min_lr: float = setting(5e-4, "AdamW's learning rate at the end of the schedule", low=0)
    warmup_iters: int = setting(1_000, "iterations of linear warmup", low=0)
    lr_decay_iters: int = setting(0, "iteration at which the schedule ends; 0: the end of the run", low=0)
    decay_fraction: float = setting(
        0.5, "wsd: length of the decay, as a fraction of the schedule after warmup", low=1e-6, high=1)
    weight_decay: float = setting(0.1, "weight decay of matrices and embeddings; biases and norms have none", low=0)
    beta1: float = setting(0.9, "AdamW's beta1", low=0, high=0.9999)
    beta2: float = setting(0.95, "AdamW's beta2", low=0, high=0.99999)
    grad_clip: float = setting(0.5, "maximum norm of the gradient; 0: no clipping", low=0)

    eval_interval: int = setting(500, "iterations between evaluations", low=1, resume=True)
    eval_iters: int = setting(40, "batches per split in an evaluation, of batch_size windows each", low=1)
    log_interval: int = setting(10, "iterations between log lines", low=1, resume=True)

    checkpoint_minutes: float = setting(
        5.0, "minutes between saves of last.pt, in addition to those at evaluations", low=0, resume=True)

    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps", resume=True)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "dtype of matrix products; auto: bfloat16 if the hardware has it", resume=True)
    compile: Literal["auto"] | bool = setting(
        "auto", "use torch.compile; auto: on CUDA, if it works there", resume=True)
    device_batch_size: Literal["auto"] | int = setting(
        "auto", "micro-batch size; the last one of a step may be smaller; auto: 4,096 tokens, on CUDA 32,768",
        low=1, resume=True)

    def __post_init__(self):
        for name, value in asdict(self).items():
            check_values({name: value})
        object.__setattr__(self, "init_from", str(Path(self.init_from)))  # drops a slash at the end
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}")
        if self.architecture == "modern" and self.n_embd % (4 * self.n_head):
            raise UserError(f"n_embd / n_head = {self.n_embd // self.n_head} is not a multiple of 4, but the rotary "
                            "positions of architecture = 'modern' need pairs in half of a head: choose another n_embd "
                            "or n_head")
        if self.max_tokens:
            if self.max_tokens < self.tokens_per_step:
                raise UserError(f"max_tokens = {self.max_tokens} is less than one step of {self.tokens_per_step} "
                                "tokens (batch_size * gradient_accumulation_steps * block_size)")
            steps = self.max_tokens // self.tokens_per_step
            object.__setattr__(self, "max_iters", steps * self.gradient_accumulation_steps)
        if not self.lr_decay_iters and not self.max_minutes:  # stored, so that extending the run keeps the schedule
            object.__setattr__(self, "lr_decay_iters", self.max_iters)
        if self.lr_decay_iters and self.warmup_iters >= self.lr_decay_iters:
            raise UserError(f"warmup_iters = {self.warmup_iters} is not below lr_decay_iters = {self.lr_decay_iters} "
                            "(by default the length of the run): lower --warmup_iters, or lengthen the run")

    @property
    def sequences_per_step(self):
        """Sequences per optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self):
        """Tokens per optimizer step."""
        return self.sequences_per_step * self.block_size

    def model_config(self, vocab_size):
        """The GPTConfig of these settings and a vocabulary."""
        return GPTConfig(**{f.name: getattr(self, f.name) for f in fields(ModelSettings)}, vocab_size=vocab_size)


SETTINGS = {f.name: f for f in fields(Config)}


def apply_overrides(settings, flags):
    """A dict of settings, overridden by flags. A flag for the length of the run replaces a length in any other unit."""
    replaced = BUDGETS if any(flags.get(name) for name in BUDGETS) else ()
    return {name: value for name, value in settings.items() if name not in replaced} | flags


# ---- the command line and config files ----


def read_command_line(argv, actions, parser=None):
    """Parse the command line; returns the config file's settings, the flags' settings (dicts) and the namespace.

    `actions`: flags that are not settings, name → meaning (`{"resume": "resume the run"}`). `parser`: a Parser that has
    other arguments already. Unless it sets `out_dir` itself, a config file's run folder is out/<name of the file>.
    Exits with code 2 for a wrong flag; raises UserError for a config file that is missing or wrong.
    """
    parser = parser or Parser(("config", *actions, *COMMON_SETTINGS), usage="%(prog)s [CONFIG] [--setting=value ...]")
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a config file, such as config/tinystories.py")
    for name, meaning in actions.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    group = parser.add_argument_group("settings, which override the config file")
    for name, f in SETTINGS.items():
        group.add_argument(f"--{name}", metavar="VALUE", default=argparse.SUPPRESS,
                           help=f"{f.metadata.get('meaning', '')}; {allowed_values(f)}; default: {f.default}")
    args = parser.parse_args(argv)
    try:
        flags = {name: parse_value(name, getattr(args, name)) for name in SETTINGS if hasattr(args, name)}
        check_values(flags)
    except UserError as error:
        parser.error(str(error))
    settings = {"out_dir": f"out/{Path(args.config).stem}"} | read_config_file(args.config) if args.config else {}
    return settings, flags, args


def read_config_file(path):
    """The settings that a config file assigns, as a dict. Raises UserError if it is missing, fails or is wrong."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [file.stem for file in Path("config").glob("*.py")], 1)
        hint = f"did you mean config/{near[0]}.py?" if near else "see config/ for the files; flags start with --"
        raise UserError(f"no config file {path}: {hint}")
    try:
        names = runpy.run_path(str(path))
    except Exception as error:  # the file is the user's code and may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", "?")  # the latter of a SyntaxError
        in_this_file = isinstance(error, SyntaxError) and error.filename == str(path)
        message = error.msg if in_this_file else error  # str(error) would repeat the line
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {message}") from error
    values = {name: value.item() if hasattr(value, "item") else value for name, value in names.items()  # of numpy
              if not name.startswith("_") and not callable(value) and not isinstance(value, types.ModuleType)}
    check_values(values, f"{path}: ")
    return values


# ---- the values of one setting ----


def parse_value(name, text):
    """The value of a setting from text, as on the command line.

    Raises UserError if there is no such setting, or if it does not allow the value.
    """
    value = text
    choices, kind = choices_and_type(SETTINGS[name]) if name in SETTINGS else ([], None)
    if text == "None" and None in choices:
        value = None
    elif kind and text not in choices:
        with suppress(ValueError, KeyError):  # wrong values are reported below
            value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    check_values({name: value})
    return value


def allowed_values(f):
    """The values that a setting allows, in words."""
    choices, value_type = choices_and_type(f)
    low, high = f.metadata.get("low", -math.inf), f.metadata.get("high", math.inf)
    values = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}.get(value_type, "")
    if low > -math.inf:
        values += f" from {low} to {high}" if high < math.inf else f" from {low}"
    return " or ".join([*map(str, choices), values] if values else map(str, choices))


def choices_and_type(f):
    """The single values of a setting ("auto", or None of `float | None`), and the type of its others, if any."""
    is_union = typing.get_origin(f.type) in (typing.Union, types.UnionType)
    parts = typing.get_args(f.type) if is_union else (f.type,)
    choices = [choice for part in parts for choice in ([None] if part is types.NoneType else typing.get_args(part))]
    return choices, next((part for part in parts if isinstance(part, type) and part is not types.NoneType), None)


def is_allowed(f, value):
    """Whether a setting allows a value."""
    choices, value_type = choices_and_type(f)
    if value in choices:
        return True
    if value_type in (int, float) and type(value) in (int, value_type):
        largest = 2**63 if value_type is int else 1e300  # larger values, such as infinity, break the arithmetic
        return max(f.metadata.get("low", -largest), -largest) <= value <= min(f.metadata.get("high", largest), largest)
    return value_type in (bool, str) and type(value) is value_type and value != ""


def check_values(values, where=""):
    """Raise UserError for the first name that is not a setting, or value that it does not allow, or two budgets."""
    for name, value in values.items():
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, 1)
            hint = f"did you mean {near[0]}?" if near else "train.py --help-all lists all settings"
            raise UserError(f"{where}unknown setting {name}: {hint} (start the name of a helper variable with an "
                            "underscore)")
        if not is_allowed(SETTINGS[name], value):
            raise UserError(f"{where}{name} = {value!r} is not allowed: it takes {allowed_values(SETTINGS[name])}")
    budgets = [name for name in BUDGETS if values.get(name)]
    if len(budgets) > 1:
        raise UserError(f"{where}{' and '.join(budgets)} are both set: set the length of the run in one unit only"
                        + " (del NAME removes one that an imported config has set)" * bool(where))
