"""The processes of one run that is spread over several GPUs or machines, as `torchrun` starts them.

A process is a *rank*: rank 0 of 1 where torchrun has started none, and then nothing here costs anything. All ranks do
the same updates on the same weights, each with its share of the sequences; rank 0 alone writes and speaks.
"""

import os
import re
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from errors import UserError

PATIENCE = timedelta(minutes=10)  # for a rank that is alive but late: compiling, or writing to a slow disk


def join():
    """Meet the other ranks of the run, where there are some; (rank, how many they are)."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return 0, 1
    ranks = int(os.environ["WORLD_SIZE"])  # 1 under torchrun too: one GPU then tests NCCL
    if int(os.environ["RANK"]):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # rank 0 speaks for all
    # torchrun's store outlives a restart, and has the addresses of the processes that are gone: each start needs names
    # of its own in it. How often a machine was started is known, but not the same on all.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts and shared_store and int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        raise UserError("torchrun can restart a run on several machines only with a new store each time: set "
                        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment on each of them")
    with together():
        store, rank, _ = next(rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}" if shared_store else "", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=PATIENCE)
    return rank, ranks


def leave():
    """Part from the other ranks, at the end."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def together():
    """Turn what happens when another rank is no longer there into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # ValueError: the environment says nothing of where they are
        reason = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0]).split(". ")[0]  # without gloo's place in its code
        raise UserError(f"the run's other processes cannot be reached ({reason}): one that failed before says why"
                        ) from error


def from_rank_0(value):
    """Rank 0's value, on every rank; the others wait for it."""
    if not dist.is_initialized():
        return value
    values = [value]
    with together():
        dist.broadcast_object_list(values)
    return values[0]


def add_up(tensor):
    """The sum of a tensor over the ranks, in its place."""
    if dist.is_initialized():
        with together():
            dist.all_reduce(tensor)
    return tensor


def add_up_gradients(parameters):
    """Sum the gradients over the ranks: one exchange of one long vector, once an update."""
    if dist.is_initialized():
        gradients = [p.grad for p in parameters]
        vector_to_parameters(add_up(parameters_to_vector(gradients)), gradients)


def agree(stop, seconds):
    """What all ranks go by: whether any is asked to stop, and the time by rank 0's clock; (bool, float)."""
    if not dist.is_initialized():
        return stop, seconds
    stops, seconds = add_up(torch.tensor([stop, seconds if dist.get_rank() == 0 else 0], dtype=torch.float64)).tolist()
    return stops > 0, seconds
