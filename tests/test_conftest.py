"""What pytest prints at its end for docs/platforms.md."""

import os
import platform
import subprocess
import sys

import torch

from conftest import ROOT


def test_the_summary_names_the_platform_and_why_tests_were_skipped(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\n@pytest.mark.skipif(True, reason='needs a Mac')\n@pytest.mark.parametrize('i', range(3))\n"
        "def test_a(i): pass\ndef test_b(): pytest.skip('no browser')\ndef test_c(): pass\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "test_x.py"],
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
                          capture_output=True, text=True)
    line, *skipped = done.stdout.split(" platform ==")[1].splitlines()[1:4]
    assert line.startswith(platform.platform()) and f"PyTorch {torch.__version__}" in line
    assert skipped == ["skipped: 3 tests (needs a Mac)", "skipped: 1 test (no browser)"]
