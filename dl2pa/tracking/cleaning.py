"""What may leave this process: names and values a tracking server accepts, and no secrets."""

from __future__ import annotations

import math
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_NAME = 250
MAX_PARAM = 6000
MAX_TAG = 8000
HIDDEN = "***"

_NOT_ALLOWED = re.compile(r"[^/\w.\- :]")
_USER_INFO = re.compile(r"(?<=://)[^/\s]+(?=@)")
_SECRET_QUERY = re.compile(
    r"(?i)([?&](?:[\w-]*[-_])?(?:password|passwd|pwd|token|secret|api_?key|credential|sig|signature)=)[^&\s'\"]+"
)
_SECRET_NAME = re.compile(r"(?i)(password|passwd|secret|token|api_?key|credentials?)$")
_SECRET_WORD = r"[\w.-]*(?:password|passwd|passphrase|secret|token|api_?key|access_?key|credentials?)"
_ASSIGNED = re.compile(
    rf"""(?ix) (?<![\w-]) (--)? ({_SECRET_WORD} ["']?) (\s*[:=](?!=)\s* | (?<=\S)\s+(?!=))
    (?! \w+\( | \*\*\* ) ("[^"\n]*" | '[^'\n]*' | [^\s,;)\]}}"']+)"""
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}")
_KNOWN_FORM = re.compile(
    r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|hf_\w{20,}|xox[abprs]-[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_SECRET_VARIABLES = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")


def redact(text: str) -> str:
    """``text`` without credentials inside URIs and without the values of MLflow's own secret variables."""
    text = _SECRET_QUERY.sub(rf"\1{HIDDEN}", _USER_INFO.sub(HIDDEN, text))
    for variable in _SECRET_VARIABLES:
        secret = os.environ.get(variable, "").strip()
        if len(secret) >= 4:
            text = text.replace(secret, HIDDEN)
    return text


def redact_lines(text: str) -> str:
    """Someone's own text, a command or a diff, without what looks like a secret in it: beside ``redact``'s, values
    given to names like password or token (``--token VALUE`` too), known forms of keys, and the values of
    environment variables of such names. Rather too much is hidden than too little."""
    text = _KNOWN_FORM.sub(HIDDEN, redact(text))
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    text = _ASSIGNED.sub(_hide_value, text)
    for name, secret in os.environ.items():
        if len(secret) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(secret, HIDDEN)
    return text


def _hide_value(found: re.Match[str]) -> str:
    dashes, name, between, value = found.groups()
    if not between.strip() and not dashes:  # two words of a sentence
        return found[0]
    if value.strip("\"'").lower() in ("", "none", "null", "true", "false", "str", "int"):
        return found[0]
    return f"{dashes or ''}{name}{between}{HIDDEN}"


def has_hidden_credentials(uri: str) -> bool:
    """Whether ``uri`` was redacted, so that it no longer opens the server it names."""
    return f"//{HIDDEN}@" in uri or f"={HIDDEN}" in uri


def clean_name(name: str) -> str:
    """``name`` in the characters MLflow takes for metrics, params and tags, at most 250 of them."""
    allowed = _NOT_ALLOWED.sub("_", str(name)).lstrip("/")
    normal = posixpath.normpath(allowed) if allowed else "unnamed"
    while normal.startswith(".."):
        normal = normal.lstrip("./") or "unnamed"
    return "unnamed" if normal == "." else normal[:MAX_NAME].rstrip("/")


def clean_value(name: str, value: Any, limit: int) -> str:
    """``value`` as text without secrets, cut to ``limit`` characters with an ellipsis that shows the cut."""
    text = str(value)
    if isinstance(value, str) and text and _SECRET_NAME.search(name):
        return HIDDEN
    text = redact(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def clean_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Params with nested mappings flattened to dotted names; the first of two equal names wins."""
    cleaned: dict[str, str] = {}
    for name, value in _leaves(params, ""):
        cleaned.setdefault(clean_name(name), clean_value(name, value, MAX_PARAM))
    return cleaned


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as the server takes them."""
    return {clean_name(name): clean_value(name, value, MAX_TAG) for name, value in tags.items()}


def encode_number(value: float) -> float | str:
    """A float as strict JSON can hold it: NaN and the infinities become ``nan``, ``inf`` and ``-inf``."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _leaves(mapping: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
