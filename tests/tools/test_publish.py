"""tools/publish.py: what TensorBoard and Weights & Biases receive equals the log and stories, also during training."""

import html
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import ROOT
from faults.processes import locked
from storygpt.run import read_log
from tools import publish

NAMES = {"step": ("train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s"),
         "eval": ("eval/train_loss", "eval/val_loss", "eval/val_bpb")}
STORIES = {8: "Tim &amp; <b>Ann</b>\nsaid: \"## iteration 7\"\n\n- *hm*\r\n\n\n   ", 16: "",
           24: "\n\nOnce upon a time, 小猫 🐈\x00\x85\u2028"}


@pytest.fixture(autouse=True)
def wandb_environment(monkeypatch):
    """Set W&B to offline mode and remove all other variables of W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false", "PROJECT": "mine"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)


def metrics(folder):
    """The metrics in the log: published name → [(iteration, value)], without the missing ones."""
    records = read_log(folder / "log.jsonl")
    return {name: [(record["iter"], pytest.approx(value)) for record in records
                   if record["kind"] == kind and (value := record[name.partition("/")[2]]) is not None]
            for kind, names in NAMES.items() for name in names}


def read_tensorboard(folder):
    """What the event file has received, name → [(iteration, value)], and the times."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray
    (path,), found, times = folder.glob("tensorboard/events.out.tfevents.*"), {}, []
    for event in EventFileLoader(str(path)).Load():
        for item in event.summary.value:
            value = make_ndarray(item.tensor).item()
            value = value.decode() if isinstance(value, bytes) else value
            found.setdefault(item.tag.removesuffix("/text_summary"), []).append((event.step, value))
            times.append(event.wall_time)
    return found, times


def read_wandb(folder):
    """What the only W&B run of a folder has received, as `read_tensorboard`; the settings are the latest ones."""
    from wandb.proto.wandb_internal_pb2 import Record
    (path,), at, settings, found = folder.glob("wandb/offline-run-*/*.wandb"), 7, {}, {"story": []}  # 7: W&B's header
    data = path.read_bytes()
    while at < len(data):  # protocol buffers in LevelDB's log format; the file is so small that each is in one piece
        _, length = struct.unpack_from("<IH", data, at)
        record = Record.FromString(data[at + 7:at + 7 + length])
        at += 7 + length
        if record.HasField("run"):
            settings |= {"project": record.run.project, "name": record.run.display_name}
        for item in (*record.run.config.update, *record.config.update):
            settings[item.key] = item.value_json and json.loads(item.value_json)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            found.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    for iteration, file in found["story/path"]:
        text = (path.parent / "files" / file).read_bytes().decode().split('<pre style="white-space:pre-wrap">')[1]
        found["story"].append((iteration, html.unescape(text.removesuffix("</pre>"))))
    times = [seconds for _, seconds in found["_timestamp"]]
    names = ("story", *NAMES["step"], *NAMES["eval"])
    return {name: found[name] for name in names if name in found} | {"settings": settings}, times


def write_log(folder, records, stories=(), rest=""):
    """Write a run's log, which ends with the text `rest`, and the stories of these iterations."""
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + rest)
    if stories:
        text = "".join(f"## iteration {i}: validation loss 1.2345\n\n{STORIES[i]}\n\n" for i in stories)
        (folder / "samples.md").write_bytes(text.encode())


def start(resumed_at=None, **settings):
    return {"kind": "run", "resumed_at": resumed_at, "config": {"n_layer": 2, "max_iters": 16} | settings}


def record(kind, iteration, **values):
    """The record of a training step or of an evaluation."""
    metrics = {name.partition("/")[2]: i + 1 / iteration for i, name in enumerate(NAMES[kind])}
    return {"kind": kind, "iter": iteration, "seconds": 10 * iteration} | metrics | values


def train_and_resume(folder):
    """Write the log and the stories of a run as it trains, is stopped at iteration 16, and resumed from 8."""
    with locked(folder):
        yield  # training has begun, but has logged nothing
        first = [start(), record("step", 2, grad_norm=None), record("step", 4), record("step", 8)]
        write_log(folder, first, rest='{"kind": "eval", "it')
        yield
        write_log(folder, first := [*first, record("eval", 8)])  # its story is not written yet
        yield
        write_log(folder, [*first, record("step", 12), record("step", 16), record("eval", 16)], [8, 16])
        yield
        write_log(folder, first, [8])
        yield
        again = [record("step", 12, tokens_per_s=1.5), record("step", 14), record("step", 16), record("eval", 16)]
        write_log(folder, [*first, start(8, max_iters=24), *again, record("step", 24), record("eval", 24)], [8, 16, 24])


