"""Messages for the errors that pydantic finds in a configuration: one problem per key, with all accepted forms."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import BaseModel, ValidationError

from dl2pa.config.explain import Key, keys_of
from dl2pa.config.gather import UnsetKey
from dl2pa.config.schema import Config
from dl2pa.errors import UserError

Details = Mapping[str, Any]
"""One entry of `ValidationError.errors()`."""

OTHER_NAMES = {
    **dict.fromkeys(("learning_rate", "base_lr"), "optim.lr"),
    "wd": "optim.weight_decay",
    **dict.fromkeys(("optimizer", "opt"), "optim.name"),
    **dict.fromkeys(("scheduler", "sched", "lr_scheduler"), "optim.schedule"),
    **dict.fromkeys(("batch", "bs", "b"), "train.batch_size"),
    **dict.fromkeys(("num_epochs", "max_epochs"), "train.epochs"),
    **dict.fromkeys(("model", "arch", "a", "network"), "model.backbone"),
    **dict.fromkeys(("pretrained", "weights"), "model.init"),
    **dict.fromkeys(("dim", "embed_dim"), "model.embedding_dim"),
    **dict.fromkeys(("data", "data_dir", "data_path"), "data.root"),
    **dict.fromkeys(("workers", "num_workers", "j"), "data.threads"),
    **dict.fromkeys(("img_size", "input_size"), "data.image_size"),
    "device": "launch.device",
    "method": "method.name",
    "random_seed": "train.seed",
}
"""Names of settings in other programs to the key."""
_MAPPINGS = ("tags", "variants")
"""Last names of the keys whose value maps names to values; each value may have a problem of its own."""
_MAX_PROBLEMS = 100
_UNKNOWN = ("extra_forbidden", "invalid_key")
_READ_AS = {bool: "true or false", int: "a number", float: "a number", type(None): "null"}
_NOUNS = (
    (r"\blist of (integer|number)\b", r"a list of \1s"),
    (r"\blist of string\b", "a list of texts"),
    (r"\bmapping of names to strings\b", "a mapping of names to texts"),
    (r"(?<!a )\bmapping\b", "a mapping"),
    (r"\binteger\b", "an integer"),
    (r"(?<!of )\bnumber\b", "a number"),
    (r"\bstring\b", "text"),
    (r"\bpath\b", "a path"),
)


def explain_errors(
    error: ValidationError,
    tree: Mapping[str, Any],
    model: type[BaseModel],
    renamed: Mapping[str, str],
    removed: Mapping[str, str],
    prefix: str = "",
) -> list[UserError]:
    """Return one problem per invalid key, of a file with very many of them only the first.

    Args:
        tree: the mapping that was validated.
        model: its model.
        renamed: former names of keys to current ones, with the prefix.
        removed: removed keys to the remedy, with the prefix.
        prefix: what the keys are below in the file, with a trailing dot; empty for a configuration.
    """
    groups: dict[tuple[str, ...], list[Details]] = {}
    for details in error.errors():
        key = _key_of(details["loc"], model)
        path = _path_of(details["loc"], key) if key and key[-1] in _MAPPINGS else key
        groups.setdefault(tuple(path), []).append(details)
    explain = _Explainer(tree, model, renamed, removed, prefix)
    first = islice(groups.values(), _MAX_PROBLEMS)
    return [explain.problem(_key_of(group[0]["loc"], model), group) for group in first]


class _Explainer:
    """Messages for the errors of one mapping; see `explain_errors`."""

    def __init__(
        self,
        tree: Mapping[str, Any],
        model: type[BaseModel],
        renamed: Mapping[str, str],
        removed: Mapping[str, str],
        prefix: str,
    ) -> None:
        self._tree = tree
        self._model = model
        self._renamed = renamed
        self._removed = removed
        self._prefix = prefix
        self._keys = {key.name: key for key in keys_of(model, prefix)}

    def problem(self, key: list[str], group: list[Details]) -> UserError:
        """Return the problem of one key from its errors, one or more per form that the value may have."""
        # The innermost error names the item of a list.
        first = max(group, key=lambda details: len(details["loc"]))
        path = _path_of(first["loc"], key)
        field, value = self._name(path), first["input"]
        if first["type"] in _UNKNOWN:
            return self._unknown(path, value)
        if first["type"] == "string_type" and type(value) in _READ_AS:
            same = [d for d in group if d["type"] == first["type"] and len(d["loc"]) == len(first["loc"])]
            return self._not_text(field, value, key, first["loc"], len(same) - 1)
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            return UserError(field, value, cause.message, cause.remedy) if first["loc"] else cause
        known = self._keys.get(self._name(key))
        if known is None:
            return self._section(key, first)
        if len(path) > len(key) and key[-1] in _MAPPINGS:
            form = "text" if "strings" in known.type else "a mapping"
            return UserError(field, value, f"must be {form}", "Give another value, or remove the key.")
        if len(path) > len(key):
            field, value = known.name, _value_at(self._tree, key, value)
        return self._wrong_form(field, value, known, first)

    def _name(self, path: Sequence[str]) -> str:
        return (self._prefix + ".".join(path)).removesuffix(".")

    def _unknown(self, path: list[str], value: Any) -> UserError:
        field = self._name(path)
        if field in self._renamed:
            return UserError(field, value, "the key was renamed", f"Use {self._renamed[field]}.")
        if field in self._removed:
            return UserError(field, value, "the key was removed", self._removed[field])
        near = self._near(path)
        remedy = (
            f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(self._siblings(path))}."
        )
        return UserError(field, value, "unknown key", remedy)

    def _near(self, path: list[str]) -> list[str]:
        """Return names that an unknown key may stand for: in its section, or of the same name in another."""
        section = self._name(path[:-1])
        if len(path[-1]) > 1 and OTHER_NAMES.get(path[-1]) in self._keys:
            return [OTHER_NAMES[path[-1]]]
        near = difflib.get_close_matches(path[-1], self._siblings(path), n=1, cutoff=0.5)
        similar = [f"{section}.{name}" if section else name for name in near]
        elsewhere = similar_keys(path[-1], self._keys, 1.0)
        if elsewhere:
            return elsewhere
        return similar or similar_keys(path[-1], self._keys, 0.8)

    def _siblings(self, path: list[str]) -> list[str]:
        model = self._model
        for part in path[:-1]:
            field = model.model_fields.get(part)
            section = None if field is None else _section_of(field.annotation)
            if section is None:
                return []
            model = section
        return sorted(model.model_fields)

    def _not_text(
        self, field: str, value: Any, key: list[str], location: tuple[int | str, ...], others: int
    ) -> UserError:
        message = f"was read as {_READ_AS[type(value)]}, but must be text"
        if others:
            message += f", like {others} other{'s' if others > 1 else ''} of the list"
        item = isinstance(location[-1], int) and key[-1] not in _MAPPINGS
        example = f"'{'.'.join(key)}=[\"TEXT\"]'" if item else f"'{field}=\"TEXT\"'"
        remedy = f'Put it in quotes: "TEXT" in a file, {example} on the command line.'
        known = self._keys.get(self._name(key))
        if known is not None and not item and " or list" in known.type:
            remedy += f" Accepted: {form_of(known)}."
        return UserError(field, value, message, remedy)

    def _section(self, key: list[str], details: Details) -> UserError:
        """Return the problem of a whole section: not a mapping, or an invalid combination of its keys."""
        field, value = self._name(key), details["input"]
        if details["type"] == "value_error":
            remedy = f"See `dl2pa config --explain {field}`."
            return UserError(field, value, _own_message(details), remedy)
        remedy = f"Write `{key[-1] if key else field}:` with indented `key: value` lines."
        return UserError(field, value, "must be a section: a mapping of keys to values", remedy)

    def _wrong_form(self, field: str, value: Any, key: Key, details: Details) -> UserError:
        form = f"must be {form_of(key)}"
        remedy = "Give another value, or remove the key."
        if key.default is not None:
            remedy = f"Give another value; the default is {key.default_text}."
        words = [word for word in key.allowed if isinstance(word, str)]
        text = value.casefold() if isinstance(value, str) else ""
        near = difflib.get_close_matches(text, words, n=1, cutoff=0.5)
        if near:
            remedy = f"Did you mean {near[0]}?"
        message = _own_message(details) if details["type"] == "value_error" else form
        if message.startswith("must not be true or false"):
            message = f"{form}, not true or false"
        elif message != form:
            remedy = f"Accepted: {form_of(key)}. {remedy}"
        return UserError(field, value, message, remedy)


def form_of(key: Key) -> str:
    """Return all accepted forms of a key as part of a sentence: `auto or an integer ≥ 1`."""
    forms = key.type.split(" or ")
    if key.type.startswith("["):
        return f"a list {key.type}"
    named: list[str] = []
    for form in forms:
        for pattern, noun in _NOUNS:
            if form not in key.allowed:
                form, count = re.subn(pattern, noun, form)
                if count:
                    break
        named.append(form)
    last = ", or " if any(" and " in form for form in named) else " or "
    return last.join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)


def similar_keys(
    name: str, keys: Iterator[str] | Mapping[str, Any] | Sequence[str], cutoff: float
) -> list[str]:
    """Return the dotted keys whose last part is similar to that of `name`, at most three."""
    last = name.rpartition(".")[2]
    by_last: dict[str, list[str]] = {}
    for key in keys:
        by_last.setdefault(key.rpartition(".")[2], []).append(key)
    near = difflib.get_close_matches(last, by_last, n=1, cutoff=cutoff)
    return [key for similar in near for key in by_last[similar]][:3]


def _own_message(details: Details) -> str:
    message = str(details["msg"]).removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_section else None


def _key_of(location: Sequence[int | str], model: type[BaseModel]) -> list[str]:
    """Part of a location that names sections and a key, or an unknown key."""
    path = list[str]()
    for part in location:
        path.append(str(part))
        field = model.model_fields.get(str(part))
        section = None if field is None else _section_of(field.annotation)
        if section is None:
            break
        model = section
    return path


def _path_of(location: Sequence[int | str], key: list[str]) -> list[str]:
    """Names and positions in a location, without pydantic's names of the types in a union."""
    items = [str(part) for part in location[len(key) :] if isinstance(part, int) or key[-1] in _MAPPINGS]
    return [*key, *(item for item in items if item != "[key]")]


