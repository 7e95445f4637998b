"""The bench: it measures what it says, on a small model; no test looks at a time."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from torch.autograd.profiler_util import Interval

import files
import model
import train
from errors import UserError
from model import GPT
from tokenizer import Tokenizer
from tools import bench


@pytest.fixture
def small(monkeypatch, here):
    """An empty folder; all that the bench's contenders change in it is put back after the test."""
    for module, name in [(model, "Dropout"), (model, "attend"), (train, "head_loss"), (sys, "stdout"),
                         (files, "append_line")]:
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(GPT, "head_loss", staticmethod(GPT.head_loss))


def test_contenders_take_turns_after_a_warm_up():
    calls = []
    seconds = bench.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or 2.0}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert len(seconds["a"]) == 3 and seconds["b"] == [2.0] * 3
    medians, spreads = bench.rates({"b": 10}, {"b": [1.0, 2.0, 5.0]})
    assert medians == {"b": 5.0} and spreads == {"b": (2.0, 10.0)}


class Parent:
    """The end of the pipe that a contender talks to: says `go` three times."""

    def __init__(self):
        self.left, self.turns = 3, []

    def recv(self):
        if not self.left:
            raise EOFError
        self.left -= 1

    def send(self, turn):
        self.turns.append(turn)


@pytest.mark.parametrize("name, small_steps, updates_of_turns", [
    ("plain", False, [0, 1, 2]), ("this project", False, [0, 1, 2]), ("… with all logits at once", False, [0, 1, 2]),
    ("eager", True, [0, 0, 1, 1, 2, 2])])
def test_each_contender_trains_its_updates_in_each_turn(small, here, monkeypatch, name, small_steps, updates_of_turns):
    bench.write_random_dataset(here / "data" / "bench", bench.TINY)
    parent, updates, step = Parent(), [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: updates.append(len(parent.turns)) or
                        step(self, *args))
    with pytest.raises(SystemExit):
        bench.contend(parent, name, bench.Training(str(here), "cpu", bench.TINY, small_steps))
    assert updates == updates_of_turns  # before each report
    assert all(seconds > 0 and mb > 10 for seconds, mb in parent.turns)


def test_the_data_of_the_bench_is_a_dataset_with_a_tokenizer(small, here):
    bench.write_random_dataset(here / "data" / "bench", bench.TINY)
    tokenizer = Tokenizer.load(here / "data" / "bench")
    assert tokenizer.vocab_size == 300 and tokenizer.decode(tokenizer.encode("a story")) == "a story"


def test_generate_and_its_keys(small, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    bench.main(["generate", "--tiny", "--json", "--rounds", "1", "--out_dir", "out/tiny", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {"machine", "ceilings", "generate"}
    assert all(result["ceilings"][key] > 0 for key in ("matmul_fp32_gflops", "matmul_bf16_gflops", "read_gb_per_s"))
    assert result["generate"].keys() >= {
        "tokens_per_s_1", "tokens_per_s_32", "no_cache_tokens_per_s_1", "no_cache_tokens_per_s_32",
        "bandwidth_fraction_1", "int8_tokens_per_s_1", "first_token_s"}
    assert result["generate"]["dtype_1"] == "int8" and len(result["generate"]["tokens_per_s_of_each"]) == 12
    losses = result["generate"]["validation_loss"]
    assert losses["int8"] == pytest.approx(losses["float32"], abs=0.01)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.01)
    assert len(set(losses.values())) == 3


def test_prepare_and_train_keys_and_the_table(small, here, monkeypatch, capsys):
    monkeypatch.setattr(bench, "race", lambda names, training, rounds, peaks, starts: (
        peaks.update(dict.fromkeys(names, 1.0)), dict.fromkeys(names, np.array([2.0])))[1])
    bench.main(["prepare", "--tiny", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "mb_per_s" in out and "matmul_bf16_gflops" in out and "gflops_of_each" in out
    bench.main(["train", "--tiny", "--json", "--rounds", "1", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out)["train"]
    assert result.keys() >= {"baseline_tokens_per_s", "baseline_bf16_compiled_tokens_per_s", "tokens_per_s", "mfu",
                             "baseline_peak_mb", "peak_mb"}
    assert result["tokens_per_s"] == 32 * 16 / 2.0
    flops = 6 * bench.TINY.num_parameters() + 12 * 2 * 16 * 32  # of a token
    assert result["mfu"] == pytest.approx(result["tokens_per_s"] * flops / result["mfu_of_tflops"] / 1e12)
    assert result["mfu_of_measured"] == result["mfu"]  # a CPU has no data sheet here


@pytest.mark.parametrize("words", [["trian"], ["--rounds", "0"], ["--rounds", "x"], ["--device"]])
def test_wrong_words_are_told(fails, words):
    assert words[0].strip("-") in fails(bench.main, words, code=2)


def test_two_processes_exchange_gradients_by_both_ways(small, capsys):
    bench.main(["ranks", "--tiny", "--json", "--rounds=1"])
    figures = json.loads(capsys.readouterr().out)["ranks"]
    assert figures["processes"] == 2 and figures["exchanged_mb"] == 4 * bench.TINY.num_parameters() / 1e6
    assert list(figures["seconds"]) == ["the exchange alone", "an update without exchange", "… with one exchange",
                                        "… with DistributedDataParallel"]
    assert all(seconds > 0 for seconds in figures["seconds"].values())


def test_small_steps_are_the_fast_recipes(small, monkeypatch, capsys):
    monkeypatch.setattr(bench, "race", lambda names, training, rounds, peaks, starts: dict.fromkeys(names, [0.5]))
    bench.main(["small", "--tiny", "--json", "--rounds=1", "--device=cpu"])
    figures = json.loads(capsys.readouterr().out)["small"]
    assert figures["tokens_a_step"] == 8 * 16 and figures["tokens_per_s"] == 2 * 8 * 16 / 0.5
    assert figures["ms_a_step"] == 250


def test_a_profile_lists_the_operations_that_take_longest(small, capsys):
    bench.main(["profile", "--tiny", "--json", "--rounds=1", "--device=cpu"])
    figures = json.loads(capsys.readouterr().out)["profile"]
    for work in ("published step", "small step", "one story"):
        operations = figures[f"{work}: share of the kernels' time"]
        shares = list(operations.values())
        assert len(shares) == 10 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
        assert any(name.startswith("aten::") for name in operations)
        assert figures[f"{work}: milliseconds profiled"] > 0 and figures[f"{work}: idle"] is None


def test_idle_is_the_time_in_which_no_kernel_runs():
    def event(name, start, end, kind=torch.autograd.DeviceType.CUDA, note=False):
        return types.SimpleNamespace(name=name, device_type=kind, is_user_annotation=note,
                                     time_range=Interval(start, end))

    events = [event("a", 0, 300), event("b", 200, 400), event("a", 600, 700), event("step", 0, 1000, note=True),
              event("launch", 0, 1000, torch.autograd.DeviceType.CPU)]
    gpu = torch.device("cuda")
    figures = bench.most_expensive("x", gpu, types.SimpleNamespace(events=lambda: events), 1e-3)
    assert figures["x: share of the kernels' time"] == pytest.approx({"a": 400 / 600, "b": 200 / 600})
    assert figures["x: idle"] == pytest.approx(0.5)
    with pytest.raises(UserError, match="saw no kernels"):
        bench.most_expensive("x", gpu, types.SimpleNamespace(events=lambda: events[3:]), 1e-3)
