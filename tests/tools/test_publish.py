"""tools/publish: what TensorBoard and Weights & Biases receive equals the log and stories, also during training."""

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

import train
from conftest import ROOT, TINY
from faults.processes import (ForkedProcess, check_one_line_error, check_success, limit_file_size, run as run_process,
                              wait_for_steps)
from storygpt.run import read_log
from tools import publish

PUBLISH = [sys.executable, "-m", "tools.publish"]
STEP = {"loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "tokens_per_s": "train/tokens_per_s"}
EVAL = {"train_loss": "eval/train_loss", "val_loss": "eval/val_loss", "val_bpb": "eval/val_bpb"}
EVENTS = "tensorboard/events.out.tfevents.*"


@pytest.fixture(autouse=True)
def wandb_environment(monkeypatch):
    """Set W&B to offline mode and remove all other variables of W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off",
                        "WANDB_ERROR_REPORTING": "false", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def run(trained, here):
    """A copy of the finished run, out/x."""
    shutil.copytree(trained / "out/tiny", "out/x")
    return Path("out/x")


def metrics(folder):
    """The metrics in the log: published name → [(iteration, value)]."""
    found = {name: [] for name in (*STEP.values(), *EVAL.values())}
    for record in read_log(folder / "log.jsonl"):
        for key, name in {"step": STEP, "eval": EVAL}.get(record["kind"], {}).items():
            found[name].append((record["iter"], record[key]))
    return found


def stories(folder):
    """The stories in samples.md, [(iteration, text)], split at the headings expected from the log's evaluations."""
    text, found = (folder / "samples.md").read_bytes().decode(), []
    for record in reversed([r for r in read_log(folder / "log.jsonl") if r["kind"] == "eval"]):
        text, story = text.split(f"## iteration {record['iter']}: validation loss {record['val_loss']:.4f}\n\n")
        found.insert(0, (record["iter"], story.removesuffix("\n\n")))
    assert not text and found
    return found


def events(folder):
    """Read the event files: {name: [(iteration, value)]}, texts as strings, and {name: [wall time]}."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    reader = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "tensors": 0}, purge_orphaned_data=False)
    reader.Reload()
    tags = reader.Tags()
    found = {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in tags["scalars"]}
    times = {name: [event.wall_time for event in reader.Scalars(name)] for name in tags["scalars"]}
    for name in tags["tensors"]:
        found[name.removesuffix("/text_summary")] = [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in reader.Tensors(name)]
    return found, times


def assert_events_equal_the_log(folder):
    found, _ = events(folder)
    (settings,) = found.pop("settings")
    assert settings[0] == 0 and found.pop("story") == stories(folder)
    assert found.keys() == metrics(folder).keys()
    for name, values in metrics(folder).items():
        assert [step for step, _ in found[name]] == [step for step, _ in values]
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in values], rel=1e-6)


def wandb_records(path):
    """Yield the records of a .wandb file: protocol buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, parts = path.read_bytes(), 7, b""  # 7: W&B's header
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a complete record, or its last part
            yield Record.FromString(parts)
            parts = b""


def wandb_run(path):
    """Read a .wandb file: name, project and config of the W&B run, and its values as {name: [(iteration, value)]}."""
    run, config, found = None, {}, {}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            updates = record.run.config.update if kind == "run" else record.config.update
            config |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}
            run = record.run if kind == "run" else run
        elif kind == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                found.setdefault(name, []).append((record.history.step.num, value))
    return SimpleNamespace(name=run.display_name, project=run.project, config=config, found=found)


def wandb_file(folder, number=0):
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)[number]


def assert_wandb_equals_the_log(folder, path):
    found = wandb_run(path).found
    for name, values in metrics(folder).items():
        assert found[name] == values
    files = path.parent / "files"
    for (step, name), (iteration, story) in zip(found["story/path"], stories(folder), strict=True):
        text = (files / name).read_bytes().decode()  # a story may contain \r
        assert step == iteration
        assert f'<pre style="white-space:pre-wrap">{html.escape(story)}</pre>' in text


