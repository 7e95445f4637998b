"""tools/compare.py: the table and the plot."""

import builtins
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="pip install -r requirements-extra.txt")

import train
from conftest import TINY
from tools import compare

PNG = b"\x89PNG\r\n\x1a\n"


def rows(text):
    """The printed table as a dict per run, and the lines printed after it."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0] == "|"]
    del lines[1]  # the line under the header
    lines = list(zip(*lines)) if not lines[1][0].startswith("out/") else lines  # a column per run
    return [dict(zip(lines[0], line)) for line in lines[1:]], [x for x in text.splitlines() if x[0] != "|"]


@pytest.fixture(scope="module")
def two_runs(trained, tmp_path_factory):
    """A folder with the runs out/tiny and out/other, which differ in two settings."""
    folder = tmp_path_factory.mktemp("two_runs")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        train.main([*TINY, "--out_dir=out/other", "--learning_rate=5e-3", "--optimizer=muon"])
    return folder


def pixels(path):
    """The pixels of a PNG file, (height, width, 4), from 0 to 1."""
    from matplotlib.image import imread
    return imread(path)


def test_the_table_has_differing_settings_and_results(two_runs, monkeypatch, capsys):
    monkeypatch.chdir(two_runs)
    compare.main(["out/tiny", "out/other/", "--picture", "out/a/both.png"])  # out/a does not exist yet
    (tiny, other), rest = rows(capsys.readouterr().out)
    assert list(tiny) == ["run", "optimizer", "learning_rate", "tokens", "seconds", "best validation loss",
                          "at tokens", "bits per byte"]
    assert (tiny["run"], tiny["optimizer"], tiny["learning_rate"]) == ("out/tiny", "adamw", "0.01")
    assert (other["run"], other["optimizer"], other["learning_rate"]) == ("out/other", "muon", "0.005")
    assert tiny["tokens"] == other["tokens"] == "1,536" and rest == ["plot: out/a/both.png"]
    evals = [json.loads(line) for line in Path("out/other/log.jsonl").read_text().splitlines() if '"eval"' in line]
    best = min(evals, key=lambda record: record["val_loss"])
    assert other["best validation loss"] == f"{best['val_loss']:.4f}" and other["at tokens"] == f"{best['tokens']:,}"
    assert other["bits per byte"] == f"{best['val_bpb']:.4f}"
    both = pixels("out/a/both.png")
    assert both.shape[0] > 300 and both.shape[1] > 2 * both.shape[0] and both.std() > 0.05


def test_the_best_evaluation_is_shown_and_a_schedule_that_ends_with_the_run_is_not(two_runs, here, capsys):
    records = [json.loads(line) for line in (two_runs / "out/tiny/log.jsonl").read_text().splitlines()]
    evals = [record for record in records if record["kind"] == "eval"]
    evals[-1]["val_loss"], evals[1]["val_loss"], evals[1]["val_bpb"] = 9.9, 1.5, 0.75
    for name, iters, decay_iters in (("a", 24, 24), ("b", 48, 48), ("c", 48, 24)):
        records[0]["config"] |= {"max_iters": iters, "lr_decay_iters": decay_iters}
        Path("out", name).mkdir(parents=True)
        Path("out", name, "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    compare.main(["out/a", "out/b"])
    (run, _), _ = rows(capsys.readouterr().out)
    assert (run["best validation loss"], run["at tokens"], run["bits per byte"]) == ("1.5000", "1,024", "0.7500")
    assert "lr_decay_iters" not in run
    compare.main(["out/b", "out/c"])
    assert "lr_decay_iters" in capsys.readouterr().out


def test_many_runs_have_a_row_each(two_runs, here, capsys):
    names = [f"out/{i:02}-a-run-with-a-long-name" for i in range(8)]
    for name in names:
        shutil.copytree(two_runs / "out/tiny", name)
    compare.main(names)
    table = [line for line in capsys.readouterr().out.splitlines() if line[0] == "|"]
    assert len(table) == 10 and len({len(line) for line in table}) == 1
    assert [line.split()[1] for line in table[2:]] == names


def test_a_single_run_and_another_format(two_runs, monkeypatch, capsys):
    monkeypatch.chdir(two_runs)
    compare.main(["out/tiny", "--picture", "out/one.svg"])
    (tiny,), _ = rows(capsys.readouterr().out)
    assert list(tiny)[:3] == ["run", "tokens", "seconds"]
    assert Path("out/one.svg").read_text().count("<svg") == 1
    compare.main(["out/tiny"])
    assert Path("out/compare.png").read_bytes().startswith(PNG)


def test_runs_that_are_still_training(two_runs, here, capsys):
    """One log ends in the middle of a line, one before the first evaluation."""
    lines = (two_runs / "out/tiny/log.jsonl").read_bytes().splitlines(keepends=True)
    first_eval = next(i for i, line in enumerate(lines) if b'"eval"' in line)
    for name, text in {"a": b"".join(lines[:first_eval + 2]) + lines[-1][:20], "b": b"".join(lines[:2])}.items():
        Path("out", name).mkdir(parents=True)
        Path("out", name, "log.jsonl").write_bytes(text)  # the only file
    compare.main(["out/a", "out/b"])
    (a, b), _ = rows(capsys.readouterr().out)
    assert (a["tokens"], a["at tokens"]) == ("768", "512") and a["best validation loss"] != "–"
    assert (b["tokens"], b["best validation loss"], b["at tokens"], b["bits per byte"]) == ("128", "–", "–", "–")
    assert pixels("out/compare.png").std() > 0.05


def test_a_log_older_than_a_setting_and_a_name_that_looks_like_a_formula(two_runs, here, capsys):
    records = [json.loads(line) for line in (two_runs / "out/tiny/log.jsonl").read_text().splitlines()]
    for name in ("new", "$\\x$"):
        Path("out", name).mkdir(parents=True)
        Path("out", name, "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        records[0]["config"].pop("optimizer", None)
    compare.main(["out/new", "out/$\\x$"])
    (run, _), _ = rows(capsys.readouterr().out)
    assert list(run)[:2] == ["run", "tokens"]  # no setting differs: a missing one has its default
    compare.main(["out/new"])
    Path("out/new/log.jsonl").write_text(json.dumps(records[0]) + "\n")
    compare.main(["out/new"])
    assert "no plot" in capsys.readouterr().out


def test_different_data_and_different_windows_are_noted(two_runs, here, capsys):
    for name, split, eval_iters in (("a", None, 2), ("b", "validation", 2), ("c", "train", 3)):
        records = [json.loads(line) for line in (two_runs / "out/tiny/log.jsonl").read_text().splitlines()]
        records[0]["data_sha256"][split] = "another"
        records[0]["config"]["eval_iters"] = eval_iters
        Path("out", name).mkdir(parents=True)
        Path("out", name, "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    compare.main(["out/a", "out/b"])
    assert "note: the runs have different validation data" in capsys.readouterr().out
    compare.main(["out/a", "out/c"])
    out = capsys.readouterr().out
    assert "note: the runs are evaluated on different windows" in out and "different validation data" not in out


def test_user_errors_print_one_line(two_runs, monkeypatch, fails):
    monkeypatch.chdir(two_runs)
    assert "no log in out/nothing" in fails(compare.main, ["out/tiny", "out/nothing"])
    assert "RUN" in fails(compare.main, [], code=2)
    assert "cannot write the plot out/x.docx" in fails(compare.main, ["out/tiny", "--picture", "out/x.docx"])
    assert "cannot write the plot out/tiny" in fails(compare.main, ["out/tiny", "--picture", "out/tiny"])
    shutil.copytree("out/tiny", "out/torn", dirs_exist_ok=True)
    Path("out/torn/log.jsonl").write_text("")
    assert "out/torn/log.jsonl is not a log" in fails(compare.main, ["out/torn"])
    for foreign in ({"kind": "run"}, {"kind": "eval", "tokens": 1}):
        Path("out/torn/log.jsonl").write_text(Path("out/tiny/log.jsonl").read_text() + json.dumps(foreign) + "\n")
        assert "out/torn/log.jsonl is not a log" in fails(compare.main, ["out/torn"])
    Path("out/torn/log.jsonl").write_text("{}\n")
    assert "line 1 is damaged" in fails(compare.main, ["out/torn"])


def test_without_matplotlib_the_table_is_still_printed(two_runs, monkeypatch, capsys, fails):
    monkeypatch.chdir(two_runs)
    importing = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as exit:
        compare.main(["out/tiny"])
    out, error = capsys.readouterr()
    assert exit.value.code == 1 and "out/tiny |" in out
    assert error == "error: the plot needs matplotlib: pip install -r requirements-extra.txt\n"
