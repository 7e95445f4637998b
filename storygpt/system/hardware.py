"""What depends on the machine: device, dtype, compiling, micro-batch size, fused optimizer, stop signals."""

import math
import os
import platform
import signal
import subprocess
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from storygpt import OPENMP_VARIABLES
from storygpt.system.errors import UserError, out_of_memory

DTYPES = ("float32", "bfloat16", "float16")


def pick_device(name):
    """The torch.device for the setting `device`: auto is CUDA, else Apple's MPS, else the CPU; raises UserError if this
    machine or build of PyTorch does not have it. Under torchrun each process gets its own GPU.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1  # set by torchrun
    if name == "auto":
        has_mps = world_size == 1 and torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
        if world_size > 1 and (device.type == "mps" or device.index is not None):
            raise UserError(f"device = {name!r} is a single device, and the run has {world_size} processes: use auto, "
                            "cpu or cuda")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if device.index >= torch.cuda.device_count() > 0:
                raise UserError("torchrun started more processes on this machine than it has GPUs: use "
                                f"--nproc_per_node={torch.cuda.device_count()}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter: this build is without CUDA
        raise UserError(f"device = {name!r} cannot be used on this machine: use auto, cpu, cuda, cuda:1 or mps"
                        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and NCCL use the current device
        # cuDNN's attention builds a new plan for each prompt length; the other kernels do not. Neither was timed:
        # attention is about 2% of this model's arithmetic, so there is little to gain.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def pick_dtype(name, device):
    """The torch.dtype to compute in: auto is bfloat16 if the hardware computes in it, else float16 on CUDA, float32
    elsewhere.
    """
    if name == "float16" and device.type == "mps":  # scaling its gradients was not tried
        raise UserError("dtype = 'float16' is not supported on mps: use bfloat16 or float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")  # on ARM neither is reported
    return torch.bfloat16 if has_bf16 else torch.float32


def pick_inference_dtype(name, device):
    """The torch.dtype of the weights for generating stories: auto is the fastest, int8 on x86 CPUs (measured on those
    with AVX-512 VNNI only), else that of `pick_dtype`.
    """
    # torch's kernels for int8 are deprecated.
    has_int8 = hasattr(torch, "quantize_per_channel") and torch.backends.quantized.engine != "none"
    if name == "auto" and device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and has_int8:
        return torch.int8
    if name != "int8":
        return pick_dtype(name, device)
    if device.type != "cpu":
        raise UserError(f"dtype = 'int8' works on a CPU only; on {device.type} use auto")
    if not has_int8:
        raise UserError("dtype = 'int8' does not work with this build of PyTorch: use auto")
    return torch.int8


def autocast(device, dtype):
    """A context in which matrix products are computed in `dtype`; float32 needs none."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def max_concurrent_samples(device):
    """How many threads may generate at the same time; two on a CPU, so that nobody waits, each at half the speed."""
    # Another thread would break the capture of the CUDA graph, and MPS does not support two (pytorch issue 197805).
    return 2 if device.type == "cpu" else 1


def pick_compile(setting, device):
    """Whether to use torch.compile, and the reason: (bool, str). auto: on CUDA, if it works there."""
    if setting != "auto":
        return setting, f"compile = {setting}"
    if device.type != "cuda":
        return False, "auto: only on CUDA"
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # no Triton (as on Windows), no compiler, no headers: whatever fails, eager mode works
        return False, f"auto: torch.compile fails here with {type(error).__name__}"
    return True, "auto: on CUDA"


def pick_fused(device):
    """Whether AdamW updates all parameters in one kernel. Not tried on MPS, so not used there."""
    return device.type in ("cpu", "cuda")


