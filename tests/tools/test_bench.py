"""The benchmark measures what it says, on a small model. No test depends on a timing."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import ROOT
from model import GPT, GPTConfig
from storygpt import fast, loss
from storygpt.checkpoint import load_model
from storygpt.generate import prepare_for_generation
from storygpt.settings import read_command_line
from storygpt.system import files
from storygpt.system.errors import UserError
from tools import bench, peers

CPU = torch.device("cpu")
# What is faster than torch's, and the variant without it.
FASTER = {"torch's dropout": (fast, "dropout"), "torch's attention": (fast, "attention"),
          "unfused loss": (loss, "fused_linear_cross_entropy"), "whole vocabulary": (loss, "UsedTokens")}


@pytest.fixture(scope="module")
def quick_processes():
    """Processes that need not import torch again: forked from one that has imported it, and has started no threads."""
    before = os.environ.get("PYTHONPATH", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), before]))
        patch.setattr(bench, "START_METHOD", "forkserver")
        multiprocessing.set_forkserver_preload(["torch._dynamo", "tools.bench"])
        yield


@pytest.fixture(scope="module")
def measured(trained, quick_processes):
    """The results of all subjects but the race, measured once; as JSON."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.chdir(trained)
        bench.main(["--tiny", "--json", "--rounds=1", "--out_dir=out/tiny", "--device=cpu"])
    return json.loads(out.getvalue())


