"""A small file system that can be filled, without root."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

_MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && echo mounted && read -r _'


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Generator[Path]:
    """Mount a tmpfs in a mount namespace of its own; yields a path to it. Skips the test where that is forbidden.

    Args:
        folder: mount point, an empty folder.
        size: as `mount` reads it, for example `8m`.
    """
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", _MOUNT, "sh", size, str(folder)]
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != "mounted\n":
            pytest.skip(f"a small file system cannot be mounted here: {holder.communicate()[1].strip()}")
        yield Path(f"/proc/{holder.pid}/root") / folder.relative_to("/")
    finally:
        holder.kill()
        holder.communicate()


@contextlib.contextmanager
def full(disk: Path, spare: int = 0) -> Iterator[None]:
    """Fill the disk, but for `spare` bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
    if spare:
        with filler.open("rb+") as file:
            file.truncate(max(0, filler.stat().st_size - spare))
    try:
        yield
    finally:
        filler.unlink()
