"""Decisions that depend on the machine, out of memory, stop signals."""

import platform
import re
import shutil
import signal
import subprocess

import pytest
import torch

from faults.processes import run
from storygpt.system import hardware
from storygpt.system.errors import UserError, exit_with_one_line
from storygpt.system.hardware import (STOP_SIGNALS, StopSignals, check_memory, compile_errors,
                                      git_commit, limit_threads, out_of_memory_errors, pick_compile,
                                      pick_device, pick_dtype, pick_inference_dtype, pick_micro_batch_size)

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.mark.parametrize("sequences, equal_sizes, size", [
    (1024, False, 32), (32, False, 32), (4, False, 4),
    (42, False, 21), (119, False, 30), (37, False, 19),  # nearly equal parts
    (37, True, 1), (96, True, 32), (48, True, 24),  # a divisor
])
def test_micro_batches_have_at_most_4096_tokens_or_on_a_gpu_32768_and_divide_the_step(sequences, equal_sizes, size):
    for device in (CPU, MPS):
        assert pick_micro_batch_size("auto", sequences, 128, device, equal_sizes) == size
    assert pick_micro_batch_size("auto", 1024, 128, CUDA, True) == 256
    assert pick_micro_batch_size("auto", sequences, 5000, CPU, equal_sizes) == 1
    assert pick_micro_batch_size(7, sequences, 128, CPU, equal_sizes) == min(7, sequences)


def test_int8_is_refused_where_it_does_not_work_and_not_picked_without_its_kernels(monkeypatch):
    assert pick_inference_dtype("int8", CPU, 1) == torch.int8
    with pytest.raises(UserError, match="does not work on cuda .*: use auto"):
        pick_inference_dtype("int8", CUDA, 1)
    monkeypatch.delattr(torch, "quantize_per_channel")
    assert pick_inference_dtype("auto", CPU, 1) in (torch.bfloat16, torch.float32)
    with pytest.raises(UserError, match="does not work on cpu with this build of PyTorch: use auto"):
        pick_inference_dtype("int8", CPU, 1)


