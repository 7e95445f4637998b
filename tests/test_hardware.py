"""What the machine can do: how much at a time, and the dtype of the weights that tell stories."""

import pytest
import torch

from errors import UserError
from hardware import pick_compile, pick_device_batch_size, pick_weights
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
