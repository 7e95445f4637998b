"""What tools/export.py can write: a module for each format, and the model card."""

from pathlib import Path
from typing import NamedTuple

import torch

from model import GPT
from storygpt.checkpoint import load_model
from storygpt.corpus.tokenizer import Tokenizer
from storygpt.generate import generate
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
        """Load the best checkpoint of a run. Raises UserError if it cannot be read."""
        path = best_checkpoint(out_dir)
        return cls(path, *load_model(path))

    def describe(self):
        """What is exported, in words."""
        return f"{self.path}, {self.model.num_parameters():,} parameters"


def check_tokens(model, end_of_text, n):
    """Two sequences of n tokens, each (1, n), on which the logits of an export are compared with the model's.

    One is random, with an end of text in the middle. The other is a story that the model generates, because an edit may
    concern only some tokens, such as line ends. Raises UserError if the model's logits are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (1, n), generator=generator)
    idx[:, n // 2] = end_of_text
    start = torch.tensor([[end_of_text]])
    return idx, torch.cat([start, *(token[:, None] for token in generate(model, start, n - 1, generator=generator))], 1)