def test_several_processes_do_not_share_a_single_device(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cpu") == CPU
    for single in ("mps", "cuda:1"):
        with pytest.raises(UserError, match=f"device = '{single}' is a single device, and the run has 2 processes"):
            pick_device(single)
    with pytest.raises(UserError, match="which has 2 CUDA GPUs: .* at most one process for each GPU"):
        pick_device("cuda")


def test_models_and_steps_larger_than_the_memory_are_refused():
    check_memory(29_995_392, 1024 * 128)
    for sizes in ((10**13, 1024 * 128), (29_995_392, 10**13)):
        with pytest.raises(UserError, match=r"10,000,000,000,000 (parameters|tokens per step and process) .* lower"):
            check_memory(*sizes)


MACHINES = {
    # What torch and Python report: system, processor, CUDA and its bfloat16, MPS, bfloat16 of the CPU. Then what is
    # picked: device, dtype, compile, dtype of the weights for generating.
    "Linux, new GPU": ("Linux", "x86_64", True, True, False, True, "cuda", "bfloat16", True, "bfloat16"),
    "Linux, old GPU": ("Linux", "x86_64", True, False, False, False, "cuda", "float16", True, "float16"),
    "Linux, new CPU": ("Linux", "x86_64", False, False, False, True, "cpu", "bfloat16", False, "int8"),
    "Linux, ARM": ("Linux", "aarch64", False, False, False, False, "cpu", "float32", False, "float32"),
    "Mac, Apple": ("Darwin", "arm64", False, False, True, False, "mps", "float32", False, "float32"),
    "Windows, GPU": ("Windows", "AMD64", True, True, False, False, "cuda", "bfloat16", False, "bfloat16"),
    "Windows, CPU": ("Windows", "AMD64", False, False, False, False, "cpu", "float32", False, "int8"),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_picked_on_each_kind_of_machine(monkeypatch, name):
    system, processor, cuda, cuda_bf16, mps, cpu_bf16, device, dtype, compiled, weights = MACHINES[name]

    def compile(function):
        if system == "Windows":
            raise RuntimeError("Cannot find a working\ntriton installation.\n\nSet TORCHDYNAMO_VERBOSE=1")
        return function

    monkeypatch.setattr(platform, "machine", lambda: processor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda_bf16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": cpu_bf16})
    monkeypatch.setattr(torch, "compile", compile)
    for factory in ("empty", "ones"):
        monkeypatch.setattr(torch, factory, lambda n, device: n)

    picked = pick_device("auto")
    assert picked.type == device
    assert pick_dtype("auto", picked) == getattr(torch, dtype)
    assert pick_compile("auto", picked)[0] == compiled
    assert not pick_compile(False, picked)[0]
    if system == "Windows":
        failure = "torch.compile fails here with RuntimeError: Cannot find a working triton installation."
        assert pick_compile("auto", picked)[1] == (f"auto: {failure}" if cuda else "auto: only on CUDA")
        with pytest.raises(UserError, match=f"^{failure}: use --compile=False$"):
            pick_compile(True, picked)
    else:
        assert pick_compile(True, picked)[0]
    assert pick_inference_dtype("auto", picked, 30_000_000) == getattr(torch, weights)
    assert pick_inference_dtype("auto", picked, 3_000_000) == getattr(torch, weights.replace("int8", "float32"))


@exit_with_one_line
def compile_and_fail(argv):
    """Compile a function with a backend that does not work, or one with a bug of its own."""
    def fail(graph, inputs):
        raise NotImplementedError("an operation")

    with compile_errors():
        if argv == ["backend"]:
            torch.compile(lambda x: x + 1, backend=fail)(torch.ones(2))
        torch.compile(lambda x: x @ x, backend="eager")(torch.ones(2, 3))


def test_a_model_that_cannot_be_compiled_gives_one_line_and_its_own_errors_pass():
    """In processes: after torch.compile and a backward pass in this one, tests could not fork any more."""
    code, _, error = run(compile_and_fail, ["backend"])
    assert code == 1 and "NotImplementedError: an operation: use --compile=False\n" in error
    assert error.startswith("error: torch.compile fails here with ") and error.count("\n") == 1
    code, _, error = run(compile_and_fail, ["bug"])
    assert code == 70 and "Traceback" in error and "use --compile=False" not in error


def test_float16_is_refused_on_mps():
    with pytest.raises(UserError, match="'float16' is not supported on mps"):
        pick_dtype("float16", MPS)


@pytest.mark.parametrize("size, advice", [
    (27, r"try --device_batch_size=13 \(now 27\)"),
    (1, "the micro-batch size is 1 already, so start a new run with a lower block_size, n_embd or n_layer"),
])
def test_out_of_memory_advises_a_smaller_micro_batch(size, advice):
    with pytest.raises(UserError, match=f"^out of memory on cpu: {advice}$"):
        with out_of_memory_errors(CPU, size):
            torch.empty(2**50)


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), UserError),
    (RuntimeError("MPS backend out of memory (MPS allocated: 8 GiB, max allowed: 9 GiB)."), UserError),
    (torch.AcceleratorError("CUDA error: device-side assert triggered"), torch.AcceleratorError),
], ids=range(3))
def test_out_of_memory_is_recognized_on_a_gpu_and_other_errors_pass(error, expected):
    with pytest.raises(expected) as raised, out_of_memory_errors(CUDA, 2):
        raise error
    assert raised.type is expected


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_git_commit_is_that_of_the_program(monkeypatch, tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@localhost", *words], cwd=tmp_path, check=True)

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    program = tmp_path / "hardware.py"
    program.write_text("one\n")
    monkeypatch.setattr(hardware, "__file__", str(program))
    assert git_commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "--no-gpg-sign", "-m", "one")
    git("tag", "v1")
    commit = git_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    program.write_text("two\n")
    assert git_commit() == commit + "+"
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


@pytest.mark.parametrize("number, other", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_stop_signals_are_recorded_and_repeating_one_aborts(capfd, number, other):
    before = [signal.getsignal(s) for s in STOP_SIGNALS]
    with pytest.raises(ZeroDivisionError), StopSignals(rank=0) as signals:
        signal.raise_signal(number)
        assert signals.received is True
        assert capfd.readouterr().err == "\nstopping after this step or evaluation; press Ctrl-C again to abort\n"
        signal.raise_signal(other)  # torchrun sends SIGTERM after the terminal's Ctrl-C
        for repeated in (number, other):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(repeated)
        raise ZeroDivisionError
    assert [signal.getsignal(s) for s in STOP_SIGNALS] == before  # restored after an error, too
    capfd.readouterr()
    with StopSignals(rank=1) as signals:  # only rank 0 prints
        signal.raise_signal(number)
    assert signals.received and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("variable, work, threads", [
    (None, 3_000_000, 1), (None, 30_000_000, 1), (None, 100_000_000, 2), ("2", 3_000_000, 2)])
def test_little_work_is_done_by_one_thread_unless_the_user_chose_a_number(monkeypatch, variable, work, threads):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(2)
    try:
        limit_threads(CPU, work)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)  # as conftest.py sets it
