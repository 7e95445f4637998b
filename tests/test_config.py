"""Settings: recipes, flags, and how what is wrong is told."""

import math
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from config import Config, over, read_command_line, read_recipe
from conftest import ROOT
from dataset import prepare_command
from errors import UserError


def settings(*argv):
    recipe, flags, args = read_command_line(list(argv), {"resume": "go on"})
    return Config(**over(recipe, flags))


def test_defaults_are_the_published_recipe_number_for_number():
    published = dict(
        n_layer=6, n_head=6, n_embd=384, block_size=128, dropout=0.1, bias=True, max_iters=20_000, batch_size=32,
        gradient_accumulation_steps=32, learning_rate=1e-4, min_lr=5e-4, warmup_iters=1_000, eval_interval=500,
        beta1=0.9, beta2=0.95, weight_decay=0.1, grad_clip=0.5, dataset="tinystories", lr_decay_iters=20_000)
    assert published.items() <= asdict(Config()).items()
    assert read_recipe(ROOT / "config/tinystories.py").items() <= published.items()
    assert settings(str(ROOT / "config/tinystories.py")) == Config()


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_recipe_is_sound_and_its_docstring_has_the_commands(path):
    cfg = settings(str(path))
    assert f"\n{prepare_command(cfg.dataset)} && python train.py config/{path.name}\n" in path.read_text()
    assert cfg.out_dir == f"out/{path.stem}"
    assert cfg.min_lr < cfg.learning_rate or path.stem == "tinystories"


