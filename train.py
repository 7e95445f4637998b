"""Train a GPT on data/<dataset>/ into a run folder.

    python train.py config/tinystories.py                        a recipe
    python train.py config/tinystories.py --learning_rate=3e-4   a recipe, with a setting changed
    python train.py config/tinystories.py --resume               go on where it stopped
    python train.py config/tinystories.py --resume=auto          … or start, where there is nothing yet
    python train.py config/tinystories.py --eval_only            its loss on the whole validation split
    torchrun --standalone --nproc_per_node=8 train.py config/tinystories.py      on eight GPUs

Ctrl-C finishes the current update, writes last.pt and exits. `--help` lists the settings.
"""

import math
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import files
from config import Config, over, read_command_line
from dataset import Split, TrainingOrder, evaluation_windows, read_meta
from errors import UserError, exit_with_one_line
from hardware import (pick_compile, pick_device, pick_device_batch_size, pick_dtype, pick_fused, refuse_what_cannot_fit,
                      stop_signals)
from layers import head_loss
from model import GPT, GPTConfig
from ranks import add_up, add_up_gradients, agree, from_rank_0, join, leave
from tokenizer import Tokenizer

ACTIONS = {
    "resume": "go on with the run in out_dir, from its last.pt",
    "resume=auto": "the same where out_dir holds a run, else start it: one command for a machine that restarts",
    "overwrite": "start anew where out_dir already holds a run",
    "eval_only": "only measure the run's ckpt.pt on the whole validation split of its dataset, or of --dataset",
}
# What may differ from the stored settings when a run goes on: nothing here changes what an update computes, but to
# rounding (and device_batch_size the dropout masks), and max_minutes, which gives it the rate of that moment.
MAY_CHANGE = {"out_dir", "max_iters", "max_tokens", "max_minutes", "eval_interval", "log_interval",
              "checkpoint_minutes", "device", "dtype", "compile", "device_batch_size"}
SAMPLE_PROMPT, SAMPLE_SEED, SAMPLE_TOKENS = "Once upon a time", 1337, 250