class LockingProcess:
    """Another process that has locked a run folder, like one that is training."""

    def __init__(self, folder):
        path = str((folder / ".lock").absolute())
        code = ("from storygpt.system import files; "
                f"files.acquire_lock({path!r}, 'it'); print('locked', flush=True); input()")
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "locked\n"

    def end(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def scripted(run, monkeypatch):
    """A function that schedules actions: one per sleep of the tool, and finally the end of the training process."""
    process = LockingProcess(run)

    def scripted(*actions):
        remaining = iter([*actions, process.end])
        monkeypatch.setattr(publish, "time", SimpleNamespace(sleep=lambda seconds: next(remaining)()))

    scripted.end = process.end
    yield scripted
    process.end()


def lines(run):
    """The lines of the log, and the content of samples.md."""
    return (run / "log.jsonl").read_bytes().splitlines(keepends=True), (run / "samples.md").read_bytes()


# ---- a finished run ----

def test_tensorboard_receives_metrics_stories_and_settings(run, capsys):
    pytest.importorskip("tensorboard")
    publish.main(["out/x", "--to", "tensorboard"])
    assert_events_equal_the_log(run)
    found, times = events(run)
    records = read_log(run / "log.jsonl")
    table = dict(line.strip("| ").replace(" ", "").split("|") for line in found["settings"][0][1].splitlines()[2:])
    assert table == {key: str(value).replace(" ", "") for key, value in records[0]["config"].items()}
    ended = (run / "log.jsonl").stat().st_mtime
    assert times["eval/val_loss"][-1] == pytest.approx(ended, abs=0.01)
    seconds = [record["seconds"] for record in records if record["kind"] == "step"]
    assert [when - times["train/lr"][0] for when in times["train/lr"]] == pytest.approx(
        [s - seconds[0] for s in seconds], abs=1e-4)
    assert capsys.readouterr().out == (
        "published up to iteration 24: 7 training records, 3 evaluations, 3 stories\n"
        "event files: out/x/tensorboard\nview: tensorboard --logdir out\n")


def test_publishing_again_replaces_event_files_and_keeps_other_files(run):
    pytest.importorskip("tensorboard")
    publish.main(["out/x", "--to=tensorboard"])
    (first,) = run.glob(EVENTS)
    (run / "tensorboard/mine.txt").write_text("mine")
    (run / "tensorboard/deeper").mkdir()
    (run / "tensorboard/deeper/events.out.tfevents.1").write_text("mine too")
    publish.main(["out/x/", "--to=tensorboard"])
    (second,) = run.glob(EVENTS)
    assert first != second and (run / "tensorboard/mine.txt").exists()
    assert (run / "tensorboard/deeper/events.out.tfevents.1").read_text() == "mine too"
    (run / "tensorboard/deeper/events.out.tfevents.1").unlink()
    assert_events_equal_the_log(run)


def test_wandb_receives_metrics_stories_and_settings(run, capfd):
    pytest.importorskip("wandb")
    publish.main(["out/x", "--to", "wandb"])
    path = wandb_file(run)
    assert_wandb_equals_the_log(run, path)
    wandb, records = wandb_run(path), read_log(run / "log.jsonl")
    assert (wandb.name, wandb.project) == ("x", "tinystories")
    assert {key: wandb.config[key] for key in records[0]["config"]} == records[0]["config"]
    steps, times = zip(*wandb.found["_timestamp"])
    assert times[-1] == pytest.approx((run / "log.jsonl").stat().st_mtime, abs=0.01)
    assert steps == (2, 4, 8, 12, 16, 20, 24)  # one row for each iteration
    out, err = capfd.readouterr()
    assert out == ("published up to iteration 24: 7 training records, 3 evaluations, 3 stories\n"
                   f"upload: wandb sync {path.parent}\n") and not err


def test_wandb_environment_variables(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    (tmp_path / "elsewhere").mkdir()
    with monkeypatch.context() as context:
        for name, value in {"PROJECT": "mine", "NAME": "another", "DIR": str(tmp_path / "elsewhere")}.items():
            context.setenv(f"WANDB_{name}", value)
        publish.main(["out/x", "--to", "wandb"])
    wandb = wandb_run(wandb_file(tmp_path / "elsewhere"))
    assert (wandb.name, wandb.project) == ("another", "mine") and not (run / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    publish.main(["out/x", "--to", "wandb"])
    assert "nothing was kept, because WANDB_MODE=disabled" in capsys.readouterr().out


def test_unusual_stories_are_published_unchanged(run):
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    texts = ["Tim & <b>Ann</b>\nsaid: \"## iteration 7\"\n\n- *hm*\r\n\n\n   ", "",
             "\n\nOnce upon a time, 小猫 🐈\x00\x85\u2028"]
    evals = [record for record in read_log(run / "log.jsonl") if record["kind"] == "eval"]
    (run / "samples.md").write_bytes("".join(
        f"## iteration {record['iter']}: validation loss {record['val_loss']:.4f}\n\n{story}\n\n"
        for record, story in zip(evals, texts)).encode())
    publish.main(["out/x", "--to=tensorboard"])
    assert [story for _, story in events(run)[0]["story"]] == texts
    publish.main(["out/x", "--to=wandb"])
    path = wandb_file(run)
    for (_, name), story in zip(wandb_run(path).found["story/path"], texts, strict=True):
        assert html.escape(story).encode() in (path.parent / "files" / name).read_bytes()


def test_float16_overflows_and_a_learning_rate_of_zero(run):
    """An optimizer step without a gradient norm is published without it; `skipped` only if it is above 0."""
    pytest.importorskip("tensorboard")
    records = read_log(run / "log.jsonl")
    records[3] |= {"grad_norm": None, "skipped": 2}
    records[-3] |= {"skipped": 2, "lr": 0.0}  # the last step; an evaluation and the end of the run follow
    del records[1]["skipped"]  # as in logs of older versions
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    publish.main(["out/x", "--to=tensorboard"])
    found, _ = events(run)
    assert found["train/skipped"] == [(records[3]["iter"], 2), (24, 2)] and found["train/lr"][-1] == (24, 0)
    assert len(found["train/loss"]) == 7
    assert [step for step, _ in found["train/grad_norm"]] == [r["iter"] for r in records
                                                              if r.get("grad_norm") is not None]


def test_settings_changed_on_resume(run):
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    records = read_log(run / "log.jsonl")
    for number, iters in enumerate((24, 48)):  # the first one changes nothing
        records.append(json.loads(json.dumps(records[0])) | {"resumed_at": 24})
        records[-1]["config"]["max_iters"] = iters
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    publish.main(["out/x", "--to=tensorboard"])
    assert [step for step, _ in events(run)[0]["settings"]] == [0, 24]
    publish.main(["out/x", "--to=wandb"])
    assert wandb_run(wandb_file(run)).config["max_iters"] == 48


# ---- a run that is still training ----

def test_publishing_continues_until_training_ends(with_data):
    """Two real processes; what W&B receives from a growing log is tested below."""
    pytest.importorskip("tensorboard")
    run = Path("out/x")
    flags = [*TINY, "--out_dir=out/x", "--max_iters=1000000", "--lr_decay_iters=1000", "--eval_interval=40"]
    training = ForkedProcess(train.main, flags)
    wait_for_steps(run, 1)
    publishing = ForkedProcess(publish.main, ["out/x", "--to", "tensorboard"])
    while not list(run.glob(EVENTS)) or len(events(run)[0].get("eval/val_loss", [])) < 2:
        time.sleep(0.05)
    os.kill(training.pid, signal.SIGINT)  # training ends after the current optimizer step
    check_success(training.result())
    out = check_success(publishing.result())
    assert out.startswith("publishing out/x until its training ends\npublished up to iteration ")
    assert_events_equal_the_log(run)


def test_incomplete_log_lines_and_stories_are_published_when_complete(run, scripted, capsys):
    pytest.importorskip("tensorboard")
    log, samples = lines(run)
    first_eval = next(i for i, line in enumerate(log) if b'"eval"' in line)
    head, story = b"".join(log[:first_eval]), samples[:samples.index(b"## iteration 16")]
    (run / "log.jsonl").write_bytes(head + log[first_eval][:30])
    (run / "samples.md").unlink()

    def complete_the_line():
        found, _ = events(run)
        assert "eval/val_loss" not in found and len(found["train/loss"]) == first_eval - 1
        (run / "log.jsonl").write_bytes(head + log[first_eval])

    def begin_the_story():
        assert len(events(run)[0]["eval/val_loss"]) == 1
        (run / "samples.md").write_bytes(story[:-10])

    def complete_all():
        assert "story" not in events(run)[0]
        (run / "samples.md").write_bytes(samples)
        (run / "log.jsonl").write_bytes(b"".join(log))

    scripted(complete_the_line, begin_the_story, complete_all)
    publish.main(["out/x", "--to=tensorboard"])
    assert_events_equal_the_log(run)
    assert len(list(run.glob(EVENTS))) == 1 and "note:" not in capsys.readouterr().out


def test_training_that_ends_without_a_log_is_an_error(run, scripted, fails):
    pytest.importorskip("tensorboard")
    (run / "log.jsonl").unlink()
    (run / "samples.md").unlink()
    scripted()
    assert "no log in out/x" in fails(publish.main, ["out/x", "--to=tensorboard"])


def test_records_written_while_the_tool_reads_are_not_lost(run, scripted, monkeypatch, capsys):
    """An evaluation and its story just before the log is read, and the end of training just after."""
    pytest.importorskip("tensorboard")
    log, samples = lines(run)
    first_eval = next(i for i, line in enumerate(log) if b'"eval"' in line)
    (run / "log.jsonl").write_bytes(b"".join(log[:first_eval]))
    (run / "samples.md").unlink()
    polls = iter(range(100))

    def read_slowly(path):
        poll = next(polls)
        if poll == 1:
            (run / "log.jsonl").write_bytes(b"".join(log[:first_eval + 2]))
            (run / "samples.md").write_bytes(samples[:samples.index(b"## iteration 16")])
        records = read_log(path)
        if poll == 2:
            (run / "log.jsonl").write_bytes(b"".join(log))
            (run / "samples.md").write_bytes(samples)
            scripted.end()
        return records

    monkeypatch.setattr(publish, "read_log", read_slowly)
    scripted(*[lambda: os.utime(run / "log.jsonl")] * 3)  # unchanged files would not be read again
    publish.main(["out/x", "--to=tensorboard"])
    assert_events_equal_the_log(run)
    assert "note:" not in capsys.readouterr().out


def truncate_and_grow(run):
    """Actions: truncate the log after its first evaluation, append the same losses at another speed, append more."""
    log, samples = lines(run)
    cut = next(i for i, line in enumerate(log) if b'"eval"' in line) + 1
    again = [json.loads(line) for line in log[cut:-1]]  # without the record of the end
    for record in again:
        record["seconds"] += 100
        record |= {"tokens_per_s": 1.5} if record["kind"] == "step" else {}
    again.insert(0, json.loads(log[0]) | {"resumed_at": 8})

    def truncate_logs():
        (run / "log.jsonl").write_bytes(b"".join(log[:cut]))
        (run / "samples.md").write_bytes(samples[:samples.index(b"## iteration 16")])

    def grow():
        with open(run / "log.jsonl", "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in again)
        (run / "samples.md").write_bytes(samples)

    def append_more():
        with open(run / "log.jsonl", "a") as file:
            file.write(json.dumps(again[-2] | {"iter": 28}) + "\n")

    return truncate_logs, grow, append_more


def test_tensorboard_after_the_log_was_truncated(run, scripted, capsys):
    pytest.importorskip("tensorboard")
    truncate_logs, grow, append_more = truncate_and_grow(run)

    def check():
        assert_events_equal_the_log(run)

    scripted(truncate_logs, check, grow, check, append_more)
    publish.main(["out/x", "--to=tensorboard"])
    assert_events_equal_the_log(run)
    assert events(run)[0]["train/tokens_per_s"][-1] == (28, 1.5) and len(list(run.glob(EVENTS))) == 1
    out = capsys.readouterr().out
    assert out.count("note: the log of out/x was truncated or replaced") == 1
    assert "published up to iteration 28: 8 training records, 3 evaluations, 3 stories" in out


def test_wandb_after_the_log_was_truncated(run, scripted, capsys):
    pytest.importorskip("wandb")
    first_speeds = metrics(run)["train/tokens_per_s"]
    scripted(*truncate_and_grow(run))
    publish.main(["out/x", "--to=wandb"])
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    found = wandb_run(path).found
    assert found.pop("train/tokens_per_s") == [*first_speeds, (28, 1.5)]
    expected = metrics(run)
    del expected["train/tokens_per_s"]
    assert {name: found[name] for name in expected} == expected and len(found["story/path"]) == 3
    assert "note: skipped" not in capsys.readouterr().out


def test_wandb_skips_records_between_published_steps(run, scripted, capsys):
    """These occur after a run is resumed with a smaller log_interval."""
    pytest.importorskip("wandb")
    log, _ = lines(run)
    between = json.dumps(json.loads(log[-3]) | {"iter": 14}) + "\n"
    scripted(lambda: (run / "log.jsonl").write_bytes(b"".join(log[:2]) + between.encode() + b"".join(log[2:])))
    publish.main(["out/x", "--to=wandb"])
    assert "note: skipped 1 records" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["tensorboard", "wandb"])
def test_an_overwritten_run_is_published_again(to, run, scripted, capsys):
    pytest.importorskip(to)
    log, _ = lines(run)
    other = [json.loads(line) for line in log]
    other[0]["config"]["learning_rate"] = 0.5
    for record in other[1:]:
        record |= {key: record[key] + 1 for key in ("loss", "val_loss") if key in record}
    losses = {record["iter"]: record["val_loss"] for record in other if record["kind"] == "eval"}

    def remove():
        for name in ("log.jsonl", "samples.md"):
            (run / name).unlink()

    def write():
        (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in other))
        (run / "samples.md").write_text("".join(f"## iteration {iteration}: validation loss {loss:.4f}\n\nNew.\n\n"
                                                for iteration, loss in losses.items()))

    scripted(remove, lambda: None, write)
    publish.main(["out/x", f"--to={to}"])
    if to == "tensorboard":
        assert_events_equal_the_log(run)
        assert " 0.5 |" in events(run)[0]["settings"][0][1]
    else:
        assert_wandb_equals_the_log(run, wandb_file(run, -1))
        assert wandb_run(wandb_file(run, -1)).config["learning_rate"] == 0.5
        assert len(list(run.glob("wandb/offline-run-*"))) == 2
    out = capsys.readouterr().out
    assert out.count("note: the log of out/x was truncated or replaced") == 1
    assert out.count("wandb sync") == (2 if to == "wandb" else 0)


def test_waiting_for_a_run_that_has_no_log_yet(run, scripted):
    pytest.importorskip("tensorboard")
    (run / "log.jsonl").rename("log.jsonl")
    scripted(lambda: Path("log.jsonl").rename(run / "log.jsonl"))
    publish.main(["out/x", "--to=tensorboard"])
    assert_events_equal_the_log(run)


@pytest.mark.parametrize("to", ["tensorboard", "wandb"])
def test_ctrl_c_leaves_everything_published(to, run):
    pytest.importorskip(to)
    process = LockingProcess(run)
    try:
        publishing = subprocess.Popen([*PUBLISH, "out/x", "--to", to], start_new_session=True, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert publishing.stdout.readline() == "publishing out/x until its training ends\n"
        os.killpg(publishing.pid, signal.SIGINT)  # like a terminal: to all processes that the tool started
        out, _ = publishing.communicate(timeout=300)
    finally:
        process.end()
    assert publishing.returncode == 130
    assert out.startswith("published up to iteration 24: 7 training records") and out.endswith("\nstopped\n"), out
    if to == "tensorboard":
        assert_events_equal_the_log(run)
    else:
        assert_wandb_equals_the_log(run, wandb_file(run))


# ---- errors ----

def test_folders_that_are_not_runs_give_one_line(run, fails):
    pytest.importorskip("tensorboard")
    (run / "empty").mkdir()
    for folder in ("out/nothing", "out/x/empty", "out/x/log.jsonl"):
        assert f"no log in {folder}: give a run folder" in fails(publish.main, [folder, "--to=tensorboard"])
    for foreign in ('{"kind": "step"}\n', '{"kind": "run"}\n', '{"kind": "run", "config": 1, "resumed_at": null}\n',
                    (run / "log.jsonl").read_text() + '{"kind": "step", "iter": 25}\n',
                    (run / "log.jsonl").read_text() + '{"kind": "step", "iter": 25, "seconds": 3, "loss": "low"}\n'):
        (run / "empty/log.jsonl").write_text(foreign)
        assert "out/x/empty/log.jsonl is not a log of this program" in fails(
            publish.main, ["out/x/empty", "--to=tensorboard"])
    (run / "empty/log.jsonl").write_text("{}\n")
    assert "line 1 is damaged" in fails(publish.main, ["out/x/empty", "--to=tensorboard"])
    assert os.listdir(run / "empty") == ["log.jsonl"]
    (run / "tensorboard").write_text("a file in the way")
    assert "cannot write out/x/tensorboard (File exists)" in fails(publish.main, ["out/x", "--to=tensorboard"])


def test_wrong_flags_give_one_line(run, fails):
    assert "--to" in fails(publish.main, ["out/x"], code=2)
    assert "RUN" in fails(publish.main, ["--to=wandb"], code=2)
    line = fails(publish.main, ["out/x", "--to=tensorbord"], code=2)
    assert "tensorbord" in line and "tensorboard" in line and "wandb" in line
    assert "did you mean --to?" in fails(publish.main, ["out/x", "--to=wandb", "--too=x"], code=2)


@pytest.mark.parametrize("to", ["tensorboard", "wandb"])
def test_missing_packages_give_one_line(to, run, monkeypatch, fails):
    for name in (to, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    line = fails(publish.main, ["out/x", "--to", to])
    assert line == f"error: --to {to} needs {to}: pip install -r requirements-extra.txt"
    assert not (run / to).exists()


def test_two_processes_cannot_publish_to_the_same_folder(run, fails):
    pytest.importorskip("tensorboard")
    (run / "tensorboard").mkdir()
    process = LockingProcess(run / "tensorboard")
    assert "another process is using out/x/tensorboard: " in fails(publish.main, ["out/x", "--to", "tensorboard"])
    process.end()


def test_a_full_disk_gives_one_line(run):
    pytest.importorskip("tensorboard")
    check_one_line_error(run_process(publish.main, ["out/x", "--to=tensorboard"], setup=lambda: limit_file_size(3000)),
                         "cannot write out/x/tensorboard (File too large): ")


@pytest.mark.parametrize("variables, complaint", [
    ({"WANDB_MODE": "online"}, "No API key configured"), ({"WANDB_MODE": "onlin"}, "onlin"),
    ({"WANDB_PROJECT": "a/b"}, "a/b"), ({"WANDB_MODE": "online", "WANDB_API_KEY": "short"}, "WANDB_API_KEY")],
    ids=["no key", "mode", "project", "key"])
def test_wandb_errors_give_one_line(variables, complaint, run, here, monkeypatch, fails):
    wandb = pytest.importorskip("wandb")
    for name, value in ({"HOME": str(here), "NETRC": str(here / "none")} | variables).items():
        monkeypatch.setenv(name, value)
    line = fails(publish.main, ["out/x", "--to", "wandb"])
    wandb.teardown()
    assert line.startswith("error: cannot create a W&B run: ") and complaint in line and "offline" in line
