"""Memory of this process, read from /proc."""

from __future__ import annotations

from pathlib import Path

_SELF = Path("/proc/self")


def resident_gib() -> float:
    """Return the current resident memory in GiB."""
    return _status_gib("VmRSS")


def peak_gib() -> float:
    """Return the peak resident memory since `reset_peak` in GiB."""
    return _status_gib("VmHWM")


def reset_peak() -> None:
    """Reset the peak to the current value."""
    (_SELF / "clear_refs").write_text("5", encoding="ascii")


def _status_gib(name: str) -> float:
    lines = (_SELF / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(name + ":"))
