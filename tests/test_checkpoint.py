"""Run folders: checkpoints (atomic, verified when read), logs, which settings may change on resume, init_from."""

import hashlib
import json
import os
import types
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import train
from config import Config, apply_overrides
from conftest import TINY
from data.dataset import with_checksum
from model import GPT, GPTConfig
from runtime import files
from runtime.errors import UserError


# ---- checkpoints ----


def test_a_saved_checkpoint_is_loaded_unchanged(tmp_path):
    state = {"model": {"w": torch.arange(6.0)}, "config": {"n_layer": 2, "compile": "auto", "bias": True}, "iter": 3}
    checkpoint.save(tmp_path / "last.pt", state)
    loaded = checkpoint.load(tmp_path / "last.pt", dict.fromkeys(state, object))
    assert torch.equal(loaded["model"].pop("w"), state["model"].pop("w")) and loaded == state
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"iter": 1})
    with pytest.raises(AttributeError):
        checkpoint.save(tmp_path / "last.pt", {"iter": lambda: 2})  # a function cannot be pickled
    assert checkpoint.load(tmp_path / "last.pt", {"iter": int}) == {"iter": 1} and os.listdir(tmp_path) == ["last.pt"]


def test_a_full_disk_is_reported_and_keeps_the_previous_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"iter": 1})
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*last.pt .No space left on device.: what was saved before is"):
        checkpoint.save(tmp_path / "last.pt", {"iter": 2, "model": torch.zeros(100_000)})
    assert checkpoint.load(tmp_path / "last.pt", {"iter": int}) == {"iter": 1} and os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "text"])
