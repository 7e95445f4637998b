"""tools/sweep.py: the command line, grids and searches with real runs, stopping and sharing them, the statistics."""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

optuna = pytest.importorskip("optuna", reason="pip install -r requirements-extra.txt")
stats = pytest.importorskip("scipy.stats", reason="pip install -r requirements-extra.txt")

from storygpt.run import read_log
from storygpt.settings import Config
from conftest import ROOT, TINY
from tools import compare, sweep

LONG = ["--max_iters=2000", "--eval_interval=200"]  # several seconds


def start(*words):
    """Start a sweep in a process of its own, as a user does."""
    return subprocess.Popen([sys.executable, "-m", "tools.sweep", *TINY, *words], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})


def table(text):
    """The printed table as a dict per row."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0] == "|"]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def records(folder, kind):
    """The records of a kind in a run's log."""
    return [record for record in read_log(Path(folder, "log.jsonl")) if record["kind"] == kind]


def final_losses(folder):
    """The lowest validation losses of a sweep's runs, name → loss."""
    return {log.parent.name: min(record["val_loss"] for record in records(log.parent, "eval"))
            for log in sorted(Path(folder).glob("*/log.jsonl"))}


def wait_for(condition):
    """Wait until `condition()` is true, for five minutes at most: the machine may be busy."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trials_of(folder):
    """The trials in the study of a sweep's folder."""
    return optuna.load_study(study_name=Path(folder).name, storage=f"sqlite:///{folder}/study.db").get_trials()


# ---- the command line ----


def test_values_and_ranges_are_parsed_in_the_order_of_the_settings():
    assert sweep.parse_varied(["muon_lr=0.01,0.02,1e-2", "n_layer=2,4", "bias=True,false", "dataset=a,../b..c"]) == {
        "dataset": ["a", "../b..c"], "n_layer": [2, 4], "bias": [True, False], "muon_lr": [0.01, 0.02]}
    assert sweep.parse_varied(["learning_rate=1e-3..2e-2:log", "batch_size=4..16"]) == {
        "batch_size": sweep.Range(4, 16, False), "learning_rate": sweep.Range(1e-3, 2e-2, True)}
    assert 4 in sweep.Range(4, 16, False) and 17 not in sweep.Range(4, 16, False)


