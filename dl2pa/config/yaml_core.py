"""YAML as dl2pa reads and writes it: scalars of the YAML 1.2 core schema, each key of a mapping once.

PyYAML follows YAML 1.1, in which `yes` is true, `017` is 15, `1:30` is 90, `1e-3` is text and `2024-02-30` is an error.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from dl2pa.errors import UserError

_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
"""Type to the pattern of its plain scalars and the characters that these begin with (YAML 1.2.2, section 10.3)."""
_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")
_BASES = {"0o": 8, "0x": 16}

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Safe loader, in C if PyYAML was built with libyaml."""
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
"""Errors of invalid text. ValueError: a number that is too long, or text that is not UTF-8."""


class _UniqueLoader(_SafeLoader):
    """YAML 1.1 as PyYAML reads it; refuses a key that a mapping contains twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        first: dict[Any, Any] = {}
        for key_node, _ in node.value:
            if key_node.tag == f"{_TAG}merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self.construct_object(key_node, deep=True)
            if key in first:
                line = first[key].line + 1
                message = f"the key {key!r} is already set in line {line}"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            first[key] = key_node.start_mark
        return super().construct_mapping(node, deep=deep)


class _CoreLoader(_UniqueLoader):
    """Scalars of the YAML 1.2 core schema and, as in YAML 1.1, the merge key `<<`; no other types."""

    yaml_implicit_resolvers: dict[Any, Any] = {}
    yaml_constructors = {
        f"{_TAG}{name}": getattr(_SafeLoader, f"construct_yaml_{name}") for name in _TYPES if name != "int"
    }

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        return int(text, _BASES.get(text[:2], 10))


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as another type, so that both read the same."""


def _refuse_tag(loader: Any, node: Any) -> None:
    message = f"the tag {node.tag.replace(_TAG, '!!')} is not supported"
    raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)


_CoreLoader.add_constructor(f"{_TAG}int", _CoreLoader.construct_yaml_int)
_CoreLoader.add_constructor(None, _refuse_tag)
_CoreLoader.add_implicit_resolver(f"{_TAG}merge", re.compile("<<$"), ["<"])
for _name, (_pattern, _first) in _CORE.items():
    _CoreLoader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})\\Z"), _first)
    _Dumper.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})\\Z"), _first)


def parse_yaml(text: str, *, written_by_dl2pa: bool = False) -> Any:
    """Parse one YAML document.

    Args:
        written_by_dl2pa: read it as YAML 1.1, because older versions did not quote text such as 1e5. Files of this
            version read the same in both.

    Raises:
        YAML_ERRORS: invalid YAML, or a key that is given twice.
    """
    return yaml.load(text, _UniqueLoader if written_by_dl2pa else _CoreLoader)


_MAX_KEYS = 10_000


def key_lines(text: str) -> dict[str, int]:
    """Map the dotted key of each mapping entry to its line, from 1; of a file with very many keys only the first.

    Raises:
        YAML_ERRORS: invalid YAML.
    """
    lines: dict[str, int] = {}
    waiting = [("", yaml.compose(text, _CoreLoader))]
    while waiting and len(lines) < _MAX_KEYS:
        prefix, node = waiting.pop(0)
        if not isinstance(node, yaml.MappingNode):
            continue
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = f"{prefix}{key.value}"
                lines.setdefault(name, key.start_mark.line + 1)
                waiting.append((f"{name}.", value))
    return lines


def dump_yaml(tree: Any) -> str:
    """Write a tree as YAML that `parse_yaml` and every YAML 1.1 or 1.2 reader read the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None)


def parse_value(field: str, text: str) -> Any:
    """Parse the value of an override `key=value`.

    A number, true, false, null, a list in brackets, a mapping in braces and text in quotes are read as in a file;
    nothing is null; anything else is literal text, without the white space around it.

    Raises:
        UserError: brackets, braces or quotes that are not a list, a mapping or one quoted text.
    """
    stripped = text.strip()
    if not stripped:
        return None
    kind = {"[]": "list", "{}": "mapping", '""': "quoted text", "''": "quoted text"}.get(
        stripped[0] + stripped[-1] if len(stripped) > 1 else ""
    )
    if kind is None:
        return _parse_scalar(stripped)
    try:
        value = parse_yaml(stripped)
    except YAML_ERRORS as error:
        message = f"is not a valid {kind} ({problem_of(error)})"
        raise UserError(field, text, message, _IN_QUOTES) from None
    if isinstance(value, str if kind == "quoted text" else list | dict):
        return value
    raise UserError(field, text, f"is not a valid {kind}", _IN_QUOTES)


_IN_QUOTES = "Correct it, or put the whole value in quotes to mean the text."


def _parse_scalar(text: str) -> Any:
    """Number, true, false or null; else the text."""
    if text == "~" or not any(re.fullmatch(pattern, text) for pattern, _ in _CORE.values()):
        return text
    try:
        return parse_yaml(text)
    except YAML_ERRORS:
        return text


def value_text(value: Any) -> str:
    """Text of an override's value, from which `parse_value` reads the value back."""
    if isinstance(value, str) and value == value.strip() and value[-1:] not in ("", "]", "}", "'", '"'):
        is_literal = isinstance(_parse_scalar(value), str)
        return value if is_literal else json.dumps(value)
    return json.dumps(value, ensure_ascii=False)


def problem_of(error: BaseException) -> str:
    """Line and problem of one of the `YAML_ERRORS`, on one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error) or type(error).__name__
    text = " ".join(str(problem).split())
    return text if mark is None else f"line {mark.line + 1}: {text}"
