"""Comparison of two runs: configuration, data, code, machine and results relative to the noise of seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl2pa.config import Config, flatten, load_recorded_config
from dl2pa.config.identity import NEUTRAL, SEED, run_identity
from dl2pa.config.load import PLACES
from dl2pa.errors import UserError
from dl2pa.osutil import read_json
from dl2pa.reporting.document import Block, Grid, Heading, Paragraph, code
from dl2pa.reporting.groups import Group, group_runs
from dl2pa.reporting.runs import Run, Unfinished, find_runs, read_run, tags_of
from dl2pa.rundir import RunDirectory

_METRICS = ("top1_last", "top1_best", "ece_last", "top1_head", "top1_medium", "top1_tail")
_CODE = (
    "git_commit",
    "git_dirty",
    "dl2pa",
    "torch",
    "torchvision",
    "nvidia-dali-cuda130",
    "numpy",
    "scipy",
    "pillow",
)
_MACHINE = ("device", "processor", "python", "world_size", "threads")
_CONFIDENCE = 0.95
_EXPLANATION = (
    "Means are over all runs of a recipe that were found, one per seed. The seed noise is the standard deviation over "
    "seeds, pooled over both recipes. The interval is Student's 95 % interval of the difference of the means (of "
    "the two runs if they share a recipe). With one seed per recipe the noise is unknown."
)


@dataclass(frozen=True)
class Difference:
    """A value that differs between the two runs."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Measured:
    """One metric of both runs and of their groups; a group is the run and the runs of its recipe with other seeds.

    Attributes:
        a, b: values of the two runs.
        mean_a, mean_b, n_a, n_b: means and sizes of the groups.
        noise: pooled standard deviation over seeds; None if no group has two seeds.
        low, high: 95 % interval of the difference b - a: of the group means, or of the two runs if they share a recipe.
    """

    name: str
    a: float
    b: float
    mean_a: float
    mean_b: float
    n_a: int
    n_b: int
    noise: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class Differences:
    """Content of ``report --compare``.

    Attributes:
        same_recipe: of the settings that change results only the seed may differ.
        unknown: why the results cannot be compared; None if they can.
    """

    a: Path
    b: Path
    config: tuple[Difference, ...]
    neutral: tuple[Difference, ...]
    data: tuple[Difference, ...]
    code: tuple[Difference, ...]
    machine: tuple[Difference, ...]
    same_recipe: bool
    results: tuple[Measured, ...]
    unknown: str | None


def compare_runs(first: Path, second: Path, below: Path | None = None) -> Differences:
    """Compare two run directories.

    Args:
        below: folder searched for runs with other seeds, to estimate the noise of seeds; default: the parent folders
            of the two runs.

    Raises:
        UserError: a path is not a run directory, or its configuration cannot be read.
    """
    paths = find_runs([first, second], None)
    if len(paths) < 2:
        raise UserError("--compare", str(second), "is the same run", "Give two different run directories.")
    runs = [read_run(path) for path in paths]
    configs = [_config_of(path) for path in paths]
    env_a, env_b = (_environment(path) for path in paths)
    identity_a, identity_b = (run_identity(config) for config in configs)
    # The identity has the resolved values of defaults.
    flat_a, flat_b = (
        {**flatten(config), **identity}
        for config, identity in zip(configs, (identity_a, identity_b), strict=True)
    )
    keys = [key for key in {**identity_a, **identity_b} if identity_a.get(key) != identity_b.get(key)]
    seeds = [SEED] if flat_a[SEED] != flat_b[SEED] else []
    config_keys = [key for key in keys if not key.startswith("data.")] + seeds
    neutral = [k for k in flat_a if k.startswith((*PLACES, *NEUTRAL)) and flat_a[k] != flat_b.get(k)]
    results, unknown = _results(runs, paths, below)
    return Differences(
        a=first,
        b=second,
        config=tuple(Difference(k, flat_a.get(k), flat_b.get(k)) for k in config_keys),
        neutral=tuple(Difference(k, flat_a.get(k), flat_b.get(k)) for k in neutral if not _is_data(k)),
        data=_data(keys, flat_a, flat_b, runs, (tags_of(paths[0]), tags_of(paths[1]))),
        code=_differing(env_a, env_b, _CODE),
        machine=_differing(env_a, env_b, _MACHINE),
        same_recipe=not keys,
        results=results,
        unknown=unknown,
    )


