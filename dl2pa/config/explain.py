"""Reference of the configuration keys, generated from the schema.

`dl2pa config --explain` prints it; docs/configuration.md is its Markdown form.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dl2pa.config.paths import PATH_KEYS
from dl2pa.config.schema import Config
from dl2pa.errors import UserError

Schema = dict[str, Any]

_INTRODUCTION = """\
# Configuration reference

<!-- Generated from dl2pa/config/schema.py. To update:
     python -m dl2pa config --explain --markdown > docs/configuration.md -->

A configuration is a YAML file with the sections below. `base:` names one or several files that it extends. Every key
is optional. Overrides on the command line are written as `optim.lr=0.1`; the last one of a key wins.

    dl2pa config FILE                  # print the configuration with all defaults
    dl2pa config --explain optim.lr    # print the reference of a key or section

All problems of a configuration are reported together, each with its value, the file and line that set it, and a remedy.

## Values

The rules also apply to sweep files.

| written | read as |
|---|---|
| `5`, `-1`, `0.1`, `.5`, `1e-3`, `0x1f`, `0o17`, `.inf` | number, as in YAML 1.2: `0o17` is 15, `017` is 17 |
| `true`, `false`, `True`, `TRUE`, … | true or false |
| `null`, nothing; in a file also `~` | null: the default of most keys |
| `[1, 2]`, `{a: b}` | list, mapping |
| `"5"`, `'true'` | text |
| anything else | text: `yes`, `no`, `on`, `off`, `1:30`, `1_000`, `2024-02-30` |

- Text that looks like a number, true, false or null must be put in quotes, such as a class name `007` or a tag `1.10`:
  `"007"` in a file, `'tracking.run_name="007"'` in a shell. Unquoted it is refused, not converted.
- Keys that take true or false also accept the texts `yes`, `no`, `on` and `off`.
- An override is literal text unless the whole value is a number, true, false, null, a list in brackets, a mapping in
  braces or a quoted text. `#`, `:`, `*`, `!` and a leading `~` have no special meaning there. White space around the
  value is removed. Brackets, braces or quotes around an invalid list, mapping or text are refused.
- A key that a mapping contains twice is refused, and so are YAML tags other than those of the types above (`!!binary`,
  `!!timestamp`, …). A key may be set by `base:`, the file and overrides; the later one replaces the earlier.
- In keys of type path, and in `base:` and the `config` of a sweep, a leading `~` or `~user`, `$NAME` and `${NAME}` are
  expanded; an undefined or empty variable is refused. `$$` is a dollar sign, `./~` a folder named `~`. A URI is not
  expanded, except the file of `sqlite:///FILE`. Other text, class names and the values of environment variables (such
  as DL2PA_DATA) are not expanded.
- `config.yaml` of a run directory contains the expanded paths. It is read as it was written, also by older versions.
"""


@dataclass(frozen=True)
class Key:
    """Reference of one key.

    Attributes:
        name: dotted name, such as `optim.lr`.
        type: type and range of the value, or its allowed values.
        allowed: allowed values; empty if `type` describes a type or range.
        default: default in its JSON form.
    """

    name: str
    type: str
    allowed: tuple[Any, ...]
    default: Any
    description: str

    @property
    def default_text(self) -> str:
        """Default as one line of YAML."""
        return _text(self.default)

    def as_dict(self) -> dict[str, Any]:
        """JSON form, without the name."""
        return {
            "type": self.type,
            "default": self.default,
            "allowed": list(self.allowed) or None,
            "description": self.description,
        }


def sections() -> dict[str, tuple[str, list[Key]]]:
    """Section name to its description and keys. A nested section such as `method.match` has its own entry."""
    return dict(_walk("", Config))


@cache
def keys_of(model: type[BaseModel], prefix: str = "") -> tuple[Key, ...]:
    """Return the keys of a configuration, or those of another model with a prefix such as `sweep.`."""
    return tuple(key for _, (_, members) in _walk(prefix, model) for key in members)


def _walk(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, tuple[str, list[Key]]]]:
    properties: Schema = {} if model is Config else model.model_json_schema()["properties"]
    keys: list[Key] = []
    nested: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            nested.append((f"{prefix}{name}", field.annotation))
        else:
            keys.append(_key(f"{prefix}{name}", field, properties[name]))
    if prefix:
        yield prefix.removesuffix("."), (inspect.getdoc(model) or "", keys)
    for name, part in nested:
        yield from _walk(f"{name}.", part)


def _key(name: str, field: FieldInfo, schema: Schema) -> Key:
    variants: list[Schema] = schema.get("anyOf", [schema])
    allowed = [value for variant in variants for value in _allowed(variant)]
    description = " ".join((field.description or "").split())
    kind = " or ".join(map(_type, variants))
    if name in PATH_KEYS:
        kind = kind.replace("string", "path", 1)
    return Key(name, kind, tuple(allowed), schema["default"], description)


def _allowed(schema: Schema) -> list[Any]:
    if schema.get("type") == "boolean":
        return [True, False]
    return schema.get("enum") or ([schema["const"]] if "const" in schema else [])


def _type(schema: Schema) -> str:
    allowed = _allowed(schema)
    if allowed:
        return " or ".join(map(_text, allowed))
    kind = schema["type"]
    if kind == "array":
        if "prefixItems" not in schema:
            return f"list of {_type(schema['items'])}"
        items = [_type(item) for item in schema["prefixItems"]]
        return f"[{', '.join(items)}]"
    if kind == "object":
        values = schema.get("additionalProperties")
        is_text = isinstance(values, dict) and values.get("type") == "string"
        return "mapping of names to strings" if is_text else "mapping"
    bounds = (("exclusiveMinimum", ">"), ("minimum", "≥"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    limits = [f"{sign} {schema[bound]:g}" for bound, sign in bounds if bound in schema]
    return " ".join([kind, " and ".join(limits)]).strip()


def _text(value: Any) -> str:
    """The value as one line of YAML."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def explain(name: str) -> list[Key]:
    """Reference of the key, or of all keys of the section, called `name`; of all keys if it is empty.

    Raises:
        UserError: there is no such key or section.
    """
    keys = keys_of(Config)
    result = [key for key in keys if not name or key.name == name or key.name.startswith(f"{name}.")]
    if result:
        return result
    names = [*sections(), *(key.name for key in keys)]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    near += [other for other in names if other.endswith(f".{name}") and other not in near]
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"Sections: {', '.join(sections())}."
    raise UserError("--explain", name, "unknown key or section", remedy)


def as_text(keys: list[Key]) -> str:
    """Reference as indented text."""
    return "\n".join(
        f"{key.name}\n  type:    {key.type}\n  default: {key.default_text}\n  {key.description}"
        for key in keys
    )


def as_markdown() -> str:
    """Content of docs/configuration.md."""
    parts = [_INTRODUCTION]
    for name, (description, keys) in sections().items():
        rows = "\n".join(
            f"| `{key.name}` | {key.type} | `{key.default_text}` | {key.description} |" for key in keys
        )
        table = f"| key | type | default | description |\n|---|---|---|---|\n{rows}\n"
        parts.append(f"## {name}\n\n{description}\n\n{table}")
    return "\n".join(parts)
