"""What pytest prints at its end for docs/platforms.md."""

import platform
from types import SimpleNamespace

import torch

import conftest


def test_the_summary_names_the_platform_why_tests_were_skipped_and_how_many_are_slow():
    lines = []
    skipped = [SimpleNamespace(longrepr=("test_x.py", 1, f"Skipped: {reason}"))
               for reason in ("needs a Mac", "no browser", "needs a Mac")]
    conftest.pytest_terminal_summary(SimpleNamespace(
        section=lambda title: None, line=lines.append,
        config=SimpleNamespace(slow_tests=2, option=SimpleNamespace(markexpr="not slow")),
        getreports=lambda kind: skipped))
    assert lines[0].startswith(platform.platform()) and f"PyTorch {torch.__version__}" in lines[0]
    assert lines[1:] == ["skipped: 2 tests (needs a Mac)", "skipped: 1 test (no browser)",
                         "2 slow tests not run: python -m pytest -m slow"]