@pytest.mark.parametrize("words, message", [
    (["--vary=lerning_rate=1"], "unknown setting lerning_rate: did you mean learning_rate?"),
    (["--vary=learning_rate"], "has no values"),
    (["--vary=learning_rate="], "learning_rate = '' is not allowed"),
    (["--vary=learning_rate=1e-3,,2e-3"], "learning_rate = '' is not allowed"),
    (["--vary=dropout=0.1,2"], "dropout = 2.0 is not allowed: it takes a number from 0 to 0.99"),
    (["--vary=learning_rate=1e-3..", "--trials=2"], "a range is LOW..HIGH or LOW..HIGH:log"),
    (["--vary=learning_rate=..1e-3", "--trials=2"], "a range is LOW..HIGH or LOW..HIGH:log"),
    (["--vary=learning_rate=2e-3..1e-3", "--trials=2"], "the low end is not below the high end"),
    (["--vary=dropout=0..0.3:log", "--trials=2"], "must be above 0"),
    (["--vary=learning_rate=1e-3..1e-2:lin", "--trials=2"], "learning_rate = '1e-2:lin' is not allowed"),
    (["--vary=bias=False..True", "--trials=2"], "bias is no number"),
    (["--vary=learning_rate=1e-3..1e-2"], "a range needs --trials N"),
    (["--trials=2"], "nothing to compare"), ([], "nothing to compare"),
    (["--seeds=2", "--trials=2"], "--trials needs --vary"),
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
    assert "error: n_head=4,n_embd=18: n_embd = 18 is not a multiple" in fails(
        sweep.main, [*TINY, "--vary=n_embd=16,18", "--vary=n_head=2,4"])
    assert "no data in data/nothing" in fails(sweep.main, [*TINY, "--vary=dataset=nursery-bpe300,nothing"])
    assert not Path("out").exists()


def test_a_storage_that_cannot_be_used_is_one_line_without_the_password(with_data, fails):
    varied = [*TINY, "--vary=learning_rate=1e-3"]
    assert "unable to open database file" in fails(sweep.main, [*varied, "--storage=sqlite:///no/such/folder/x.db"])
    for url in ("nonsense", "sqlite://", "postgresql://me:secret@localhost:port/x"):
        assert "--storage is not the URL of a database, such as" in fails(sweep.main, [*varied, f"--storage={url}"])
    error = fails(sweep.main, [*varied, "--storage=mssql+pymssql://me:secret@localhost/x"])
    assert "No module named 'pymssql': install the driver" in error and "secret" not in error
    Path("no_database").write_text("text")
    assert "not a database" in fails(sweep.main, [*varied, "--storage=sqlite:///no_database"])


def test_jobs_share_the_machine():
    assert [sweep.share_of_machine(slot, 3, ["2", "5"], 8) for slot in range(3)] == [
        {"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("2", "5", "2")]
    assert sweep.share_of_machine(1, 3, [], 8) == {"OMP_NUM_THREADS": "2"}
    assert sweep.share_of_machine(1, 3, [], 2) == {"OMP_NUM_THREADS": "1"}
    assert sweep.visible_gpus("auto") == sweep.visible_gpus("cpu") == []


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


# ---- a grid ----


@pytest.fixture(scope="module")
def grid(nursery_data, tmp_path_factory):
    """A folder with a finished grid of two settings and two seeds in out/grid, and what it printed."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "data").symlink_to(nursery_data / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        process = start("--vary", "learning_rate=1e-2,1e-3", "--seeds=2", "--jobs=2", "--out_dir=out/grid", "--picture")
        out, error = process.communicate()
    assert process.returncode == 0 and not error, error
    return folder, out


def test_a_grid_compares_with_the_config_as_it_is(grid, monkeypatch):
    folder, out = grid
    monkeypatch.chdir(folder)
    losses = final_losses("out/grid")
    assert list(losses) == [f"learning_rate={rate},seed={seed}" for rate in ("0.001", "0.01") for seed in (1337, 1338)]
    first, second = table(out)
    assert (first["learning_rate"], first["seeds"], first["verdict"]) == ("0.01", "2", "baseline")
    assert (second["learning_rate"], second["seeds"]) == ("0.001", "2") and second["verdict"] != "baseline"
    slow, fast = ([losses[f"learning_rate={rate},seed={seed}"] for seed in (1337, 1338)] for rate in ("0.001", "0.01"))
    difference = np.subtract(slow, fast)
    assert first["validation loss"] == f"{np.mean(fast):.4f} ± {np.std(fast, ddof=1):.4f}"
    assert second["difference"] == f"{difference.mean():+.4f} ± {difference.std(ddof=1) / math.sqrt(2):.4f}"
    assert out.count("tokens/s\n") == 4 and "4/4 " in out  # without a terminal, a line for each run
    assert Path("out/grid/losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_a_sweep_is_like_any_other(grid, monkeypatch, capsys):
    import sample
    from tools import serve

    monkeypatch.chdir(grid[0])
    names = {f"grid/learning_rate={rate},seed={seed}" for rate in ("0.001", "0.01") for seed in (1337, 1338)}
    assert set(serve.run_names()) == names
    sample.main(["--out_dir", "out/grid/learning_rate=0.01,seed=1337", "--max_new_tokens=5"])
    assert list(serve.story_events(serve.pick_device("cpu"), sorted(names)[0], "", 1, 5, temperature=1.0))
    run = records("out/grid/learning_rate=0.001,seed=1338", "run")[0]
    assert (run["config"]["learning_rate"], run["seed"], run["threads"]) == (1e-3, 1338, 1)


def test_compare_groups_the_seeds_of_a_sweep(grid, monkeypatch, capsys):
    monkeypatch.chdir(grid[0])
    compare.main(["out/grid", "--picture=out/compared.png"])
    losses = list(final_losses("out/grid").values())
    text = capsys.readouterr().out
    assert "out/grid/learning_rate=0.001 " in text and "seed=" not in text and "plot: out/compared.png" in text
    for pair in (losses[:2], losses[2:]):
        assert f"{np.mean(pair):.4f} ± {np.std(pair, ddof=1):.4f}" in text
    group, = [runs for runs in compare.read_groups("out/grid") if runs[0]["config"]["learning_rate"] == 1e-3]
    tokens, _, lowest, mean, highest = compare.curve(group, "val_loss")
    assert tokens == [512e-6, 1024e-6, 1536e-6] and lowest < mean < highest
    assert mean[-1] == pytest.approx(np.mean(losses[:2]))
    group[0]["evals"].pop()
    assert compare.curve(group, "val_loss")[0] == tokens[:2]  # not where only the others go
    compare.main(["out/grid", "out/grid/learning_rate=0.001,seed=1337"])  # a group and a single run
    assert "| seeds " in capsys.readouterr().out


def test_the_same_command_trains_only_what_is_missing_and_another_sweep_is_refused(grid, here, capsys, fails):
    shutil.copytree(grid[0], here, dirs_exist_ok=True)
    before = final_losses("out/grid")
    words = [*TINY, "--vary", "learning_rate=1e-2,1e-3", "--out_dir=out/grid"]
    sweep.main([*words, "--seeds=2"])
    assert "grid, 2 settings, seeds 1337, 1338; 4 of 4 runs are finished" in capsys.readouterr().out
    sweep.main([*words, "--seeds=3"])
    after = final_losses("out/grid")
    assert before.items() < after.items() and len(after) == 6
    assert [row["seeds"] for row in table(capsys.readouterr().out)] == ["3", "3"]
    assert all(len(records(Path("out/grid", name), "run")) == 1 for name in after)  # none was trained twice
    sweep.main([*TINY, "--vary=learning_rate=1e-2", "--seeds=1", "--out_dir=out/grid"])  # fewer values and seeds
    out = capsys.readouterr().out
    assert "1 of 1 runs are finished" in out and [row["seeds"] for row in table(out)] == ["1"]
    assert "another sweep (its max_iters differs)" in fails(sweep.main, [*words, "--max_iters=40"])
    assert "another sweep (its --vary dropout differs)" in fails(
        sweep.main, [*TINY, "--vary=dropout=0.1,0", "--out_dir=out/grid"])
    assert "contains a run" in fails(sweep.main, [*words[:-1], "--out_dir=out/grid/learning_rate=0.01,seed=1337"])


def test_runs_are_used_without_their_study_and_a_damaged_one_fails_alone(grid, here, capsys):
    shutil.copytree(grid[0], here, dirs_exist_ok=True)
    Path("out/grid/study.db").unlink()
    log = Path("out/grid/learning_rate=0.001,seed=1337/log.jsonl")
    log.write_text(log.read_text().replace('{"kind": "eval"', "{", 1))
    sweep.main([*TINY, "--vary", "learning_rate=1e-2,1e-3", "--seeds=2", "--out_dir=out/grid"])
    out = capsys.readouterr().out
    assert [row["seeds"] for row in table(out)] == ["2", "1"] and out.count("tokens/s\n") == 3
    assert f"failed: learning_rate=0.001,seed=1337: {log}, line " in out and "is damaged" in out


# ---- stopping, dying, failing, sharing ----


def test_a_stopped_sweep_resumes_its_runs_bit_for_bit(with_data, capsys):
    import train
    words = [*LONG, "--vary", "learning_rate=1e-3", "--seeds=1", "--out_dir=out/stopped"]
    log = Path("out/stopped/learning_rate=0.001,seed=1337/log.jsonl")  # of the second run
    process = start(*words)
    wait_for(lambda: log.exists() and records(log.parent, "eval"))
    process.send_signal(signal.SIGINT)  # a terminal would also send it to train.py
    out, error = process.communicate()
    assert process.returncode == 130 and error.endswith("stopped: the same command resumes the sweep\n")
    assert [row["verdict"] for row in table(out)] == ["baseline", "not finished"]
    assert [record["reason"] for record in records(log.parent, "end")] == ["stopped"]
    sweep.main([*TINY, *words])
    assert [record["resumed_at"] for record in records(log.parent, "run")][1:] != []
    assert len(records(log.parent.with_name("learning_rate=0.01,seed=1337"), "run")) == 1
    train.main([*TINY, *LONG, "--learning_rate=1e-3", "--out_dir=out/whole"])
    assert final_losses("out/stopped")[log.parent.name] == final_losses("out")["whole"]


def test_a_killed_sweep_is_noticed_by_its_heartbeat_and_taken_up(with_data, monkeypatch, capsys):
    words = [*LONG, "--vary=learning_rate=1e-2", "--seeds=1", "--out_dir=out/killed"]
    process = start(*words)
    folder = Path("out/killed/learning_rate=0.01,seed=1337")
    wait_for(lambda: (folder / "log.jsonl").exists() and records(folder, "eval"))
    children = [int(child) for tasks in Path(f"/proc/{process.pid}/task").glob("*/children")
                for child in tasks.read_text().split()]
    process.kill()
    for child in children:  # train.py would go on, and the lock of its run make the next one wait until it ends
        os.kill(child, signal.SIGKILL)
    process.communicate()
    monkeypatch.setattr(sweep, "GRACE_SECONDS", 2)
    sweep.main([*TINY, *words])
    out = capsys.readouterr().out
    assert "0 of 1 runs are finished" in out
    assert [trial.state.name for trial in trials_of("out/killed")] == ["FAIL", "COMPLETE"]
    assert len(table(out)) == 1 and records(folder, "eval")[-1]["iter"] == 2000


@pytest.mark.filterwarnings("ignore")  # of experimental functions, and that ask() sends no heartbeat
def test_no_two_jobs_take_the_same_trial(here):
    study = optuna.create_study(storage=sweep.open_storage("sqlite:///study.db"))
    for _ in range(20):
        study.enqueue_trial({})
    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda _: study.ask().number, range(20)))
    assert sorted(numbers) == list(range(20))


def test_two_commands_share_a_sweep_of_seeds_alone_which_measures_the_noise(with_data):
    processes = [start("--seeds=4"), start("--seeds=4")]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert set(final_losses("out/tinystories-seeds")) == {f"seed={seed}" for seed in range(1337, 1341)}
    assert all(len(records(folder, "run")) == 1 for folder in Path("out/tinystories-seeds").glob("*/"))
    row, = table(outputs[0][0])
    assert row["seeds"] == "4" and "±" in row["validation loss"] and row["verdict"] == "baseline"
    assert table(outputs[1][0]) == [row] and "failed" not in outputs[0][0] + outputs[1][0]
    assert sum(output.count("tokens/s\n") for output, _ in outputs) == 4


def test_a_failed_run_is_recorded_and_tried_again_by_the_next_command(with_data, capsys):
    words = [*TINY, "--vary", "learning_rate=1e4", "--seeds=1", "--out_dir=out/failing"]
    sweep.main(words)
    out = capsys.readouterr().out
    assert [row["verdict"] for row in table(out)] == ["baseline", "failed"]
    assert out.count("failed: learning_rate=10000.0,seed=1337: the loss is nan at iteration 8") == 1
    assert "2/2 learning_rate=10000.0,seed=1337: failed: the loss is nan" in out
    sweep.main(words)
    assert "1 of 2 runs are finished" in capsys.readouterr().out
    assert [trial.state.name for trial in trials_of("out/failing")] == ["COMPLETE", "FAIL", "FAIL"]


def test_if_all_runs_fail_it_is_one_line(with_data, fails):
    assert "all 2 runs failed, the last one with: the loss is nan" in fails(
        sweep.main, [*TINY, "--learning_rate=1e4", "--seeds=2", "--jobs=2", "--out_dir=out/a?b%41{c}"])
    assert Path("out/a?b%41{c}/study.db").exists()


@pytest.mark.parametrize("code, reason, error", [
    (0, "finished", None), (0, "stopped", "^$"), (130, None, "^$"),
    (-signal.SIGINT, None, "^$"), (-signal.SIGTERM, None, "^$"), (-signal.SIGKILL, None, "was killed by signal 9"),
    (1, None, "^a reason$")])
def test_how_a_run_ended(here, code, reason, error):
    """Whether it was stopped is in the last record of its log, whatever train.py prints; "^$": it is queued again."""
    end = [{"kind": "end", "iter": 8, "reason": reason}] if reason else []
    Path("log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [{"kind": "run"}, *end]))
    running, trial = sweep.Sweep({}, Config(), {}, [1], 0, False, 1, ""), optuna.create_study().ask()
    with pytest.raises(sweep.NoResult, match=error) if error else nullcontext():
        sweep.check_finished(running, trial, code, ["stopped after step 4", "error: a reason"], "log.jsonl")
    assert ("error" in trial.user_attrs) == (error not in (None, "^$"))
    running.stop.set()  # then also a run that fails is queued again, but not one that has just finished
    with pytest.raises(sweep.NoResult, match="^$") if error else nullcontext():
        sweep.check_finished(running, trial, code, ["error: a reason"], "log.jsonl")


def test_a_trial_that_was_not_queued_is_skipped():
    """Two jobs see one run in the queue: for the one that comes too late, Optuna makes a new trial."""
    study = optuna.create_study()
    grid = sweep.Sweep({}, Config(), {"bias": [True]}, [1], 0, False, 2, "", study)
    with pytest.raises(sweep.NoResult, match=sweep.SKIPPED):
        sweep.train_run(grid, 0, study.ask())
    study.enqueue_trial({}, {"seed": 2, "settings": {"bias": True}})  # of an earlier command with more seeds
    with pytest.raises(sweep.NoResult, match=sweep.SKIPPED):
        sweep.train_run(grid, 0, study.ask())
    assert sweep.best_trials(grid) == {}


# ---- a search ----


def test_only_the_first_seed_is_pruned(trained):
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=0))
    search = sweep.Sweep({}, Config(), {"dropout": [0.5]}, [1, 2], 2, True, 1, "", study)
    for seed, pruned in ((1, True), (2, False)):
        trial = study.ask()
        trial.set_user_attr("seed", seed)
        trial.set_user_attr("settings", {"dropout": 0.5})
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"])
        assert sweep.report_losses(search, trial, process, trained / "out/tiny/log.jsonl") is pruned
        process.kill()
        process.wait()


def test_a_search_without_new_settings_ends(with_data, capsys):
    words = [*TINY, "--vary=lr_schedule=cosine,linear", "--trials=5", "--jobs=2", "--out_dir=out/few"]
    sweep.main(words)
    assert len(final_losses("out/few")) <= 2 and len(table(capsys.readouterr().out)) == len(final_losses("out/few"))
    trials = trials_of("out/few")
    assert {trial.user_attrs["error"] for trial in trials} <= {"", sweep.SKIPPED}
    # A job that looks for a run when the other one has just taken the last adds a trial without a seed, and skips it.
    assert sum("seed" in trial.user_attrs for trial in trials) == 5 and len(trials) <= 6
    sweep.main(words)
    assert len(trials_of("out/few")) == len(trials)


def test_a_search_samples_its_ranges_and_plots_what_matters(with_data, capsys, fails):
    words = [*TINY, "--vary", "learning_rate=1e-3..2e-2:log", "--vary", "optimizer=adamw,muon", "--trials=4",
             "--jobs=2", "--out_dir=out/search"]
    sweep.main([*words, "--picture"])
    first, *others = table(out := capsys.readouterr().out)
    assert (first["optimizer"], first["learning_rate"], first["verdict"]) == ("adamw", "0.01", "baseline")
    assert len(others) == 3 and all(1e-3 <= float(row["learning_rate"]) <= 2e-2 for row in others)
    losses = [float(row["validation loss"]) for row in others]
    assert losses == sorted(losses) and {row["verdict"] for row in others} == {"not distinguishable (one seed)"}
    for name in ("losses", "importances", "parallel_coordinate"):
        assert Path(f"out/search/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert ("--seed=1338 --out_dir=out/search-best" in out) == (losses[0] < float(first["validation loss"]))
    words[words.index("learning_rate=1e-3..2e-2:log")] = "learning_rate=1e-3..1e-2:log"
    assert "another sweep (its --vary learning_rate differs)" in fails(sweep.main, words)


def test_the_best_settings_are_confirmed_also_without_a_baseline():
    search = sweep.Sweep({}, Config(), {"dropout": sweep.Range(0.0, 0.5, False)}, [7], 2, True, 1, "")

    def trial(dropout, loss):
        state = optuna.trial.TrialState.FAIL if loss is None else optuna.trial.TrialState.COMPLETE
        return optuna.create_trial(state=state, value=loss, user_attrs={"settings": {"dropout": dropout}, "seed": 7})

    runs = {"a": trial(Config().dropout, 2.0), "b": trial(0.2, 2.1), "c": trial(0.3, 2.2)}
    assert sweep.confirmation(search, runs) == "no settings have a lower loss than the config as it is"
    runs["a"] = trial(Config().dropout, None)
    assert "\n--vary dropout=0.2 --seeds 5 --seed=8 --out_dir=" in sweep.confirmation(search, runs)


def test_a_bad_setting_is_pruned_and_the_others_get_all_seeds(with_data, monkeypatch, capsys):
    """The median of one run is enough here; the baseline, which is not in the range, is trained first."""
    pruner = functools.partial(optuna.pruners.MedianPruner, n_startup_trials=1)
    monkeypatch.setattr(optuna.pruners, "MedianPruner", pruner)
    words = [*TINY, *LONG, "--vary", "learning_rate=1e-7", "--trials=2", "--seeds=2", "--out_dir=out/pruned"]
    sweep.main(words)
    assert set(final_losses("out/pruned")) == {"learning_rate=1e-07,seed=1337", "learning_rate=0.01,seed=1337",
                                               "learning_rate=0.01,seed=1338"}
    folder = Path("out/pruned/learning_rate=1e-07,seed=1337")
    assert 1000 <= records(folder, "eval")[-1]["iter"] < 2000 and (folder / "last.pt").exists()
    out = capsys.readouterr().out
    assert [(row["seeds"], row["verdict"]) for row in table(out)] == [("2", "baseline"), ("0", "pruned")]
    assert "learning_rate=1e-07,seed=1337: pruned at iteration " in out
    states = [(trial.state.name, trial.user_attrs["seed"]) for trial in trials_of("out/pruned")]
    assert sorted(states) == [("COMPLETE", 1337), ("COMPLETE", 1338), ("PRUNED", 1337)]
    identity = optuna.load_study(study_name="pruned", storage="sqlite:///out/pruned/study.db").user_attrs["identity"]
    assert json.loads(json.dumps(identity)) == identity and identity["max_iters"] == 2000
