"""Train a GPT on data/<dataset>/ into a run folder.

    python train.py config/tinystories.py                        train with a config file
    python train.py config/tinystories.py --learning_rate=3e-4   override a setting
    python train.py config/tinystories.py --resume               resume the run
    python train.py config/tinystories.py --resume=auto          resume the run if there is one, else start it
    python train.py config/tinystories.py --eval_only            evaluate it on the whole validation split
    torchrun --standalone --nproc_per_node=8 train.py config/tinystories.py      train on eight GPUs

Ctrl-C finishes the current step, saves last.pt and exits. `--help-all` lists all settings.
"""

import storygpt  # noqa: F401, I001  (first: it prepares the process for importing torch)

import math
import platform
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from modern import make_model
from storygpt.checkpoint import load_model, load_weights, save
from storygpt.corpus.dataset import Dataset
from storygpt.corpus.tokenizer import Tokenizer
from storygpt.embeddings import cooccurrence_embeddings, set_embeddings
from storygpt.evaluate import (SAMPLE_PROMPT, bits_per_byte, evaluate_checkpoint, evaluate_splits, evaluating,
                               sample_story)
from storygpt.fast import faster_functions
from storygpt.loss import IGNORED_TARGET, fuse_loss
from storygpt.muon import Muon
from storygpt.run import (TrainState, best_checkpoint, claim_run_folder, describe_optimizers, open_run,
                          reopen_run_folder, save_last, start_run_folder)
from storygpt.settings import BUDGETS, read_command_line
from storygpt.system import files
from storygpt.system.distributed import (all_reduce_sum, broadcast_object, cleanup_distributed, distributed_errors,
                                         init_distributed, is_first_on_machine, rank_0_first, rank_0_result)
from storygpt.system.errors import UserError, exit_with_one_line, shell_word
from storygpt.system.hardware import (StopSignals, autocast, check_memory, compile_errors, describe_device,
                                      describe_threads, git_commit, out_of_memory_errors, pick_compile, pick_device,
                                      pick_dtype, pick_micro_batch_size, to_device)

ACTIONS = {
    "resume": "resume the run in out_dir from its last.pt",
    "resume=auto": "resume the run if there is one, else start it",
    "overwrite": "replace the run in out_dir with a new one",
    "eval_only": "only evaluate the run's ckpt.pt; on the whole validation split of its dataset, or of --dataset",
}


