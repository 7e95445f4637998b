"""The README says what the program does: its commands are the ones that CI runs, its table has every setting."""

import re
from dataclasses import fields

from config import Config
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_finds_its_commands_once_on_a_line_each():
    loop = (ROOT / ".ci/run").read_text().split("for requirements in ")[1].splitlines()[0]
    assert len(loop.split()) == 4
    for requirements in re.findall(r"requirements\S*\.txt", loop):
        assert len(re.findall(rf"^pip install -r {re.escape(requirements)} && python .*$", README, re.M)) == 1


def test_the_table_has_every_setting_with_its_default_and_meaning():
    rows = re.findall(r"^\| `(\w+)` \| (\S*) \| (.*) \|$", README, re.M)
    assert rows == [(f.name, str(f.default), f.metadata["meaning"]) for f in fields(Config)]


def test_nothing_is_left_to_be_filled_in():
    assert not re.search(r"@@|TODO|XXX", README)


def test_every_file_has_its_place_in_the_plan():
    plan = README.split("## The plan of the house")[1]
    files = [path for pattern in ("*.py", "tools/*.py", "docs/*.md", "data/*.py") for path in ROOT.glob(pattern)]
    for path in [*files, ROOT / "config", ROOT / "tests"]:
        assert f"| `{path.relative_to(ROOT)}{'/' if path.is_dir() else ''}` |" in plan