@exit_with_one_line
def main(argv=None):
    """Train, or with --eval_only measure; `argv` as on the command line. What a user can mend ends in one line."""
    recipe, flags, args = read_command_line(argv, ACTIONS)
    resume_auto = vars(args)["resume=auto"]
    if args.resume + resume_auto + args.overwrite + args.eval_only > 1:
        raise UserError("--resume, --overwrite and --eval_only exclude each other: choose one")
    rank, ranks = join()  # 0 and 1 unless torchrun has started several; rank 0 alone reads and writes the run folder
    if args.eval_only:
        if rank == 0:
            measure(recipe, flags)
        return leave()

    # ---- settings ----
    settings = over(recipe, flags)
    last = old = None  # the checkpoint to go on from, or the one that a new run takes its first weights from
    if rank == 0:
        out_dir = settings.get("out_dir") or (checkpoint.newest_run() if args.resume else Config.out_dir)
        if args.resume or resume_auto and checkpoint.can_go_on(out_dir):
            last = checkpoint.load_last(out_dir)
            settings["out_dir"] = str(out_dir)
        elif settings.get("init_from", "scratch") != "scratch":
            _, old_tokenizer, old = checkpoint.load_model(checkpoint.best_in(settings["init_from"]))
    settings, last, old = from_rank_0([settings, last, old])
    if rank:  # waits until rank 0 has made all its checks: what all would complain of is told once
        data_of_rank_0 = from_rank_0(None)
    if last:
        with checkpoint.taking_from(Path(settings["out_dir"], "last.pt")):
            stored = asdict(Config(**last["config"]))
        cfg = Config(**over(stored, flags) | {"out_dir": settings["out_dir"]})
        refuse_changes(stored, asdict(cfg), recipe)
        if last["ranks"] != ranks:
            print(f"changed: {ranks} processes share the run, were {last['ranks']}")
    elif old:
        shape = {name: old["model_config"][name] for name in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
        cfg = Config(**shape | settings)
        refuse_another_shape(shape, cfg)
        if Path(cfg.init_from).resolve() == Path(cfg.out_dir).resolve():
            raise UserError(f"init_from = {cfg.init_from!r} would be replaced by the new run: name another --out_dir")
    else:
        cfg = Config(**settings)
    out_dir = Path(cfg.out_dir)
    if rank == 0 and not last and not args.overwrite:
        refuse_another_run(out_dir)
    if cfg.sequences_per_update % ranks:
        divisors = [n for n in range(1, cfg.sequences_per_update + 1) if cfg.sequences_per_update % n == 0]
        raise UserError(f"{ranks} processes cannot share an update's {cfg.sequences_per_update} sequences evenly: "
                        f"start {', '.join(map(str, divisors))} of them")

    # ---- data ----
    data_dir = Path("data", cfg.dataset)
    meta = read_meta(data_dir)
    tokenizer = Tokenizer.load(data_dir)
    if old and rank == 0 and tokenizer != old_tokenizer:
        raise UserError(f"{data_dir} has another tokenizer than init_from = {cfg.init_from!r}: prepare it with that "
                        "one, or start from scratch")
    train_split, val_split = (Split(data_dir, name, cfg.block_size) for name in ("train", "validation"))
    order = TrainingOrder(train_split, cfg.seed)
    eval_windows = {split: evaluation_windows(split, cfg.eval_iters * cfg.batch_size)
                    for split in (train_split, val_split)}
    data_sha256 = checkpoint.data_sha256(meta)
    if last and last["data_sha256"] != data_sha256:
        raise UserError(f"{data_dir} is not the data that {out_dir} was trained on: prepare that again, or start a "
                        "new run with another --out_dir")

    # ---- model and optimizers ----
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    sequences = cfg.sequences_per_update
    share = sequences // ranks  # of them, for each rank
    model_config = GPTConfig(meta["vocab_size"], cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout,
                             cfg.bias)
    refuse_what_cannot_fit(model_config, share, device)
    cut = pick_device_batch_size(cfg.device_batch_size, share, model_config, device)
    if rank == 0:
        from_rank_0(data_sha256)
    elif data_of_rank_0 != data_sha256:
        raise UserError(f"{data_dir} is not the data that rank 0 has: copy it from there")
    # On a CPU a run that goes on equals one that was never stopped, bit for bit.
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32 on a GPU
    torch.manual_seed(cfg.seed)
    model = GPT(model_config).to(device)
    optimizers = make_optimizers(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # fp16's small gradients would vanish
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    # ---- the plan, in words ----
    updates = updates_in_all(cfg, last["update"] if last else 0, last["seconds"] if last else 0.0)
    update_tokens = sequences * cfg.block_size
    epoch_tokens = order.windows_per_epoch * cfg.block_size
    flops = 6 * model.num_parameters() * update_tokens * updates
    if cfg.max_minutes:  # how many updates fit is not known yet; compiling takes about a minute
        flops = math.inf if cfg.max_minutes >= 10 else 0
    use_compile, why_not = pick_compile(cfg.compile, device, flops)
    print(f"{out_dir}: {model.num_parameters():,} parameters; {cfg.n_layer} layers, {cfg.n_head} heads, width "
          f"{cfg.n_embd}, block {cfg.block_size}, vocabulary {meta['vocab_size']:,}\n"
          f"{data_dir}: {len(train_split.tokens):,} training tokens, {len(val_split.tokens):,} validation tokens\n"
          f"an update: {sequences:,} sequences = {update_tokens:,} tokens, {cut} sequences at a time"
          + (f" on each of {ranks} processes\n" if ranks > 1 else "\n")
          + (f"the run: {cfg.max_minutes:g} minutes\n" if cfg.max_minutes else
             f"the run: {updates:,} updates = {updates * update_tokens:,} tokens = "
             f"{updates * update_tokens / epoch_tokens:.2f} epochs\n")
          + f"on {device}, in {str(dtype).split('.')[1]}, "
          + ("compiled (the first update waits for that)" if use_compile else f"not compiled: {why_not}"))
    if cfg.min_lr > cfg.learning_rate:
        print(f"warning: min_lr = {cfg.min_lr:g} is above learning_rate = {cfg.learning_rate:g}: after warmup the "
              "learning rate rises to the end and never decays")
    if cfg.lr_decay_iters > cfg.max_iters and not cfg.max_minutes:  # as in a run made shorter when it goes on
        print(f"note: the learning rate reaches min_lr at iteration {cfg.lr_decay_iters:,}, and the run ends before, "
              f"at {cfg.max_iters:,}")

    # ---- a new run folder, or the one to go on in ----
    update, best_val_loss, seconds_before, skipped = 0, math.inf, 0.0, 0
    figures = {"iter": 0}  # of the last evaluation
    if last:
        update, best_val_loss, seconds_before = last["update"], last["best_val_loss"], last["seconds"]
        skipped = last["skipped"]
        with checkpoint.taking_from(out_dir / "last.pt"):
            model.load_state_dict(last["model"])
            for optimizer, state in zip(optimizers, last["optimizers"], strict=True):
                for group in state["param_groups"]:
                    if "fused" in group:  # as on the device that the run was on before
                        group["fused"] = pick_fused(device)
                optimizer.load_state_dict(state)
            if last["scaler"]:  # empty where the run was not in fp16 before
                scaler.load_state_dict(last["scaler"])
            figures = last["figures"] | {"iter": last["figures"]["iter"]}
        if rank == 0:
            checkpoint.cut_back(out_dir, last["sizes"])
            if math.isfinite(best_val_loss) and not is_sound(out_dir / "ckpt.pt", stored):
                best_val_loss = math.inf
        print(f"going on after update {update:,} of {updates:,}")
    else:
        if old:
            old["model"]["transformer.wpe.weight"] = old["model"]["transformer.wpe.weight"][:cfg.block_size]
            model.load_state_dict(old["model"])
            print(f"starting from the weights of {cfg.init_from}, after {old['tokens']:,} tokens of training here")
        if rank == 0:
            start_folder(out_dir, data_dir, args.overwrite)
    iteration = update * cfg.gradient_accumulation_steps
    if update > updates or update == updates and figures["iter"] == iteration:
        length = next(name for name in ("max_minutes", "max_tokens", "max_iters") if getattr(cfg, name))
        print(f"{out_dir} is at its end already: raise --{length} to train on")
        return leave()
    resumed = last is not None
    del last, old  # their weights are in the model now

    # ---- Ctrl-C and SIGTERM ask for an end after the current update ----
    signals = []

    def ask_to_stop(number, frame):
        if number in signals:  # not at another one: torchrun sends SIGTERM behind the terminal's Ctrl-C
            raise KeyboardInterrupt
        signals.append(number)
        if rank == 0:  # print is not safe in a handler
            os.write(2, b"\nstopping after this update or evaluation; once more stops at once\n")

    handlers = {s: signal.signal(s, ask_to_stop) for s in stop_signals()}

    # ---- the loop ----
    step_model = model
    if use_compile:
        model.head_loss = torch.compiler.disable(head_loss)  # large products one by one: there is nothing to fuse
        step_model = torch.compile(model)  # for updates alone: the rest is a small part
    started = time.perf_counter()
    log_time, log_update = started, update  # when and where the last log line was written
    saved, saved_at = update, seconds_before  # the same of last.pt, in seconds of the run
    elapsed = seconds_before  # of the run, as all ranks take it to be
    bar = tqdm(total=updates, initial=update, unit=" updates", disable=rank > 0 or not sys.stderr.isatty(),
               dynamic_ncols=True)

    def seconds():  # spent on the run, evaluations included
        return seconds_before + time.perf_counter() - started

    def snapshot():
        return {"model": model.state_dict(), "model_config": asdict(model_config), "config": asdict(cfg),
                "data_sha256": data_sha256, "iter": iteration, "update": update,
                "tokens": update * update_tokens, "figures": figures}

    def fetch(update):  # this rank's share of its sequences, on the device: inputs and targets, (share, T) each
        return [to(device, tokens) for tokens in order.sequences(update * sequences + rank * share, share)]

    def stop_if_not_finite(value, what):
        if not math.isfinite(value):
            lr = learning_rate(iteration, cfg, updates)
            rates = "--muon_lr and --learning_rate" if cfg.optimizer == "muon" else "--learning_rate"
            raise UserError(f"the {what} is {value} at iteration {iteration}: try a lower {rates} (now {lr:.3g}), "
                            f"more --warmup_iters or --dtype=float32; the checkpoints in {out_dir} are from before")

    def save_last():
        nonlocal saved, saved_at
        saved, saved_at = update, elapsed
        if rank == 0:
            checkpoint.save(out_dir / "last.pt", snapshot() | {
                "optimizers": [optimizer.state_dict() for optimizer in optimizers], "scaler": scaler.state_dict(),
                "skipped": skipped, "best_val_loss": best_val_loss, "seconds": seconds(), "ranks": ranks,
                "sizes": checkpoint.sizes(out_dir)})

    log = out_dir / "log.jsonl"
    try:
        if not resumed:
            save_last()  # from now on the run can go on, whatever happens
        if rank == 0:
            files.append_line(log, {
                "kind": "run", "config": asdict(cfg), "resumed_at": iteration if resumed else None,
                "parameters": model.num_parameters(), "device": describe(device), "dtype": str(dtype).split(".")[1],
                "compiled": use_compile, "sequences_at_a_time": cut, "ranks": ranks,
                "threads": torch.get_num_threads(), "git": git_commit(), "data_sha256": data_sha256, "seed": cfg.seed,
                "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__})
        x, y = fetch(update)
        stop, elapsed = agree(bool(signals), seconds())  # the same on all ranks, so that they do the same
        while True:
            iteration = update * cfg.gradient_accumulation_steps
            # Evaluation stands at the top so that a run that was stopped just before one begins with it.
            if update and figures["iter"] < iteration and (
                    update == updates or not stop and is_due(iteration, cfg.eval_interval, cfg)):
                pause = time.perf_counter()
                with autocast:
                    train_loss, val_loss = (
                        add_up(evaluate(model, split, starts[rank::ranks], cut).double().sum()).item() / len(starts)
                        for split, starts in eval_windows.items())
                stop_if_not_finite(val_loss, "validation loss")
                figures = {"iter": iteration, "tokens": update * update_tokens, "train_loss": train_loss,
                           "val_loss": val_loss, "val_bpb": bits_per_byte(val_loss, val_split)}
                tqdm.write(f"iteration {iteration:,}: train loss {train_loss:.4f}, validation loss {val_loss:.4f}, "
                           f"{figures['val_bpb']:.4f} bits per byte")
                if rank == 0:
                    files.append_line(log, {"kind": "eval", **figures, "seconds": seconds()})
                    files.append(out_dir / "samples.md", f"## iteration {iteration}: validation loss {val_loss:.4f}\n\n"
                                                         f"{tell_story(model, tokenizer)}\n\n")
                if val_loss < best_val_loss:
                    best_val_loss = val_loss
                    if rank == 0:
                        checkpoint.save(out_dir / "ckpt.pt", snapshot())
                stop, elapsed = agree(bool(signals), seconds())
                save_last()
                log_time += time.perf_counter() - pause  # the tokens a second are those of training alone
                updates = bar.total = updates_in_all(cfg, update, elapsed)
            if update == updates or stop:
                break

            lr = learning_rate(iteration, cfg, updates)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * lr / cfg.learning_rate
            torch.manual_seed(dropout_seed(cfg.seed, update, rank))
            loss = torch.zeros((), device=device)  # stays on the device: nothing waits for it but a log line
            for i in range(0, share, cut):
                with autocast:
                    part = step_model(x[i:i + cut], y[i:i + cut]) * (len(x[i:i + cut]) / sequences)
                scaler.scale(part).backward()
                loss += part.detach()
            add_up_gradients(model.parameters())
            for optimizer in optimizers:
                scaler.unscale_(optimizer)  # before clipping, which would else measure the scaled gradient
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            if not scaler.is_enabled() or math.isfinite(grad_norm):  # all optimizers skip an update that overflows
                for optimizer in optimizers:
                    scaler.step(optimizer)
            else:
                skipped += 1
            scaler.update()
            model.zero_grad(set_to_none=True)
            update += 1
            iteration = update * cfg.gradient_accumulation_steps
            x, y = fetch(update)  # while a GPU is still at work on the last ones
            stop, elapsed = agree(bool(signals), seconds())
            updates = bar.total = updates_in_all(cfg, update, elapsed)
            bar.update()

            log_due = update in (1, updates) or is_due(iteration, cfg.log_interval, cfg)
            save_due = elapsed - saved_at >= 60 * cfg.checkpoint_minutes
            if not (log_due or save_due or stop or is_due(iteration, cfg.eval_interval, cfg)):
                continue
            # Before anything is logged or saved. The scaler skips an update whose gradient overflows in fp16; anywhere
            # else such a gradient has spoilt the weights.
            stop_if_not_finite(add_up(loss).item(), "loss")
            if not scaler.is_enabled():
                stop_if_not_finite(grad_norm.item(), "norm of the gradient")
            if log_due:
                now = time.perf_counter()
                speed = (update - log_update) * update_tokens / (now - log_time)
                log_time, log_update = now, update
                if rank == 0:
                    files.append_line(log, {
                        "kind": "step", "iter": iteration, "update": update, "tokens": update * update_tokens,
                        "epoch": update * update_tokens / epoch_tokens, "loss": loss.item(), "lr": lr,
                        "grad_norm": grad_norm.item() if math.isfinite(grad_norm) else None,  # JSON has no inf
                        "skipped": skipped, "tokens_per_s": speed, "seconds": seconds()})
                bar.set_postfix_str(f"loss {loss.item():.3f}, lr {lr:.2e}, {speed:,.0f} tokens/s")
                if bar.disable:
                    left = (updates - update) * update_tokens / speed  # the first update may have waited to compile
                    print(f"iteration {iteration:,}: loss {loss.item():.3f}, lr {lr:.2e}, {speed:,.0f} tokens/s"
                          + (f", {tqdm.format_interval(left)} left" if update > 1 else ""), flush=True)
            if save_due:
                save_last()
        if saved < update:
            save_last()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):  # the CPU's words
            raise
        raise UserError(f"out of memory on {device}: try --device_batch_size={max(1, cut // 2)} (now {cut})"
                        ) from error
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)

    # ---- the end ----
    leave()
    if rank:
        return  # the rest is words, and the run folder perhaps on another machine
    if update == updates and iteration < cfg.warmup_iters:
        print(f"warning: the run ended in its warmup, after {iteration:,} of warmup_iters = {cfg.warmup_iters:,}")
    if update < updates:
        print(f"stopped after update {update:,} of {updates:,}; go on with  "
              f"{'python' if ranks == 1 else 'torchrun …'} train.py --out_dir={out_dir} --resume")
    if math.isfinite(best_val_loss):
        print(f"best_val_loss: {best_val_loss:.4f}\nval_bits_per_byte: {bits_per_byte(best_val_loss, val_split):.4f}")
    if skipped:
        print(f"skipped_updates: {skipped}")  # their gradients were too large for float16
    tokens = update * update_tokens
    print(f"tokens: {tokens}\nseconds: {seconds():.1f}\ntokens_per_s: {tokens / seconds():.0f}\n"
          f"checkpoint: {checkpoint.best_in(out_dir)}\n"
          f'sample: python sample.py --out_dir {out_dir} --start "{SAMPLE_PROMPT}"')


def refuse_changes(stored, now, recipe):
    """Say which settings differ from those of the run that goes on; raise UserError where that would break it."""
    if bool(stored["max_minutes"]) != bool(now["max_minutes"]):
        raise UserError("a run of minutes goes on by --max_minutes alone, any other by --max_iters or --max_tokens: "
                        "keep to it, or start a new run with another --out_dir")
    if now["min_lr"] == 0 and max(stored["max_iters"], now["lr_decay_iters"]) < now["max_iters"]:
        raise UserError(f"the learning rate is 0 from iteration {now['lr_decay_iters']} on: a longer run would learn "
                        "nothing more; start a new one of that length with another --out_dir")
    for name in now:
        if now[name] != stored[name] and name not in MAY_CHANGE:
            raise UserError(f"{name} = {now[name]!r} cannot change in a run that goes on (it is {stored[name]!r}): "
                            "leave it, or start a new run with another --out_dir")
        if now[name] != stored[name]:
            print(f"changed: {name} is now {now[name]!r}, was {stored[name]!r}")
        elif recipe.get(name, stored[name]) != stored[name]:
            print(f"note: the run keeps {name} = {stored[name]!r}, though the recipe says {recipe[name]!r}")


def is_sound(path, stored):
    """Whether a ckpt.pt can stay in a run that goes on; if not, why and what then. `stored`: the settings of the run.

    Raises UserError where it is another run's.
    """
    try:
        theirs = checkpoint.load(path)["config"]
    except UserError as error:
        print(f"note: {error}\nnote: the next evaluation makes a new {path}")
        return False
    if differing := [name for name in stored.keys() - MAY_CHANGE if theirs.get(name, stored[name]) != stored[name]]:
        raise UserError(f"{path} and the last.pt beside it are of different runs, by their {min(differing)}: take away "
                        "the one that does not belong there")
    return True


def refuse_another_shape(shape, cfg):
    """Raise UserError where the settings are not of the shape of the model that init_from names; a shorter block is."""
    for name, value in shape.items():
        mine = getattr(cfg, name)
        if mine != value and not (name == "block_size" and mine < value):
            raise UserError(f"{name} = {mine!r} is not that of init_from = {cfg.init_from!r}, {value!r}: leave it out, "
                            f"or set --{name}={value}")


def make_optimizers(model, cfg):
    """The optimizers of a run, as a list; each parameter is in one of them, and matrices alone decay.

    AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) takes everything, or leaves the matrices of the blocks to Muon
    (Jordan et al. 2024, kellerjordan.github.io/posts/muon), which gives all directions of an update equal weight.
    """
    hidden, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        is_hidden = cfg.optimizer == "muon" and name.startswith("transformer.h.")
        (vectors if p.dim() < 2 else hidden if is_hidden else matrices).append(p)
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                                    fused=pick_fused(matrices[0].device))]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # torch's name for the rate that a schedule multiplies
    return optimizers


