"""The benchmark measures what it says, on a small model. No test depends on a timing."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import TINY
from model import GPT, GPTConfig
from storygpt import fast, loss
from storygpt.corpus.tokenizer import Tokenizer
from storygpt.generate import generate
from storygpt.settings import parse_value
from storygpt.system import files
from storygpt.system.errors import UserError
from tools import bench, peers

FASTER = [(fast, "dropout"), (fast, "causal_attention"), (loss, "fused_linear_cross_entropy"), (loss, "UsedTokens")]


@pytest.fixture
def small(monkeypatch, here):
    """An empty folder; everything that the benchmark's variants patch is restored after the test."""
    for owner, name in [*FASTER, (train, "fuse_loss"), (train, "save_last"), (sys, "stdout"), (files, "append_line"),
                        (torch, "compile")]:
        monkeypatch.setattr(owner, name, getattr(owner, name))


def fake_timings(seconds):
    """A `time_variants` in which every variant takes this long, and 3 seconds at first."""
    return lambda names, workload, rounds: dict.fromkeys(names, [(3.0, 1.0), (seconds, 1.0)])


def test_variants_are_interleaved_after_a_warm_up():
    calls = []
    seconds = bench.time_interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or 2.0}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert len(seconds["a"]) == 3 and seconds["b"] == [2.0] * 3
    medians, spreads = bench.measure_rates({"b": (10, iter([9.0, 1.0, 2.0, 5.0]).__next__)}, rounds=3)
    assert medians == {"b": 5.0} and spreads == {"b": (2.0, 10.0)}


class ParentPipe:
    """The pipe to a parent process that asks for three rounds."""

    def __init__(self):
        self.remaining, self.answers = 3, []

    def recv(self):
        if not self.remaining:
            raise EOFError
        self.remaining -= 1

    def send(self, answer):
        self.answers.append(answer)


@pytest.mark.parametrize("name, small_steps, rounds_of_steps", [
    ("baseline", False, [0, 1, 2]), ("this project", False, [0, 1, 2]), ("unfused loss", False, [0, 1, 2]),
    ("eager", True, [0, 0, 1, 1, 2, 2])])
def test_each_variant_does_its_optimizer_steps_in_each_round(small, here, monkeypatch, name, small_steps,
                                                             rounds_of_steps):
    workload = bench.make_workload(here, torch.device("cpu"), bench.TINY, small_steps)
    pipe, steps, step = ParentPipe(), [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: steps.append(len(pipe.answers)) or
                        step(self, *args))
    with pytest.raises(SystemExit):
        bench.run_variant(pipe, name, workload)
    assert steps == rounds_of_steps
    assert all(seconds > 0 and mb > 10 for seconds, mb in pipe.answers)


@pytest.mark.parametrize("name, without", [
    ("torch's dropout", FASTER[:1]), ("torch's attention", FASTER[1:2]), ("unfused loss", FASTER[2:3]),
    ("whole vocabulary", FASTER[3:]), ("baseline", FASTER)])
def test_a_variant_does_without_something_faster(small, here, monkeypatch, name, without):
    def fail(*args, **options):
        raise AssertionError("called")

    workload = bench.make_workload(here, torch.device("cpu"), bench.TINY)
    for owner, attribute in without:
        monkeypatch.setattr(owner, attribute, fail)
    with pytest.raises(AssertionError, match="called"):
        bench.run_variant(ParentPipe(), "this project", workload)
    with pytest.raises(SystemExit):  # at the end
        bench.run_variant(ParentPipe(), name, workload)


def test_the_losses_that_are_compared_are_equal_and_timed(capsys):
    x, weight, targets = torch.randn(6, 4), torch.randn(9, 4), torch.tensor([0, 7, 3, -1, 5, 7])
    expected = F.cross_entropy(x @ weight.T, targets, ignore_index=-1)
    for function in bench.LOSSES.values():
        torch.testing.assert_close(function(x, weight, targets), expected)
    several = [function(x, weight, targets, 3)[0] for function in (loss.fused_linear_cross_entropy, bench.unfused_loss)]
    torch.testing.assert_close(*several)
    bench.main(["loss", "--tiny", "--json", "--rounds=1", "--device=cpu"])
    assert json.loads(capsys.readouterr().out)["loss"]["seconds"].keys() == bench.LOSSES.keys()


def test_a_variant_that_fails_is_named(small, here):
    workload = bench.make_workload(here, torch.device("cpu"), bench.TINY)
    with pytest.raises(UserError, match="the process of 'no such variant' failed"):
        bench.time_variants(["no such variant"], workload, 1)


def test_the_random_dataset_has_a_tokenizer(small, here):
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
        "tokens_per_s_1", "tokens_per_s_32", "bandwidth_fraction_1", "first_token_s", "peers_tokens_per_s"}
    assert result["generate"]["dtype"] == "int8" and len(result["generate"]["tokens_per_s_of_each"]) == 12
    programs = peers.programs(GPTConfig(vocab_size=300, n_embd=16)).keys()
    assert ("CTranslate2" in programs) == (find_spec("ctranslate2") is not None)
    assert result["generate"]["peers_tokens_per_s"].keys() == {f"{name}, {n}" for name in programs for n in (1, 32)}
    differences = result["generate"]["first_greedy_difference"]
    assert differences.keys() == programs and all(text.startswith(("none in 15", "token ")) for text in
                                                  differences.values())
    losses = result["generate"]["validation_loss"]
    assert losses["int8"] == pytest.approx(losses["float32"], abs=0.01)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.01)
    assert len(set(losses.values())) == 3


