"""Load a ``Config`` from YAML files with `base:` inheritance and `key=value` overrides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dl2pa.config.gather import Problems
from dl2pa.config.paths import expand_path, expand_paths
from dl2pa.config.places import finder, placed
from dl2pa.config.schema import Config
from dl2pa.config.schema_errors import config_of_valid_keys, explain_errors
from dl2pa.config.yaml_core import YAML_ERRORS, dump_yaml, parse_value, parse_yaml, problem_of
from dl2pa.errors import UserError
from dl2pa.records import DamagedFile
from dl2pa.redaction import redact_tree

_MAX_DEPTH = 16
LOCAL_KEYS = (
    "tracking.",
    "launch.",
    "checkpoint.",
    "notify.",
    "data.root",
    "data.val_root",
    "data.classes",
    "data.threads",
    "data.hw_decoder_",
    "data.index",
    "data.max_bad_fraction",
    "data.max_bad_val_fraction",
    "data.read_warn_s",
    "data.read_timeout_s",
    "data.s3_",
    "train.profile",
)
"""Prefixes of keys that do not affect the result: paths, resources, tracking.

`data.root` is among them because the fingerprint of the data set detects other images.
"""

ADDED_KEYS: dict[str, Any] = {
    "data.interpolation": "bilinear",
    "data.val_fraction": None,
    "data.calibration_fraction": 0.0,
    "data.label_noise": 0.0,
    "data.label_noise_seed": 0,
    "model.init": None,
    "model.freeze_epochs": 0,
    "model.freeze_before": None,
    "model.freeze_norm": False,
    "model.hidden": [512],
    "model.hidden_norm": "none",
    "model.dropout": 0.0,
    "method.match.statistic": "embedding",
    "method.match.solver": "linear",
    "method.match.rotate": False,
    "method.gce_q": 0.0,
    "method.release_epoch": None,
    "method.negatives.neighbors": 0,
    "method.negatives.random": 0,
    "optim.layer_decay": 1.0,
    "optim.head_lr_scale": 1.0,
    "train.accumulate": 1,
    "train.checkpoint_activations": False,
    "data.rand_augment": 0,
    "data.rand_magnitude": 9,
    "data.color_jitter": [0.0, 0.0, 0.0, 0.0],
    "optim.lr_scaling": "none",
    "train.patience": None,
}
"""Keys that older versions lack, with the value that has their behavior, which changes no name or hash of a run."""

RENAMED_KEYS = {
    "train.log_every": "train.log_every_steps",
    "train.eval_every": "train.eval_every_epochs",
    "data.slow_read_s": "data.read_warn_s",
}
"""Maps the former name of a key to its current name, in the same section."""

REMOVED_KEYS = {
    "method.match.lag_steps": "Remove it: assignments of many classes are now solved within seconds."
}
"""Maps a removed key to the remedy in the error message.

Configurations recorded by older versions may contain the key with value 0.
"""


def load_config(
    path: str | Path, overrides: Sequence[str] = (), check_files: Callable[[Config], None] | None = None
) -> Config:
    """Read a configuration file and the files it extends, and apply the overrides of the command line.

    Args:
        path: YAML file; `base:` in it names the files that it extends, relative to its folder.
        overrides: `section.key=value`; see ``parse_value`` for the value.
        check_files: checks the files that the configuration names; called only if there is another problem, so that
            all are reported together.

    Raises:
        UserError: a missing file or invalid YAML; or all unknown keys (the message suggests the nearest name) and
            invalid values, together with the combinations of settings that are invalid.
    """
    problems, tree = Problems(), dict[str, Any]()
    with placed(finder([(Path(path), overrides)])):
        with problems:
            tree = _read_with_bases(Path(path), ())
        can_check = not problems
        for text in overrides:
            with problems:
                tree = merge(tree, _parse_override(text))
        with problems:
            tree = expand_paths(tree)
        if not can_check:
            raise problems.error()
        return _check_tree(tree, problems, check_files)


def _check_tree(
    tree: Mapping[str, Any], problems: Problems, check_files: Callable[[Config], None] | None
) -> Config:
    """Validate a configuration; with any problem, also check the combinations of its valid settings.

    Args:
        problems: found before.

    Raises:
        UserError: all problems.
    """
    try:
        config = Config.model_validate(dict(tree))
        if not problems:
            return config
    except ValidationError as error:
        for problem in explain_errors(error, tree, Config, RENAMED_KEYS, REMOVED_KEYS):
            problems.add(problem)
        config = config_of_valid_keys(error, tree)

    from dl2pa.config.validate import validate

    for check in (partial(validate, world_size=1), check_files):
        with problems:
            if config is not None and check is not None:
                check(config)
    raise problems.error()


def load_recorded_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration recorded in a run directory, possibly by an older version; see ``load_config``.

    Its paths are already expanded; those of the overrides are not.

    Raises:
        DamagedFile: the file is empty, truncated or not YAML.
        UserError: an invalid value, or an invalid override.
    """
    tree = with_current_names(read_recorded(path))
    for text in overrides:
        tree = merge(tree, expand_paths(_parse_override(text)))
    return parse_config(tree)