@exit_with_one_line
def main(argv=None):
    """Train, or evaluate with --eval_only; `argv` as on the command line. User errors are reported in one line."""
    # ---- settings ----
    settings, flags, args = read_command_line(argv, ACTIONS)
    if sum(vars(args)[action] for action in ACTIONS) > 1:
        raise UserError("--resume, --overwrite and --eval_only are mutually exclusive: choose one")
    rank, world_size = init_distributed()  # 0 and 1 without torchrun
    if args.eval_only:
        if rank == 0:
            evaluate_checkpoint(settings, flags)
        return cleanup_distributed()
    # Rank 0 alone reads and writes the run folder.
    cfg, resume_checkpoint, init_checkpoint = rank_0_result(open_run, settings, flags, args, world_size)

    # ---- data and hardware ----
    with rank_0_first():
        data = Dataset(cfg, verify=is_first_on_machine())
        tokenizer = Tokenizer.load(data.folder)
        device = pick_device(cfg.device)
        dtype = pick_dtype(cfg.dtype, device)
        use_compile, reason = pick_compile(cfg.compile, device)
        sequences_per_rank = cfg.sequences_per_step // world_size
        # At least: without biases, norms and value embeddings.
        parameters = 12 * cfg.n_layer * cfg.n_embd**2 + data.vocab_size * cfg.n_embd
        check_memory(parameters, sequences_per_rank * cfg.block_size)
    if broadcast_object(data.sha256) != data.sha256:
        raise UserError(f"{data.folder} differs from rank 0's copy: copy that folder to this machine")
    micro_batch_size = pick_micro_batch_size(cfg.device_batch_size, sequences_per_rank, cfg.block_size, device,
                                             equal_sizes=use_compile)

    # ---- model and optimizers ----
    torch.use_deterministic_algorithms(device.type == "cpu")  # makes resuming bit-exact on a CPU
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU for what stays in float32
    torch.manual_seed(cfg.seed)
    model = make_model(cfg.model_config(data.vocab_size)).to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # small float16 gradients underflow
    state = TrainState(cfg, data, model, scaler, device, dtype, micro_batch_size, rank, world_size)
    resumed = resume_checkpoint is not None
    if not resumed:
        set_initial_weights(state, init_checkpoint)
    fuse_loss(model, torch.from_numpy(data.train.used_tokens()), equalize=not (resumed or init_checkpoint))
    state.optimizers = make_optimizers(model, cfg)  # now: an optimizer may copy the initial weights
    state.optimized = describe_optimizers(model, state.optimizers)
    if resumed:
        state.restore(resume_checkpoint)
        rank_0_result(reopen_run_folder, state, resume_checkpoint["sizes"])
        state.best_val_loss = broadcast_object(state.best_val_loss)  # infinity if ckpt.pt cannot be used

    # ---- what will be done ----
    print_plan(state, f"{'compiled in the first step' if use_compile else 'not compiled'} ({reason})")
    if is_finished(state):
        print(f"{cfg.out_dir} is finished already: {extension_hint(state)}")
        log_end(state)  # again: reopening has truncated the log
        return cleanup_distributed()
    if resumed:
        print(f"resuming after step {state.step:,} of {total_steps(state):,}")
        log_run(state, resumed_at=state.iteration)
    else:
        rank_0_result(claim_run_folder, state.out_dir, args.overwrite)
    if init_checkpoint:
        print(f"starting from the weights of {cfg.init_from}, trained on {init_checkpoint['tokens']:,} tokens")
    del resume_checkpoint, init_checkpoint  # frees memory: the weights are in the model now

    # ---- the loop ----
    train_model = prepare_for_training(model, use_compile)
    state.start_clock()
    with (StopSignals(rank) as signals, out_of_memory_errors(device, micro_batch_size),
          compile_errors(), distributed_errors(), faster_functions(device), progress_bar(state) as bar):
        x, y = get_batch(state)  # (B, T) each
        while True:
            # Evaluate first: a run that was stopped just before an evaluation then performs it on resume.
            if evaluation_is_due(state):
                is_first_evaluation = not state.metrics["iter"]
                evaluate_and_log(state, tokenizer)
                state.sync_ranks(signals.received)  # evaluation takes time, and a signal may have arrived
                save_last(state)
                if rank == 0 and (is_first_evaluation or state.step == total_steps(state)):
                    check_saved_model(state, x[:1])  # again: a difference may need training to show
            if state.stop or state.step == total_steps(state):
                break
            lr = set_learning_rate(state)
            seed_random(cfg.seed, state.step, rank)
            loss = forward_backward(state, train_model, x, y)
            seed_random(cfg.seed, state.step, 0, 2)  # the same on all ranks, for an edit that draws random numbers here
            grad_norm = optimizer_step(state)
            state.step += 1
            x, y = get_batch(state)  # of the next step, while a GPU computes this one
            state.sync_ranks(signals.received)
            bar.total = total_steps(state)
            bar.update()

            log_due = state.step in (1, bar.total) or is_due(state, cfg.log_interval)
            save_due = state.step == 1 or state.seconds - state.saved_seconds >= 60 * cfg.checkpoint_minutes
            if log_due or save_due or state.stop or is_due(state, cfg.eval_interval):
                loss = all_reduce_sum(loss)  # the mean over the targets of all ranks
                check_finite(state, "loss", loss)  # waits for the device, so not after every step
                if not scaler.is_enabled():  # in float16 it may be infinite: the step was skipped then
                    check_finite(state, "gradient norm", grad_norm)
            if state.step == 1:  # it works: only now an earlier run is replaced
                rank_0_result(start_run_folder, state.out_dir, data.folder)
                log_run(state, resumed_at=None)
            if log_due:
                log_step(state, loss, lr, grad_norm, bar)
            if save_due:
                save_last(state)
                if state.step == 1 and rank == 0:
                    check_saved_model(state, x[:1])
        if state.saved_step < state.step:
            save_last(state)

    del train_model  # DistributedDataParallel must be freed before the process group, or PyTorch 2.11 can hang
    cleanup_distributed()
    log_end(state)
    if rank == 0:
        print_summary(state)


# ---- the model before the first step ----