@pytest.fixture
def data(here):
    """A folder with data/bench; everything that the variants of training patch is restored after the test."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [*FASTER.values(), (train, "fuse_loss"), (train, "save_last"), (train, "check_saved_model"),
                            (files, "append_line"), (sys, "stdout")]:
            patch.setattr(owner, name, getattr(owner, name))
        bench.write_random_dataset(here / "data" / "bench", bench.TINY)
        yield here


# ---- timing and arithmetic ----


def test_variants_are_interleaved_after_a_warm_up(monkeypatch):
    calls = []
    results = bench.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or 2.0}, rounds=3)
    assert calls == ["a", "b"] * 4 and results == {"a": [None] * 4, "b": [2.0] * 4}
    monkeypatch.setattr(bench.time, "perf_counter", iter([0, 9, 10, 11, 20, 22, 30, 35]).__next__)
    assert bench.measure_rates({"b": (10, calls.append, "c")}, rounds=3) == ({"b": 5.0}, {"b": (2.0, 10.0)})


def test_mfu(monkeypatch):
    ceilings = {"matmul_fp32_gflops": 2000.0, "matmul_bf16_gflops": 100.0}
    parameters = GPT(GPTConfig(**{**vars(bench.TINY), "vocab_size": 75})).num_parameters()  # the data uses a quarter
    flops_per_token = 6 * parameters + 12 * 2 * 16 * 32
    result = bench.flops_utilization(1e6, CPU, bench.TINY, ceilings)
    assert result["mfu"] == result["mfu_of_measured"] == pytest.approx(1e6 * flops_per_token / 2e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    result = bench.flops_utilization(1e6, torch.device("cuda"), bench.TINY, ceilings)
    assert result["mfu"] == pytest.approx(1e6 * flops_per_token / 989e12) and result["mfu_of_tflops"] == 989


def test_tables(capsys):
    bench.print_tables({"train": {"tokens_per_s": 1234.5678, "spreads": {"eager": (1.0, 2000.0)}, "git": None}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["train"], ["tokens_per_s", "1,234.6"], ["spreads"], ["eager", "1", "to", "2,000"],
                     ["git", "None"]]


def test_subjects(fails):
    assert bench.parse_args([]).subjects == ["train", "generate", "prepare"]
    assert [bench.parse_args(words).subjects for words in (["machine"], ["train"])] == [[], ["train"]]
    assert "trian" in fails(bench.main, ["trian"], code=2)
    assert "race needs a config" in fails(bench.main, ["race"], code=2)
    assert "other subjects take none" in fails(bench.main, ["train", "config/speedrun.py"], code=2)


def test_results_before_an_error_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SUBJECTS", {"train": lambda *_: {"a": 1}, "generate": lambda *_: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        bench.main(["--json", "--tiny", "--rounds=1", "--device=cpu"])
    assert json.loads(capsys.readouterr().out).keys() == {"machine", "ceilings", "train"}


# ---- what is measured ----


def test_the_machine_and_its_limits(measured):
    assert measured.keys() == {"machine", "ceilings", "train", "generate", "prepare"}
    assert measured["machine"]["torch"] == torch.__version__ and measured["machine"]["threads"] == 1
    assert all(measured["ceilings"][key] > 0 for key in ("matmul_fp32_gflops", "matmul_bf16_gflops", "read_gb_per_s"))


def test_training_speed(measured):
    result, names = measured["train"], ["baseline", "baseline, bf16, compiled", "this project"]
    for table in ("tokens_per_s_of_each", "peak_mb_of_each", "first_step_s_of_each", "times_each", "spreads"):
        assert list(result[table]) == names
    rates = result["tokens_per_s_of_each"]
    assert result["tokens_per_s"] == rates["this project"] > 0 and result["tokens_per_step"] == 32 * 16
    assert result["times_each"]["baseline"] == pytest.approx(rates["this project"] / rates["baseline"])
    assert all(20 < mb < 5000 for mb in result["peak_mb_of_each"].values()) and result["mfu"] > 0


def test_generation_speed(measured):
    result, programs = measured["generate"], peers.programs(GPTConfig(vocab_size=300, n_embd=16))
    rates = result["tokens_per_s_of_each"]
    assert rates.keys() == result["spreads"].keys() == {
        f"{dtype} {stories}{cache}" for dtype in ("float32", "bfloat16", "int8") for stories in (1, 32)
        for cache in ("", " no cache")}
    assert result["dtype"] == "int8" and result["tokens_per_s_32"] == rates["int8 32"] > 0 < result["first_token_s"]
    assert result["programs"]["tokens_per_s"].keys() == {f"{name}, {n}" for name in programs for n in (1, 32)}
    losses = result["validation_loss"]
    assert losses["int8"] == pytest.approx(losses["float32"], abs=0.01) == losses["bfloat16"]
    assert len(set(losses.values())) == 3


def test_preparation_speed(measured):
    assert measured["prepare"]["mb_of_text"] > 1
    assert measured["prepare"]["mb_per_s"] > 0 < measured["prepare"]["tokenizer_mb_per_s"]


def test_many_stories_are_measured_on_a_cpu_only_in_the_picked_dtype():
    amounts = {name: amount for picked in (False, True) for stories in (32, 512) for name, (amount, *_) in
               bench.generation_variants(f"{stories} {picked}", GPT(bench.TINY), stories, CPU, picked).items()}
    assert amounts == {"32 False": 32 * 32, "32 False no cache": 32 * 8, "32 True": 32 * 32, "32 True no cache": 32 * 8,
                       "512 True": 512 * 32}


def test_a_random_run_is_like_a_trained_one(here):
    model, tokenizer, _ = load_model(bench.write_random_run(here / "run", bench.TINY))
    assert tokenizer.vocab_size == 300 and tokenizer.decode(tokenizer.encode("a story")) == "a story"
    assert len(prepare_for_generation(model, CPU, torch.float32).lm_head.distinct_rows) == 75


@torch.no_grad()
def test_every_program_generates_with_the_same_model(here):
    """Greedily, the token with the largest logit or, as their weights are in int8, nearly that."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0)).eval()
    model.transformer.wpe.weight *= 50  # another token at each position
    path = bench.write_random_run(here / "run", bench.TINY)
    for name, program in peers.programs(model.config).items():
        copy = load_model(path)[0]
        copy.load_state_dict(model.state_dict())
        program = program(copy, 299, here)
        story = torch.tensor([program.generate(1, 15, greedy=True)[0].tolist()])  # (1, 15)
        logits = model(F.pad(story[:, :-1], (1, 0), value=299))[0]  # (15, 300)
        chosen = logits.gather(-1, story[0, :, None])[:, 0]  # (15)
        assert (logits.amax(-1) - chosen).max() < 0.3 * logits.std() and len(story.unique()) > 5, name
        assert name == "llama.cpp" or program.generate(3, 15).shape == (3, 15)


# ---- training variants ----


class Ended(Exception):
    """Ends a variant after its last round."""


def losses(monkeypatch, name, flags=(), accumulation=1):
    """The loss of each micro-batch in two optimizer steps of a variant, with further flags for train.py."""
    seen, forward, ends = [], GPT.forward, iter([False, True])

    def recorded(self, idx, targets=None, cache=None):
        result = forward(self, idx, targets, cache)
        seen.extend([] if targets is None else [result.detach().clone()])
        return result

    def end_round():
        if next(ends):
            raise Ended

    function, *args = bench.VARIANTS[name]
    if flags:
        args = [[*args[0], *flags] if args else flags, *args[1:]]
    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(GPT, "forward", recorded)
        function(end_round, CPU, bench.TINY, accumulation, *args)
    return torch.stack(seen)


FLAGS = ["--dropout=0", "--dtype=float32"]


@pytest.mark.parametrize("name", FASTER)
def test_a_variant_does_without_something_faster(data, monkeypatch, name):
    """And has the same losses, to the random initial values of embeddings of unused tokens."""
    def fail(*args, **options):
        raise AssertionError("called")

    expected = losses(monkeypatch, "this project", FLAGS)
    monkeypatch.setattr(*FASTER[name], fail)
    with pytest.raises(AssertionError, match="called"):
        losses(monkeypatch, "this project")
    tolerance = 1e-2 if name == "whole vocabulary" else 1e-5
    torch.testing.assert_close(losses(monkeypatch, name, FLAGS), expected, rtol=0, atol=tolerance)
    assert len(losses(monkeypatch, name)) == 2  # with dropout


