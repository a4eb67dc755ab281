"""Home folders and environment variables in the paths of configurations."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dl2pa.config.gather import Problems
from dl2pa.errors import UserError

PATH_KEYS = (
    "data.root",
    "data.val_root",
    "data.index",
    "data.classes",
    "data.s3_cache_dir",
    "model.init",
    "method.prototypes",
    "method.class_vectors",
    "tracking.uri",
)
"""Keys whose text is a path, or may be one."""
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):///?")
_LOCAL_SCHEMES = ("sqlite", "file")
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{(\w*)\})")


def expand_paths(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Expand the paths of a nested configuration that a user wrote; lists of class names are not paths.

    Raises:
        UserError: undefined variables or unknown users.
    """
    result: dict[str, Any] = {}
    problems = Problems()
    for key, value in tree.items():
        name = f"{prefix}{key}"
        with problems:
            if isinstance(value, Mapping):
                value = expand_paths(value, f"{name}.")
            elif name in PATH_KEYS and isinstance(value, str):
                value = expand_path(name, value)
        result[key] = value
    problems.raise_any()
    return result


def expand_path(field: str, text: str) -> str:
    """Expand a leading `~` or `~user`, `$NAME` and `${NAME}`; `$$` is a dollar sign.

    A URI is returned unchanged (its password may contain a dollar sign), except that of a file.

    Raises:
        UserError: an undefined variable or an unknown user.
    """
    uri = _URI.match(text)
    start = 0 if uri is None else uri.end()
    if uri is not None and uri[1].split("+")[0] not in _LOCAL_SCHEMES:
        return text
    return text[:start] + _expand_home(field, _expand_variables(field, text[start:]))


def literal_path(path: str) -> str:
    """Return the text that `expand_path` expands to a path or a URI of a file."""
    text = path.replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


def _expand_variables(field: str, text: str) -> str:
    def value_of(match: re.Match[str]) -> str:
        if match[1]:
            return "$"
        name = match[2] or match[3]
        value = os.environ.get(name)
        if not value:
            message = f"the environment variable {name} is {'not set' if value is None else 'empty'}"
            raise UserError(field, text, message, f"Set {name}, or write $$ for a dollar sign.")
        return value

    return _VARIABLE.sub(value_of, text)


def _expand_home(field: str, text: str) -> str:
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        user = text.partition("/")[0]
        message = f"{user} is not the home folder of a user"
        remedy = f"Write the whole path, or ./{text} for a folder of this name."
        raise UserError(field, text, message, remedy) from None