def test_flags_come_after_the_recipe_in_both_forms(tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text("import math\n_tokens = 4096\ndef helper(): pass\nbatch_size = _tokens // 128\ndropout = 0\n"
                      "learning_rate = math.sqrt(1e-6)\nimport numpy\nweight_decay = numpy.float64(0.5)\n")
    cfg = settings(str(recipe), "--n_layer=2", "--min_lr", "1e-5", "--compile=False", "--dtype", "bfloat16")
    assert (cfg.batch_size, cfg.n_layer, cfg.min_lr, cfg.compile, cfg.dtype) == (32, 2, 1e-5, False, "bfloat16")
    assert cfg.learning_rate == pytest.approx(1e-3) and cfg.dropout == 0 and cfg.out_dir == "out/mine"
    assert cfg.weight_decay == 0.5 and type(cfg.weight_decay) is float
    assert settings("--batch_size=7", str(recipe)).batch_size == 7
    assert settings(str(recipe), "--out_dir=elsewhere").out_dir == "elsewhere"
    assert settings("--compile=true").compile is True and settings("--compile=auto").compile == "auto"
    assert settings("--device_batch_size=16").device_batch_size == 16


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as exit:
        settings(*argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    return error


def test_wrong_flags_are_told_in_one_line_with_code_2(capsys):
    assert "did you mean --learning_rate?" in refused(capsys, "--learning_rat=1e-3")
    assert "did you mean --learning_rate?" in refused(capsys, "--learning-rate", "1e-3")
    assert "did you mean --resume?" in refused(capsys, "--resum")
    assert "--help" in refused(capsys, "--zzz=1")
    assert "n_layer = 'six' is not allowed: it takes a whole number from 1" in refused(capsys, "--n_layer=six")
    assert "n_layer = 0 is not allowed" in refused(capsys, "--n_layer=0")
    assert "dropout = 1.0 is not allowed: it takes a number from 0 to 0.99" in refused(capsys, "--dropout=1.0")
    assert "bias = 'maybe' is not allowed: it takes True or False" in refused(capsys, "--bias=maybe")
    assert "auto or bfloat16 or float16 or float32" in refused(capsys, "--dtype=fp8")
    assert "learning_rate = nan" in refused(capsys, "--learning_rate=nan")
    assert "learning_rate = inf" in refused(capsys, "--learning_rate=inf")
    assert "--n_layer" in refused(capsys, "--n_layer")
    assert "out_dir = '' is not allowed" in refused(capsys, "--out_dir=")
    assert "seed = " in refused(capsys, f"--seed={2**70}")


@pytest.mark.parametrize("text, complaint", [
    ("learning_rat = 1", "unknown setting learning_rat: did you mean learning_rate?"),
    ("n_layer = 2.0", "n_layer = 2.0 is not allowed: it takes a whole number from 1"),
    ("n_layer = True", "n_layer = True is not allowed"),
    ("bias = 1", "bias = 1 is not allowed"),
    ("max_iters = 10**400", "max_iters = 1000"),
    ("raise SystemExit(0)", "line 1: SystemExit"),
    ("batch_size = '8'", "batch_size = '8' is not allowed"),
    ("n_layer = 1\nbatch_size = = 2", "line 2: invalid syntax"),
    ("n_layer = 1\nbatch_size = n_laye", "line 2: NameError: name 'n_laye' is not defined"),
])
def test_wrong_recipes_are_told_with_their_file(tmp_path, text, complaint):
    recipe = tmp_path / "mine.py"
    recipe.write_text(text)
    with pytest.raises(UserError) as error:
        read_recipe(recipe)
    assert complaint in str(error.value) and str(recipe) in str(error.value)


def test_missing_recipe_suggests_the_one_in_config(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="did you mean config/quickstart.py?"):
        read_recipe("quickstart")
    with pytest.raises(UserError, match="did you mean config/tinystories.py?"):
        read_recipe("config/tinystory.py")
    with pytest.raises(UserError, match="no recipe file config/nothing.py"):
        read_recipe(Path("config/nothing.py"))


@pytest.mark.parametrize("changes, complaint", [
    (dict(n_embd=100, n_head=6), "n_embd = 100 is not a multiple of n_head = 6"),
    (dict(max_iters=1000), "warmup_iters = 1000 is not below lr_decay_iters = 1000"),
    (dict(device_batch_size=33), "device_batch_size = 33 does not divide an update's 1024"),
    (dict(eval_iters=0), "eval_iters = 0"),
    (dict(max_tokens=131_071), "max_tokens = 131071 is less than one update of 131072 tokens"),
    (dict(max_tokens=1_000_000), "warmup_iters = 1000 is not below lr_decay_iters = 224"),
])
def test_settings_that_contradict_each_other(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        Config(**changes)


def test_the_schedule_ends_with_the_run_unless_it_is_set():
    assert Config(max_iters=5000).lr_decay_iters == 5000
    assert Config(max_iters=5000, lr_decay_iters=2000).lr_decay_iters == 2000


def test_a_run_has_one_length_and_a_flag_replaces_the_recipes(tmp_path, capsys):
    recipe = tmp_path / "x.py"
    recipe.write_text("max_tokens = 10_000_000")
    stored, flags, _ = read_command_line([str(recipe), "--max_iters=3200"], {})
    assert Config(**over(stored, flags)).max_iters == 3200 and over(stored, {"seed": 1})["max_tokens"] == 10_000_000
    assert Config(**over(stored, {"max_minutes": 5.0})).max_tokens == 0
    cfg = Config(**stored)
    assert cfg.max_iters == cfg.lr_decay_iters == 10_000_000 // 131_072 * 32
    # A run that is made longer keeps its schedule.
    longer = Config(**over(asdict(cfg), {"max_iters": 6400}))
    assert longer.max_iters == 6400 and longer.lr_decay_iters == cfg.max_iters
    assert "max_iters and max_minutes are both set" in refused(capsys, "--max_minutes=1", "--max_iters=5")
    recipe.write_text("max_tokens = 10_000_000\nmax_minutes = 5")
    with pytest.raises(UserError, match="x.py: max_tokens and max_minutes are both set"):
        read_recipe(recipe)


def test_help_has_every_setting_with_its_default_and_bounds(capsys):
    with pytest.raises(SystemExit) as exit:
        settings("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for f in fields(Config):
        assert f"--{f.name} VALUE {f.metadata['meaning']}" in text
        assert f"default: {f.default})" in text
    assert "a whole number from 1; default: 6)" in text and math.inf not in vars(Config()).values()
