"""A recipe as a commented configuration file."""

from __future__ import annotations

import json
import re
import textwrap
from typing import Any

from dl2pa.config.yaml_core import dump_yaml, parse_yaml
from dl2pa.starter.recipe import Recipe

_WIDTH = 100
_PLAIN = re.compile(r"[A-Za-z/][\w./:+-]*", re.ASCII)
"""Text that needs no quotes, unless it is a word such as true."""


def render(recipe: Recipe, header: str) -> str:
    """Return the YAML text: the header, then each section with the reasons above its keys.

    Args:
        header: like a reason, paragraphs separated by line breaks.
    """
    lines = _comment(header, "")
    for section, values in recipe.tree.items():
        lines.append(f"{section}:")
        for key, value in values.items():
            lines += _comment(recipe.reasons.get(f"{section}.{key}", ""), "  ")
            lines.append(f"  {key}: {_scalar(value)}")
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    wrapper = textwrap.TextWrapper(
        _WIDTH,
        initial_indent=prefix,
        subsequent_indent=prefix,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line for paragraph in text.splitlines() for line in wrapper.wrap(paragraph)]


def _scalar(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and parse_yaml(value) == value
        return value if plain else json.dumps(value, ensure_ascii=False)
    return dump_yaml([value]).strip("[] \n")
