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
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def init_distributed():
    """Create the process group if torchrun started this process; returns (rank, world size)."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return 0, 1
    world_size = int(os.environ["WORLD_SIZE"])  # may be 1, also under torchrun: NCCL can then be tested on one GPU
    if int(os.environ["RANK"]):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # rank 0 prints
    # torchrun's store survives a restart together with the addresses of the dead processes, so each start needs its
    # own key prefix: the restart count. On several machines the counts can differ.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts and shared_store and int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        raise UserError("torchrun can restart a run on several machines only with a new store each time: set "
                        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment on each of them")
    with distributed_errors():
        store, rank, _ = next(rendezvous("env://", timeout=TIMEOUT))
        prefix = f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}" if shared_store else ""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world_size,
                                timeout=TIMEOUT)
        dist.all_reduce(torch.zeros(1))  # a barrier: without torchrun the others find each other through rank 0
    return rank, world_size


def cleanup_distributed():
    """Destroy the process group, at the end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_communication_error(error):
    """Whether an exception of torch means that another rank cannot be reached, as when that has died."""
    message = str(error)
    if isinstance(error, ValueError):  # the environment lacks the address of rank 0
        return "env:// rendezvous" in message
    if isinstance(error, dist.DistError):  # of NCCL or the store; NCCL also passes on errors of CUDA
        return "cuda error" not in message.lower()
    return isinstance(error, RuntimeError) and bool(GLOO_POSITION.search(message))


@contextmanager
def distributed_errors():
    """Raise UserError when communication fails; other exceptions pass. Also a decorator: `@distributed_errors()`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not is_communication_error(error):
            raise
        reason = GLOO_POSITION.sub("", str(error).splitlines()[0]).split(". ")[0]
        raise UserError(f"the other processes of the run cannot be reached ({reason}): see the error of the one that "
                        "failed first") from error


def is_first_on_machine():
    """Whether this is the first process of the run on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


@distributed_errors()
def broadcast_object(value):
    """Rank 0's value, on every rank; the others wait for it."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def rank_0_result(function, *args):
    """The result of function(*args), which only rank 0 calls, on every rank.

    If it raises UserError, rank 0 raises that and the others exit with code 1.
    """
    if not dist.is_initialized():
        return function(*args)
    result = error = None
    if dist.get_rank() == 0:
        try:
            result = function(*args)
        except UserError as caught:
            error = caught
    result, failed = broadcast_object((result, error is not None))
    if error:
        raise error
    if failed:
        sys.exit(1)
    return result


@contextmanager
def rank_0_first():
    """Let rank 0 finish a block before the other ranks enter it: an error that all would raise is printed once."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank:
        broadcast_object(None)  # wait for rank 0
    yield
    if not rank:
        broadcast_object(None)


@distributed_errors()
def all_reduce_sum(tensor):
    """Sum a tensor over the ranks, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def check_equal_weights(parameters):
    """Raise UserError on rank 0, and exit on the others, if the parameters of a rank differ from rank 0's.

    Compares a checksum of each parameter, of any dtype: the sum of its bits as integers.
    """
    if not dist.is_initialized():
        return
    sums = [p.detach().view(INTEGERS[p.element_size()]).sum(dtype=torch.int64).item() for p in parameters]
    differs = torch.zeros(dist.get_world_size())
    differs[dist.get_rank()] = sums != broadcast_object(sums)
    ranks = all_reduce_sum(differs).nonzero().flatten().tolist()
    if ranks and dist.get_rank():
        sys.exit(1)  # rank 0 reports it
    if ranks:
        raise UserError(f"the weights of rank {', '.join(map(str, ranks))} differ from those of rank 0: use the same "
                        "processors and PyTorch build on all machines, then resume from the last checkpoint (--resume)")


def sync_stop_and_time(stop, seconds):
    """What all ranks must agree on: whether any rank was asked to stop, and rank 0's clock; returns (bool, float)."""
    if not dist.is_initialized():
        return stop, seconds
    both = torch.tensor([stop, seconds if dist.get_rank() == 0 else 0], dtype=torch.float64)
    stops, seconds = all_reduce_sum(both).tolist()
    return stops > 0, seconds
