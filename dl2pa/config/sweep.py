"""Sweep files: YAML files with the single key `sweep`, which `dl2pa sweep` accepts instead of a configuration."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from dl2pa.config.gather import Problems
from dl2pa.config.load import read_yaml
from dl2pa.config.places import finder, placed
from dl2pa.config.schema_errors import explain_errors
from dl2pa.config.section import PositiveInt, Section
from dl2pa.config.yaml_core import value_text
from dl2pa.errors import UserError

KEY = "sweep"
"""The only top-level key of a sweep file; configurations do not have it."""
VARIANT_KEY = "variant"
"""Tag of a run with the name of its variant."""
_RENAMED_KEYS = {"sweep.cells": "sweep.published", "sweep.array": "sweep.grid"}


class Sweep(Section):
    """Content of a sweep file; most keys correspond to options of `dl2pa sweep`."""

    config: str | None = None
    """Configuration file, relative to this file."""
    published: tuple[str, ...] = ()
    """Published results to reproduce, TABLE[:ROW[:COLUMN]], instead of a configuration."""
    overrides: dict[str, Any] = {}
    """Values for every run, by key: `train.epochs: 5`."""
    variants: dict[str, dict[str, Any]] = {}
    """Named sets of values: `margin: {method.loss: cross_entropy, method.margin: 0.2}`. Each is run with every
    combination of the grid; the key `config` selects another configuration, relative to this file."""
    grid: dict[str, Any] = {}
    """Values to sweep, by key, in all combinations: `optim.lr: [0.1, 0.2]` or `method.name: dl2pa,hpn`."""
    seeds: int | str | tuple[int, ...] | None = None
    """Short for `train.seed` in `grid`: 0..4, or a list."""
    parallel: PositiveInt | None = None
    """Maximum number of concurrent runs, here or of the SLURM job array."""

    @model_validator(mode="after")
    def _refuse_seeds_twice(self) -> Sweep:
        if self.seeds is not None and "train.seed" in self.grid:
            message = "the seeds are given twice, by `seeds` and by `train.seed`"
            raise UserError("sweep.seeds", self.seeds, message, "Remove one of them.")
        return self

    @model_validator(mode="after")
    def _refuse_hidden_overrides(self) -> Sweep:
        for name, keys in (("grid", [*self.grid]), ("seeds", [] if self.seeds is None else ["train.seed"])):
            if same := common_keys(keys, self.overrides):
                message = f"sets {same[0]}, which has no effect, because sweep.{name} varies this key"
                raise UserError(
                    "sweep.overrides", self.overrides, message, "Remove the key from one of them."
                )
        return self

    def override_texts(self) -> list[str]:
        """Return the overrides in the form of the command line."""
        return _texts(self.overrides)

    def variant_texts(self) -> dict[str, tuple[str | None, list[str]]]:
        """Return each variant's configuration, if set, and its overrides in the form of the command line."""
        return {
            name: (values.get("config"), _texts({k: v for k, v in values.items() if k != "config"}))
            for name, values in self.variants.items()
        }

    def grid_texts(self) -> list[str]:
        """Return the grid in the form of the command line, seeds last."""
        axes = {**self.grid, **({} if self.seeds is None else {"train.seed": self.seeds})}
        return [
            f"{key}={','.join(map(value_text, values)) if isinstance(values, list | tuple) else _text(values)}"
            for key, values in axes.items()
        ]


def common_keys(keys: Collection[str], values: Mapping[str, Any]) -> list[str]:
    """Return the keys that settings by key also set, perhaps as part of a section: `optim: {lr: 0.1}`."""
    return sorted(set(keys) & {*values, *_inner_keys(values)})


def _inner_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _inner_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _texts(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _text(value: Any) -> str:
    """Return a value that YAML reads back; strings without quotes, because the text is part of the run's title."""
    return value if isinstance(value, str) else json.dumps(value)


def is_sweep(path: Path) -> bool:
    """Return whether the file describes a sweep rather than a configuration.

    Raises:
        UserError: the file does not exist or is not YAML.
    """
    return KEY in read_yaml(path)


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: unknown or renamed keys, and invalid values.
    """
    tree = read_yaml(path)
    with placed(finder([(path, ())])):
        return _sweep_of(tree)


def _sweep_of(tree: dict[str, Any]) -> Sweep:
    problems = Problems()
    for key in tree:
        if key != KEY:
            problems.add(
                UserError(
                    str(key), tree[key], f"cannot be combined with `{KEY}:`", f"Move it below `{KEY}:`."
                )
            )
    try:
        sweep = Sweep.model_validate(tree.get(KEY) or {})
        if not problems:
            return sweep
    except ValidationError as error:
        content = tree[KEY] if isinstance(tree[KEY], dict) else {}
        for problem in explain_errors(error, content, Sweep, _RENAMED_KEYS, {}, f"{KEY}."):
            problems.add(problem)
    raise problems.error()