@pytest.mark.parametrize("to, read", [("tensorboard", read_tensorboard), ("wandb", read_wandb)])
def test_everything_is_published_once_also_of_a_run_that_is_stopped_and_resumed(to, read, here, monkeypatch):
    package = pytest.importorskip(to)
    folder = here / "out/x"
    folder.mkdir(parents=True)
    training = train_and_resume(folder)
    next(training)

    def read_slowly(path):
        """Read the log, and only then let the training go on, as in the worst case."""
        records = read_log(path)
        next(training, None)
        return records
    monkeypatch.setattr(publish, "read_log", read_slowly)
    monkeypatch.setattr(publish, "time", SimpleNamespace(  # not time.sleep, which threads of wandb use
        sleep=lambda seconds: (folder / "log.jsonl").exists() or next(training)))
    publish.main([str(folder), "--to", to])
    if to == "wandb":
        package.teardown()  # waits for its process, which may still be writing

    found, times = read(folder)
    settings, expected = found.pop("settings"), metrics(folder) | {"story": list(STORIES.items())}
    expected["train/tokens_per_s"][3] = (12, pytest.approx(3 + 1 / 12))  # published before the run was resumed
    if to == "wandb":  # iteration 16 was published before 14, and W&B's iterations may only increase
        expected = {name: [value for value in values if value[0] != 14] for name, values in expected.items()}
        assert {"project": "mine", "name": "x", "n_layer": 2, "max_iters": 24}.items() <= settings.items()
    else:
        assert [(iteration, text.replace(" ", "").splitlines()[2:]) for iteration, text in settings] == [
            (0, ["|n_layer|2|", "|max_iters|16|"]), (8, ["|n_layer|2|", "|max_iters|24|"])]
    assert {name: sorted(values) for name, values in found.items()} == expected
    assert max(times) == pytest.approx((folder / "log.jsonl").stat().st_mtime, abs=0.01)


@pytest.fixture
def short(here):
    """A run with two evaluations, out/x."""
    folder = Path("out/x")
    folder.mkdir(parents=True)
    write_log(folder, [start(), record("eval", 8), record("eval", 24)], [8, 24])
    return folder


def test_publishing_again_replaces_event_files_unless_the_log_is_damaged(short, capsys, fails):
    pytest.importorskip("tensorboard")
    for _ in range(2):
        publish.main(["out/x/", "--to=tensorboard"])
        (short / "tensorboard/mine.txt").write_text("mine")
    found, times = read_tensorboard(short)
    assert found["eval/val_loss"] == metrics(short)["eval/val_loss"]
    assert max(times) - min(times) == pytest.approx(240, abs=1e-3)
    assert (short / "tensorboard/mine.txt").exists()
    assert "view: tensorboard --logdir out\n" in capsys.readouterr().out
    shutil.copytree("out/x", "my runs/x")
    publish.main(["my runs/x", "--to=tensorboard"])
    assert "view: tensorboard --logdir 'my runs'\n" in capsys.readouterr().out
    (short / "log.jsonl").write_text("{}\n")
    assert "line 1 is damaged" in fails(publish.main, ["out/x", "--to=tensorboard"])
    assert read_tensorboard(short) == (found, times)


def test_a_run_that_is_replaced_by_another_is_an_error(short, monkeypatch, fails):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(publish, "time", SimpleNamespace(sleep=lambda seconds: write_log(short, [start(n_layer=3)])))
    with locked(short):
        assert "out/x was replaced" in fails(publish.main, ["out/x", "--to=tensorboard"])


def test_folders_without_a_log_give_one_line(short, fails):
    for folder in ("out", "out/nothing"):
        assert f"no log in {folder}: give a run folder" in fails(publish.main, [folder, "--to=tensorboard"])
    assert os.listdir("out") == ["x"]


@pytest.mark.parametrize("to", ["tensorboard", "wandb"])
def test_missing_packages_give_one_line(to, short, monkeypatch, fails):
    for name in (to, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install -r requirements.txt" in fails(publish.main, ["out/x", "--to", to])


@pytest.mark.parametrize("mode, complaint", [("online", "No API key configured"), ("onlin", "onlin")])
def test_wandb_errors_give_one_line(mode, complaint, short, here, monkeypatch, fails):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": mode, "HOME": str(here), "NETRC": str(here / "none")}.items():
        monkeypatch.setenv(name, value)
    line = fails(publish.main, ["out/x", "--to", "wandb"])
    wandb.teardown()
    assert line.startswith("error: cannot create a W&B run: ") and complaint in line and "WANDB_MODE=offline" in line


def test_a_run_of_train_py(run):
    pytest.importorskip("tensorboard")
    folder = Path("out/tiny")
    publish.main(["out/tiny/", "--to=tensorboard"])
    (found, _), losses = read_tensorboard(folder), dict(metrics(folder)["eval/val_loss"])
    assert {name: found[name] for name in metrics(folder)} == metrics(folder)
    assert (folder / "samples.md").read_bytes().decode() == "".join(
        f"## iteration {i}: validation loss {losses[i].expected:.4f}\n\n{story}\n\n" for i, story in found["story"])


@pytest.mark.slow
def test_ctrl_c_leaves_everything_published_on_wandb(short):
    """In a process group of its own: a terminal interrupts also the process that wandb started."""
    pytest.importorskip("wandb")
    with locked(short):
        publishing = subprocess.Popen([sys.executable, "-m", "tools.publish", short.absolute(), "--to=wandb"], cwd=ROOT,
                                      start_new_session=True, stderr=subprocess.PIPE, text=True)
        while len(list(short.glob("wandb/offline-run-*/files/media/html/*"))) < 2:  # the first one is then published
            time.sleep(0.05)
        os.killpg(publishing.pid, signal.SIGINT)
        _, error = publishing.communicate()
    assert publishing.returncode == 130 and error.endswith("stopped\n"), error
    found, _ = read_wandb(short)
    assert found["story"][0] == (8, STORIES[8]) and found["eval/val_loss"][0] == metrics(short)["eval/val_loss"][0]
