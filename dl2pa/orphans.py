"""No process outlives its launcher. A leaf without heavy imports: a worker calls it before anything else."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
PARENT_VARIABLE = "DL2PA_AGENT_PID"
"""Environment variable in which the launcher's torchrun names itself to its workers."""


def die_with_parent() -> None:
    """Ask Linux to kill this process with its parent; end at once where the parent is gone already."""
    expected = int(os.environ.get(PARENT_VARIABLE) or os.getppid())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected:
        os._exit(1)