def set_initial_weights(state, init_checkpoint):
    """Load the weights of `init_checkpoint`, if there is one, or set the token embeddings as init_embeddings says.

    A checkpoint's block may be longer: its extra position embeddings are dropped. Embeddings are computed from the
    sequences of the run, at most one epoch or 8 M tokens, by rank 0, which sends them to the others.
    """
    cfg, order = state.cfg, state.data.order
    if init_checkpoint:
        weights = {name: w[:cfg.block_size] if name == "transformer.wpe.weight" else w
                   for name, w in init_checkpoint["model"].items()}
        load_weights(cfg.init_from, state.model, weights)
    elif cfg.init_embeddings == "cooccurrence":
        count = min(order.windows_per_epoch, math.ceil(2**23 / cfg.block_size))
        if not cfg.max_minutes:  # the length is known
            count = min(count, cfg.max_iters * cfg.batch_size)
        set_embeddings(state.model, rank_0_result(lambda: cooccurrence_embeddings(
            order.sequences(0, count)[0], state.data.vocab_size, cfg.n_embd)))


@distributed_errors()
def prepare_for_training(model, use_compile):
    """The model as the training step calls it: its layers compiled, and its gradients averaged over the ranks.

    Layers in an nn.ModuleList are compiled one by one: equal ones, as the blocks, only once.
    """
    if use_compile:
        for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
            for layer in layers:
                layer.compile()
    if not torch.distributed.is_initialized():
        return model
    # It sends rank 0's weights to the others. A parameter may be frozen or unused, such as that of an expert.
    return DistributedDataParallel(model, find_unused_parameters=True)


# ---- optimizers and learning rate ----


def make_optimizers(model, cfg):
    """The optimizers of a run, as a list. Each parameter is in one of them; only matrices and embeddings are decayed.

    AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) updates all parameters. With optimizer = "muon", Muon (Jordan et
    al. 2024, kellerjordan.github.io/posts/muon) updates the matrices of the blocks, and AdamW the rest.
    """
    decayed, not_decayed, muon = [], [], {}  # the first two for AdamW
    for name, p in model.named_parameters():
        if p.dim() < 2:
            not_decayed.append(p)  # biases and norms
        elif cfg.optimizer == "muon" and name.startswith("transformer.h.") and p.dim() == 2:
            muon[name] = p
        else:
            decayed.append(p)
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                                    fused=next(model.parameters()).device.type != "mps")]  # not tried there
    if muon:
        # Queries, keys and values are three matrices.
        parts = [3 if name.endswith("c_attn.weight") and len(p) == 3 * p.size(1) else 1 for name, p in muon.items()]
        optimizers.append(Muon(list(muon.values()), cfg.muon_lr, cfg.weight_decay, parts))
    return optimizers


# From 1 to 0 while t goes from 0 (the end of warmup) to 1 (the end of the schedule).
SCHEDULES = {
    "cosine": lambda t, cfg: 0.5 * (1 + math.cos(math.pi * t)),
    "linear": lambda t, cfg: 1 - t,
    # Warmup, stable, decay: constant, then linear over the last decay_fraction (Hu et al. 2024, arXiv 2404.06395).
    "wsd": lambda t, cfg: min(1, (1 - t) / cfg.decay_fraction),
}


def schedule_progress(state):
    """The part of the schedule that is done, warmup included, 0 to 1: of lr_decay_iters, else of max_minutes."""
    cfg = state.cfg
    if cfg.lr_decay_iters:
        return min(1, state.iteration / cfg.lr_decay_iters)
    return min(1, state.seconds / (60 * cfg.max_minutes))


def learning_rate_multiplier(cfg, iteration, progress):
    """The factor on every optimizer's learning rate in the step that starts at `iteration`, at this `progress`.

    Linear warmup to 1 over warmup_iters, then lr_schedule from 1 to min_lr / learning_rate.
    """
    if iteration < cfg.warmup_iters:
        return (iteration + 1) / (cfg.warmup_iters + 1)
    final = cfg.min_lr / cfg.learning_rate
    if progress == 1:  # first, because 1 - warmup_progress can be 0
        return final
    warmup_progress = progress * cfg.warmup_iters / max(1, iteration)  # at its end, if the speed was constant
    t = max(0.0, (progress - warmup_progress) / (1 - warmup_progress))  # rounding could make it negative
    return final + (1 - final) * SCHEDULES[cfg.lr_schedule](t, cfg)


def set_learning_rate(state):
    """Set the learning rates of the next step in all optimizers; returns AdamW's."""
    multiplier = learning_rate_multiplier(state.cfg, state.iteration, schedule_progress(state))
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * multiplier  # a key of torch's schedulers, too
    return state.cfg.learning_rate * multiplier


# ---- one optimizer step ----


