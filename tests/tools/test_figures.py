"""The script that measures the figures of README.md."""

import json

import pytest

import prepare
import sample
from conftest import ROOT, TINY
from storygpt.settings import Config, apply_overrides, read_command_line
from tools import bench, figures


@pytest.mark.slow
def test_what_is_missing_is_measured_once_a_commit(with_data, monkeypatch, capsys):
    for name in ("one", "two"):
        with_data.joinpath(f"{name}.py").write_text("")
    monkeypatch.setattr(figures, "RUNS", {"one": (["one.py", *TINY], True), "two": (["two.py", *TINY], False)})
    monkeypatch.setattr(figures, "SPEEDS", {"speed": ["generate", "--tiny"]})
    monkeypatch.setattr(figures, "describe_machine", lambda device: {"git": "0123abc"})  # a tree without changes
    figures.main(["--fast"])
    first = json.loads(figures.RESULTS.read_text())
    assert set(first) == {"one"} and first["one"]["seconds"] > 0 and 1 < first["one"]["bits_per_byte"] < 5
    figures.main([])
    results = json.loads(figures.RESULTS.read_text())
    assert set(results) == {"one", "two", "speed"} and results["one"] == first["one"]
    assert results["speed"]["tokens_per_s_1"] > 0
    assert "bits_per_byte" in capsys.readouterr().out


def test_the_commands_are_valid():
    prepare.parse_args(figures.PREPARE[1:])
    sample.parse_args(figures.SAMPLE[1:])
    for words in figures.SPEEDS.values():
        bench.parse_args(words)
    for (config, *flags), _ in figures.RUNS.values():
        assert Config(**apply_overrides(*read_command_line([str(ROOT / config), *flags], {})[:2]))
