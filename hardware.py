"""What differs between machines, decided in one place: CUDA, Apple's MPS or the CPU, the dtype, whether to compile, the
fused optimizer, how much at a time; and between Linux, macOS and Windows: the signals that stop a run, locks on files.

torch is imported where it is asked something: prepare.py comes here for a lock alone, and starts sooner without it.
"""

import math
import os
import platform
import signal

from errors import UserError

DTYPES = ("float32", "bfloat16", "float16")

# Below this many floating-point operations, a run on a CUDA device ends before compiling is repaid. Not measured.
FLOPS_THAT_REPAY_COMPILING = 1e15


def pick_device(name):
    """The torch.device of a setting: auto is CUDA, else Apple's MPS, else the CPU. Each of torchrun's processes on a
    machine gets a GPU of its own.

    Raises UserError for a device that this machine, or this build of PyTorch, does not have.
    """
    import torch

    ranks = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1  # torchrun's
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cpu" if ranks > 1 and name == "mps" else name
    try:
        device = torch.device(name)
        if ranks > 1 and (device.type == "mps" or device.index is not None):
            raise UserError(f"device = {name!r} is one device, and the run has {ranks} processes: use auto, cpu or "
                            "cuda")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if device.index >= torch.cuda.device_count() > 0:
                raise UserError(f"torchrun has started more processes here than there are GPUs: use "
                                f"--nproc_per_node={torch.cuda.device_count()}")
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # streams, graphs and NCCL's exchanges are made on the current one
            # cuDNN's attention makes a new plan for each prompt length; the other kernels make none. Neither was timed:
            # attention is about a fiftieth of this model's arithmetic, so there is little to gain.
            torch.backends.cuda.enable_cudnn_sdp(False)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device = {name!r} cannot be used on this machine: use auto, cpu, cuda, cuda:1 or mps"
                        ) from error
    return device


def pick_dtype(name, device):
    """The torch.dtype for the arithmetic: auto is bfloat16 where the hardware computes in it, else float16 on CUDA.

    Raises UserError for float16 on MPS: its gradients need a scaler, which is for CUDA and, to try it out, the CPU.
    """
    import torch

    if name == "float16" and device.type == "mps":
        raise UserError("dtype = 'float16' is not for mps: use bfloat16 or float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # torch 2.11 has no public question for this
    has_bf16 = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if has_bf16 else torch.float32


def pick_weights(name, device, stories):
    """What to keep the weights in for telling so many stories at once: a torch.dtype or, on a CPU, "int8".

    auto: the fastest. One story waits for the weights to come from memory, and int8's are the smallest; many wait for
    arithmetic, at which int8 is slower here. On processors other than x86 int8 was not tried, so auto leaves it there.
    Raises UserError as `pick_dtype` does, and for int8 anywhere but on a CPU.
    """
    if name == "auto" and device.type == "cpu" and stories == 1 and platform.machine() in ("x86_64", "AMD64"):
        return "int8"
    if name == "int8" and device.type != "cpu":
        raise UserError(f"dtype = 'int8' is for telling stories on a CPU; on {device.type} use auto")
    return name if name == "int8" else pick_dtype(name, device)


def pick_stories_at_once(device):
    """How many threads may tell stories at once. On a GPU one alone: another would disturb the recording of its steps,
    and MPS does not bear two (pytorch issue 197805). On a CPU a second takes half of the first one's speed.
    """
    return 2 if device.type == "cpu" else 1


def pick_compile(wish, device, flops):
    """Whether to use torch.compile, and why not where the answer is no: (bool, str).

    auto: where it works and pays, for a run of that many floating-point operations. (On Windows PyTorch comes without
    Triton, the compiler that it needs.)
    """
    import torch

    if wish != "auto":
        return wish, "compile = False"
    if device.type != "cuda":
        return False, f"it brings nothing on {device.type}"
    if flops < FLOPS_THAT_REPAY_COMPILING:
        return False, "this run is too short to repay compiling"
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # the compiler, its headers, Triton: whatever it is that fails, eager works
        return False, f"torch.compile does not work here ({type(error).__name__})"
    return True, ""


def pick_fused(device):
    """Whether AdamW updates all parameters in one kernel. On MPS that was not tried, so it is left there."""
    return device.type in ("cpu", "cuda")


def pick_device_batch_size(wish, sequences, shape, device):
    """How many of an update's sequences go through the model of a GPTConfig at once: if possible a divisor of them.

    auto: as many as take half of a GPU's memory or, on a CPU, 768 MiB, above which nothing gets faster.
    """
    if wish != "auto":
        return min(wish, sequences)
    # Bytes that a token leaves for the backward pass, as measured on a CPU (docs/speed.md); on a GPU it is less.
    token_bytes = shape.n_layer * (65 * shape.n_embd + 8 * shape.n_head * shape.block_size)
    memory = memory_of(device) // 2 if device.type == "cuda" else 768 * 2**20
    most = max(1, memory // (token_bytes * shape.block_size))
    divisor = max(n for n in range(1, min(most, sequences) + 1) if sequences % n == 0)
    return divisor if 2 * divisor > most else math.ceil(sequences / math.ceil(sequences / most))


def refuse_what_cannot_fit(shape, sequences, device):
    """Raise UserError where a GPTConfig, or an update of that many sequences, is beyond all memory there is."""
    memory = memory_of(device)
    # A parameter, its gradient and AdamW's two means in float32; a token's place, input and target in int64.
    needed = 16 * shape.num_parameters() + 32 * sequences * shape.block_size
    if needed > memory:
        raise UserError(f"{shape.num_parameters():,} parameters and updates of {sequences * shape.block_size:,} tokens "
                        f"need more than the {memory / 2**30:.0f} GiB of {device}: lower n_layer, n_embd, block_size "
                        "or batch_size")


def memory_of(device):
    """All memory of a device in bytes; infinity where it does not tell."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    # Windows does not tell without another package.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def stop_signals():
    """The signals that ask a run to stop: Ctrl-C's, a scheduler's (Windows never sends it), and Windows' Ctrl-Break's.
    """
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]


def try_lock(file):
    """Lock an open file for this process, without waiting; whether that went. The lock ends when the file is closed.

    Raises OSError on a file system without locks.
    """
    try:
        if platform.system() == "Windows":
            import msvcrt

            file.seek(0)  # it locks bytes from there on; they need not exist
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the one or the other is each system's word for: it is taken
        return False
    return True
