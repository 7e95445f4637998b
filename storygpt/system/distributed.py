"""Training on several GPUs or machines, in processes started by torchrun.

Each process is a rank. All ranks do the same optimizer steps on the same weights, each with its part of the sequences;
rank 0 alone writes files and prints. Without torchrun there is one rank, and the functions here do nothing. (train.py
uses torch's DistributedDataParallel for the gradients and the initial weights.)
"""

import os
import re
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from storygpt.system.errors import UserError

TIMEOUT = timedelta(minutes=10)  # for a slow rank: compiling, or writing to a slow disk
GLOO_POSITION = re.compile(r"\[[^]]*[\\/]gloo[\\/][^]]*\] ?")  # gloo's errors contain their position in its source


def init_distributed():
    """Create the process group if torchrun started this process; returns (rank, world size).

    torchrun may also start a single process, as to test NCCL on one GPU. Raises UserError if another process cannot
    be reached.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return 0, 1
    if int(os.environ["RANK"]):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # rank 0 prints
    with distributed_errors():
        store, rank, world_size = next(rendezvous("env://", timeout=TIMEOUT))
        # torchrun's own store keeps the addresses of dead processes when it restarts them, so each start has its own
        # keys. (On several machines the restart counts can differ: there it must not be used, see docs/training.md.)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        dist.all_reduce(torch.zeros(1))  # a barrier: without torchrun, rank 0 hosts the store and must not exit yet
    return rank, world_size


def cleanup_distributed():
    """Destroy the process group, at the end."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def distributed_errors():
    """Raise UserError when another rank cannot be reached, as when that has died; other exceptions pass.

    Also a decorator: `@distributed_errors()`.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        message = str(error)
        # Of the environment, which lacks an address; of gloo; of NCCL or the store. NCCL also passes on errors of CUDA.
        if not ("env:// rendezvous" in message or GLOO_POSITION.search(message)
                or (isinstance(error, dist.DistError) and "cuda error" not in message.lower())):
            raise
        reason = GLOO_POSITION.sub("", message.splitlines()[0]).split(". ")[0]
        raise UserError(f"the other processes of the run cannot be reached ({reason}): see the error of the one that "
                        "failed first") from error


def is_first_on_machine():
    """Whether this is the first process of the run on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def get_rank():
    """The rank of this process; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


@distributed_errors()
def broadcast_object(value):
    """Rank 0's value, on every rank; the others wait for it."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def rank_0_result(function, *args):
    """The result of function(*args), which only rank 0 calls, on every rank; UserError on the others if it fails."""
    return broadcast_object(function(*args) if get_rank() == 0 else None)


@contextmanager
def rank_0_first():
    """Let rank 0 finish a block before the other ranks enter it: an error that all would raise is printed once."""
    if get_rank() > 0:
        broadcast_object(None)  # wait for rank 0
    yield
    if get_rank() == 0:
        broadcast_object(None)


@distributed_errors()
def all_reduce_sum(tensor):
    """Sum a tensor over the ranks, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sync_stop_and_time(stop, seconds):
    """What all ranks must agree on: whether any rank was asked to stop, and rank 0's clock; returns (bool, float)."""
    both = torch.tensor([stop, seconds if get_rank() == 0 else 0], dtype=torch.float64)
    stops, seconds = all_reduce_sum(both).tolist()
    return stops > 0, seconds
