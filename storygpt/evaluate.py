"""What is measured on a model: the loss over windows, bits per byte, a sample; and `train.py --eval_only`."""

import math
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from storygpt.checkpoint import load_model, reading_checkpoint
from storygpt.corpus.dataset import Split, evaluation_windows
from storygpt.corpus.tokenizer import Tokenizer
from storygpt.generate import check_cache, generate
from storygpt.loss import IGNORED_TARGET, fuse_loss, lazy_without_gradients
from storygpt.run import best_checkpoint, newest_run
from storygpt.settings import Config
from storygpt.system.distributed import all_reduce_sum
from storygpt.system.errors import UserError
from storygpt.system.hardware import autocast, pick_device, pick_dtype, to_device

SAMPLE_PROMPT, SAMPLE_SEED, SAMPLE_TOKENS = "Once upon a time", 1337, 250  # of the story at each evaluation


@contextmanager
def evaluating(model):
    """A context in which a model is in eval mode, without dropout; afterwards, each module is in its former mode."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    reset = lazy_without_gradients.set(True)
    try:
        yield
    finally:
        lazy_without_gradients.reset(reset)
        model.train(was_training[model])  # a module may do more in it
        for module, training in was_training.items():
            module.training = training


@torch.no_grad()
def window_losses(model, split, starts, batch_size):
    """The mean loss of each window of a `Split`, in nats/token: (N), on the CPU. `starts` (N): their first tokens.

    It is the cross-entropy of the model's logits, whatever loss the model is trained with.
    """
    device = next(model.parameters()).device
    losses = []
    with evaluating(model):
        for i in range(0, len(starts), batch_size):
            x, y = (to_device(array, device) for array in split.windows(starts[i:i + batch_size]))  # (B, T) each
            tokens = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORED_TARGET, reduction="none")
            losses.append(tokens.view(y.shape).float().mean(1))  # (B)
    return torch.cat(losses or [torch.empty(0)]).cpu()  # empty if there are more ranks than windows


def evaluate_splits(state):
    """The mean losses over the evaluation windows of both splits: (training, validation), in nats/token.

    The windows are divided among the ranks of the `TrainState`.
    """
    losses = []
    with autocast(state.device, state.dtype):
        for split, starts in state.data.eval_windows.items():
            local = window_losses(state.model, split, starts[state.rank::state.world_size], state.micro_batch_size)
            losses.append(all_reduce_sum(local.double().sum()).item() / len(starts))
    return losses


def bits_per_byte(loss, split):
    """Convert a loss in nats/token to bits per byte of the split's text, which compares across tokenizers."""
    return loss / math.log(2) / split.bytes_per_token


def sample_story(model, tokenizer):
    """Generate a story from a fixed prompt and seed, to follow the training progress by reading."""
    device = next(model.parameters()).device
    prompt = tokenizer.encode(SAMPLE_PROMPT)
    with evaluating(model):
        check_cache(model)
        tokens = [int(token) for token in generate(
            model, torch.tensor([[tokenizer.end_of_text, *prompt]], device=device), SAMPLE_TOKENS, temperature=0.8,
            top_k=200, generator=torch.Generator(device).manual_seed(SAMPLE_SEED), end_of_text=tokenizer.end_of_text)]
    return tokenizer.decode([*prompt, *(token for token in tokens if token != tokenizer.end_of_text)])


def evaluate_checkpoint(settings, flags):
    """--eval_only: print the loss of a run's ckpt.pt on a whole validation split, as `key: value` lines.

    `settings`: those of the config file, of which only out_dir counts; `flags` may be out_dir, dataset, device, dtype
    and batch_size. Raises UserError for other flags, and if the run or its data cannot be used.
    """
    if wrong := flags.keys() - {"out_dir", "dataset", "device", "dtype", "batch_size"}:
        raise UserError(f"--eval_only uses the settings of the run: leave out --{min(wrong)}")
    out_dir = (settings | flags).get("out_dir") or newest_run()
    path = best_checkpoint(out_dir)
    if path.name != "ckpt.pt":
        print(f"{out_dir} has no ckpt.pt yet: evaluating {path.name}", file=sys.stderr)
    model, tokenizer, checkpoint = load_model(path)
    with reading_checkpoint(path, TypeError):
        # Another batch_size could contradict max_tokens, which evaluation does not use.
        cfg = Config(**checkpoint["config"] | flags | {"max_tokens": 0})
    data_dir = Path("data", cfg.dataset)
    split = Split(data_dir, "validation", cfg.block_size)
    if Tokenizer.load(data_dir) != tokenizer:
        raise UserError(f"{data_dir} has a different tokenizer from {out_dir}: prepare it with that one")

    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    fuse_loss(model.to(device))
    with autocast(device, dtype):
        losses = window_losses(model, split, evaluation_windows(split), cfg.batch_size)  # (windows,)
        loss, tokens = losses.mean().item(), losses.numel() * cfg.block_size
        remaining = len(split.tokens) - 1 - tokens  # after the last whole window
        if remaining:
            last_window = Split(data_dir, "validation", remaining, verify=False)
            last_loss = window_losses(model, last_window, [tokens], 1).item()
            loss, tokens = (loss * tokens + last_loss * remaining) / (tokens + remaining), tokens + remaining
    print(f"checkpoint: {path}\ndataset: {data_dir}\ntokens: {tokens}\nloss: {loss:.4f}\n"
          f"perplexity: {math.exp(loss):.3f}\nbits_per_byte: {bits_per_byte(loss, split):.4f}")
    if losses.numel() > 1:
        print(f"standard_error: {(losses.std() / math.sqrt(losses.numel())).item():.4f}")
