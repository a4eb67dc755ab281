"""How this process was started, and that it does not outlive its launcher. A leaf without heavy imports."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
PARENT_VARIABLE = "DL2PA_AGENT_PID"
"""Environment variable in which the launcher's torchrun names itself to its workers."""


def inside_torchrun() -> bool:
    """Whether torchrun (or something that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def die_with_parent() -> None:
    """Ask Linux to kill this process with its parent; end at once where the parent is gone already."""
    expected = int(os.environ.get(PARENT_VARIABLE) or os.getppid())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected:
        os._exit(1)