def _value_at(tree: Mapping[str, Any], key: list[str], fallback: Any) -> Any:
    value: Any = tree
    for part in key:
        value = value.get(part, fallback) if isinstance(value, Mapping) else fallback
    return value


class _ValidKeys:
    """Section of a configuration without the keys that have no valid value."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise UnsetKey(name)


def config_of_valid_keys(error: ValidationError, tree: Mapping[str, Any]) -> Config | None:
    """Return the configuration without its invalid keys; reading one of these raises `UnsetKey`.

    A key or section that a misspelled one probably means has no value either.

    Returns:
        None if the rest is invalid, too, or there are very many invalid keys.
    """
    if error.error_count() > _MAX_PROBLEMS:
        return None
    pruned = _copy(tree)
    unset = set[str]()
    keys = [key.name for key in keys_of(Config)]
    for details in error.errors():
        path = _key_of(details["loc"], Config)
        unset.add(".".join(path))
        if details["type"] in _UNKNOWN:
            unset.update([*similar_keys(path[-1], keys, 0.5), OTHER_NAMES.get(path[-1], "")])
            if len(path) == 1:
                unset.update(difflib.get_close_matches(path[0], Config.model_fields, n=1))
        _remove(pruned, path)
    try:
        config = Config.model_validate(pruned)
    except ValidationError:
        return None
    return Config.model_construct(**_valid_sections(config, "", unset))


def _valid_sections(section: BaseModel, prefix: str, unset: set[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            is_unset = f"{prefix}{name}" in unset
            value = _ValidKeys({} if is_unset else _valid_sections(value, f"{prefix}{name}.", unset))
        elif f"{prefix}{name}" in unset:
            continue
        values[name] = value
    return values


def _copy(tree: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _remove(tree: dict[Any, Any], path: list[str]) -> None:
    section: Any = tree
    for part in path[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if isinstance(section, dict):
        for key in [key for key in section if str(key) == path[-1]]:
            del section[key]
