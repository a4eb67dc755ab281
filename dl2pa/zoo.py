"""Names of the classification models of torchvision and timm, read from their sources.

Importing either library takes seconds and imports torch; a configuration must be refused without both.
"""

from __future__ import annotations

import functools
import re
from importlib.util import find_spec
from pathlib import Path

TIMM = "timm:"
"""Prefix of a timm model in `model.backbone`."""

_REGISTERED = re.compile(r"^@register_model(?:\(\))?\s*\n(?:@[^\n]*\n)*def (\w+)\(", re.MULTILINE)


def is_installed(library: str) -> bool:
    """Whether a library is installed; does not import it."""
    return find_spec(library) is not None


@functools.cache
def torchvision_models() -> tuple[str, ...]:
    """Classification models of torchvision. Its other models are in subfolders."""
    return _registered("torchvision")


@functools.cache
def timm_models() -> tuple[str, ...]:
    """Models of timm, without prefix; empty if timm is not installed."""
    return _registered("timm")


def _registered(library: str) -> tuple[str, ...]:
    spec = find_spec(library)
    folders = (
        [] if spec is None else [Path(place) / "models" for place in spec.submodule_search_locations or []]
    )
    sources = [path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("*.py")]
    return tuple(sorted({name for source in sources for name in _REGISTERED.findall(source)}))
