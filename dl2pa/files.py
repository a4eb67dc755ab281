"""Who may read a file that the program writes. A leaf module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any


def follow_umask(path: Path) -> None:
    """Give a finished file the permissions that the user's umask asks for; safetensors leaves it to its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def open_private(path: Path, mode: str) -> IO[Any]:
    """Open a file for writing (``w`` or ``a``) that only its owner may read, whether or not it was there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if "a" in mode else os.O_TRUNC)
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)
    return os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8")