def read_recorded(path: Path) -> dict[str, Any]:
    """Read the tree of a recorded configuration, which names every section.

    Raises:
        DamagedFile: the file is empty, truncated or not YAML.
        UserError: the file is missing.
    """
    try:
        tree = read_yaml(path, written_by_dl2pa=True)
    except UserError as error:
        if not path.exists():
            raise
        raise DamagedFile(path, error.message, _RESTORE, "config") from None
    if not tree:
        raise DamagedFile(path, "it is empty", _RESTORE, "config")
    for section in _SECTIONS:
        if not isinstance(tree.get(section), dict):
            raise DamagedFile(path, f"the section {section} is missing", _RESTORE, "config")
    return tree


_SECTIONS = ("data", "model", "method", "optim", "train")
"""Sections that every version records."""
_RESTORE = (
    "Restore it from a backup; or delete it, then repeat the `dl2pa train` or `dl2pa submit` command of the run, "
    "which writes it again."
)


def with_current_names(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Replace the former names of keys and drop removed keys whose value is 0.

    Args:
        tree: recorded configuration, nested or with dotted keys.
        prefix: section that `tree` is the content of, with a trailing dot; empty for the whole configuration.
    """
    result: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in REMOVED_KEYS and value == 0:
            continue
        current = RENAMED_KEYS.get(name, name).removeprefix(prefix)
        result[current] = with_current_names(value, f"{name}.") if isinstance(value, dict) else value
    return result


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping; ``UserError`` names the invalid fields."""
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        problems = Problems()
        for problem in explain_errors(error, tree, Config, RENAMED_KEYS, REMOVED_KEYS):
            problems.add(problem)
        raise problems.error() from None


def dump_config(config: Config, *, redacted: bool = False) -> str:
    """Return the configuration with all defaults as YAML, optionally without secrets."""
    tree = config.model_dump(mode="json")
    tree = redact_tree(tree) if redacted else tree
    return "".join(_section_text(section, json.dumps(values)) for section, values in tree.items())


@lru_cache(maxsize=64)
def _section_text(section: str, values: str) -> str:
    """YAML of one section, given as JSON. The runs of a sweep share most sections, and writing YAML is slow."""
    return dump_yaml({section: json.loads(values)})


def flatten(config: Config) -> dict[str, Any]:
    """Return a flat dict of dotted keys and values, for comparisons and for the params in MLflow."""
    return _flat(config.model_dump(mode="json"))


def flat_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values that overrides set, by dotted key; of `section={key: value}`, each key.

    Raises:
        UserError: an override is not of the form key=value.
    """
    tree: dict[str, Any] = {}
    for text in overrides:
        tree = merge(tree, _parse_override(text))
    return _flat(tree)


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and prefix != "tracking.tags":
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            flat[prefix] = node

    walk("", tree)
    return flat


def without_added(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat configuration without the `ADDED_KEYS` that do not change the behavior."""
    return {k: v for k, v in flat.items() if k not in ADDED_KEYS or v != ADDED_KEYS[k]}


def fingerprint(config: Config) -> str:
    """Hash (ten hexadecimal digits) of all keys that can change the result of a run."""
    tree = {k: v for k, v in without_added(flatten(config)).items() if not k.startswith(LOCAL_KEYS)}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:10]


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings recursively; other values of `override` replace those of `base`."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen or len(seen) >= _MAX_DEPTH:
        raise UserError("base", str(path), "the configuration extends itself", "Remove the circular `base:`.")
    tree = read_yaml(path)
    base_names = tree.pop("base", None) or []
    bases: list[Any] = base_names if isinstance(base_names, list) else [base_names]
    result: dict[str, Any] = {}
    for base in bases:
        if not isinstance(base, str):
            raise UserError("base", base, "not a file name", "Write a path or a list of paths.")
        result = merge(result, _read_with_bases(path.parent / expand_path("base", base), (*seen, path)))
    return merge(result, tree)


_MAX_VALUES = 100_000


def _is_larger_than(tree: object, limit: int) -> bool:
    """Whether a tree has more than `limit` nodes; a node with several aliases is counted once per alias."""
    waiting, count = [tree], 0
    while waiting and count <= limit:
        node = waiting.pop()
        count += 1
        if isinstance(node, dict):
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
    return count > limit


def read_yaml(path: Path, *, written_by_dl2pa: bool = False) -> dict[str, Any]:
    """Read a YAML mapping; an empty file is an empty mapping. See ``parse_yaml`` for the argument."""
    if not path.is_file():
        raise UserError("config", str(path), "no such file", "Give the path of a YAML configuration file.")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), written_by_dl2pa=written_by_dl2pa)
    except OSError as error:
        message = f"cannot be read ({error.strerror or error})"
        raise UserError("config", str(path), message, "Make the file readable.") from None
    except YAML_ERRORS as error:
        message = f"not valid YAML ({problem_of(error)})"
        raise UserError("config", str(path), message, "Correct the file.") from None
    if tree is None:
        return {}
    if _is_larger_than(tree, _MAX_VALUES):
        message = f"more than {_MAX_VALUES:,} values after expanding aliases"
        raise UserError("config", str(path), message, "Remove the aliases (`*name`).")
    if not isinstance(tree, dict):
        remedy = "Write `section:` with indented `key: value` lines."
        raise UserError("config", str(path), "no sections found", remedy)
    return tree


def _parse_override(text: str) -> dict[str, Any]:
    key, sign, value = text.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise UserError("override", text, "not of the form key=value", "Write, for example, train.epochs=5.")
    node = parse_value(".".join(parts), value)
    for part in reversed(parts):
        node = {part: node}
    return node