def pick_micro_batch_size(setting, sequences, training_bytes, device, equal_sizes):
    """How many of a rank's `sequences` go through the model at once.

    auto: as many as fit into 80% of a CUDA GPU's free memory or, elsewhere, into 768 MiB: on a CPU, more is no faster.
    `training_bytes`: the estimated memory (fixed, per sequence), the former for CUDA only. `equal_sizes`: all have the
    same size, because torch.compile compiles again for another.
    """
    if setting != "auto":
        return min(setting, sequences)
    fixed, per_sequence = training_bytes
    memory = 0.8 * free_memory(device) - fixed if device.type == "cuda" else 768 * 2**20
    limit = max(1, int(memory // per_sequence))
    divisor = largest_divisor(sequences, limit)
    if equal_sizes or 2 * divisor > limit:
        return divisor
    return math.ceil(sequences / math.ceil(sequences / limit))  # nearly equal parts, the last one smaller


def largest_divisor(number, limit):
    """The largest divisor of a number that is at most `limit`."""
    return max(n for n in range(1, min(limit, number) + 1) if number % n == 0)


def check_memory(parameters, tokens, device):
    """Raise UserError if a model of so many parameters, or a step of so many tokens, cannot fit into memory at all."""
    memory = free_memory(device)
    # Bytes: float32 weight, gradient and AdamW's two moments; int64 index, window, input and target.
    if 16 * parameters + 32 * tokens > memory:
        raise UserError(f"{parameters:,} parameters and {tokens:,} tokens per step and process need more than the "
                        f"{memory / 2**30:.0f} GiB available on {device}: lower n_layer, n_embd, block_size, "
                        "batch_size or gradient_accumulation_steps")


def free_memory(device):
    """Memory of a device in bytes: on CUDA what no process uses, elsewhere all of it; infinity if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # Windows needs another package for this.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


@contextmanager
def out_of_memory_errors(device, micro_batch_size, sequences):
    """Turn an out-of-memory error into a UserError that names a smaller divisor of the rank's `sequences`."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        advice = "the micro-batch size is 1 already, so start a new run with a lower block_size, n_embd or n_layer"
        if micro_batch_size > 1:
            size = largest_divisor(sequences, micro_batch_size // 2)
            advice = f"try --device_batch_size={size} (now {micro_batch_size})"
        raise UserError(f"out of memory on {device}: {advice}") from error


def to_device(array, device):
    """A numpy array as a tensor on the device; the copy to a GPU is asynchronous."""
    tensor = torch.from_numpy(array).contiguous()  # pinning a view would copy twice
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def describe_device(device):
    """The GPU's name, or the processor architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} {platform.machine()}"


def describe_threads():
    """The number of threads, and the environment variable that sets how long they wait for work before they sleep."""
    waiting = [f"{name}={os.environ[name]}" for name in OPENMP_VARIABLES if name in os.environ]
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}" + (f" ({', '.join(waiting)})" if waiting else "")


def git_commit():
    """The commit of the program, with `+` appended if files differ from it; None outside of git."""
    with suppress(OSError):
        result = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"],
                                cwd=Path(__file__).parent, capture_output=True, text=True)
        return result.stdout.strip() or None


class StopSignals:
    """A context in which Ctrl-C and SIGTERM set `received` instead of ending the process; repeating the signal aborts,
    one of the other kind does not: torchrun sends SIGTERM after the terminal's Ctrl-C. Only rank 0 prints.
    """

    def __init__(self, rank):
        self.rank, self.received, self.numbers = rank, False, set()

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.handle) for number in stop_signals()}
        return self

    def handle(self, number, frame):
        """Note the signal; raise KeyboardInterrupt if it was received before."""
        if number in self.numbers:
            raise KeyboardInterrupt
        self.numbers.add(number)
        self.received = True
        if self.rank == 0:  # print is not safe in a signal handler
            os.write(2, b"\nstopping after this step or evaluation; press Ctrl-C again to abort\n")

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def stop_signals():
    """The signals that ask a run to stop: Ctrl-C, SIGTERM (job schedulers) and, on Windows, Ctrl-Break."""
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
