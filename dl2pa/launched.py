"""How this process was started, and that it does not outlive its launcher. A leaf without heavy imports."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
PARENT_VARIABLE = "DL2PA_AGENT_PID"
"""Environment variable in which the launcher's torchrun names itself to its workers."""

STORE_VARIABLE = "DL2PA_STORE"
"""Environment variable with the file by which the ranks of one machine find each other."""

COMMAND_AT = "DL2PA_COMMAND_AT"
"""Environment variable with the time at which `dl2pa train` was called, seconds since 1970."""


def inside_torchrun() -> bool:
    """Whether torchrun (or something that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def note_command() -> None:
    """Let the processes that this command starts know when it began."""
    os.environ[COMMAND_AT] = str(_process_began())


def command_began() -> float:
    """When the command began whose part this process is; seconds since 1970."""
    return float(os.environ.get(COMMAND_AT) or _process_began())


def _process_began() -> float:
    try:
        ticks = float(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):  # no Linux
        return time.time()
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


def die_with_parent() -> None:
    """Ask Linux to kill this process with its parent; end at once where the parent is gone already."""
    expected = int(os.environ.get(PARENT_VARIABLE) or os.getppid())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected:
        os._exit(1)