def get_batch(state):
    """This rank's sequences of the next step, on the device: inputs and targets, (B, T) each."""
    seed_random(state.cfg.seed, state.step, state.rank, 1)  # for an edit that draws random numbers here
    count = state.cfg.sequences_per_step // state.world_size
    first = state.step * state.cfg.sequences_per_step + state.rank * count
    return [to_device(tokens, state.device) for tokens in state.data.order.sequences(first, count)]


def seed_random(*integers):
    """Seed all random numbers that a model may use. In training, `integers` are the run's seed, the step and the rank,
    so no state of a generator has to be saved.
    """
    seed = int(np.random.SeedSequence(integers).generate_state(1, np.uint64)[0])
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def forward_backward(state, model, x, y):
    """Accumulate the gradients of sequences x, targets y (B, T each), in micro-batches.

    `model` is `state.model`, or DistributedDataParallel around it. Returns this rank's part of the step's loss, a mean
    over the targets that are not ignored, as a scalar tensor, without waiting for the device.
    """
    loss = torch.zeros((), device=state.device)
    counts = (y != IGNORED_TARGET).sum(1)  # (B), of the targets of each sequence
    total = all_reduce_sum(counts.sum()).clamp_min(1)  # of all ranks
    for i in range(0, len(x), state.micro_batch_size):
        inputs, targets = x[i:i + state.micro_batch_size], y[i:i + state.micro_batch_size]  # (b, T)
        count = counts[i:i + state.micro_batch_size].sum()
        targets = targets.masked_fill(count == 0, 0)  # a mean over no target is NaN; the weight of these is 0
        is_last = i + len(inputs) == len(x)
        with nullcontext() if is_last or model is state.model else model.no_sync():
            with autocast(state.device, state.dtype):
                micro_loss = model(inputs, targets) * (count / total)
            # The ranks' gradients are averaged, but their losses are parts of a sum.
            state.scaler.scale(micro_loss * state.world_size).backward()
        loss += micro_loss.detach()
    return loss


def optimizer_step(state):
    """Clip the gradient, update the weights and clear the gradient; returns the gradient's norm, a scalar tensor.

    If a float16 gradient has overflowed, all optimizers skip the step: the scaler would skip only those affected.
    """
    parameters, scaler = state.model.parameters(), state.scaler
    for optimizer in state.optimizers:
        scaler.unscale_(optimizer)  # clipping needs unscaled gradients
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, state.cfg.grad_clip or math.inf)
    if not scaler.is_enabled() or math.isfinite(grad_norm):
        for optimizer in state.optimizers:
            scaler.step(optimizer)
    else:
        state.skipped += 1
    scaler.update()
    state.model.zero_grad(set_to_none=True)
    return grad_norm


def check_finite(state, name, value):
    """Raise UserError if a loss or a gradient norm is infinite or NaN: the weights are damaged then."""
    cfg, value = state.cfg, float(value)
    if math.isfinite(value):
        return
    rates = f"--learning_rate (now {cfg.learning_rate:g})"
    if cfg.optimizer == "muon":
        rates = f"--muon_lr (now {cfg.muon_lr:g}) and {rates}"
    advice = f"start a new run with a lower {rates} or more --warmup_iters"
    if state.dtype != torch.float32:
        advice = f"{'resume' if state.saved_step else 'start again'} with --dtype=float32, or {advice}"
    if state.saved_step:
        advice += f"; {cfg.out_dir} has earlier checkpoints"
    raise UserError(f"the {name} is {value} at iteration {state.iteration}: {advice}")


# ---- when things are due ----


def total_steps(state):
    """Optimizer steps in the whole run; with max_minutes, an estimate from the speed so far."""
    cfg = state.cfg
    if not cfg.max_minutes:
        return math.ceil(cfg.max_iters / cfg.gradient_accumulation_steps)
    used = state.seconds / (60 * cfg.max_minutes)  # part of the time
    if used >= 1:
        return max(1, state.step)
    return max(state.step + 1, int(state.step / used) if used else 0)


def is_due(state, interval):
    """Whether the latest step reached or passed a multiple of `interval` iterations."""
    previous = state.iteration - state.cfg.gradient_accumulation_steps
    return state.iteration // interval > previous // interval


def evaluation_is_due(state):
    """Whether to evaluate now: at the end, and at each eval_interval unless the run was asked to stop."""
    if state.metrics["iter"] == state.iteration:  # done, or at the very start
        return False
    return state.step == total_steps(state) or (not state.stop and is_due(state, state.cfg.eval_interval))