def test_the_baseline_uses_nothing_of_this_project(data, monkeypatch):
    own = losses(monkeypatch, "this project", FLAGS)
    for owner, attribute in FASTER.values():
        monkeypatch.delattr(owner, attribute)
    baseline = losses(monkeypatch, "baseline", accumulation=3)
    assert len(baseline) == 6 and len(own) == 2  # micro-batches in two optimizer steps
    assert baseline[0] == pytest.approx(math.log(300), abs=0.1) == own[0]
    assert baseline[3:].mean() != baseline[:3].mean()


def test_the_flags_of_the_variants_are_valid():
    for function, *args in bench.VARIANTS.values():
        if function is bench.train_project and args:
            read_command_line(args[0], {})  # exits if one is not


def test_a_process_that_fails_is_named(quick_processes):
    with pytest.raises(UserError, match="the process of 'wrong' failed"):
        bench.interleave_processes({"wrong": (bench.run_variant, "no such variant", ".")}, CPU, 1)


# ---- the speedrun ----

RECORDED_TRAIN = """
import sys
from pathlib import Path
flags = dict(word.lstrip("-").split("=") for word in sys.argv[1:] if "=" in word)
if "--eval_only" in sys.argv:
    print("checkpoint: x\\nloss: 2.0\\nbits_per_byte: " + Path(flags["out_dir"], "loss").read_text()
          + "\\nstandard_error: 0.5")
else:
    name = Path(sys.argv[3]).read_text().removeprefix("# ")
    Path("order").open("a").write(f"{name} {flags['seed']} {flags['device']}\\n")
    Path(flags["out_dir"], "loss").write_text("0.816" if name == "first" or flags["seed"] == "2" else "0.815")
"""


def commit_files(folder, *names):
    """Make a git repository of a folder, with one commit of these files."""
    for words in (["init", "-q"], ["add", *names], "-c user.name=x -c user.email=x commit -q -m x".split()):
        subprocess.run(["git", *words], cwd=folder, check=True)


def test_a_race_alternates_with_the_first_record(with_data, here, monkeypatch, capsys):
    """With a program in git that writes down how it is called."""
    (here / "data" / "tinystories").symlink_to(here / "data" / "nursery-bpe300")  # the default dataset
    (here / "train.py").write_text(RECORDED_TRAIN)
    (here / "config.py").write_text("# first")
    commit_files(here, "train.py", "config.py")
    (here / "config.py").write_text("# now")
    monkeypatch.setattr(bench, "ROOT", here)
    monkeypatch.setattr(bench, "FIRST_RECORD", "HEAD:config.py")
    bench.main(["race", "config.py", "--json", "--rounds=3", "--device=cpu", "--tiny"])
    result = json.loads(capsys.readouterr().out)["race"]
    assert (here / "order").read_text() == "now 1337 cpu\nfirst 1 cpu\nnow 1 cpu\nnow 2 cpu\n"
    own = [result[f"config.py --seed={seed}"] for seed in (1337, 1, 2)]
    assert result["reached_0.815"] == "2 of 3" and [each["bits_per_byte"] for each in own] == [0.815, 0.815, 0.816]
    assert result["worst_bits_per_byte"] == 0.816 and result["mean_bits_per_byte"] == pytest.approx(0.815333, abs=1e-6)
    assert own[2]["standard_error"] == pytest.approx(0.5 * 0.816 / 2)
    assert result["seconds"] == sorted(each["seconds"] for each in own)[1]
    assert result["times_first_record"] == result["seconds"] / result["the first record"]["seconds"]


def test_the_evaluation_of_a_run(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    train.main(["--out_dir=out/tiny", "--eval_only"])
    result = bench.read_evaluation(capsys.readouterr().out)
    assert 0.5 < result["bits_per_byte"] < 6 and 0 < result["standard_error"] < 1


@pytest.mark.parametrize("config, message", [
    ("no/such-commit:config.py", "archive failed: fatal: not a valid object name: no/such-commit"),
    ("HEAD:no_such.py", "no config file"), ("no_such.py", "no config file no_such.py"),
    ("HEAD:config.py", "no data in data/nothing: create it with ")])
def test_a_race_that_cannot_be_run(here, monkeypatch, config, message):
    (here / "config.py").write_text("dataset = 'nothing'")
    commit_files(here, "config.py")
    monkeypatch.setattr(bench, "ROOT", here)
    with pytest.raises(UserError, match=message):
        bench.find_program(config, here)