def _config_of(path: Path) -> Config:
    try:
        return load_recorded_config(RunDirectory(path).config)
    except UserError as error:
        message = f"its configuration cannot be read: {error}"
        raise UserError("--compare", str(path), message, "Give another run.") from None


def _environment(path: Path) -> dict[str, Any]:
    """Read the environment of the last attempt; empty if unknown."""
    attempts = read_json(RunDirectory(path).environment).get("attempts")
    return dict(attempts[-1]) if attempts else {}


def _is_data(key: str) -> bool:
    return key.startswith("data.")


def _differing(a: dict[str, Any], b: dict[str, Any], names: Sequence[str]) -> tuple[Difference, ...]:
    return tuple(Difference(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name))


def _data(
    keys: Sequence[str],
    flat_a: dict[str, Any],
    flat_b: dict[str, Any],
    runs: Sequence[Run | Unfinished],
    tags: tuple[dict[str, str], dict[str, str]],
) -> tuple[Difference, ...]:
    """Compare the data configuration, paths, fingerprint and the number of classes and validated images."""
    configured = [*(k for k in keys if _is_data(k)), "data.root", "data.val_root", "data.classes"]
    rows = [*_differing(flat_a, flat_b, configured), *_differing(*tags, ("dl2pa.data",))]
    a, b = runs
    if isinstance(a, Run) and isinstance(b, Run):
        rows += _differing(a.result.model_dump(), b.result.model_dump(), ("num_classes", "num_validated"))
    return tuple(rows)


def _results(
    runs: Sequence[Run | Unfinished], paths: Sequence[Path], below: Path | None
) -> tuple[tuple[Measured, ...], str | None]:
    for run in runs:
        if isinstance(run, Unfinished):
            return (), f"{run.path} has no result: {run.state}, {run.reason}"
    a, b = (run for run in runs if isinstance(run, Run))
    if a.result.num_validated != b.result.num_validated:
        return (), "the runs were validated on different numbers of images"
    groups = group_runs([*_others(paths, below), a, b])
    measured = [_measure(name, a, b, groups) for name in _METRICS]
    return tuple(m for m in measured if m is not None), None


def _others(paths: Sequence[Path], below: Path | None) -> list[Run]:
    folders = [below] if below is not None else list({path.resolve().parent for path in paths})
    compared = {path.resolve() for path in paths}
    others = {path.resolve(): path for folder in folders for path in find_runs([], folder)}
    runs = (read_run(path) for resolved, path in others.items() if resolved not in compared)
    return [run for run in runs if isinstance(run, Run)]


def _siblings(run: Run, group: Group) -> list[Run]:
    """Return the run and the runs of its group with other seeds."""
    return [run, *(other for other in group.runs if other.seed != run.seed)]


def _measure(name: str, a: Run, b: Run, groups: Sequence[Group]) -> Measured | None:
    group_a, group_b = (next(g for g in groups if run in (*g.runs, *g.repeats)) for run in (a, b))
    same = group_a is group_b
    value_a, value_b = _value(a, name), _value(b, name)
    runs_a, runs_b = (group_a.runs, group_a.runs) if same else (_siblings(a, group_a), _siblings(b, group_b))
    values_a = [v for v in (_value(run, name) for run in runs_a) if v is not None]
    values_b = [v for v in (_value(run, name) for run in runs_b) if v is not None]
    if value_a is None or value_b is None or not values_a or not values_b:
        return None
    dof = len(values_a) - 1 if same else len(values_a) + len(values_b) - 2
    noise = None
    if dof > 0:
        squares = _squares(values_a) + (0.0 if same else _squares(values_b))
        noise = math.sqrt(squares / dof)
    mean_a, mean_b = sum(values_a) / len(values_a), sum(values_b) / len(values_b)
    gap = value_b - value_a if same else mean_b - mean_a
    low = high = None
    if noise is not None:
        counts = (1, 1) if same else (len(values_a), len(values_b))
        margin = _quantile(dof) * noise * math.sqrt(1 / counts[0] + 1 / counts[1])
        low, high = gap - margin, gap + margin
    n_a, n_b = len(values_a), len(values_b)
    verdict = _verdict(gap, noise, low, high)
    return Measured(name, value_a, value_b, mean_a, mean_b, n_a, n_b, noise, low, high, verdict)


