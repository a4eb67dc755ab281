"""Search files: YAML files with the single key `search`, which `dl2pa search` reads."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from dl2pa.config.gather import Problems
from dl2pa.config.load import read_yaml
from dl2pa.config.places import finder, placed
from dl2pa.config.schema_errors import explain_errors
from dl2pa.config.section import NonNegativeInt, PositiveInt, Section
from dl2pa.config.sweep import common_keys
from dl2pa.config.yaml_core import value_text
from dl2pa.errors import UserError

KEY = "search"
"""The only top-level key of a search file; configurations do not have it."""
RANGES = ("log_uniform", "uniform", "integer")
CHOICE = "choice"
_EXAMPLE = "Write, for example, `optim.lr: {log_uniform: [0.01, 1]}` or `{choice: [0.1, 0.2]}`."
_SMALLER_IS_BETTER = ("ece",)

Metric = Literal["top1", "top5", "ece", "top1_head", "top1_medium", "top1_tail"]


class Prune(Section):
    """Successive halving: when the trials are compared, and how many of them continue."""

    enabled: bool = True
    """Whether trials are stopped early; if not, each is trained to its end."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One in this number of trials continues at a rung; also the factor between the epochs of the rungs."""
    first_epoch: PositiveInt = 1
    """Epoch of the first rung: a trial is compared at its first validation in or after this epoch."""