def test_an_unreadable_checkpoint_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, {"model": torch.zeros(1000)})
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "short": content[:len(content) // 2], "text": b"hello\n"}[damage])
    with pytest.raises(UserError, match="ckpt.pt"):
        checkpoint.load(path)


def test_a_flipped_bit_in_a_checkpoint_is_detected_or_has_no_effect(tmp_path):
    path = tmp_path / "ckpt.pt"
    state = {"model": {"w": torch.arange(300.0)}, "config": {"n_layer": 2}}
    checkpoint.save(path, state)
    content, detected = path.read_bytes(), 0
    for bit in range(0, 8 * len(content), 7):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            loaded = checkpoint.load(path, {})
            assert torch.equal(loaded["model"]["w"], state["model"]["w"]) and loaded["config"] == state["config"]
        except UserError as error:
            assert "ckpt.pt is damaged" in str(error)
            detected += 1
    assert detected > 1200 * 8 / 7  # at least every flipped bit in the 1,200 bytes of weights


class Malicious:
    """An object that, when unpickled carelessly, runs code: it creates the folder `evil`."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_code_in_a_checkpoint_is_refused_and_not_run(here):
    torch.save({"model": Malicious()}, "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt"):
        checkpoint.load("ckpt.pt")
    assert os.listdir() == ["ckpt.pt"]


@pytest.mark.parametrize("state", [{"weights": torch.zeros(3)}, torch.zeros(3), dict.fromkeys(
    checkpoint.REQUIRED_KEYS, {}) | {"tokens": 0}])
def test_a_checkpoint_of_another_program_is_refused(here, state):
    torch.save(state, "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt (is not a checkpoint|does not fit this version)"):
        checkpoint.load_model("ckpt.pt")


def test_a_damaged_last_pt_never_replaces_the_good_one_before_it(tmp_path, capsys):
    state = {key: kind() for key, kind in checkpoint.LAST_REQUIRED_KEYS.items()}
    for step in (1, 2):
        checkpoint.save(tmp_path / "last.pt", state | {"update": step})
    (tmp_path / "last.pt").write_bytes(b"damaged")
    assert checkpoint.load_resume_checkpoint(tmp_path)["update"] == 1
    assert "last.pt is missing or damaged: resuming from" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "last.pt")["update"] == 1 and not (tmp_path / "last.prev.pt").exists()
    (tmp_path / "last.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="last.pt is damaged"):
        checkpoint.load_resume_checkpoint(tmp_path)


def test_runs_are_listed_by_their_newest_checkpoint(here):
    with pytest.raises(UserError, match="no trained model under out/"):
        checkpoint.newest_run()
    for name, file, when in [("a", "last.prev.pt", 1), ("a", "ckpt.pt", 4), ("b", "last.pt", 3), ("b", "ckpt.pt", 2),
                             ("c", "last.prev.pt", 5), ("no", "log.jsonl", 6), ("sweep/d", "ckpt.pt", 0)]:
        path = Path("out", name, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (when, when))
    assert checkpoint.list_runs() == [Path("out/c"), Path("out/a"), Path("out/b"), Path("out/sweep/d")]
    assert checkpoint.newest_run() == Path("out/c")
    assert [checkpoint.best_checkpoint(f"out/{name}").name for name in "abc"] == ["ckpt.pt", "ckpt.pt", "last.prev.pt"]


# ---- logs ----


def test_an_incomplete_last_log_line_is_ignored_and_a_damaged_line_is_named(tmp_path):
    records = [{"kind": "run"}, *({"kind": "step", "iter": i} for i in (1, 2, 3))]
    for record in records:
        files.append_line(tmp_path / "log.jsonl", record)
    files.append(tmp_path / "log.jsonl", '{"kind": "st')
    assert checkpoint.read_log(tmp_path / "log.jsonl") == records
    (tmp_path / "bad.jsonl").write_text('{"kind": "run"}\n' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match="bad.jsonl, line 2 is damaged"):
        checkpoint.read_log(tmp_path / "bad.jsonl")


def test_logs_are_truncated_to_their_sizes_at_the_checkpoint(tmp_path):
    log, samples = tmp_path / "log.jsonl", tmp_path / "samples.md"
    log.write_text('{"kind": "run"}\n')
    sizes = checkpoint.flush_logs(tmp_path)
    for text in ('{"kind": "step"}\n', '{"kind": "st'):
        files.append(log, text)
        files.append(samples, "## iteration 3: x\n\nThr")  # did not exist at the checkpoint
        checkpoint.truncate_logs(tmp_path, sizes)
        assert log.read_text() == '{"kind": "run"}\n' and samples.read_text() == ""
    log.write_text("short")
    with pytest.raises(UserError, match="log.jsonl is shorter than at the last checkpoint: restore it, or move it"):
        checkpoint.truncate_logs(tmp_path, sizes)
    log.write_text("another\nfile, longer than the log\n")
    with pytest.raises(UserError, match="log.jsonl, line 1 is damaged"):
        checkpoint.truncate_logs(tmp_path, sizes)
    assert log.read_text() == "another\nfile, longer than the log\n"  # a file of unknown content is not truncated
    log.unlink()
    checkpoint.truncate_logs(tmp_path, sizes)  # resuming without it is allowed
    assert not log.exists()


# ---- resuming ----


@pytest.mark.parametrize("saved_on, resumed_on", [(True, False), (False, True)])
def test_the_optimizer_is_fused_as_this_machine_does_it(trained, monkeypatch, saved_on, resumed_on):
    """As when a run on a CPU is resumed on MPS, and the reverse."""
    monkeypatch.chdir(trained)
    last = checkpoint.load("out/tiny/last.pt", checkpoint.LAST_REQUIRED_KEYS)
    for optimizer in last["optimizers"]:
        for group in optimizer["param_groups"]:
            group["fused"] = saved_on
    for module in (train, checkpoint):
        monkeypatch.setattr(module, "pick_fused", lambda device: resumed_on)
    cfg, device = Config(**last["config"]), torch.device("cpu")
    model = GPT(GPTConfig(**last["model_config"]))
    state = checkpoint.TrainState(cfg, None, model, train.make_optimizers(model, cfg), torch.amp.GradScaler("cpu"),
                                  device, torch.float32, 4)
    state.restore(last)
    assert {group["fused"] for optimizer in state.optimizers for group in optimizer.param_groups} == {resumed_on}


# ---- opening a run ----


@pytest.mark.parametrize("world_size, size, advice", [(2, 32, 24), (3, 31, 16), (1, 95, 48)])
def test_a_micro_batch_size_that_does_not_divide_a_process_part_is_refused(here, world_size, size, advice):
    def open_run(size):
        args = types.SimpleNamespace(**{"resume": False, "resume=auto": False, "overwrite": False})
        return checkpoint.open_run(settings, {"device_batch_size": size}, args, world_size)[0]

    settings = {"batch_size": 96, "gradient_accumulation_steps": 1}
    with pytest.raises(UserError, match=f"^device_batch_size = {size} does not divide the {96 // world_size} sequences "
                                        f"of a step in each process: use {advice}$"):
        open_run(size)
    assert open_run(advice).device_batch_size == advice
    assert open_run(96).device_batch_size == 96  # all of its sequences


# ---- settings of a resumed run ----

CHANGEABLE_ON_RESUME = {"out_dir", "max_iters", "max_tokens", "max_minutes", "eval_interval", "log_interval",
              "checkpoint_minutes", "patience", "device", "dtype", "compile", "device_batch_size"}


@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_exactly_these_settings_may_change_when_a_run_is_resumed(name, capsys):
    stored = asdict(Config(max_minutes=5.0))
    changed = stored | {name: "another value"}
    if name in CHANGEABLE_ON_RESUME:
        checkpoint.check_resume_settings(stored, changed, {})
        assert capsys.readouterr().out == f"changed: {name} is now 'another value', was {stored[name]!r}\n"
    else:
        with pytest.raises(UserError, match=f"^{name} = 'another value' cannot change when a run is resumed"):
            checkpoint.check_resume_settings(stored, changed, {})


@pytest.mark.parametrize("change", ["n_layer=3", "dropout=0.3", "batch_size=8", "learning_rate=1.0", "seed=1"])
def test_resuming_with_a_flag_that_may_not_change_is_refused(trained, monkeypatch, fails, change):
    monkeypatch.chdir(trained)
    line = fails(train.main, ["--resume", "--out_dir=out/tiny", f"--{change}"])
    assert f"error: {change.split('=')[0]} = " in line and "cannot change" in line


def test_resuming_refuses_another_unit_of_length_and_a_longer_run_at_learning_rate_0():
    minutes, iterations = asdict(Config(max_minutes=5.0)), asdict(Config(max_iters=4000, min_lr=0.0))
    for stored, flags in [(minutes, {"max_iters": 9000}), (minutes, {"max_tokens": 10**9}),
                          (iterations, {"max_minutes": 1.0})]:
        now = asdict(Config(**apply_overrides(stored, flags)))
        with pytest.raises(UserError, match="length of a run with max_minutes can be changed by --max_minutes only"):
            checkpoint.check_resume_settings(stored, now, {})
    for flags in ({"max_iters": 6000}, {"max_tokens": 10**9}):
        now = asdict(Config(**apply_overrides(iterations, flags)))
        with pytest.raises(UserError, match="the learning rate is 0 from iteration 4000 on"):
            checkpoint.check_resume_settings(iterations, now, {})
    shorter = asdict(Config(**apply_overrides(iterations, {"max_iters": 2000})))
    checkpoint.check_resume_settings(iterations, shorter, {})
    checkpoint.check_resume_settings(shorter, iterations, {})  # back to the length of its schedule


# ---- opening a run ----


def test_nothing_to_resume(here, fails):
    assert "no trained model under out/" in fails(train.main, ["--resume"])
    assert "no checkpoint out/x/last.pt" in fails(train.main, ["--resume", "--out_dir=out/x"])


def test_resuming_refuses_other_data_under_the_same_name(with_data, fails):
    train.main([*TINY, "--max_iters=2", "--out_dir=out/x"])
    data = with_data / "data/nursery-bpe300"
    folder = data.resolve()
    data.unlink()
    data.mkdir()
    for path in folder.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    meta = json.loads((data / "meta.json").read_text())
    tokens = np.fromfile(data / "train.bin", np.uint16)[::-1]
    tokens.tofile(data / "train.bin")
    meta["splits"]["train"]["sha256"] = hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()
    (data / "meta.json").write_text(json.dumps(with_checksum(meta)))
    assert "is not the data that out/x was trained on" in fails(
        train.main, ["--resume", "--out_dir=out/x", "--max_iters=4"])


def test_resuming_refuses_a_checkpoint_that_does_not_fit_the_run(with_data, fails):
    train.main([*TINY, "--max_iters=2", "--out_dir=out/x"])
    state = checkpoint.load("out/x/last.pt", checkpoint.LAST_REQUIRED_KEYS)
    for part in ({"optimizers": []}, {"model": {}}, {"figures": {}}, {"config": state["config"] | {"n_heads": 2}}):
        checkpoint.save("out/x/last.pt", state | part)
        line = fails(train.main, ["--resume", "--out_dir=out/x", "--max_iters=4"])
        assert "out/x/last.pt does not fit this version of the program: use the version that saved it" in line


def test_init_from_starts_a_new_run_from_the_weights_of_another(with_data, fails, capsys):
    import prepare
    train.main([*TINY, "--out_dir=out/old", "--max_iters=8", "--n_layer=1", "--n_head=4", "--n_embd=32",
                "--bias=False"])
    words = [word for word in TINY if not word.startswith(("--n_", "--block_size"))]
    train.main([*words, "--init_from=out/old", "--out_dir=out/new", "--max_iters=2", "--learning_rate=1e-9",
                "--min_lr=0", "--block_size=8", "--dropout=0.3"])  # a shorter block and another dropout are allowed
    assert "starting from the weights of out/old, trained on 512 tokens" in capsys.readouterr().out
    old, new = checkpoint.load("out/old/ckpt.pt"), checkpoint.load("out/new/last.pt")
    assert new["model_config"] == old["model_config"] | {"block_size": 8, "dropout": 0.3}
    assert new["config"]["n_embd"] == 32 and new["config"]["bias"] is False and new["tokens"] == 64
    assert new["model"].keys() == old["model"].keys()
    for name, w in old["model"].items():
        torch.testing.assert_close(new["model"][name], w[:8] if name == "transformer.wpe.weight" else w)

    other_run = [*TINY, "--out_dir=out/y"]
    same_architecture = ["--init_from=out/old", "--n_layer=1", "--n_head=4", "--n_embd=32", "--bias=False"]
    for words, message in [
        ([*same_architecture, "--n_embd=16"], "n_embd = 16 differs from that of init_from = 'out/old', 32"),
        ([*same_architecture, "--block_size=32"], "block_size = 32 differs from that of"),
        (["--init_from=out/none"], "no checkpoint in out/none"),
        ([*same_architecture, "--out_dir=out/old", "--overwrite"], "is also the folder of the new run"),
    ]:
        assert message in fails(train.main, [*other_run, *words])
    prepare.main(["nursery", "--tokenizer", "bpe:310", "--max_stories", "60"])
    assert "different tokenizer from init_from = 'out/old'" in fails(
        train.main, [*other_run, *same_architecture, "--dataset=nursery-bpe310"])
    assert not Path("out/y").exists()


def test_init_from_takes_every_field_of_the_architecture(trained, monkeypatch):
    monkeypatch.chdir(trained)
    args = types.SimpleNamespace(resume=False, overwrite=False, **{"resume=auto": False})
    settings = {"dataset": "nursery-bpe300", "out_dir": "out/new", "init_from": "out/tiny"}
    cfg, resumed, source = checkpoint.open_run(settings, {"warmup_iters": 1}, args, world_size=1)
    assert resumed is None and source["model"].keys() == checkpoint.load("out/tiny/ckpt.pt")["model"].keys()
    architecture = {f.name for f in fields(GPTConfig)} - {"vocab_size", "dropout"}
    assert architecture < asdict(cfg).keys()
    for name in architecture:
        value = source["model_config"][name]
        assert getattr(cfg, name) == value
        other = {"bias": not value, "gelu": "exact", "architecture": "modern"}.get(name, 2 * value)
        with pytest.raises(
                UserError, match=f"^{name} = {other!r} differs from that of init_from = 'out/tiny', {value!r}"):
            checkpoint.open_run(settings | {name: other}, {"warmup_iters": 1}, args, world_size=1)


def test_an_existing_run_is_replaced_only_with_overwrite(with_data, fails):
    words = [*TINY, "--max_iters=2", "--out_dir=out/x"]
    train.main(words)
    before = Path("out/x/log.jsonl").read_text()
    assert "out/x already contains a run: resume it (--resume), replace it" in fails(train.main, words)
    assert Path("out/x/log.jsonl").read_text() == before
    Path("out/x/notes.txt").write_text("mine")
    train.main([*words, "--overwrite", "--seed=3"])
    (run,) = (record for record in checkpoint.read_log("out/x/log.jsonl") if record["kind"] == "run")
    assert run["seed"] == 3 and Path("out/x/notes.txt").read_text() == "mine"