def updates_in_all(cfg, update, seconds):
    """Updates in the whole run: by count, or as many as fit into max_minutes at the pace of the first `update`."""
    if not cfg.max_minutes:
        return math.ceil(cfg.max_iters / cfg.gradient_accumulation_steps)
    share = seconds / (60 * cfg.max_minutes)
    return update if share >= 1 else max(update + 1, int(update / share) if share else 0)


def learning_rate(iteration, cfg, updates=0):
    """AdamW's rate for the update whose first iteration this is; `updates` is how many a run of max_minutes will have.

    Linear warmup, then the schedule down (or up) to min_lr, then min_lr. wsd (warmup, stable, decay) is the one of Hu
    et al. 2024, arXiv 2404.06395, with a linear decay.
    """
    end = cfg.lr_decay_iters or updates * cfg.gradient_accumulation_steps
    if iteration < cfg.warmup_iters:
        return cfg.learning_rate * (iteration + 1) / (cfg.warmup_iters + 1)
    if iteration >= end:
        return cfg.min_lr
    left = (end - iteration) / (end - cfg.warmup_iters)  # 1 to 0
    if cfg.lr_schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    elif cfg.lr_schedule == "wsd":
        left = min(1, left / cfg.decay_fraction)
    return cfg.min_lr + left * (cfg.learning_rate - cfg.min_lr)


