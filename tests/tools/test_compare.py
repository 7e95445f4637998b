"""tools/compare.py: the table and the plot."""

import builtins
import json
import os
import shutil
import signal
import time
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


def watch(monkeypatch, steps, *words):
    """Run compare with --watch; instead of each pause, the generator `steps` goes on, and Ctrl-C follows its end."""
    monkeypatch.setattr(time, "sleep", lambda seconds: next(steps, None) or os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as exit:
        compare.main([*words, "--watch"])
    assert exit.value.code == 130


def test_watching_runs_from_before_their_start(two_runs, here, monkeypatch, capsys):
    lines = (two_runs / "out/tiny/log.jsonl").read_text().splitlines(keepends=True)
    first, second, third = (i for i, line in enumerate(lines) if '"eval"' in line)
    losses = [f"{json.loads(lines[i])['val_loss']:.4f}" for i in (first, second, third)]
    log, picture = Path("out/a/log.jsonl"), Path("out/compare.png")

    def training():
        assert capsys.readouterr().out == ("waiting for a run to begin in out/a (there is no such folder yet)\n"
                                           "waiting for a run to begin in out/b (there is no such folder yet)\n")
        log.parent.mkdir(parents=True)
        log.touch()
        yield True
        assert capsys.readouterr().out == ""
        log.write_text("".join(lines[:first]))
        yield True
        (a,), rest = rows(capsys.readouterr().out)
        assert a["run"] == "out/a" and rest == ["no plot: none of these runs has been evaluated yet"]
        log.write_text("".join(lines[:first + 1]) + lines[second][:30])
        yield True
        out, before = capsys.readouterr().out, picture.read_bytes()
        assert out.endswith(f"  out/a: 512 tokens, validation loss {losses[0]}\n") and out[2] == out[5] == ":"
        log.write_text("".join(lines[:second]))  # training steps, which are not in the picture
        yield True
        assert capsys.readouterr().out == ""
        shutil.copytree(two_runs / "out/other", "out/b")
        log.write_text("".join(lines[:second + 1]))
        yield True
        assert len(rows(capsys.readouterr().out)[0]) == 2 and picture.read_bytes() != before
        before = picture.read_bytes()
        log.write_text("".join(lines))
        yield True
        assert capsys.readouterr().out[8:] == f"  out/a: 1,536 tokens, validation loss {losses[2]}\n"
        assert picture.read_bytes() != before

    watch(monkeypatch, training(), "out/a", "out/b")
    assert capsys.readouterr() == ("", "stopped\n") and sorted(os.listdir("out")) == ["a", "b", "compare.png"]


def test_watching_runs_that_are_resumed_replaced_and_deleted(two_runs, here, monkeypatch, capsys, fails):
    for name in ("seed=1", "seed=2"):
        shutil.copytree(two_runs / "out/tiny", f"out/sweep/{name}")
    log = Path("out/sweep/seed=1/log.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    first, second, _ = (i for i, line in enumerate(lines) if '"eval"' in line)

    def training():
        assert rows(capsys.readouterr().out)[0][0]["seeds"] == "2"
        log.write_text("".join(lines[:second + 1] + lines[:1]))  # resumed from an earlier checkpoint
        yield True
        assert "  out/sweep/seed=1: 1,024 tokens" in capsys.readouterr().out
        log.write_text("".join(lines).replace('"seed": 1337', '"seed": 7'))  # replaced
        yield True
        assert rows(capsys.readouterr().out)[0][0]["seeds"] == "2"
        log.write_text("")
        yield True
        assert rows(capsys.readouterr().out)[0][0]["run"] == "out/sweep/seed=2"
        shutil.rmtree("out/sweep")
        yield True
        assert capsys.readouterr().out == "waiting for a run to begin in out/sweep (there is no such folder yet)\n"

    watch(monkeypatch, training(), "out/sweep")
    shutil.copytree(two_runs / "out/tiny", "out/foreign")
    Path("out/foreign/log.jsonl").write_text('{"kind": "run"}\n')
    assert "out/foreign/log.jsonl is not a log" in fails(compare.main, ["out/foreign", "--watch"])
    assert "no log in out/foreign/log.jsonl" in fails(compare.main, ["out/foreign/log.jsonl", "--watch"])


def test_a_picture_that_cannot_be_written_leaves_the_old_one(two_runs, monkeypatch, fails):
    from matplotlib.figure import Figure
    monkeypatch.chdir(two_runs)
    compare.main(["out/tiny", "--picture", "out/kept.png"])
    before = Path("out/kept.png").read_bytes()
    assert before.startswith(PNG)

    def write_half(figure, target, **options):
        with open(target, "wb") if isinstance(target, str | Path) else target as file:
            file.write(before[:100])
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(Figure, "savefig", write_half)
    assert "cannot write the plot out/kept.png" in fails(compare.main, ["out/tiny", "--picture", "out/kept.png"])
    assert Path("out/kept.png").read_bytes() == before


def test_user_errors_print_one_line(two_runs, monkeypatch, fails):
    monkeypatch.chdir(two_runs)
    assert "no log in out/nothing" in fails(compare.main, ["out/tiny", "out/nothing"])
    assert "RUN" in fails(compare.main, [], code=2)
    assert "cannot write the plot out/x.docx" in fails(compare.main, ["out/tiny", "--picture", "out/x.docx"])
    assert "cannot write the plot out/tiny: " in fails(compare.main, ["out/tiny", "--picture", "out/tiny"])
    for path in ("out/x.docx", "out/tiny"):
        assert f"cannot write the plot {path}: " in fails(compare.main, ["out/tiny", "--watch", "--picture", path])
    assert not any(Path("out").glob(".*.partial"))
    shutil.copytree("out/tiny", "out/torn", dirs_exist_ok=True)
    Path("out/torn/log.jsonl").write_text("")
    assert "out/torn/log.jsonl is empty" in fails(compare.main, ["out/torn"])
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
