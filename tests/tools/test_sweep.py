"""tools/sweep.py: the command line, the statistics, grids and searches, with trained and written runs."""

import functools
import json
import math
import os
import shutil
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

optuna = pytest.importorskip("optuna", reason="pip install -r requirements-extra.txt")
stats = pytest.importorskip("scipy.stats", reason="pip install -r requirements-extra.txt")

import train
from optuna.distributions import FloatDistribution, IntDistribution
from storygpt.settings import Config
from conftest import TINY, records
from test_train import TINY_MODEL
from faults.processes import locked
from tools import compare, sweep


def table(text):
    """The printed table as a dict per row."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0] == "|"]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def write_run(words, settings, seed, losses, reason="finished"):
    """Write the log of a run of the sweep that has these words, with a loss every 8 iterations; returns its folder."""
    a_sweep = sweep.parse_args([*TINY, *words])
    run = sweep.add_run(a_sweep, settings, seed)
    config = asdict(Config(**run.flags))
    evals = [{"kind": "eval", "iter": 8 * i, "tokens": 512 * i, "seconds": i, "train_loss": loss, "val_loss": loss,
              "val_bpb": loss} for i, loss in enumerate(losses, 1)]
    run.folder.mkdir(parents=True)
    lines = [{"kind": "run", "config": config, "data_sha256": run.data}, *evals, {"kind": "end", "reason": reason}]
    Path(run.folder, "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run.folder


# ---- the command line ----


def test_values_and_ranges_are_parsed_in_the_order_of_the_settings():
    varied = sweep.parse_varied(["muon_lr=0.01,0.02,1e-2", "n_layer=2,4", "bias=True,false", "dataset=a,../b..c"])
    assert [(name, space.choices) for name, space in varied.items()] == [
        ("n_layer", (2, 4)), ("bias", (True, False)), ("dataset", ("a", "../b..c")), ("muon_lr", (0.01, 0.02))]
    assert sweep.parse_varied(["learning_rate=1e-3..2e-2:log", "batch_size=4..16"]) == {
        "batch_size": IntDistribution(4, 16), "learning_rate": FloatDistribution(1e-3, 2e-2, log=True)}


@pytest.mark.parametrize("words, message", [
    (["--vary=lerning_rate=1"], "unknown setting lerning_rate: did you mean learning_rate?"),
    (["--vary=learning_rate"], "learning_rate = '' is not allowed"),
    (["--vary=learning_rate=1e-3,,2e-3"], "learning_rate = '' is not allowed"),
    (["--vary=dropout=0.1,2"], "dropout = 2.0 is not allowed: it takes a number from 0 to 0.99"),
    (["--vary=learning_rate=1e-3..", "--trials=2"], "learning_rate = '' is not allowed"),
    (["--vary=learning_rate=2e-3..1e-3", "--trials=2"], "learning_rate=2e-3..1e-3: `low <= high` must hold"),
    (["--vary=dropout=0..0.3:log", "--trials=2"], "dropout=0..0.3:log: `low > 0` must hold"),
    (["--vary=learning_rate=1e-3..1e-2:lin", "--trials=2"], "learning_rate = '1e-2:lin' is not allowed"),
    (["--vary=bias=False..True", "--trials=2"], "bias = 'False..True' is not allowed"),
    (["--vary=learning_rate=1e-3..1e-2"], "a range needs --trials N"),
    ([], "nothing to compare"), (["--seeds=2", "--trials=2"], "nothing to compare"),
    (["--vary=seed=1,2"], "use --seeds N"), (["--vary=out_dir=a,b"], "use --out_dir=FOLDER"),
    (["--vary=bias=True", "--vary=bias=False"], "--vary bias is given twice"),
    (["--vary=max_iters=10,20", "--vary=max_tokens=1000,2000"], "the length of the run in two units"),
    (["--vary=bias=True", "--seeds=0"], "argument --seeds: 0 is not 1 or more"),
    (["--vary=bias=True", "--sedes=3"], "did you mean --seeds?"),
])
def test_a_wrong_command_line_is_one_line(with_data, fails, words, message):
    assert message in fails(sweep.main, [*TINY, *words], code=2)
    assert not Path("out").exists()


def test_settings_that_cannot_be_trained_are_one_line_before_anything_runs(with_data, fails):
    assert "the length of the config is max_minutes, so vary that" in fails(
        sweep.main, ["--max_minutes=1", "--vary=max_iters=10,20"], code=2)
    assert "error: n_embd = 18 is not a multiple of n_head = 4" in fails(
        sweep.main, [*TINY, "--vary=n_embd=16,18", "--vary=n_head=2,4"])
    assert "no data in data/nothing" in fails(sweep.main, [*TINY, "--vary=dataset=nursery-bpe300,nothing"])
    assert not Path("out").exists()


def test_the_architecture_of_runs_with_init_from_is_that_of_its_run(run):
    a_sweep = sweep.parse_args(["--init_from=out/tiny", "--block_size=8", "--warmup_iters=1", "--vary=learning_rate=1"])
    assert (a_sweep.base.n_layer, a_sweep.base.n_embd, a_sweep.base.block_size, a_sweep.base.dropout) == (
        TINY_MODEL.n_layer, TINY_MODEL.n_embd, 8, Config.dropout)
    assert a_sweep.settings["n_head"] == TINY_MODEL.n_head  # train.py would refuse another one


# ---- statistics ----


@pytest.mark.parametrize("comparisons", [1, 5])
@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("shift", [0.0, -0.02, 0.02, -0.2, 0.2])
def test_the_verdict_is_that_of_scipys_paired_t_test(shift, n, comparisons):
    random = np.random.default_rng(n)
    baseline = dict(enumerate(3 + random.normal(0, 0.05, n)))
    losses = {seed: loss + shift + random.normal(0, 0.02) for seed, loss in baseline.items()}
    mean, error, verdict = sweep.paired_difference(losses, baseline, comparisons)
    test = stats.ttest_rel([losses[seed] for seed in range(n)], list(baseline.values()))
    assert mean / error == pytest.approx(test.statistic)
    expected = ("better" if mean < 0 else "worse") if test.pvalue < 0.05 / comparisons else "not distinguishable"
    assert verdict.startswith(expected)


def test_a_difference_by_hand():
    """Differences −0.1, −0.2, −0.3: mean −0.2, standard deviation 0.1, t = 3.46, where 3 seeds need 4.30, 4 need 3.18.

    4 seeds of the same mean and deviation have t = 4.
    """
    baseline = {1: 3.0, 2: 3.0, 3: 3.0, 4: 9.0}  # seed 4 has no counterpart
    mean, error, verdict = sweep.paired_difference({3: 2.7, 1: 2.9, 2: 2.8, 5: 0.0}, baseline, 1)
    assert (mean, error) == (pytest.approx(-0.2), pytest.approx(0.1 / math.sqrt(3)))
    assert verdict == "not distinguishable (1 more seed would tell)"
    assert sweep.paired_difference({1: 2.9, 2: 2.8, 3: 2.7}, baseline, 2)[2].startswith("not distinguishable (2 more")
    assert sweep.paired_difference({1: 2.9, 2: 2.9, 3: 2.9 + 1e-9}, baseline, 1)[2] == "better"
    mean, error, verdict = sweep.paired_difference({1: 2.5}, baseline, 1)
    assert (mean, verdict) == (-0.5, "not distinguishable (one seed)") and math.isnan(error)
    for same in ({1: 3.0, 2: 3.0}, {1: 3.1, 2: 2.9}):
        assert sweep.paired_difference(same, baseline, 1)[2] == "not distinguishable (1,000 more seeds would not tell)"


# ---- runs that are there already ----

GRID = ["--vary=learning_rate=1e-2,1e-3", "--seeds=2", "--out_dir=out/grid"]


@pytest.fixture
def grid(with_data):
    """The logs of a finished grid of two settings and two seeds, in out/grid."""
    for settings, losses in (({"learning_rate": 0.01}, (4.0, 4.2)), ({"learning_rate": 0.001}, (4.5, 4.8))):
        for seed, loss in zip((1337, 1338), losses):
            write_run(GRID, settings, seed, [loss + 1, loss, loss + 0.1])


def test_a_finished_grid_is_compared_seed_by_seed_and_not_trained(grid, capsys):
    sweep.main([*TINY, *GRID])
    out = capsys.readouterr().out
    assert "grid, 2 settings, seeds 1337, 1338; 4 of 4 runs are done" in out
    first, second = table(out)
    assert (first["learning_rate"], first["seeds"], first["verdict"]) == ("0.01", "2", "baseline")
    assert first["validation loss"] == "4.1000 ± 0.1414" and first["tokens/s"] == "512"
    assert second["difference"] == "+0.5500 ± 0.0500" and second["verdict"].startswith("not distinguishable (1 more")


def test_fewer_values_and_seeds_are_a_part_of_the_grid(grid, capsys):
    sweep.main([*TINY, "--vary=learning_rate=1e-2", "--seeds=1", "--out_dir=out/grid"])
    out = capsys.readouterr().out
    assert "1 of 1 runs are done" in out and [row["seeds"] for row in table(out)] == ["1"]


def test_another_sweep_in_the_folder_is_refused(grid, fails):
    for flag in ("--max_iters=40", "--dropout=0.2"):
        assert f"is of another sweep ({flag[2:].split('=')[0]} = " in fails(sweep.main, [*TINY, *GRID, flag])
    log = Path("out/grid/learning_rate=0.001,seed=1338/log.jsonl")
    log.write_text(log.read_text().replace('"train": "', '"train": "0'))
    assert f"{log.parent} was trained on other data than are in data/nursery-bpe300" in fails(
        sweep.main, [*TINY, *GRID])
    shutil.copy(log, "out/grid")
    assert "out/grid is a run" in fails(sweep.main, [*TINY, *GRID])


def test_an_empty_log_is_that_of_a_run_that_begins_and_a_damaged_one_is_named(grid, fails):
    log = Path("out/grid/learning_rate=0.001,seed=1337/log.jsonl")
    for name in "ab":
        shutil.copytree(log.parent, f"out/grid/{name}")
    Path("out/grid/a/log.jsonl").write_text("")
    Path("out/grid/b/log.jsonl").write_text('{"kind": "ru')
    assert sum(map(len, compare.read_groups("out/grid"))) == 4
    sweep.main([*TINY, "--vary=learning_rate=1e-4..1e-2", "--trials=2", "--seeds=2", "--out_dir=out/grid"])
    log.write_text(log.read_text().replace('{"kind": "eval"', "{", 1))
    assert f"{log}, line " in fails(sweep.main, [*TINY, *GRID])


def test_compare_groups_the_seeds_of_a_sweep(grid):
    text = compare.format_table(compare.read_groups("out/grid"))
    assert "out/grid/learning_rate=0.001 " in text and "seed=" not in text
    assert "4.1000 ± 0.1414" in text and "4.6500 ± 0.2121" in text


def test_with_several_datasets_bits_per_byte_are_compared():
    assert sweep.parse_args([*TINY, "--vary=dataset=a,b"]).metric == "val_bpb"


SEARCH = ["--vary=learning_rate=1e-3..2e-2:log", "--vary=optimizer=adamw,muon", "--trials=3", "--out_dir=out/a search"]


def test_a_search_knows_what_it_has_tried(with_data, capsys):
    baseline, better = {"optimizer": "adamw", "learning_rate": 0.01}, {"optimizer": "muon", "learning_rate": 0.005}
    write_run(SEARCH, baseline, 1337, [4.0])
    write_run(SEARCH, better, 1337, [3.5])
    pruned = write_run(SEARCH, {"optimizer": "adamw", "learning_rate": 0.002}, 1337, [5.0], reason="stopped")
    (pruned / "pruned").touch()
    write_run(SEARCH, {"optimizer": "adamw", "learning_rate": 0.1}, 1337, [1.0])  # of another range: not part of it
    sweep.main([*TINY, *SEARCH])
    out = capsys.readouterr().out
    assert [(row["optimizer"], row["verdict"]) for row in table(out)] == [
        ("adamw", "baseline"), ("muon", "not distinguishable (one seed)"), ("adamw", "pruned")]
    assert "--vary optimizer=muon --vary learning_rate=0.005 --seeds 5 --seed=1338 --out_dir='out/a search-best'" in out


def test_optuna_learns_from_the_runs_and_suggests_within_the_ranges(with_data):
    write_run(SEARCH, {"optimizer": "adamw", "learning_rate": 0.01}, 1337, [4.0, 3.0])
    search = sweep.parse_args([*TINY, *SEARCH])
    sweep.find_runs(search)
    trial, = search.study.trials
    assert trial.value == 3.0 and trial.intermediate_values == {8: 4.0, 16: 3.0}
    assert trial.params == {"optimizer": "adamw", "learning_rate": 0.01}
    runs = [sweep.suggest_run(search) for _ in range(5)]
    assert all(1e-3 <= run.settings["learning_rate"] <= 2e-2 for run in runs) and len(search.runs) == 6
    assert {run.settings["optimizer"] for run in runs} <= {"adamw", "muon"}


def test_a_suggestion_that_the_search_has_had_counts_but_is_not_trained(with_data, capsys):
    words = ["--vary=lr_schedule=cosine,linear", "--trials=5", "--out_dir=out/few"]
    for name, loss in (("cosine", 4.0), ("linear", 3.0)):
        write_run(words, {"lr_schedule": name}, 1337, [loss])
    sweep.main([*TINY, *words])
    assert len(table(capsys.readouterr().out)) == 2


def test_without_a_better_setting_there_is_nothing_to_confirm(with_data, capsys):
    write_run(SEARCH, {"optimizer": "adamw", "learning_rate": 0.01}, 1337, [4.0])
    sweep.main([*TINY, *SEARCH[:2], "--trials=1", "--out_dir=out/a search"])
    assert "no settings have a lower loss than the config as it is" in capsys.readouterr().out


# ---- runs that train, each in a process of train.py ----


def test_what_is_missing_is_trained_and_a_failed_run_is_reported(with_data, capsys):
    words = ["--vary=learning_rate=1e-3,1e4", "--seeds=1", "--jobs=2", "--out_dir=out/grid"]
    baseline = write_run(words, {"learning_rate": 0.01}, 1337, [4.0])
    before = baseline.joinpath("log.jsonl").read_text()
    sweep.main([*TINY, *words])
    out = capsys.readouterr().out
    assert "1 of 3 runs are done" in out and out.count("tokens/s\n") == 1
    assert [row["verdict"] for row in table(out)] == ["baseline", "not distinguishable (one seed)", "failed"]
    assert out.count("learning_rate=10000.0,seed=1337: failed: the loss is nan at iteration 8") == 1
    assert baseline.joinpath("log.jsonl").read_text() == before
    trained = Path("out/grid/learning_rate=0.001,seed=1337")
    run, = records(trained, "run")
    assert (run["config"]["learning_rate"], run["seed"], run["threads"]) == (1e-3, 1337, 1)
    assert records(trained, "end")[0]["reason"] == "finished" and (trained / "ckpt.pt").exists()


def test_if_all_runs_fail_it_is_one_line():
    a_sweep = sweep.parse_args(["--vary=dropout=0.5"])
    a_sweep.runs["x"] = sweep.Run({"dropout": 0.5}, 1, Path("x"), {}, {}, state="failed")
    with pytest.raises(sweep.UserError, match="all runs failed, for the reasons above"):
        sweep.print_results(a_sweep)


def interrupt_after(condition):
    """Send this process SIGINT once `condition()` is true, as Ctrl-C does, from a thread."""
    def wait():
        while not condition():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=wait, daemon=True).start()


def test_a_stopped_sweep_resumes_its_runs_bit_for_bit(with_data, capsys):
    words = [*TINY, "--max_iters=400", "--eval_interval=100"]
    folder = Path("out/stopped/learning_rate=0.01,seed=1337")
    interrupt_after(lambda: (folder / "log.jsonl").exists() and records(folder, "eval"))
    with pytest.raises(SystemExit) as exit:
        sweep.main([*words, "--vary=learning_rate=1e-3", "--seeds=1", "--out_dir=out/stopped"])
    out, error = capsys.readouterr()
    assert exit.value.code == 130 and error.endswith("stopped: the same command resumes the sweep\n")
    assert [row["verdict"] for row in table(out)] == ["baseline", "not finished"]
    assert [record["reason"] for record in records(folder, "end")] == ["stopped"]
    sweep.main([*words, "--vary=learning_rate=1e-2", "--seeds=1", "--out_dir=out/stopped"])
    assert [record["resumed_at"] for record in records(folder, "run")][1:] != []
    train.main([*words, "--out_dir=out/whole"])
    assert records(folder, "eval")[-1]["val_loss"] == records("out/whole", "eval")[-1]["val_loss"]


def test_a_run_that_still_trains_after_its_sweep_was_killed_takes_a_job(with_data, monkeypatch, capsys):
    folder = Path("out/grid/learning_rate=0.001,seed=1337")
    folder.mkdir(parents=True)
    monkeypatch.setattr(sweep, "time", SimpleNamespace(sleep=lambda seconds: os.kill(os.getpid(), signal.SIGINT)))
    with locked(folder), pytest.raises(SystemExit):
        sweep.main([*TINY, "--vary=learning_rate=1e-3", "--seeds=1", "--out_dir=out/grid"])
    assert f"waiting for the train.py in {folder}\n" in capsys.readouterr().out
    assert os.listdir("out/grid") == [".lock", folder.name]


def test_a_bad_setting_is_pruned(with_data, monkeypatch, capsys):
    """The run would take hours: it ends because its losses are above those of the baseline, one of which is enough."""
    pruner = functools.partial(optuna.pruners.MedianPruner, n_startup_trials=1)
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda n_warmup_steps: pruner(n_warmup_steps=16))
    words = ["--max_iters=1000000", "--vary=learning_rate=1e-7", "--trials=2", "--seeds=2", "--out_dir=out/pruned"]
    for seed in (1337, 1338):
        write_run(words, {"learning_rate": 0.01}, seed, [1.0] * 5000)
    sweep.main([*TINY, *words])
    rows = table(capsys.readouterr().out)
    assert [(row["seeds"], row["verdict"]) for row in rows] == [("2", "baseline"), ("0", "pruned")]
    folder = Path("out/pruned/learning_rate=1e-07,seed=1337")
    assert records(folder, "eval")[-1]["iter"] >= 16 and (folder / "pruned").exists()
    assert not folder.with_name("learning_rate=1e-07,seed=1338").exists()