def is_due(iteration, interval, cfg):
    """Whether the update that ended at this iteration is the first one at or after a multiple of the interval."""
    return iteration // interval > (iteration - cfg.gradient_accumulation_steps) // interval


def to(device, array):
    """A numpy array as a tensor on the device, copied without waiting where that is a GPU."""
    tensor = torch.from_numpy(array).contiguous()  # a view would be copied twice
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@torch.no_grad()
def evaluate(model, split, starts, batch_size):
    """The mean loss of each window of a split that begins at `starts` (N,), in nats a token: (N,), on the CPU."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()  # no dropout
    losses = []
    for i in range(0, len(starts), batch_size):
        x, y = split.windows(starts[i:i + batch_size])  # (B, T) each
        losses.append(model(to(device, x), to(device, y), reduction="none").float().mean(1))  # (B,)
    model.train(was_training)
    return torch.cat(losses).cpu() if losses else torch.empty(0)  # none: more ranks than windows


def bits_per_byte(loss, split):
    """A loss in nats a token as bits a byte of the split's text: the figure that compares across tokenizers."""
    return loss / math.log(2) / split.bytes_per_token


def tell_story(model, tokenizer):
    """A story from the fixed prompt and seed, so that one can read how the model learns."""
    device = next(model.parameters()).device
    prompt = tokenizer.encode(SAMPLE_PROMPT)
    model.eval()
    tokens = [int(token) for token in model.generate(
        torch.tensor([[tokenizer.end_of_text, *prompt]], device=device), SAMPLE_TOKENS, temperature=0.8, top_k=200,
        generator=torch.Generator(device).manual_seed(SAMPLE_SEED), end_of_text=tokenizer.end_of_text)]
    model.train()
    return tokenizer.decode([*prompt, *(token for token in tokens if token != tokenizer.end_of_text)])


