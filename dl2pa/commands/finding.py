"""What one check of `dl2pa doctor` found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check: whether it is fine, what was seen, what to do if not. Only `needed` ones fail the command."""

    name: str
    ok: bool
    seen: str
    remedy: str = ""
    needed: bool = True
