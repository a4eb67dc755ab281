"""Convert names and values to a form that MLflow accepts, and remove secrets."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dl2pa.redaction import HIDDEN, is_secret_name, redact

MAX_NAME = 250
MAX_PARAM = 6000
MAX_TAG = 8000

_NOT_ALLOWED = re.compile(r"[^/\w.\- :]")
_MARKDOWN = re.compile(r"([\\*<]|\](?=[(\[:])|(?<!\w)_|_(?!\w))")


def clean_name(name: str) -> str:
    """Replace characters that MLflow does not accept in names, and truncate to 250 characters."""
    allowed = _NOT_ALLOWED.sub("_", str(name)).lstrip("/")
    normal = posixpath.normpath(allowed) if allowed else "unnamed"
    while normal.startswith(".."):
        normal = normal.lstrip("./") or "unnamed"
    return "unnamed" if normal == "." else normal[:MAX_NAME].rstrip("/")


def clean_value(name: str, value: Any, limit: int) -> str:
    """Convert ``value`` to text, remove secrets, and truncate it to ``limit`` characters with an ellipsis."""
    text = str(value)
    if isinstance(value, str) and text and is_secret_name(name):
        return HIDDEN
    text = redact(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def clean_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Flatten nested params to dotted names and sanitize them; if two names become equal, keep the first."""
    cleaned: dict[str, str] = {}
    for name, value in _leaves(params, ""):
        cleaned.setdefault(clean_name(name), clean_value(name, value, MAX_PARAM))
    return cleaned


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Sanitize the names and values of tags."""
    return {clean_name(name): clean_value(name, value, MAX_TAG) for name, value in tags.items()}


def encode_number(value: float) -> float | str:
    """Encode a float for strict JSON: NaN and infinities become the strings ``nan``, ``inf`` and ``-inf``."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def escape_markdown(text: str) -> str:
    """Escape emphasis, links and HTML; the caller escapes code spans and table separators."""
    return _MARKDOWN.sub(r"\\\1", text)


def markdown_text(text: object) -> str:
    """Format text as one line of plain Markdown."""
    return escape_markdown(" ".join(str(text).split())).replace("`", "\\`").replace("|", "\\|")


def _leaves(mapping: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