def refuse_another_run(out_dir):
    """Raise UserError where a folder holds a run already."""
    if checkpoint.holds_run(out_dir):
        go_on = "go on with it (--resume), " if checkpoint.can_go_on(out_dir) else ""
        raise UserError(f"{out_dir} already holds a run: {go_on}replace it (--overwrite), or name another folder "
                        "(--out_dir)")


def start_folder(out_dir, data_dir, overwrite):
    """Make a run folder with the dataset's tokenizer and meta.json, without what an earlier run left there."""
    out_dir.mkdir(parents=True, exist_ok=True)
    files.hold(out_dir / ".lock", out_dir)
    if not overwrite:
        refuse_another_run(out_dir)  # that another process has made in the meantime
    for name in ("last.prev.pt", "last.pt", "ckpt.pt", "log.jsonl", "samples.md"):  # none can be resumed by halves
        (out_dir / name).unlink(missing_ok=True)
    for name in ("tokenizer.tiktoken", "meta.json"):
        files.replace(out_dir / name, lambda file: file.write((data_dir / name).read_bytes()))


def dropout_seed(seed, update, rank):
    """What the random numbers of an update begin from: of these three alone, so that a run that goes on needs no more.
    """
    return int(np.random.SeedSequence([seed, update, rank]).generate_state(1, np.uint64)[0])


