"""Several runs from one command: every combination of the swept values, each with its configuration and directory."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dl2pa.config import Config, fingerprint
from dl2pa.errors import UserError

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_MAX_RUNS = 1000


@dataclass(frozen=True)
class Element:
    """One run to be.

    Attributes:
        config: the configuration file.
        overrides: `key=value` for it, the swept ones last.
        swept: what sets it apart from the others: its `key=value` of each sweep.
    """

    config: Path
    overrides: tuple[str, ...]
    swept: tuple[str, ...] = ()


def expand(config: Path, overrides: Sequence[str], sweeps: Sequence[str]) -> list[Element]:
    """The runs of an array: every combination of the swept values.

    Args:
        sweeps: `key=a,b,c` or `key=0..4`; the key `config` sweeps configuration files.

    Raises:
        UserError: a sweep that cannot be read, or too many runs.
    """
    axes = [_axis(text) for text in sweeps]
    check_count(math.prod(len(axis) for axis in axes))
    found: list[Element] = []
    for combination in itertools.product(*axes):
        files = [Path(value) for key, value in combination if key == "config"]
        keys = [f"{key}={value}" for key, value in combination if key != "config"]
        swept = tuple(f"{key}={value}" for key, value in combination)
        found.append(Element(files[-1] if files else config, (*overrides, *keys), swept))
    return found


def check_count(runs: int) -> None:
    """Refuse what nobody can have meant.

    Raises:
        UserError: too many runs.
    """
    if runs > _MAX_RUNS:
        raise UserError("--array", runs, f"more than {_MAX_RUNS} runs", "Start it in parts.")


def check_distinct(run_dirs: Sequence[Path]) -> None:
    """Refuse an array of which two runs would write the same directory.

    Raises:
        UserError: naming the directory.
    """
    for run_dir in run_dirs:
        if run_dirs.count(run_dir) > 1:
            remedy = "Sweep a key that changes the run."
            raise UserError("--array", str(run_dir), "two of the array's runs are the same", remedy)


def run_name(path: Path, config: Config) -> str:
    """What a run's directory is called where nobody says otherwise."""
    return f"{path.stem}-{fingerprint(config)}"


def _axis(text: str) -> list[tuple[str, str]]:
    key, equals, values = text.partition("=")
    span = _RANGE.fullmatch(values)
    if span is not None:
        low, high = int(span[1]), int(span[2])
        if high < low:
            raise UserError(
                "--array", text, "is a range that ends before it begins", f"Write {key}={high}..{low}."
            )
        check_count(high - low + 1)
        found = [str(n) for n in range(low, high + 1)]
    else:
        found = [value for value in _split(values) if value]
    if not equals or not key or not found:
        remedy = "Write key=0..4 or key=a,b,c, for example train.seed=0..4."
        raise UserError("--array", text, "names no key with values", remedy)
    return [(key, value) for value in found]


def _split(values: str) -> Iterator[str]:
    """At commas that stand in no bracket."""
    depth, start = 0, 0
    for at, character in enumerate(values):
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            yield values[start:at]
            start = at + 1
    yield values[start:]
