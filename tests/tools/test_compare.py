"""tools/compare.py: the table and the plot of written logs."""

import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="pip install -r requirements-extra.txt")

from matplotlib.figure import Figure

from conftest import records
from storygpt.settings import Config
from tools import compare


def log_lines(losses, data="a", **settings):
    """The lines of a run's log: its settings, and each 512 tokens and 60 seconds a step and an evaluation."""
    records = [{"kind": "run", "config": asdict(Config()) | settings, "data_sha256": {"validation": data}}]
    for i, loss in enumerate(losses, 1):
        records.append({"kind": "step", "tokens": 512 * i, "seconds": 60 * i - 1})
        records.append({"kind": "eval", "iter": 8 * i, "tokens": 512 * i, "seconds": 60 * i, "train_loss": loss - 1,
                        "val_loss": loss, "val_bpb": loss / 2})
    return [json.dumps(record) + "\n" for record in records]


def write_run(name, losses, **settings):
    """Write a run's log, and nothing else, into the folder out/NAME; returns the folder."""
    folder = Path("out", name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(log_lines(losses, **settings)))
    return folder


def groups(*folders):
    return [group for folder in folders for group in compare.read_groups(folder)]


def rows(text):
    """The printed table as a dict per run."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0] == "|"]
    del lines[1]  # the line under the header
    lines = list(zip(*lines)) if not lines[1][0].startswith("out/") else lines  # a column per run
    return [dict(zip(lines[0], line)) for line in lines[1:]]


@pytest.fixture
def figure(monkeypatch):
    """A function that returns the figure that compare.plot would save."""
    def figure(*folders):
        with monkeypatch.context() as context:
            saved = []
            context.setattr(Figure, "savefig", lambda figure, file, **options: saved.append(figure))
            compare.plot(groups(*folders), "out/not_rendered.png")
        return saved[0]
    return figure


def curves(axes):
    """The curves of a plot: label → points."""
    return {line.get_label(): [(x, pytest.approx(y)) for x, y in line.get_xydata().tolist()] for line in axes.lines}


def test_a_trained_run(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    compare.main(["out/tiny/", "--picture", str(tmp_path / "new/tiny.svg")])
    out = capsys.readouterr().out
    evals = records("out/tiny", "eval")
    best = min(evals, key=lambda record: record["val_loss"])
    (row,) = rows(out)
    seconds = row.pop("seconds")
    assert row == {"run": "out/tiny", "tokens": "1,536", "best validation loss": f"{best['val_loss']:.4f}",
                   "at tokens": f"{best['tokens']:,}", "bits per byte": f"{best['val_bpb']:.4f}"}
    assert int(seconds) == round(evals[-1]["seconds"])
    assert (tmp_path / "new/tiny.svg").read_text().count("<svg") == 1 and out.endswith("tiny.svg\n")


def test_the_table_has_differing_settings_and_the_best_evaluations(here):
    write_run("a", [3, 1.5, 9.9], out_dir="out/a", max_tokens=8, learning_rate=0.25, max_iters=24, lr_decay_iters=24)
    write_run("b", [4], learning_rate=0.5, optimizer="muon", max_iters=48, lr_decay_iters=48)
    a, b = rows(compare.format_table(groups("out/a", "out/b")))
    assert a == {"run": "out/a", "max_iters": "24", "optimizer": "adamw", "learning_rate": "0.25", "tokens": "1,536",
                 "seconds": "180", "best validation loss": "1.5000", "at tokens": "1,024", "bits per byte": "0.7500"}
    assert (b["optimizer"], b["learning_rate"], b["max_iters"]) == ("muon", "0.5", "48")
    write_run("c", [4], max_iters=48, lr_decay_iters=24)
    assert "lr_decay_iters" in compare.format_table(groups("out/b", "out/c"))


def test_many_runs_have_a_row_each_and_few_with_many_settings_a_column(here):
    names = [str(write_run(f"{i:02}-a-run-with-a-long-name", [4])) for i in range(8)]
    lines = compare.format_table(groups(*names)).splitlines()
    assert [line.split()[1] for line in lines[2:]] == names and len({len(line) for line in lines}) == 1
    write_run("other", [4], n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0)
    assert compare.format_table(groups(names[0], "out/other")).splitlines()[2].startswith("| n_layer ")


def test_runs_that_are_still_training(here):
    """One log ends in the middle of a line, one before the first evaluation."""
    lines = log_lines([3, 2])
    for name, text in {"a": "".join(lines[:4]) + lines[4][:20], "b": lines[0]}.items():
        write_run(name, []).joinpath("log.jsonl").write_text(text)
    a, b = rows(compare.format_table(groups("out/a", "out/b")))
    assert (a["tokens"], a["seconds"], a["at tokens"], a["best validation loss"]) == ("1,024", "119", "512", "3.0000")
    assert (b["tokens"], b["best validation loss"], b["at tokens"], b["bits per byte"]) == ("0", "–", "–", "–")


def test_settings_that_a_log_lacks_have_their_default_and_unused_ones_are_not_shown(here):
    for name, missing, settings in (("new", "", {}), ("old", "optimizer", {}), ("timed", "", {"max_minutes": 1})):
        start = json.loads(log_lines([], **settings)[0])
        start["config"].pop(missing, None)
        write_run(name, []).joinpath("log.jsonl").write_text(json.dumps(start) + "\n")
    assert list(rows(compare.format_table(groups("out/new", "out/old")))[0])[:2] == ["run", "tokens"]
    assert rows(compare.format_table(groups("out/new", "out/timed")))[1]["max_iters"] == "–"


def test_runs_that_differ_in_the_seed_are_one_row_and_one_curve(here, figure):
    write_run("sweep/lr=1,seed=1", [4, 3], learning_rate=1, seed=1, out_dir="out/1")
    write_run("sweep/lr=1,seed=2", [5], learning_rate=1, seed=2, device="cuda:1")
    write_run("sweep/lr=1,seed=3", [], learning_rate=1, seed=3)
    write_run("sweep/lr=2,seed=1", [2, 1], seed=1, learning_rate=2)
    write_run("sweep/lr=2,seed=2", [2, 1], seed=2, learning_rate=2, data="b")
    Path("out/sweep/lr=2,seed=3").mkdir()
    first, *others = rows(compare.format_table(groups("out/sweep")))
    assert first == {"run": "out/sweep/lr=1", "learning_rate": "1", "seeds": "3", "tokens": "0–1,024",
                     "seconds": "0–120", "best validation loss": "4.0000 ± 1.4142", "at tokens": "512–1,024",
                     "bits per byte": "2.0000 ± 0.7071"}
    assert [(row["run"], row["seeds"]) for row in others] == [
        ("out/sweep/lr=2,seed=1", "1"), ("out/sweep/lr=2,seed=2", "1")]
    assert compare.group_name([{"name": f"out/x-seeds/seed={seed}"} for seed in (1, 2)]) == "out/x-seeds"
    assert compare.curve(groups("out/sweep")[0], "val_loss") == ([512e-6], [1], [4], [4.5], [5])
    by_tokens = figure("out/sweep").axes[0]
    assert curves(by_tokens) == {"out/sweep/lr=1": [(512e-6, 2.25)],  # bits per byte, as the data differ
                                 "out/sweep/lr=2,seed=1": [(512e-6, 1), (1024e-6, 0.5)],
                                 "out/sweep/lr=2,seed=2": [(512e-6, 1), (1024e-6, 0.5)]}
    bands = [band.get_paths()[0].get_extents() for band in by_tokens.collections]
    assert [(band.ymin, band.ymax) for band in bands] == [(2, 2.5), (0.5, 1), (0.5, 1)]
    assert by_tokens.get_ylabel() == "validation loss (bits per byte)"


def test_different_data_and_different_windows_are_noted(here, capsys):
    write_run("a", [])
    write_run("b", [], data="b")
    write_run("c", [], eval_iters=3)
    compare.main(["out/a", "out/b"])
    assert "note: the runs have different validation data" in capsys.readouterr().out
    compare.main(["out/a", "out/c"])
    out = capsys.readouterr().out
    assert "note: the runs are evaluated on different windows" in out and "different validation data" not in out


def test_the_plot_of_a_single_run_and_of_several(here, figure):
    write_run("a", [3, 2])
    write_run("b", [])
    by_tokens, by_time = figure("out/a").axes
    assert curves(by_tokens) == {"out/a": [(512e-6, 3), (1024e-6, 2)], "training loss": [(512e-6, 2), (1024e-6, 1)]}
    assert curves(by_time) == {"out/a": [(1, 3), (2, 2)], "training loss": [(1, 2), (2, 1)]}
    both = figure("out/a", "out/b")
    assert curves(both.axes[0]) == {"out/a": [(512e-6, 3), (1024e-6, 2)], "out/b": []}
    assert [text.get_text() for text in both.legends[0].get_texts()] == ["out/a", "out/b"]
    assert both.axes[0].get_yscale() == "log" and both.axes[0].get_ylabel() == "validation loss (nats/token)"


def test_a_picture_that_cannot_be_written_leaves_the_old_one(here, monkeypatch, fails):
    write_run("a", [3])
    compare.main(["out/a"])
    before = Path("out/compare.png").read_bytes()
    assert before.startswith(b"\x89PNG\r\n\x1a\n")
    assert "cannot write the plot out/x.docx" in fails(compare.main, ["out/a", "--picture", "out/x.docx"])
    assert "cannot write out/a (Is a directory)" in fails(compare.main, ["out/a", "--picture", "out/a"])

    def write_half(figure, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Figure, "savefig", write_half)
    assert "cannot write out/compare.png (No space left" in fails(compare.main, ["out/a"])
    assert Path("out/compare.png").read_bytes() == before


def test_without_matplotlib_the_table_is_still_printed(here, monkeypatch, capsys):
    write_run("a", [3])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as exit:
        compare.main(["out/a"])
    out, error = capsys.readouterr()
    assert exit.value.code == 1 and rows(out)[0]["run"] == "out/a"
    assert "error: import of matplotlib.figure halted" in error and error.endswith("requirements-extra.txt\n")


def test_folders_without_a_run_give_one_line(here, fails, capsys):
    write_run("a", [3])
    write_run("empty", []).joinpath("log.jsonl").write_text("")
    for folder in ("out/nothing", "out/empty", "out/a/log.jsonl"):
        compare.main(["out/a", folder])
        assert f"note: no log in {folder}: " in capsys.readouterr().out
        assert f"no log in {folder}: " in fails(compare.main, [folder])


def test_watching_runs_from_before_their_start(here, monkeypatch, capsys):
    """Instead of each pause, the run goes on and what was printed is checked; at the end comes Ctrl-C."""
    lines = log_lines([4, 3, 2], seed=1)
    picture = Path("out/compare.png")

    def runs():
        assert "waiting for a run in out/a\nwaiting for a run in out/sweep\n" in capsys.readouterr().out
        log = write_run("a", []) / "log.jsonl"
        yield
        out = capsys.readouterr().out
        assert rows(out)[0]["best validation loss"] == "–" and out.endswith("waiting for a run in out/sweep\n")
        log.write_text("".join(lines[:3]))
        yield
        assert rows(capsys.readouterr().out)[0]["best validation loss"] == "4.0000"
        before = picture.read_bytes()
        log.write_text("".join(lines[:4]) + lines[4][:20])  # a training step and half an evaluation
        yield
        assert capsys.readouterr().out == "" and picture.read_bytes() == before
        log.write_text("".join(lines[:5]))
        yield
        assert rows(capsys.readouterr().out)[0]["tokens"] == "1,024" and picture.read_bytes() != before
        write_run("sweep/seed=1", [4])
        yield
        assert len(rows(capsys.readouterr().out)) == 2
        write_run("a", [4, 3], learning_rate=1)  # replaced by another run
        yield
        assert rows(capsys.readouterr().out)[0]["learning_rate"] == "1"
        shutil.rmtree("out/a")
        yield
        assert "waiting for a run in out/a" in capsys.readouterr().out
        raise KeyboardInterrupt

    steps = runs()
    monkeypatch.setattr(time, "sleep", lambda seconds: next(steps))
    with pytest.raises(SystemExit) as exit:
        compare.main(["out/a", "out/sweep", "--watch"])
    assert exit.value.code == 130 and capsys.readouterr() == ("", "stopped\n")
