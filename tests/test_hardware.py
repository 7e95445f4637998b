"""What the machine can do: the device, how much at a time, and the dtype of the weights that tell stories."""

import pytest
import torch

from errors import UserError
from hardware import pick_compile, pick_device, pick_device_batch_size, pick_weights, refuse_what_cannot_fit
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
