"""This process: its rank under torchrun, start time, and end with its parent; private arguments of others."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dl2pa import envvars
from dl2pa.errors import UserError
from dl2pa.osutil import set_parent_death_signal

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
"""Beginning of an override, `key=value`."""
_LIKE_OVERRIDE = re.compile(r"[^=/]*=")
"""Beginning of anything that may be read as an override."""
_PYTHON = (sys.executable, "-P")
"""Python that, like the installed `dl2pa`, imports nothing from the working directory, such as a file `queue.py`."""
_DL2PA = (*_PYTHON, "-m", "dl2pa")


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


def shown_words(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that other users may read: all except overrides."""
    return [word for word in arguments if word.startswith("-") or not _LIKE_OVERRIDE.match(word)]


def dl2pa_command(arguments: Sequence[str]) -> list[str]:
    """Return the command line that runs `dl2pa` with the arguments."""
    return [*_DL2PA, *arguments]


def dl2pa_arguments(command: Sequence[str]) -> list[str] | None:
    """Return the arguments of a `dl2pa_command`; None for other commands."""
    count = len(_DL2PA)
    return list(command[count:]) if tuple(command[:count]) == _DL2PA else None


def private_command(arguments: Sequence[str]) -> list[str]:
    """Command line of a process that runs `dl2pa` with the arguments; its input is `private_input(arguments)`."""
    return [*_PYTHON, "-m", "dl2pa.private_command", *shown_words(arguments)]


@contextmanager
def private_input(arguments: Sequence[str]) -> Generator[int]:
    """Yield a file descriptor for the standard input of the process; the file is in memory and has no name."""
    descriptor = os.memfd_create("dl2pa")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(json.dumps(list(arguments)).encode())
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
