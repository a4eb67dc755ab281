"""Start of this process: under torchrun or alone, start time, and ending with its parent."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from dl2pa import envvars
from dl2pa.osutil import set_parent_death_signal


def inside_torchrun() -> bool:
    """Whether torchrun (or something that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def note_command() -> None:
    """Record the start time of this command for the processes that it starts."""
    os.environ[envvars.COMMAND_START] = str(_process_began())


def command_began() -> float:
    """Start time of the command that this process belongs to, seconds since 1970."""
    return float(os.environ.get(envvars.COMMAND_START) or _process_began())


def _process_began() -> float:
    try:
        ticks = float(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):  # not Linux
        return time.time()
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


def die_with_parent() -> None:
    """End this process when its parent ends; exit at once if the parent has already ended."""
    expected = int(os.environ.get(envvars.AGENT_PID) or os.getppid())
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != expected:
        os._exit(1)
