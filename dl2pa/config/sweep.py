"""A sweep written down: the file that `dl2pa sweep` takes in place of a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dl2pa.config.load import read_yaml
from dl2pa.config.schema import PositiveInt, Section
from dl2pa.errors import UserError

KEY = "sweep"
"""The one key of such a file; no configuration has it."""


class Sweep(Section):
    """What `dl2pa sweep` is asked for; each key is also an option of the command line."""

    config: str | None = None
    """Configuration file, relative to this file."""
    cells: tuple[str, ...] = ()
    """Cells of the published tables, TABLE[:ROW[:COLUMN]], in place of a configuration."""
    overrides: dict[str, Any] = {}
    """Values for every run, by key: `train.epochs: 5`."""
    variants: dict[str, dict[str, Any]] = {}
    """Values that belong together, by a name of yours: `margin: {method.loss: cross_entropy, method.margin: 0.2}`. Each
    is run with every combination of the array; the key `config` takes another configuration, relative to this file."""
    array: dict[str, Any] = {}
    """Values to sweep, by key, in all combinations: `optim.lr: [0.1, 0.2]`, `method.name: dl2pa,hpn`; one alone is one
    value."""
    seeds: int | str | tuple[int, ...] | None = None
    """Short for `train.seed` in `array`: 0..4, or a list."""
    parallel: PositiveInt | None = None
    """Runs at a time on this machine."""

    def override_texts(self) -> list[str]:
        """The overrides as the command line writes them."""
        return _texts(self.overrides)

    def variant_texts(self) -> dict[str, tuple[str | None, list[str]]]:
        """Each variant's configuration, where it has its own, and its overrides as the command line writes them."""
        return {
            name: (values.get("config"), _texts({k: v for k, v in values.items() if k != "config"}))
            for name, values in self.variants.items()
        }

    def array_texts(self) -> list[str]:
        """The sweeps as the command line writes them, the seeds last."""
        axes = {**self.array, **({} if self.seeds is None else {"train.seed": self.seeds})}
        return [
            f"{key}={','.join(map(_text, values)) if isinstance(values, list | tuple) else _text(values)}"
            for key, values in axes.items()
        ]


def _texts(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _text(value: Any) -> str:
    """A value as YAML reads it back, plain where it is a text: it also names the run for people."""
    return value if isinstance(value, str) else json.dumps(value)


def is_sweep(path: Path) -> bool:
    """Whether the file describes a sweep rather than a configuration.

    Raises:
        UserError: there is no such file, or it is not YAML.
    """
    return KEY in read_yaml(path)


def load_sweep(path: Path) -> Sweep:
    """Read a file whose only key is `sweep`.

    Raises:
        UserError: an unknown key or a bad value, naming it.
    """
    tree = read_yaml(path)
    if set(tree) != {KEY}:
        other = next(key for key in tree if key != KEY)
        raise UserError(str(other), tree[other], f"stands beside `{KEY}:`", f"Put it below `{KEY}:`.")
    try:
        return Sweep.model_validate(tree[KEY] or {})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([KEY, *(str(part) for part in first["loc"])])
        message = first["msg"].removeprefix("Value error, ")
        remedy = f"Known: {', '.join(Sweep.model_fields)}."
        raise UserError(field, first["input"], message[0].lower() + message[1:], remedy) from None
