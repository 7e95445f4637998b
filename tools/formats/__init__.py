"""What tools/export.py can write: a module for each format, and the model card."""

from pathlib import Path
from typing import NamedTuple

from model import GPT
from storygpt.checkpoint import load_model
from storygpt.corpus.tokenizer import Tokenizer
from storygpt.run import best_checkpoint
from storygpt.system.errors import UserError


class NotExportable(UserError):
    """A format cannot hold the model or its tokenizer."""


class SavedModel(NamedTuple):
    """The best checkpoint of a run, as it is exported."""

    path: Path  # of the checkpoint
    model: GPT  # or a Modern, in eval mode, in float32
    tokenizer: Tokenizer
    state: dict  # the checkpoint

    @classmethod
    def load(cls, out_dir):
        """Load that of a run's folder. Raises UserError if it cannot be read."""
        path = best_checkpoint(out_dir)
        return cls(path, *load_model(path))

    def describe(self):
        """What is exported, in words."""
        return f"{self.path}, {self.model.num_parameters():,} parameters"
