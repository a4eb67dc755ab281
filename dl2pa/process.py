"""This process: its rank under torchrun, start time, and end with its parent."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from dl2pa import envvars
from dl2pa.errors import UserError
from dl2pa.osutil import set_parent_death_signal


@dataclass(frozen=True)
class Ranks:
    """Position of this process among all processes of a training and among those on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def torchrun_ranks() -> Ranks | None:
    """Position of this process as torchrun describes it in the environment; None if no such variable is set.

    Raises:
        UserError: only some of the variables are set, or their values contradict each other, as when they are left
            over from another program.
    """
    env = os.environ
    present = [name for name in envvars.RANKS if name in env]
    if not present:
        return None
    rendezvous = () if envvars.STORE in env else envvars.RENDEZVOUS
    missing = [name for name in (*envvars.RANKS, *rendezvous) if name not in env]
    values = " ".join(f"{name}={env[name]}" for name in present)
    remedy = f"Run `unset {' '.join(present)}` to train without another launcher, or start dl2pa by torchrun."
    if missing:
        raise UserError("environment", values, f"torchrun also sets {', '.join(missing)}", remedy)
    try:
        ranks = Ranks(*(int(env[name]) for name in envvars.RANKS))
    except ValueError:
        raise UserError("environment", values, "must be whole numbers", remedy) from None
    if not (
        0 <= ranks.local_rank < ranks.local_size <= ranks.size and ranks.local_rank <= ranks.rank < ranks.size
    ):
        raise UserError("environment", values, "these numbers contradict each other", remedy)
    return ranks


def environment_without_ranks() -> dict[str, str]:
    """Environment for a training of its own, without the variables by which torchrun describes a rank."""
    return {name: value for name, value in os.environ.items() if name not in envvars.RANKS}


def note_command() -> None:
    """Record the start time of this command for the processes that it starts."""
    os.environ[envvars.COMMAND_START] = str(_process_began())


def command_began() -> float:
    """Return the start time of the command that this process belongs to, seconds since 1970."""
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
