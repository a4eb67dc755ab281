"""Removal of secrets from the text that a run prints and writes.

Redacted are credentials in URLs; values assigned to names such as password, token or key; keys of known formats; and
the values of environment variables with such names. In doubt, text is redacted.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"
_MIN_LENGTH = 6
"""Minimum length of a secret that is searched for by its value, in characters."""

_WORD = (
    r"(?:password|passwd|passphrase|secret|token|credentials?|(?:api|access|account|private|secret|signing|"
    r"encryption|shared|auth)[_.-]?(?:access)?key|[_.-](?:pass|pwd|pw|key))"
)
_SECRET_NAME = re.compile(rf"(?i)(?:{_WORD}|^pwd|^pass|auth)$")
_USER_INFO = re.compile(r"""(?<=://)(?:[^\s/@"'`<>]*:[^\s"'`<>]*|[^\s/@"'`<>]+)(?=@)""")
_VIEW_NAME = r"(?!(?<=viewStateShareKey=)dl2pa-[a-z]+(?![^&\s)'\"]))"
"""Not before the name of a saved view of dl2pa, which MLflow calls a key."""
_QUERY = re.compile(
    rf"(?i)([?&][\w.-]*(?:{_WORD}|pwd|pass|sig|signature|key|auth|code)=){_VIEW_NAME}[^&\s'\"]+"
)
_ASSIGNED = re.compile(
    rf"""(?imx) (?<![\w.-]) (--?)? ([\w.-]*{_WORD} | pwd | pass) ([\\]{{0,15}}["']?)
    (\s*(?::=|=>|[:=])(?![=>])\s* | (?<=\S)\s+(?!=)) (?! \w+\( | \*\*\* | [\\]{{0,15}}["']\*\*\* )
    (\"\"\"[\s\S]*?(?:\"\"\"|\Z) | '''[\s\S]*?(?:'''|\Z)
    | (?:[\\]{{1,15}}"){{3}}[^\n]*?(?:(?:[\\]{{1,15}}"){{3}}|$)
    | (?P<escapes>[\\]{{1,15}})"[^\n]*?(?<!\\)(?P=escapes)"
    | "(?:[^"\\\n]|\\.)*"? | '(?:[^'\\\n]|\\.)*'? | [^\s,;)\]}}"'\\]+)"""
)
_HEADER = re.compile(
    r"(?i)\b(authorization\s*[:=]\s*(?:(?:bearer|basic|token)\s+)?|bearer\s+|basic\s+)"
    r"(?!(?:bearer|basic|token)\b)[\w.~+/=-]{6,}"
)
_LOGIN = re.compile(r"(?i)((?:^|\s)(?:-u|--user|--proxy-user)[\s=]+[^\s:]+:|\blogin\s+\S+\s+password\s+)\S+")
_KNOWN_FORM = re.compile(
    r"-----BEGIN [A-Z ]*(?:PRIVATE KEY|PGP MESSAGE)[A-Z ]*-----[\s\S]*?(?:-----END [A-Z ]*-----|\Z)"
    r"|\b(?:A(?:KIA|SIA|GPA|ROA)[0-9A-Z]{12,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|hf_\w{16,}"
    r"|xox[abeprs]-[\w-]{10,}|sk-[\w-]{16,}|[rs]k_(?:live|test)_\w{10,}|AIza[\w-]{30,}|ya29\.[\w-]{10,}"
    r"|npm_\w{20,}|pypi-[\w-]{20,}|dop_v1_\w{20,}|SG\.[\w-]{10,}\.[\w-]{10,}|dckr_pat_[\w-]{16,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?|hooks\.slack\.com/services/[\w/]+|\d{8,10}:AA[\w-]{30,})"
)
_ADDRESS = re.compile(r"(?i)(\bnotify\.url\s*[=:]\s*[\"']?[a-z][a-z+]*://[^/\s\"'?]*)[^\s\"']*")
_hidden_addresses: dict[str, str] = {}
_HARMLESS = ("", "none", "null", "true", "false", "str", "int", HIDDEN)


def redact(text: str) -> str:
    """Replace each secret in ``text`` by ``***``; idempotent."""
    for secret in _known_values(tuple(os.environ.items())):
        text = text.replace(secret, HIDDEN)
    for address in sorted(_hidden_addresses, key=len, reverse=True):
        text = text.replace(address, _hidden_addresses[address])
    text = _ADDRESS.sub(rf"\1/{HIDDEN}", text)
    text = _KNOWN_FORM.sub(HIDDEN, text)
    text = _QUERY.sub(rf"\1{HIDDEN}", _USER_INFO.sub(HIDDEN, text))
    text = _LOGIN.sub(rf"\1{HIDDEN}", _HEADER.sub(rf"\1{HIDDEN}", text))
    return _ASSIGNED.sub(_hide_value, text)


def hide_address(address: str) -> None:
    """From now on, show only scheme and host of an address whose path is a secret, as that of a webhook."""
    shown = without_path(address)
    if shown != address:
        _hidden_addresses[address] = shown


def without_path(address: str) -> str:
    """Scheme and host of an address; ``***`` replaces the rest."""
    scheme, separator, rest = address.partition("://")
    host = re.split(r"[/?#]", rest.rpartition("@")[2] if "@" in rest else rest)[0]
    if not separator:
        return HIDDEN
    return address if rest.strip("/") == host else f"{scheme}://{host}/{HIDDEN}"


def redact_command(words: Sequence[str]) -> str:
    """Return a shell command line without secrets, including values that follow an option."""
    return redact(shlex.join(redact(word) for word in words))


def redact_tree(tree: Any) -> Any:
    """Return JSON or YAML content without secrets. Each string is redacted separately, which keeps the file valid."""
    if isinstance(tree, Mapping):
        return {key: _redact_item(str(key), value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact_tree(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree


def _redact_item(name: str, value: Any) -> Any:
    hidden = isinstance(value, str) and value.lower() not in _HARMLESS and is_secret_name(name)
    return HIDDEN if hidden else redact_tree(value)


def is_secret_name(name: str) -> bool:
    """Return whether a variable, key or tag with this name contains a secret."""
    return _SECRET_NAME.search(name) is not None


def has_hidden_credentials(uri: str) -> bool:
    """Return whether ``uri`` was redacted and can no longer be used to connect."""
    return f"//{HIDDEN}@" in uri or f"={HIDDEN}" in uri


@functools.lru_cache(maxsize=2)
def _known_values(environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Return the secrets in the environment, also in their URL and JSON encodings, longest first."""
    values: set[str] = set()
    for name, value in environment:
        secrets = [value.strip()] if is_secret_name(name) and name not in ("PWD", "OLDPWD") else []
        secrets += [match[0].partition(":")[2] for match in _USER_INFO.finditer(value)]
        for secret in secrets:
            if len(secret) >= _MIN_LENGTH and secret.lower() not in _HARMLESS:
                values |= {secret, quote(secret, ""), unquote(secret), json.dumps(secret)[1:-1]}
    return tuple(sorted(values, key=len, reverse=True))


def _hide_value(match: re.Match[str]) -> str:
    dashes, name, closing, between, value = match.groups()[:5]
    if not between.strip() and not dashes:  # two words of a sentence
        return match[0]
    bare = value.strip("\\\"'")
    if bare.lower() in _HARMLESS or not bare:
        return match[0]
    opening = re.match(r"""[\\]{0,3}(?:\"\"\"|'''|["'])?""", value)
    quotes = opening[0] if opening else ""
    return f"{dashes or ''}{name}{closing}{between}{quotes}{HIDDEN}{quotes}"
