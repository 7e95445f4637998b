"""What the machine can do: the device, how much at a time, and the dtype of the weights that tell stories."""

import os
import platform
import signal
import subprocess
import sys
import types

import pytest
import torch

from conftest import ROOT
from errors import UserError
from hardware import (pick_compile, pick_device, pick_device_batch_size, pick_dtype, pick_fused, pick_weights,
                      pick_stories_at_once, refuse_what_cannot_fit, stop_signals, try_lock)
from model import GPTConfig

CPU = torch.device("cpu")
PUBLISHED = GPTConfig(50257)


def test_as_many_sequences_as_the_memory_takes_and_the_update_divides_into():
    assert pick_device_batch_size("auto", 1024, PUBLISHED, CPU) == 32
    assert pick_device_batch_size("auto", 32, PUBLISHED, CPU) == 32
    assert pick_device_batch_size("auto", 42, PUBLISHED, CPU) == 21
    assert pick_device_batch_size("auto", 37, PUBLISHED, CPU) == 19  # a prime: 19 and 18
    assert pick_device_batch_size("auto", 1024, GPTConfig(50257, block_size=1024, n_layer=12), CPU) == 1
    assert pick_device_batch_size(7, 1024, PUBLISHED, CPU) == 7


def test_half_of_a_gpus_memory(monkeypatch):
    class Card:
        total_memory = 80 * 2**30
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    assert pick_device_batch_size("auto", 1024, PUBLISHED, torch.device("cuda")) == 1024
    Card.total_memory = 16 * 2**30
    assert pick_device_batch_size("auto", 1024, PUBLISHED, torch.device("cuda")) == 256


def test_one_story_on_a_cpu_is_told_in_int8_and_many_are_not():
    assert pick_weights("auto", CPU, 1) == "int8" == pick_weights("int8", CPU, 5)
    assert pick_weights("auto", CPU, 2) in (torch.bfloat16, torch.float32)
    assert pick_weights("auto", torch.device("mps"), 1) == torch.float32
    assert pick_weights("float32", CPU, 1) == torch.float32
    with pytest.raises(UserError, match="int8"):
        pick_weights("int8", torch.device("cuda"), 1)


def test_a_cpu_compiles_only_when_told():
    assert pick_compile("auto", CPU, 1e20) == (False, "it brings nothing on cpu")
    assert pick_compile(True, CPU, 1)[0]


@pytest.mark.parametrize("name, on_mac, device", [("auto", False, "cpu"), ("cpu", True, "cpu"), ("auto", True, "cpu")])
def test_several_processes_share_no_device(monkeypatch, name, on_mac, device):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: on_mac)
    assert pick_device(name) == torch.device(device)
    for one in ("mps", "cuda:1"):
        with pytest.raises(UserError, match=f"device = '{one}' is one device, and the run has 2 processes"):
            pick_device(one)


def test_what_is_beyond_all_memory_is_refused_before_it_is_made():
    refuse_what_cannot_fit(GPTConfig(50257), 1024, CPU)
    with pytest.raises(UserError, match="lower n_layer, n_embd, block_size or batch_size"):
        refuse_what_cannot_fit(GPTConfig(50257, n_embd=384_000), 1024, CPU)
    with pytest.raises(UserError, match="updates of 12,800,000,000,000 tokens"):
        refuse_what_cannot_fit(GPTConfig(50257), 100_000_000_000, CPU)


# Machines by what torch and Python say of them: system, processor, CUDA, bfloat16 on it, MPS, bfloat16 on the CPU. Then
# the decisions: device, dtype, compiled, fused AdamW, weights of one story, signals that stop a run.
STOP = ["SIGINT", "SIGTERM"]
MACHINES = {
    "Linux, new GPU": ("Linux", "x86_64", True, True, False, True,
                       "cuda", "bfloat16", True, True, "bfloat16", STOP),
    "Linux, old GPU": ("Linux", "x86_64", True, False, False, False,
                       "cuda", "float16", True, True, "float16", STOP),
    "Linux, new CPU": ("Linux", "x86_64", False, False, False, True,
                       "cpu", "bfloat16", False, True, "int8", STOP),
    "Linux, old CPU": ("Linux", "x86_64", False, False, False, False,
                       "cpu", "float32", False, True, "int8", STOP),
    "Linux, ARM": ("Linux", "aarch64", False, False, False, False,
                   "cpu", "float32", False, True, "float32", STOP),
    "Mac, Apple's": ("Darwin", "arm64", False, False, True, False,
                     "mps", "float32", False, False, "float32", STOP),
    "Mac, Intel": ("Darwin", "x86_64", False, False, False, False,
                   "cpu", "float32", False, True, "int8", STOP),
    "Windows, GPU": ("Windows", "AMD64", True, True, False, False,
                     "cuda", "bfloat16", False, True, "bfloat16", [*STOP, "SIGBREAK"]),
    "Windows, CPU": ("Windows", "AMD64", False, False, False, False,
                     "cpu", "float32", False, True, "int8", [*STOP, "SIGBREAK"]),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_decided_on_each_kind_of_machine(monkeypatch, name):
    system, processor, cuda, cuda_bf16, mps, cpu_bf16, device, dtype, compiled, fused, weights, signals = MACHINES[name]

    def compiler(function):
        if system == "Windows":
            raise RuntimeError("Cannot find a working triton installation")
        return function

    monkeypatch.setattr(platform, "machine", lambda: processor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda_bf16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch, "compile", compiler)
    for allocates in ("empty", "ones"):
        monkeypatch.setattr(torch, allocates, lambda n, device: n)
    if system == "Windows":
        monkeypatch.setattr(signal, "SIGBREAK", 21, raising=False)

    picked = pick_device("auto")
    assert picked.type == device
    assert pick_dtype("auto", picked) == getattr(torch, dtype)
    assert pick_compile("auto", picked, 1e20)[0] == compiled
    assert pick_fused(picked) == fused
    assert pick_stories_at_once(picked) == (2 if device == "cpu" else 1)
    assert pick_weights("auto", picked, 1) == (weights if weights == "int8" else getattr(torch, weights))
    assert stop_signals() == [getattr(signal, name) for name in signals]


def test_float16_is_not_for_mps():
    with pytest.raises(UserError, match="'float16' is not for mps"):
        pick_dtype("float16", torch.device("mps"))


def test_a_lock_is_taken_in_the_systems_own_way(monkeypatch, tmp_path):
    calls = []

    def windows_locking(descriptor, mode, size):
        calls.append((mode, size, os.lseek(descriptor, 0, os.SEEK_CUR)))
        if len(calls) > 1:
            raise PermissionError(13, "Permission denied")

    with open(tmp_path / "lock", "a+") as file:
        file.write("something")
        file.flush()
        assert try_lock(file)
        monkeypatch.setattr(platform, "system", lambda: "Windows")
        monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=windows_locking, LK_NBLCK=2))
        assert try_lock(file) and not try_lock(file)
        assert calls[0] == (2, 1, 0)


def test_prepare_does_without_torch():
    done = subprocess.run([sys.executable, "-c", "import prepare, sys; sys.exit('torch' in sys.modules)"], cwd=ROOT)
    assert done.returncode == 0
