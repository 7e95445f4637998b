"""evaluate.py: the loss of windows, bits per byte, sample stories, and `train.py --eval_only`."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from conftest import TINY
from model import GPT, GPTConfig
from storygpt import checkpoint
from storygpt.corpus.dataset import Split, evaluation_windows, with_checksum
from storygpt.corpus.tokenizer import Tokenizer
from storygpt.evaluate import evaluating, sample_story, window_losses


def test_evaluation_has_no_dropout_and_does_not_depend_on_the_batch_size(nursery_data):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.5)).train()
    split = Split(nursery_data / "data/nursery-bpe300", "validation", 16)
    starts = evaluation_windows(split, 12)
    losses = window_losses(model, split, starts, batch_size=5)
    assert model.training and losses.shape == (12,)
    assert torch.allclose(losses, window_losses(model, split, starts, batch_size=12), atol=1e-5)
    x, y = map(torch.from_numpy, split.windows(starts[3:4]))
    assert losses[3].item() == pytest.approx(model.eval()(x, y).item(), rel=1e-5)
    assert window_losses(model, split, [], batch_size=5).shape == (0,) and not model.training


def test_after_an_evaluation_every_module_is_in_its_own_mode():
    class Merged(torch.nn.Dropout):
        """As a low-rank update that is added to its weight in eval mode."""

        def train(self, mode=True):
            self.is_merged = not mode
            return super().train(mode)
    model = torch.nn.Sequential(Merged(), torch.nn.Sequential(torch.nn.Dropout())).train()
    model[1].eval()  # as a frozen teacher
    with evaluating(model):
        assert not any(module.training for module in model.modules()) and model[0].is_merged
    assert [module.training for module in model.modules()] == [True, True, False, False] and not model[0].is_merged


@pytest.fixture
def run(with_data):
    """A run of one step, out/x, in the current folder."""
    train.main([*TINY, "--max_iters=2", "--out_dir=out/x"])


def eval_only(capsys, *flags):
    """Run `train.py --eval_only`; returns its `key: value` lines as a dict, and stderr."""
    capsys.readouterr()
    train.main(["--eval_only", "--dtype=float32", *flags])
    out, err = capsys.readouterr()
    return dict(line.split(": ") for line in out.splitlines()), err


def test_sample_stories_are_deterministic_and_eval_only_evaluates_every_token(run, capsys):
    results, err = eval_only(capsys, "--out_dir=out/x", "--batch_size=7")
    model, tokenizer, _ = checkpoint.load_model("out/x/ckpt.pt")
    tokens = torch.from_numpy(np.fromfile("data/nursery-bpe300/validation.bin", np.uint16).astype(np.int64))
    losses = [F.cross_entropy(model(tokens[None, i:i + 16][:, :len(tokens) - 1 - i])[0], tokens[i + 1:i + 17],
                              reduction="none") for i in range(0, len(tokens) - 1, 16)]  # (16) each, the last shorter
    token_losses = torch.cat(losses)
    assert int(results["tokens"]) == len(tokens) - 1 == len(token_losses) and len(losses[-1]) < 16
    loss = token_losses.mean().item()
    assert float(results["loss"]) == pytest.approx(loss, abs=1e-4)
    assert float(results["perplexity"]) == pytest.approx(math.exp(loss), rel=1e-3)
    split = json.loads(Path("data/nursery-bpe300/meta.json").read_text())["splits"]["validation"]
    assert float(results["bits_per_byte"]) == pytest.approx(
        loss * split["tokens"] / split["bytes"] / math.log(2), abs=1e-4)
    windows = torch.stack([loss.mean() for loss in losses if loss.numel() == 16])
    assert float(results["standard_error"]) == pytest.approx(windows.std().item() / len(windows) ** 0.5, abs=1e-4)
    assert results["checkpoint"] == "out/x/ckpt.pt" and results["dataset"] == "data/nursery-bpe300" and err == ""

    model.train()  # the model has dropout
    story = sample_story(model, tokenizer)
    torch.manual_seed(5)
    assert sample_story(model, tokenizer) == story and model.training
    assert story.startswith("Once upon a time") and len(story) > 30


def test_eval_only_takes_the_newest_run_and_last_pt_before_the_first_evaluation(run, capsys, fails):
    best, _ = eval_only(capsys)
    Path("out/x/ckpt.pt").unlink()
    last, err = eval_only(capsys)
    assert "out/x has no ckpt.pt yet: evaluating last.pt" in err
    assert best["checkpoint"] == "out/x/ckpt.pt" and last == best | {"checkpoint": "out/x/last.pt"}
    assert "leave out --n_layer" in fails(train.main, ["--eval_only", "--n_layer=3"])


def test_eval_only_on_another_dataset_needs_the_same_tokenizer(run, capsys, fails):
    shutil.copytree("data/nursery-bpe300", "data/copy")
    assert eval_only(capsys, "--dataset=copy")[0]["dataset"] == "data/copy"
    meta = json.loads(Path("data/copy/meta.json").read_text())
    meta["tokenizer"] = Tokenizer.train(["abab"], 258).save("data/copy")
    Path("data/copy/meta.json").write_text(json.dumps(with_checksum(meta)))
    assert "has a different tokenizer from out/x" in fails(train.main, ["--eval_only", "--dataset=copy"])