def is_finished(state):
    """Whether a run has done all its steps and its last evaluation."""
    steps_left = total_steps(state) - state.step  # negative if the run has been shortened
    return steps_left < 0 or (steps_left == 0 and state.metrics["iter"] == state.iteration)


# ---- evaluation, checks and logs ----


@torch.no_grad()
def check_saved_model(state, idx):
    """Raise UserError if the model that was just saved, when loaded, has other logits for token ids (1, T).

    A model may depend on what is neither a parameter nor a saved buffer, such as random numbers drawn in __init__.
    """
    started = time.perf_counter()
    saved, _, _ = load_model(state.out_dir / "last.pt")
    logits = []  # of both models, (1, T, V) each
    with torch.compiler.set_stance("force_eager"):
        for model in (state.model, saved.to(state.device)):
            seed_random(0)
            with evaluating(model):
                output = model(idx)
            if not isinstance(output, torch.Tensor) or output.shape[:2] != idx.shape:
                raise UserError("without targets, model.forward must return the logits of all positions, (B, T, V)")
            logits.append(output.float())
    state.excluded_seconds += time.perf_counter() - started
    largest = logits[1].nan_to_num(0, 0, 0).abs().max().item()
    if not torch.allclose(*logits, rtol=0, atol=1e-3 * largest, equal_nan=True):  # -infinity excludes a token
        raise UserError("the model computes something else after it was saved and loaded: keep what it depends on in "
                        "a parameter or a saved buffer (train.py: check_saved_model)")


def evaluate_and_log(state, tokenizer):
    """Evaluate on fixed windows of both splits, log the losses and a sample, and save the best weights in ckpt.pt."""
    started = time.perf_counter()
    with torch.compiler.set_stance("force_eager"):  # evaluations have other shapes, and take little time
        train_loss, val_loss = evaluate_splits(state)
        check_finite(state, "validation loss", val_loss)
        story = sample_story(state.model, tokenizer) if state.rank == 0 else None
    val_bpb = bits_per_byte(val_loss, state.data.validation)
    state.metrics = {"iter": state.iteration, "tokens": state.tokens, "train_loss": train_loss, "val_loss": val_loss,
                     "val_bpb": val_bpb}
    tqdm.write(f"iteration {state.iteration:,}: train loss {train_loss:.4f}, validation loss {val_loss:.4f}, "
               f"{val_bpb:.4f} bits per byte")
    state.log({"kind": "eval", **state.metrics, "seconds": state.elapsed()})
    if state.rank == 0:
        files.append(state.out_dir / "samples.md", f"## iteration {state.iteration}: validation loss {val_loss:.4f}\n\n"
                                                   f"{story}\n\n")
    if val_loss < state.best_val_loss:
        state.best_val_loss = float(val_loss)
        if state.rank == 0:
            save(state.out_dir / "ckpt.pt", state.model_dict())
    state.excluded_seconds += time.perf_counter() - started


def log_run(state, resumed_at):
    """Log the settings, data, machine and versions of the run, and the iteration at which it is resumed or None."""
    state.log(dict(kind="run", config=asdict(state.cfg), resumed_at=resumed_at, parameters=state.model.num_parameters(),
                   device=describe_device(state.device), dtype=str(state.dtype).removeprefix("torch."),
                   micro_batch_size=state.micro_batch_size, world_size=state.world_size,
                   threads=torch.get_num_threads(), git=git_commit(), data_sha256=state.data.sha256,
                   seed=state.cfg.seed, python=platform.python_version(), torch=torch.__version__,
                   numpy=np.__version__))


def log_step(state, loss, lr, grad_norm, bar):
    """Log a training step, and show it on the progress bar or, without a terminal, as a line."""
    now = time.perf_counter()
    training_seconds = now - state.logged_at - state.excluded_seconds
    tokens_per_s = (state.step - state.logged_step) * state.cfg.tokens_per_step / training_seconds
    state.logged_step, state.logged_at, state.excluded_seconds = state.step, now, 0.0
    state.log(dict(kind="step", iter=state.iteration, step=state.step, tokens=state.tokens,
                   epoch=state.tokens / state.data.tokens_per_epoch, loss=loss.item(), lr=lr,
                   grad_norm=grad_norm.item() if math.isfinite(grad_norm) else None,  # JSON has no infinity
                   skipped=state.skipped, tokens_per_s=tokens_per_s, seconds=state.elapsed()))
    summary = f"loss {loss.item():.3f}, lr {lr:.2e}, {tokens_per_s:,.0f} tokens/s"
    bar.set_postfix_str(summary)
    if bar.disable:
        if state.step > 1:  # the first step may include compiling
            seconds_left = (bar.total - state.step) * state.cfg.tokens_per_step / tokens_per_s
            summary += f", {tqdm.format_interval(seconds_left)} left"
        print(f"iteration {state.iteration:,}: {summary}", flush=True)


