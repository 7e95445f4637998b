"""evaluate.py: the loss of windows, bits per byte, sample stories, and `train.py --eval_only`."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from conftest import TINY
from model import GPT, GPTConfig
from storygpt import checkpoint
from storygpt.corpus.dataset import Split, evaluation_windows
from storygpt.evaluate import bits_per_byte, sample_story, window_losses

TINY_MODEL = GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.5)  # on TINY's data


def test_evaluation_has_no_dropout_and_does_not_depend_on_the_batch_size(with_data):
    torch.manual_seed(0)
    model = GPT(TINY_MODEL).train()
    split = Split("data/nursery-bpe300", "validation", 16)
    starts = evaluation_windows(split, 12)
    losses = window_losses(model, split, starts, batch_size=5)
    assert model.training and losses.shape == (12,)
    assert torch.allclose(losses, window_losses(model, split, starts, batch_size=12), atol=1e-5)
    x, y = map(torch.from_numpy, split.windows(starts[3:4]))
    assert losses[3].item() == pytest.approx(model.eval()(x, y).item(), rel=1e-5)
    assert window_losses(model, split, [], batch_size=5).shape == (0,) and not model.training


def test_bits_per_byte(with_data):
    split = Split("data/nursery-bpe300", "validation", 16)
    meta = json.loads(Path("data/nursery-bpe300/meta.json").read_text())["splits"]["validation"]
    assert bits_per_byte(math.log(2), split) == pytest.approx(meta["tokens"] / meta["bytes"])  # a bit per token


def test_sample_stories_are_deterministic(trained):
    model, tokenizer, _ = checkpoint.load_model(trained / "out/tiny/ckpt.pt")
    model.train()  # the model has dropout
    story = sample_story(model, tokenizer)
    torch.manual_seed(5)
    assert sample_story(model, tokenizer) == story and model.training
    assert story.startswith("Once upon a time") and len(story) > 30


def eval_only(capsys, *flags):
    """Run `train.py --eval_only`; returns its `key: value` lines as a dict, and stderr."""
    train.main(["--eval_only", "--dtype=float32", *flags])
    out, err = capsys.readouterr()
    return dict(line.split(": ") for line in out.splitlines()), err


def test_eval_only_evaluates_every_token_of_the_validation_split(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    results, err = eval_only(capsys, "--out_dir=out/tiny", "--batch_size=7")
    model, _, _ = checkpoint.load_model("out/tiny/ckpt.pt")
    tokens = torch.from_numpy(np.fromfile("data/nursery-bpe300/validation.bin", np.uint16).astype(np.int64))
    losses = [F.cross_entropy(model(tokens[None, i:i + 16][:, :len(tokens) - 1 - i])[0], tokens[i + 1:i + 17],
                              reduction="none") for i in range(0, len(tokens) - 1, 16)]  # (16) each, the last shorter
    token_losses = torch.cat(losses)
    assert int(results["tokens"]) == len(tokens) - 1 == len(token_losses)
    loss = token_losses.mean().item()
    assert float(results["loss"]) == pytest.approx(loss, abs=1e-4)
    assert float(results["perplexity"]) == pytest.approx(math.exp(loss), rel=1e-3)
    split = json.loads(Path("data/nursery-bpe300/meta.json").read_text())["splits"]["validation"]
    assert float(results["bits_per_byte"]) == pytest.approx(
        loss * split["tokens"] / split["bytes"] / math.log(2), abs=1e-4)
    windows = torch.stack([loss.mean() for loss in losses if loss.numel() == 16])
    assert float(results["standard_error"]) == pytest.approx(windows.std().item() / len(windows) ** 0.5, abs=1e-4)
    assert results["checkpoint"] == "out/tiny/ckpt.pt" and results["dataset"] == "data/nursery-bpe300" and err == ""


def test_eval_only_takes_last_pt_before_the_first_evaluation(with_data, capsys):
    train.main([*TINY, "--max_iters=2", "--out_dir=out/x"])
    capsys.readouterr()
    best, _ = eval_only(capsys)  # the newest run
    Path("out/x/ckpt.pt").unlink()
    last, err = eval_only(capsys)
    assert "out/x has no ckpt.pt yet: evaluating last.pt" in err
    assert best["checkpoint"] == "out/x/ckpt.pt" and last == best | {"checkpoint": "out/x/last.pt"}


def test_eval_only_on_another_dataset_needs_the_same_tokenizer(with_data, capsys, fails):
    import prepare
    train.main([*TINY, "--max_iters=2", "--out_dir=out/x"])
    prepare.main(["nursery", "--tokenizer", "bpe:310", "--max_stories", "60"])
    assert "has a different tokenizer from out/x" in fails(train.main, ["--eval_only", "--dataset=nursery-bpe310"])
    (with_data / "data/copy").symlink_to(with_data / "data/nursery-bpe300")
    assert eval_only(capsys, "--dataset=copy")[0]["dataset"] == "data/copy"


def test_eval_only_refuses_settings_of_the_run(here, fails):
    assert "leave out --n_layer" in fails(train.main, ["--eval_only", "--n_layer=3"])
