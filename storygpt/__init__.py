"""Everything that prepare.py, train.py and sample.py share.

A script imports this package first: before torch, whose import takes seconds and reads OpenMP's environment variables.
"""

import os
import signal
import sys
from pathlib import Path

# How often OpenMP's threads check for new work before they sleep, in GNU's implementation, which torch's Linux packages
# contain. Its default of 300,000 can make a run that shares the cores with another process several times slower
# (docs/speed.md).
SPIN_COUNT = "2000"
OPENMP_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # each sets how long threads wait


def before_importing_torch():
    """Let Ctrl-C end the process at once, without a traceback, until the script's main starts (`exit_with_one_line`).

    Also set what torch reads from the environment, unless the user has.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in a shell's background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # an exception could be lost in an import that catches it
    if not any(name in os.environ for name in OPENMP_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    if "RANK" in os.environ:  # DistributedDataParallel warns if a model has no unused parameters
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


project = Path(__file__).parents[1]
if Path(getattr(sys.modules["__main__"], "__file__", "")).resolve().parent in (project, project / "tools"):
    before_importing_torch()  # not when a test or a notebook imports this
