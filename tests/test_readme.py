"""The documentation agrees with the program: commands, settings, files, names and links.

`python tests/test_readme.py` rewrites the table of docs/settings.md.
"""

import re
from dataclasses import fields

import pytest

from conftest import ROOT  # first: it puts the project on sys.path
from storygpt.settings import Config, allowed_values

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in (
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))}
SETTINGS = ROOT / "docs/settings.md"


def settings_table():
    """The Markdown table of all settings."""
    rows = ["| setting | default | values | resume | meaning |", "|---|---|---|---|---|"]
    for f in fields(Config):
        resume = "yes" if f.metadata.get("resume") else ""
        rows.append(f"| `{f.name}` | {f.default} | {allowed_values(f)} | {resume} | {f.metadata['meaning']} |")
    return "\n".join(rows) + "\n"


def section(heading):
    """The text of a second-level section of the README."""
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def anchors(text):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120


def test_ci_finds_its_commands_once():
    commands = re.findall(r"\$\(readme_command (\S+)\)", (ROOT / ".ci/run").read_text())
    assert sorted(commands) == ["requirements-dev.txt", "requirements.txt"]
    for requirements in commands:
        assert len(re.findall(rf"^pip install -r {re.escape(requirements)} && ", README, re.M)) == 1


def test_the_settings_table_is_up_to_date():
    table = SETTINGS.read_text(encoding="utf-8").partition("| setting |")
    assert table[1] + table[2] == settings_table(), "run  python tests/test_readme.py"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_resolve_and_nothing_is_left_to_be_filled_in(path):
    assert not re.search(r"@@|TODO|XXX", PAGES[path])
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[path]):
        if not link.startswith(("http://", "https://")):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_file_is_in_the_layout_table():
    names = re.findall(r"`([^`]+)`", section("Layout"))
    files = [path for pattern in ("*.py", "tools/*.py", "storygpt/*.py", "storygpt/*/*.py", "docs/*.md",
                                 "requirements*.txt", "*.toml", "CONTRIBUTING.md")
             for path in ROOT.glob(pattern) if path.name != "__init__.py"]
    assert not {path.name for path in files} - set(names)
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert not folders - set(names)
    known = {path.name for path in [*files, *(ROOT / "config").glob("*.py")]}
    assert not {name for name in names if name.endswith((".py", ".md", ".txt"))} - known  # nothing that is gone


def test_every_name_in_where_to_change_what_exists():
    for row in re.findall(r"^\| .*$", section("Where to change what"), re.M)[1:]:
        text = None
        for name in re.findall(r"`([^`]+)`", row):
            if re.fullmatch(r"[\w/]+\.py", name):
                text = (ROOT / name).read_text(encoding="utf-8")
            elif name.isidentifier():
                assert re.search(rf"^ *(?:(?:def|class) {name}\b|{name}\b[^=(]* = )", text, re.M), f"{name}: {row}"


if __name__ == "__main__":  # replace the table, which ends the page
    text = SETTINGS.read_text(encoding="utf-8")
    SETTINGS.write_text(text.split("| setting |")[0] + settings_table(), encoding="utf-8")