def test_prepare_and_train_keys_and_the_tables(small, monkeypatch, capsys):
    monkeypatch.setattr(bench, "time_variants", fake_timings(2.0))
    bench.main(["prepare", "--tiny", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "mb_per_s" in out and "matmul_bf16_gflops" in out and "gflops_of_each" in out
    bench.main(["train", "--tiny", "--json", "--rounds", "1", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out)["train"]
    assert result.keys() >= {"baseline_tokens_per_s", "baseline_bf16_compiled_tokens_per_s", "tokens_per_s", "mfu",
                             "baseline_peak_mb", "peak_mb"}
    assert result["tokens_per_s"] == 32 * 16 / 2.0 and result["first_round_s_of_each"]["baseline"] == 3.0
    used = replace(bench.TINY, vocab_size=75)  # the data uses a quarter of the vocabulary
    flops_per_token = 6 * bench.count_parameters(used) + 12 * 2 * 16 * 32
    assert result["mfu"] == pytest.approx(result["tokens_per_s"] * flops_per_token / result["mfu_of_tflops"] / 1e12)
    assert result["mfu_of_measured"] == result["mfu"]  # there is no data sheet of a CPU


@pytest.mark.parametrize("words, named", [
    (["trian"], "trian"), (["--rounds", "0"], "rounds"), (["--rounds", "x"], "rounds"), (["--device"], "device"),
    (["race"], "race needs a config"), (["small", "config/speedrun.py"], "other subjects take none")])
def test_wrong_arguments_are_named(fails, words, named):
    assert named in fails(bench.main, words, code=2)


def test_small_steps_are_those_of_the_fast_config(small, monkeypatch, capsys):
    monkeypatch.setattr(bench, "time_variants", fake_timings(0.5))
    bench.main(["small", "--tiny", "--json", "--rounds=1", "--device=cpu"])
    result = json.loads(capsys.readouterr().out)["small"]
    assert result["tokens_per_step"] == 8 * 16 and result["tokens_per_s"] == 2 * 8 * 16 / 0.5
    assert result["ms_per_step"] == 250


# ---- the speedrun ----

RECORDED_TRAIN = """
import sys
from pathlib import Path
flags = dict(word.lstrip("-").split("=") for word in sys.argv[1:] if "=" in word)
if "--eval_only" in sys.argv:
    print("checkpoint: x\\ndataset: data/x\\ntokens: 9\\nloss: 2.0\\nperplexity: 7.389\\nbits_per_byte: "
          + Path(flags["out_dir"], "loss").read_text() + "\\nstandard_error: 0.5")
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
    assert (here / "order").read_text() == "now 1 cpu\nfirst 1 cpu\nnow 2 cpu\nnow 3 cpu\n"
    assert result["reached_0.815"] == "2 of 3"
    assert result["bits_per_byte_of_each"] == {"config.py --seed=1": 0.815, "the first record": 0.816,
                                               "config.py --seed=2": 0.816, "config.py --seed=3": 0.815}
    assert result["standard_error_of_each"]["config.py --seed=2"] == pytest.approx(0.5 * 0.816 / 2)
    own = sorted(result["seconds_of_each"][f"config.py --seed={seed}"] for seed in (1, 2, 3))[1]
    first = result["seconds_of_each"]["the first record"]
    assert result["seconds"] == own and result["times_first_record"] == own / first
    bench.main(["race", "HEAD:config.py", "--json", "--rounds=1", "--device=cpu", "--tiny"])  # against itself
    result = json.loads(capsys.readouterr().out)["race"]
    assert list(result["seconds_of_each"]) == ["HEAD:config.py --seed=1", "the first record"]


def test_a_race_trains_and_evaluates(with_data):
    flags = (flag.removeprefix("--").split("=") for flag in TINY)
    Path("config.py").write_text("".join(f"{name} = {parse_value(name, value)!r}\n" for name, value in flags))
    script, config = bench.find_program("config.py", with_data)
    seconds, bits_per_byte, error = bench.race(script, config, 1, torch.device("cpu"), with_data)
    assert seconds > 0.5 and 0.5 < bits_per_byte < 6 and 0 < error < 1


@pytest.mark.parametrize("config, message", [
    ("no/such-commit:config.py", "git cannot find commit no/such-commit"),
    ("HEAD:no_such.py", "commit HEAD has no config file 'no_such.py'"),
    ("HEAD:", "commit HEAD has no config file ''"), ("no_such.py", "no config file no_such.py"),
    ("HEAD:config.py", "no data in data/nothing: create it with ")])
def test_a_race_that_cannot_be_run(here, monkeypatch, config, message):
    (here / "config.py").write_text("dataset = 'nothing'")
    commit_files(here, "config.py")
    monkeypatch.setattr(bench, "ROOT", here)
    with pytest.raises(UserError, match=message):
        bench.find_program(config, here)


def test_all_subjects_are_measured_but_the_race(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SUBJECTS", dict.fromkeys(bench.SUBJECTS, lambda *args: {}))
    monkeypatch.setattr(bench, "measure_ceilings", lambda *args: {})
    bench.main(["--json", "--device=cpu"])
    assert list(json.loads(capsys.readouterr().out)) == [
        "machine", "ceilings", *(name for name in bench.SUBJECTS if name != "race")]


def test_the_first_difference_of_a_greedy_story():
    torch.manual_seed(0)
    model = GPT(bench.TINY).eval()
    story = [int(token) for token in generate(model, torch.tensor([[5]]), 15, temperature=0)]
    assert bench.first_difference(model, 5, story) == "none in 15 tokens"
    other = [*story[:7], (story[7] + 1) % 300, *story[8:]]
    assert bench.first_difference(model, 5, other).startswith("token 8, whose logit is ")
