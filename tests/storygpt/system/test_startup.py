"""What scripts do before they import torch: Ctrl-C while they import, OpenMP's environment variables."""

import ast
import os
import signal
import subprocess
import sys

import pytest
import torch

import storygpt
from conftest import ROOT
from storygpt.system.errors import exit_with_one_line
from storygpt.system.hardware import describe_threads

SCRIPTS = [path for pattern in ("*.py", "tools/*.py") for path in sorted(ROOT.glob(pattern))
           if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")]


@pytest.fixture
def default_handler():
    """The handler of SIGINT is the default one, and restored after the test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_every_script_and_tool_imports_storygpt_first_and_reports_its_errors_in_one_line():
    assert {"prepare.py", "train.py", "sample.py", "hf.py"} <= {path.name for path in SCRIPTS}
    for path in SCRIPTS:
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        first = next(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
        main = next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == "main")
        assert ast.unparse(first) == "import storygpt", path
        assert [ast.unparse(decorator) for decorator in main.decorator_list] == ["exit_with_one_line"], path


@pytest.mark.parametrize("words", [["train.py"], ["-m", "tools.bench"]], ids=["script", "tool"])
def test_ctrl_c_during_the_imports_ends_silently(tmp_path, words):
    """A package that takes long to import, and hides every exception as some do, stands for the real one."""
    (tmp_path / "torch.py").write_text(
        "import signal\nprint('importing', flush=True)\ntry: signal.pause()\nexcept BaseException: pass\n")
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == -signal.SIGINT


def test_main_restores_ctrl_c_and_a_background_job_still_ignores_it(default_handler):
    main = exit_with_one_line(lambda argv=None: signal.getsignal(signal.SIGINT))
    storygpt.before_importing_torch()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert main() is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    storygpt.before_importing_torch()
    assert signal.getsignal(signal.SIGINT) is main() is signal.SIG_IGN


@pytest.mark.parametrize("variables", [{}, {"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "ACTIVE"}], ids=str)
def test_threads_sleep_early_unless_the_user_has_chosen(monkeypatch, default_handler, variables):
    for name in storygpt.OPENMP_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ | variables)
    storygpt.before_importing_torch()
    chosen = {name: os.environ[name] for name in storygpt.OPENMP_VARIABLES if name in os.environ}
    assert chosen == (variables or {"GOMP_SPINCOUNT": storygpt.SPIN_COUNT})
    waiting, = (f"{name}={value}" for name, value in chosen.items())
    assert describe_threads().startswith(f"{torch.get_num_threads()} thread") and f" ({waiting})" in describe_threads()
