"""Settings: defaults, config files, flags, and the errors for wrong ones."""

import importlib
import sys
from dataclasses import asdict, fields

import pytest

import storygpt
from conftest import ROOT
from storygpt.corpus.dataset import prepare_command
from storygpt.settings import Config, allowed_values, apply_overrides, read_command_line, read_config_file
from storygpt.system.errors import UserError


def config_of(*argv):
    """The Config of a command line."""
    settings, flags, _ = read_command_line(list(argv), {"resume": "resume the run"})
    return Config(**apply_overrides(settings, flags))


def test_defaults_are_the_published_recipe():
    published = dict(
        n_layer=6, n_head=6, n_embd=384, block_size=128, dropout=0.1, bias=True, max_iters=20_000, batch_size=32,
        gradient_accumulation_steps=32, learning_rate=1e-4, min_lr=5e-4, warmup_iters=1_000, eval_interval=500,
        beta1=0.9, beta2=0.95, weight_decay=0.1, grad_clip=0.5, dataset="tinystories", lr_decay_iters=20_000)
    assert published.items() <= asdict(Config()).items()
    assert read_config_file(ROOT / "config/tinystories.py").items() <= published.items()
    assert config_of(str(ROOT / "config/tinystories.py")) == Config()


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_config_file_is_valid_and_shows_its_commands(path):
    cfg = config_of(str(path))
    assert f"\n{prepare_command(cfg.dataset)} && python train.py config/{path.name}\n" in path.read_text()
    assert cfg.out_dir == f"out/{path.stem}"
    assert cfg.min_lr < cfg.learning_rate or path.stem == "tinystories"


def test_flags_override_the_config_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import math\n_tokens = 4096\ndef helper(): pass\nbatch_size = _tokens // 128\ndropout = 0\n"
                    "learning_rate = math.sqrt(1e-6)\n")
    cfg = config_of(str(path), "--n_layer=2", "--min_lr", "1e-5", "--compile=False", "--dtype", "bfloat16")
    assert (cfg.batch_size, cfg.n_layer, cfg.min_lr, cfg.compile, cfg.dtype) == (32, 2, 1e-5, False, "bfloat16")
    assert cfg.learning_rate == pytest.approx(1e-3) and cfg.dropout == 0 and cfg.out_dir == "out/mine"
    assert config_of("--batch_size=7", str(path)).batch_size == 7
    assert config_of(str(path), "--out_dir=elsewhere").out_dir == "elsewhere"
    assert config_of("--compile=true").compile is True and config_of("--compile=auto").compile == "auto"
    cfg = config_of("--device_batch_size=16", "--bias=false")
    assert cfg.device_batch_size == 16 and cfg.bias is False


def test_wrong_flags_print_one_line_and_exit_with_code_2(fails):
    for flag, message in {
        "--learning_rat=1e-3": "did you mean --learning_rate?", "--zzz=1": "--help",
        "--n_layer=six": "n_layer = 'six' is not allowed: it takes a whole number from 1 to 1000",
        "--n_layer=0": "n_layer = 0 is not allowed", "--n_layer=1001": "n_layer = 1001 is not allowed",
        "--dropout=1.0": "dropout = 1.0 is not allowed: it takes a number from 0 to 0.99",
        "--bias=maybe": "bias = 'maybe' is not allowed: it takes True or False",
        "--dtype=fp8": "auto or bfloat16 or float16 or float32", "--out_dir=": "out_dir = '' is not allowed",
        "--learning_rate=nan": "learning_rate = ", "--learning_rate=1e999": "learning_rate = ",
        f"--seed={2**70}": "seed = ",
    }.items():
        assert message in fails(lambda argv: config_of(*argv), [flag], code=2)
    assert "max_iters and max_minutes are both set" in fails(
        lambda argv: config_of(*argv), ["--max_minutes=1", "--max_iters=5"], code=2)