def describe(device):
    """The device in words: the GPU's name, or the processor's kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} {platform.machine()}"


def git_commit():
    """The commit that the program is at, `+` behind it where files differ from it; None outside of git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"], cwd=here,
                                capture_output=True, text=True)
    except OSError:
        return None
    return commit.stdout.strip() or None


def measure(recipe, flags):
    """--eval_only: the loss of a run's ckpt.pt on a whole validation split, printed as `key: value` lines."""
    allowed = {"out_dir", "dataset", "device", "dtype", "batch_size"}
    if wrong := flags.keys() - allowed:
        raise UserError(f"--eval_only takes the run's own settings: leave out --{min(wrong)}")
    out_dir = (recipe | flags).get("out_dir") or checkpoint.newest_run()
    path = checkpoint.best_in(out_dir)
    if path.name == "last.pt":
        print(f"{out_dir} has no ckpt.pt yet: measuring last.pt", file=sys.stderr)
    model, tokenizer, state = checkpoint.load_model(path)
    with checkpoint.taking_from(path):
        cfg = Config(**state["config"] | flags | {"max_tokens": 0})  # which another batch_size could contradict
    data_dir = Path("data", cfg.dataset)
    split = Split(data_dir, "validation", cfg.block_size)
    if Tokenizer.load(data_dir) != tokenizer:
        raise UserError(f"{data_dir} has another tokenizer than {out_dir}: prepare it with the run's")

    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    model.to(device)
    starts = evaluation_windows(split)
    with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
        losses = evaluate(model, split, starts, cfg.batch_size)  # (windows,)
        loss, tokens = losses.mean().item(), losses.numel() * cfg.block_size
        rest = len(split.tokens) - 1 - tokens  # what is left behind the last whole window
        if rest:
            tail_loss = evaluate(model, Split(data_dir, "validation", rest), [tokens], 1).item()
            loss, tokens = (loss * tokens + tail_loss * rest) / (tokens + rest), tokens + rest
    print(f"checkpoint: {path}\ndataset: {data_dir}\ntokens: {tokens}\nloss: {loss:.4f}\n"
          f"perplexity: {math.exp(loss):.3f}\nbits_per_byte: {bits_per_byte(loss, split):.4f}")
    if losses.numel() > 1:
        print(f"standard_error: {(losses.std() / math.sqrt(losses.numel())).item():.4f}")


if __name__ == "__main__":
    main()