def log_end(state):
    """Log how the run ended: it has finished, or was stopped and can be resumed."""
    state.log({"kind": "end", "iter": state.iteration, "reason": "finished" if is_finished(state) else "stopped"})


# ---- what is printed at the start and at the end ----


def print_plan(state, compiled):
    """Print the model, the data and the length of the run, and warn about a learning rate that rises."""
    cfg, data, steps = state.cfg, state.data, total_steps(state)
    tokens = steps * cfg.tokens_per_step
    length = (f"{cfg.max_minutes:g} minutes" if cfg.max_minutes else
              f"{steps:,} steps = {tokens:,} tokens = {tokens / data.tokens_per_epoch:.2f} epochs")
    processes = f" on {state.world_size} processes" if state.world_size > 1 else ""
    threads = f", {describe_threads()}" if state.device.type == "cpu" else ""
    print(f"{cfg.out_dir}: {state.model.num_parameters():,} parameters; {cfg.architecture}, {cfg.n_layer} layers, "
          f"{cfg.n_head} heads, width {cfg.n_embd}, block {cfg.block_size}, vocabulary {data.vocab_size:,}\n"
          f"{data.folder}: {len(data.train.tokens):,} training tokens, {len(data.validation.tokens):,} validation "
          f"tokens\na step: {cfg.sequences_per_step:,} sequences = {cfg.tokens_per_step:,} tokens, in micro-batches of "
          f"{state.micro_batch_size} sequences{processes}\nthe run: {length}\n"
          f"on {state.device}, in {str(state.dtype).removeprefix('torch.')}, {compiled}{threads}")
    if cfg.min_lr > cfg.learning_rate:
        print(f"warning: min_lr = {cfg.min_lr:g} is above learning_rate = {cfg.learning_rate:g}: after warmup, the "
              "learning rate rises until the end and never decays")


def progress_bar(state):
    """A bar on a terminal; without one, `log_step` prints lines."""
    return tqdm(total=total_steps(state), initial=state.step, unit=" steps", dynamic_ncols=True,
                disable=state.rank > 0 or not sys.stderr.isatty())


def extension_hint(state):
    """How to train a finished run further, as a phrase."""
    cfg = state.cfg
    if cfg.min_lr == 0 and 0 < cfg.lr_decay_iters <= state.iteration:
        return "its learning rate is 0 now, so start a longer run with another --out_dir"
    budget = next(name for name in reversed(BUDGETS) if getattr(cfg, name))  # max_iters is always set
    return f"to train it further, increase --{budget}"


def print_summary(state):
    """Print the result as `key: value` lines, how to resume if the run was stopped, and how to sample."""
    cfg, steps, seconds = state.cfg, total_steps(state), state.elapsed()
    if state.step < steps:
        script = "python train.py" if state.world_size == 1 else "torchrun … train.py"
        print(f"stopped after step {state.step:,} of {steps:,}; resume with  "
              f"{script} --out_dir={shell_word(cfg.out_dir)} --resume")
    elif state.iteration < cfg.warmup_iters:
        print(f"warning: the run ended during warmup, after {state.iteration:,} of warmup_iters = {cfg.warmup_iters:,}")
    if math.isfinite(state.best_val_loss):
        print(f"best_val_loss: {state.best_val_loss:.4f}\n"
              f"val_bits_per_byte: {bits_per_byte(state.best_val_loss, state.data.validation):.4f}")
    if state.skipped:
        print(f"skipped_steps: {state.skipped}")  # steps whose gradients overflowed in float16
    print(f"tokens: {state.tokens}\nseconds: {seconds:.1f}\ntokens_per_s: {state.tokens / seconds:.0f}\n"
          f"checkpoint: {best_checkpoint(cfg.out_dir)}\n"
          f'sample: python sample.py --out_dir {shell_word(cfg.out_dir)} --start "{SAMPLE_PROMPT}"')


if __name__ == "__main__":
    main()
