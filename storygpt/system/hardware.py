"""What depends on the machine: device, dtype, compiling, micro-batch size, stop signals."""

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
# Generation on a CPU, by parameters × stories in a batch. Below the first, float32 is faster than int8, and is exact.
# Below the second, one thread is up to four times faster than two beside another process (docs/speed.md).
FLOAT32_BELOW, ONE_THREAD_BELOW = 5_000_000, 40_000_000
# By device type; 4,096 for others. On a CPU, larger micro-batches are no faster (docs/speed.md).
TOKENS_PER_MICRO_BATCH = {"cpu": 4_096, "cuda": 32_768}
# Signals that ask a run to stop: of Ctrl-C, of job schedulers and, on Windows, of Ctrl-Break.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]


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
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter: this build is without CUDA
        raise UserError(f"device = {name!r} cannot be used on this machine, which has {torch.cuda.device_count()} CUDA "
                        "GPUs: use auto, cpu, cuda, cuda:1 or mps; with torchrun, at most one process for each GPU"
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


def pick_inference_dtype(name, device, work):
    """The torch.dtype of the weights for generating stories: auto is the fastest for this `work`, which is the model's
    parameters times the stories in a batch. On x86 CPUs it is int8 or float32 (measured on those with AVX-512 VNNI
    only), elsewhere that of `pick_dtype`.
    """
    # torch's kernels for int8 are deprecated.
    has_int8 = (device.type == "cpu" and hasattr(torch, "quantize_per_channel")
                and torch.backends.quantized.engine != "none")
    if name == "int8" and not has_int8:
        raise UserError(f"dtype = 'int8' does not work on {device.type} with this build of PyTorch: use auto")
    if name == "auto" and has_int8 and platform.machine() in ("x86_64", "AMD64"):
        name = "float32" if work < FLOAT32_BELOW else "int8"
    return torch.int8 if name == "int8" else pick_dtype(name, device)


def limit_threads(device, work):
    """Use one thread on a CPU if the `work` is small (`pick_inference_dtype`) and the user has chosen no number."""
    if device.type == "cpu" and work < ONE_THREAD_BELOW and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def autocast(device, dtype):
    """A context in which matrix products are computed in `dtype`; float32 needs none."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def pick_compile(setting, device):
    """Whether to use torch.compile, and the reason: (bool, str). auto: on CUDA, if it works there.

    Raises UserError if the setting is True and it does not work.
    """
    if setting is False or (setting == "auto" and device.type != "cuda"):
        return False, "auto: only on CUDA" if setting == "auto" else "compile = False"
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # no Triton (as on Windows), no compiler, no headers: whatever fails, eager mode works
        if setting == "auto":
            return False, f"auto: {compile_failure(error)}"
        raise UserError(f"{compile_failure(error)}: use --compile=False") from error
    return True, "auto: on CUDA" if setting == "auto" else "compile = True"


def compile_failure(error):
    """What to print of an exception from torch.compile: its first paragraph, as advice about PyTorch's logs follows."""
    message = " ".join(str(error).split("\n\n")[0].split())[:200]
    return f"torch.compile fails here with {type(error).__name__}: {message}"


@contextmanager
def compile_errors():
    """Turn torch.compile's failure on a model into a UserError. Errors of the model, as of its shapes, pass."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise UserError(f"{compile_failure(error)}: use --compile=False") from error


def pick_micro_batch_size(setting, sequences, block_size, device, equal_sizes):
    """How many of a rank's `sequences` go through the model at once; auto: at most TOKENS_PER_MICRO_BATCH tokens.

    `equal_sizes`: those of auto all have the same size, because torch.compile compiles again for another.
    """
    if setting != "auto":
        return min(setting, sequences)
    limit = max(1, TOKENS_PER_MICRO_BATCH.get(device.type, 4_096) // block_size)
    if equal_sizes:
        return largest_divisor(sequences, limit)
    return math.ceil(sequences / math.ceil(sequences / limit))  # nearly equal parts, the last one smaller


def largest_divisor(number, limit):
    """The largest divisor of a number that is at most `limit`."""
    return max(n for n in range(1, min(limit, number) + 1) if number % n == 0)


def check_memory(parameters, tokens):
    """Raise UserError if a model of so many parameters, or a step of so many tokens, cannot fit into this machine's
    memory at all: Linux would kill the process without a message.
    """
    # Windows needs another package for this.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    # Bytes: float32 weight, gradient and AdamW's two moments; int64 index, window, input and target.
    if 16 * parameters + 32 * tokens > memory:
        raise UserError(f"{parameters:,} parameters and {tokens:,} tokens per step and process need more than the "
                        f"{memory / 2**30:.0f} GiB of this machine: lower n_layer, n_embd, block_size, batch_size or "
                        "gradient_accumulation_steps")


@contextmanager
def out_of_memory_errors(device, micro_batch_size):
    """Turn an out-of-memory error into a UserError that advises a smaller micro-batch."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        advice = "the micro-batch size is 1 already, so start a new run with a lower block_size, n_embd or n_layer"
        if micro_batch_size > 1:
            advice = f"try --device_batch_size={micro_batch_size // 2} (now {micro_batch_size})"
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
    """A context in which Ctrl-C and SIGTERM set `received` instead of ending the process. The same signal again aborts;
    a different one does not, because torchrun sends SIGTERM after the terminal's Ctrl-C. Only rank 0 prints.
    """

    def __init__(self, rank):
        self.rank, self.received = rank, False

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.handle) for number in STOP_SIGNALS}
        return self

    def handle(self, number, frame):
        """Note the signal, and let the next one of its kind raise KeyboardInterrupt."""
        self.received = True
        signal.signal(number, signal.default_int_handler)
        if self.rank == 0:  # print is not safe in a signal handler
            os.write(2, b"\nstopping after this step or evaluation; press Ctrl-C again to abort\n")

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