def _value(run: Run, name: str) -> float | None:
    return getattr(run.result, name)


def _squares(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)


def _quantile(dof: int) -> float:
    """Two-sided quantile of Student's t distribution."""
    from scipy.stats import t

    return float(t.ppf((1 + _CONFIDENCE) / 2, dof))


def _verdict(gap: float, noise: float | None, low: float | None, high: float | None) -> str:
    if gap == 0:
        return "equal"
    if noise is None or low is None or high is None:
        return "undecided: one seed each"
    return "within seed noise" if low <= 0 <= high else "exceeds seed noise"


def compose_differences(content: Differences) -> list[Block]:
    """Compose the comparison as a document."""
    blocks: list[Block] = [Heading(1, f"Comparison of {code(content.a)} and {code(content.b)}")]
    if content.same_recipe:
        blocks.append(
            Paragraph(
                "Both runs have the same recipe: of the settings that change results only the seed may differ."
            )
        )
    blocks += [Heading(2, "Results"), *_result_blocks(content)]
    for title, rows, none in (
        ("Configuration", content.config, "No differences in settings that change results."),
        ("Data", content.data, "No differences in data configuration, fingerprint and counts."),
        ("Code", content.code, "No differences in commit and versions."),
        ("Machine", content.machine, "No differences."),
        ("Settings without effect on results", content.neutral, ""),
    ):
        if rows or none:
            blocks += [Heading(2, title), _grid(rows) if rows else Paragraph(none)]
    return blocks


def _result_blocks(content: Differences) -> list[Block]:
    if content.unknown is not None:
        return [Paragraph(f"The results cannot be compared: {content.unknown}.")]
    heads = [
        "metric ",
        "A",
        "B",
        "B - A",
        "mean A (n)",
        "mean B (n)",
        "seed noise",
        "95 % interval of B - A",
        "verdict ",
    ]
    rows: list[list[str]] = []
    for m in content.results:
        values = [m.name, f"{m.a:.2f}", f"{m.b:.2f}", f"{m.b - m.a:+.2f}"]
        means = [f"{m.mean_a:.2f} ({m.n_a})", f"{m.mean_b:.2f} ({m.n_b})"]
        noise = "–" if m.noise is None else f"{m.noise:.2f}"
        interval = "–" if m.low is None else f"{m.low:+.2f} to {m.high:+.2f}"
        rows.append([*values, *means, noise, interval, m.verdict])
    return [Grid(heads, rows), Paragraph(_EXPLANATION)]


def _grid(rows: Sequence[Difference]) -> Grid:
    shown = [[code(d.name), _shown(d.a), _shown(d.b)] for d in rows]
    return Grid(["name ", "A ", "B "], shown)


def _shown(value: Any) -> str:
    text = (
        json.dumps(value) if isinstance(value, bool | dict | list) else "–" if value is None else str(value)
    )
    return text if len(text) <= 80 else f"{text[:79]}…"


def record_differences(content: Differences) -> dict[str, Any]:
    """Return the comparison as a JSON object."""

    def rows(differing: Sequence[Difference]) -> dict[str, list[Any]]:
        return {d.name: [d.a, d.b] for d in differing}

    return {
        "a": str(content.a),
        "b": str(content.b),
        "same_recipe": content.same_recipe,
        "config": rows(content.config),
        "data": rows(content.data),
        "code": rows(content.code),
        "machine": rows(content.machine),
        "neutral": rows(content.neutral),
        "results": {
            m.name: {
                "a": m.a,
                "b": m.b,
                "mean": [m.mean_a, m.mean_b],
                "n": [m.n_a, m.n_b],
                "noise": m.noise,
                "interval": None if m.low is None else [m.low, m.high],
                "verdict": m.verdict,
            }
            for m in content.results
        },
        "unknown": content.unknown,
    }