class Search(Section):
    """Content of a search file."""

    config: str = ""
    """Configuration file, relative to this file."""
    overrides: dict[str, Any] = {}
    """Values for every trial, by key: `train.epochs: 30`."""
    parameters: dict[str, Any] = {}
    """Parameters, by key: `optim.lr: {log_uniform: [0.01, 1]}`. Forms: log_uniform, uniform and integer with the lowest
    and the highest value, and choice with a list of values."""
    trials: PositiveInt = 20
    """Number of trials; it may be raised later."""
    parallel: PositiveInt | None = None
    """Maximum number of concurrent trials, here or as SLURM jobs; 1 by default."""
    metric: Metric = "top1"
    """Result of the validation that is optimized: its value at the last epoch, in percent."""
    direction: Literal["maximize", "minimize"] | None = None
    """Direction of the optimization; by default, ece is minimized and the others are maximized."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """Sampler of Optuna: tree-structured Parzen estimator, random, or each combination of choices once."""
    seed: NonNegativeInt = 0
    """Seed of the sampler. The seed of the trainings is `train.seed`."""
    prune: Prune = Prune()
    """Successive halving."""

    @property
    def maximizes(self) -> bool:
        return (self.direction or _default_direction(self.metric)) == "maximize"

    def override_texts(self) -> list[str]:
        """Return the overrides in the form of the command line."""
        return [f"{key}={json.dumps(value)}" for key, value in self.overrides.items()]

    def space(self) -> list[Parameter]:
        """Return the parameters.

        Raises:
            UserError: all invalid parameters.
        """
        return space_of(self.parameters)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a search.

    Attributes:
        key: configuration key.
        form: one of `RANGES`, or `CHOICE`.
        low, high: bounds of a range, which includes both.
        choices: values of a choice, each as the text of an override.
    """

    key: str
    form: str
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values to check before the search: both ends of a range, or all choices."""
        return self.choices or (self.low, self.high)

    def override(self, value: Any) -> str:
        """Return `key=value` for a value of the parameter."""
        return f"{self.key}={value if self.form == CHOICE else json.dumps(value)}"


def _default_direction(metric: str) -> str:
    return "minimize" if metric in _SMALLER_IS_BETTER else "maximize"


def space_of(parameters: dict[str, Any]) -> list[Parameter]:
    """Parse the parameters of a search.

    Raises:
        UserError: all invalid parameters.
    """
    problems, space = Problems(), list[Parameter]()
    for key, value in parameters.items():
        with problems:
            space.append(_parameter(str(key), value))
    if not parameters:
        problems.add(UserError("search.parameters", parameters, "is empty", _EXAMPLE))
    problems.raise_any()
    return space


def _parameter(key: str, value: Any) -> Parameter:
    field = f"search.parameters.{key}"
    form, values = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (None, None)
    if form == CHOICE:
        return _choice(field, key, values)
    if form not in RANGES:
        message = f"must be one of {', '.join(RANGES)} and {CHOICE}, with its values"
        raise UserError(field, value, message, _EXAMPLE)
    numbers = values if isinstance(values, list) else []
    kinds = int if form == "integer" else (int, float)
    if len(numbers) != 2 or not all(isinstance(n, kinds) and not isinstance(n, bool) for n in numbers):
        kind = "integers" if form == "integer" else "numbers"
        raise UserError(field, value, f"{form} needs two {kind}: the lowest and the highest value", _EXAMPLE)
    low, high = numbers
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        remedy = f"Write {{{form}: [{min(low, high)}, {max(low, high)}]}}."
        if low == high or not math.isfinite(high - low):
            remedy = "Give two different finite numbers, or set the key below `overrides`."
        raise UserError(field, value, "the lowest value is not less than the highest one", remedy)
    if form == "log_uniform" and low <= 0:
        message, remedy = "a logarithmic range has positive values only", "Give a lowest value above 0."
        raise UserError(field, value, message, remedy)
    return Parameter(key, form, low, high)


def _choice(field: str, key: str, values: Any) -> Parameter:
    texts = [value_text(value) for value in values] if isinstance(values, list) else []
    if len(texts) < 2 or len(set(texts)) < len(texts):
        message = "choice needs a list of at least two different values"
        raise UserError(field, values, message, "List each value once, or set the key below `overrides`.")
    return Parameter(key, CHOICE, choices=tuple(texts))


def load_search(path: Path) -> Search:
    """Read a search file.

    Raises:
        UserError: unknown keys and invalid values.
    """
    tree = read_yaml(path)
    if KEY not in tree:
        message = f"has no key `{KEY}`"
        remedy = f"Write `{KEY}:` with `config`, `parameters` and `trials`; see configs/searches/digits.yaml."
        raise UserError("file", str(path), message, remedy)
    with placed(finder([(path, ())])):
        return _search_of(tree)


def _search_of(tree: dict[str, Any]) -> Search:
    problems = Problems()
    for key in tree:
        if key != KEY:
            message, remedy = f"cannot be combined with `{KEY}:`", f"Move it below `{KEY}:`."
            problems.add(UserError(str(key), tree[key], message, remedy))
    content = tree[KEY] if isinstance(tree[KEY], dict) else {}
    if missing := sorted({"config", "parameters"} - content.keys()):
        for key in missing:
            problems.add(UserError(f"{KEY}.{key}", None, "is missing", f"Add `{key}:` below `{KEY}:`."))
        raise problems.error()
    with problems:
        if isinstance(content["parameters"], dict):
            _check_keys(content, space_of(content["parameters"]))
    try:
        search = Search.model_validate(content)
        if not problems:
            return search
    except ValidationError as error:
        for problem in explain_errors(error, content, Search, {}, {}, f"{KEY}."):
            problems.add(problem)
    raise problems.error()


def _check_keys(content: dict[str, Any], space: list[Parameter]) -> None:
    """Refuse a parameter that an override sets, and a grid of ranges."""
    overrides = content.get("overrides")
    for parameter in space:
        field = f"search.parameters.{parameter.key}"
        if isinstance(overrides, dict) and common_keys([parameter.key], overrides):
            message, remedy = "is also set by search.overrides", "Remove the key from one of them."
            raise UserError(field, content["parameters"][parameter.key], message, remedy)
        if content.get("sampler") == "grid" and parameter.form != CHOICE:
            message, remedy = (
                "the grid sampler needs choices",
                "Write {choice: [...]}, or use `sampler: tpe`.",
            )
            raise UserError(field, content["parameters"][parameter.key], message, remedy)
