"""What scripts do before they import torch: Ctrl-C while they import, OpenMP's environment variables."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
import storygpt
from storygpt.system.errors import exit_with_one_line
from storygpt.system.hardware import describe_threads

# The scripts and tools, and a package that each imports.
SCRIPTS = {"prepare.py": "numpy", "train.py": "torch", "sample.py": "torch", "tools.bench": "torch",
           "tools.compare": "torch", "tools.hf": "torch", "tools.judge": "torch", "tools.publish": "torch",
           "tools.serve": "torch", "tools.sweep": "torch"}


@pytest.fixture
def default_handler():
    """The handler of SIGINT is the default one, and restored after the test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_the_imports_ends_silently(tmp_path, script):
    """A package that takes a minute to import, and hides every exception as some do, stands for the real one."""
    package = "import time\nprint('importing', flush=True)\ntry: time.sleep(60)\nexcept BaseException: pass\n"
    (tmp_path / f"{SCRIPTS[script]}.py").write_text(package)
    words = [ROOT / script] if script.endswith(".py") else ["-m", script]
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == -signal.SIGINT


def test_main_restores_ctrl_c(default_handler):
    handlers = []
    main = exit_with_one_line(lambda argv=None: handlers.append(signal.getsignal(signal.SIGINT)))
    storygpt.before_importing_torch()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    main()
    assert handlers == [signal.default_int_handler]


def test_a_background_job_still_ignores_ctrl_c(default_handler):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    storygpt.before_importing_torch()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("variables", [
    {}, {"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"KMP_BLOCKTIME": "0"}])
def test_threads_sleep_early_unless_the_user_has_chosen(monkeypatch, default_handler, variables):
    for name in storygpt.OPENMP_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ | variables)
    storygpt.before_importing_torch()
    chosen = {name: os.environ[name] for name in storygpt.OPENMP_VARIABLES if name in os.environ}
    assert chosen == (variables or {"GOMP_SPINCOUNT": storygpt.SPIN_COUNT})
    waiting, = (f"{name}={value}" for name, value in chosen.items())
    assert describe_threads().startswith(f"{torch.get_num_threads()} thread") and f" ({waiting})" in describe_threads()