@pytest.mark.parametrize("text, message", [
    ("learning_rat = 1", "unknown setting learning_rat: did you mean learning_rate?"),
    ("n_layer = True", "n_layer = True is not allowed: it takes a whole number from 1"),
    ("bias = 1", "bias = 1 is not allowed"),
    ("max_iters = 10**400", "max_iters = 1000"),
    ("n_layer = 1\nbatch_size = = 2", "line 2: SyntaxError: invalid syntax"),
    ("n_layer = 1\nbatch_size = n_laye", "line 2: NameError: name 'n_laye' is not defined"),
])
def test_errors_in_a_config_file_name_the_file(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_config_file(path)
    assert message in str(error.value) and str(error.value).count("mine.py") == 1


def test_a_syntax_error_in_an_imported_config_names_both_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_base.py").write_text("n_layer = (")
    (tmp_path / "mine.py").write_text("\nfrom broken_base import *")
    with pytest.raises(UserError, match=r"mine.py, line 2: SyntaxError: .*\(broken_base.py, line 1\)"):
        read_config_file(tmp_path / "mine.py")


def test_a_missing_config_file_suggests_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, hint in [("quickstart", "did you mean config/quickstart.py?"),
                       ("config/nothing.py", "no config file config/nothing.py")]:
        with pytest.raises(UserError, match=hint):
            read_config_file(name)


@pytest.mark.parametrize("changes, message", [
    (dict(n_embd=100, n_head=6), "n_embd = 100 is not a multiple of n_head = 6"),
    (dict(max_iters=1000), "warmup_iters = 1000 is not below lr_decay_iters = 1000"),
    (dict(max_tokens=131_071), "max_tokens = 131071 is less than one step of 131072 tokens"),
    (dict(max_tokens=1_000_000), "warmup_iters = 1000 is not below lr_decay_iters = 224"),
])
def test_contradictory_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**changes)


def test_the_length_of_a_run_has_one_unit_and_a_flag_replaces_that_of_the_config_file(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("max_tokens = 10_000_000")
    settings, flags, _ = read_command_line([str(path), "--max_iters=3200"], {})
    assert Config(**apply_overrides(settings, flags)).max_iters == 3200
    assert apply_overrides(settings, {"seed": 1})["max_tokens"] == 10_000_000
    minutes = Config(**apply_overrides(settings, {"max_minutes": 5.0}))
    assert minutes.max_tokens == minutes.lr_decay_iters == 0  # the schedule follows the time
    cfg = Config(**settings)
    assert cfg.max_iters == cfg.lr_decay_iters == 10_000_000 // 131_072 * 32
    longer = Config(**apply_overrides(asdict(cfg), {"max_iters": 6400}))
    assert longer.max_iters == 6400 and longer.lr_decay_iters == cfg.max_iters  # extending a run keeps its schedule
    path.write_text("max_tokens = 10_000_000\nmax_minutes = 5")
    with pytest.raises(UserError, match=r"x.py: max_tokens and max_minutes are both set.*\(del NAME removes"):
        read_config_file(path)


def test_a_plain_field_of_the_model_settings_is_a_setting(tmp_path, monkeypatch, capsys):
    """As a reader adds it to model.py: without a meaning, and without anything elsewhere."""
    source = (ROOT / "model.py").read_text(encoding="utf-8")
    (tmp_path / "model.py").write_text(source.replace("    bias: bool = ", "    window: int = 7\n"
                                                    "    cap: float | None = None\n    bias: bool = ", 1))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(storygpt, "settings", storygpt.settings)  # what importing it again replaces
    for name in ("model", "storygpt.settings"):
        monkeypatch.delitem(sys.modules, name)
    edited = importlib.import_module("storygpt.settings")
    _, flags, _ = edited.read_command_line(["--window=9"], {})
    assert edited.Config().model_config(300).window == 7 and edited.Config().cap is None
    assert edited.read_command_line(["--cap=0.5"], {})[1] == {"cap": 0.5}
    assert edited.read_command_line(["--cap=None"], {})[1] == {"cap": None}
    cfg = edited.Config(**flags, n_layer=3, dropout=0.25)
    assert asdict(cfg.model_config(300)).items() <= asdict(cfg).items() | {("vocab_size", 300)} and cfg.window == 9
    with pytest.raises(SystemExit):
        edited.read_command_line(["--help-all"], {})
    text = " ".join(capsys.readouterr().out.split())
    assert "--window VALUE ; a whole number; default: 7" in text
    assert "--cap VALUE ; None or a number; default: None" in text


def test_help_all_lists_every_setting_with_its_default_and_bounds(capsys):
    with pytest.raises(SystemExit) as exit:
        config_of("--help-all")
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0 and "a whole number from 1 to 1000; default: 6" in text
    for f in fields(Config):
        assert f"--{f.name} VALUE {f.metadata['meaning']}; {allowed_values(f)}; default: {f.default}" in text
