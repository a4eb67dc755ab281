"""Two runs beside each other: what differs in configuration, data, code and result, and whether seeds explain it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl2pa.config import Config, flatten, load_recorded_config
from dl2pa.config.identity import NEUTRAL, SEED, identity_of
from dl2pa.config.load import PLACES
from dl2pa.errors import UserError
from dl2pa.reporting.document import Block, Grid, Heading, Paragraph, code
from dl2pa.reporting.groups import Group, group_runs
from dl2pa.reporting.runs import Result, Run, Unfinished, find_runs, read_run, tags_of

METRICS = ("top1_last", "top1_best", "ece_last", "top1_head", "top1_medium", "top1_tail")
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


@dataclass(frozen=True)
class Difference:
    """A value that the two runs do not share."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Measured:
    """One figure of both runs and of their groups: the runs of the same recipe with other seeds.

    Attributes:
        a, b: the two runs' own.
        mean_a, mean_b, n_a, n_b: of their groups, the run itself among them.
        noise: standard deviation over seeds, pooled; None where no group has two seeds.
        low, high: 95 % interval of the difference b - a of the groups' means (of one recipe: of the two runs).
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
    """Everything that ``report --compare`` says.

    Attributes:
        same_recipe: nothing that changes results differs but the seed.
        unknown: why there is no result to compare; None where there is.
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


def differences(first: Path, second: Path, below: Path | None = None) -> Differences:
    """Compare two run directories.

    Args:
        below: a folder with further runs, whose other seeds tell how much seeds alone change; by default the
            folders that the two lie in.

    Raises:
        UserError: one is no run directory, or its configuration cannot be read.
    """
    paths = find_runs([first, second], None)
    if len(paths) < 2:
        raise UserError("--compare", str(second), "is the same run", "Give two run directories.")
    runs = [read_run(path) for path in paths]
    configs = [_config_of(path) for path in paths]
    of_a, of_b = (_environment(path) for path in paths)
    identity_a, identity_b = (identity_of(config) for config in configs)
    # A default as what it stands for.
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
        code=_unlike(of_a, of_b, _CODE),
        machine=_unlike(of_a, of_b, _MACHINE),
        same_recipe=not keys,
        results=results,
        unknown=unknown,
    )


def _config_of(path: Path) -> Config:
    try:
        return load_recorded_config(path / "config.yaml")
    except UserError as error:
        raise UserError("--compare", str(path), f"its config.yaml: {error}", "Give another run.") from None


def _environment(path: Path) -> dict[str, Any]:
    """Of the run's last attempt."""
    try:
        attempts = json.loads((path / "environment.json").read_text(encoding="utf-8"))["attempts"]
        return dict(attempts[-1])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return {}


def _is_data(key: str) -> bool:
    return key.startswith("data.")


def _unlike(a: dict[str, Any], b: dict[str, Any], names: Sequence[str]) -> tuple[Difference, ...]:
    return tuple(Difference(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name))


def _data(
    keys: Sequence[str],
    flat_a: dict[str, Any],
    flat_b: dict[str, Any],
    runs: Sequence[Run | Unfinished],
    tags: tuple[dict[str, str], dict[str, str]],
) -> tuple[Difference, ...]:
    """Configured data, where it lay, its fingerprint, and how much was validated."""
    places = [k for k in ("data.root", "data.val_root", "data.classes") if flat_a.get(k) != flat_b.get(k)]
    found = [
        Difference(k, flat_a.get(k), flat_b.get(k)) for k in [*(k for k in keys if _is_data(k)), *places]
    ]
    found += _unlike(*tags, ("dl2pa.data",))
    a, b = runs
    if isinstance(a, Run) and isinstance(b, Run):
        for name in ("num_classes", "num_validated"):
            values = getattr(a.result, name), getattr(b.result, name)
            if values[0] != values[1]:
                found.append(Difference(name, *values))
    return tuple(found)


def _results(
    runs: Sequence[Run | Unfinished], paths: Sequence[Path], below: Path | None
) -> tuple[tuple[Measured, ...], str | None]:
    for run in runs:
        if isinstance(run, Unfinished):
            return (), f"{run.path} has no result: {run.state}, {run.reason}"
    a, b = (run for run in runs if isinstance(run, Run))
    if a.result.num_validated != b.result.num_validated:
        return (), "they were validated on different numbers of images"
    groups = group_runs([*_others(paths, below), a, b])
    measured = [_measure(name, a, b, groups) for name in METRICS]
    return tuple(m for m in measured if m is not None), None


def _others(paths: Sequence[Path], below: Path | None) -> list[Run]:
    folders = [below] if below is not None else list({path.resolve().parent for path in paths})
    own = {path.resolve() for path in paths}
    found: dict[Path, Path] = {}
    for folder in folders:
        found.update({path.resolve(): path for path in find_runs([], folder)})
    read = (read_run(path) for resolved, path in found.items() if resolved not in own)
    return [run for run in read if isinstance(run, Run)]


def _siblings(run: Run, group: Group) -> list[Run]:
    """The run and those of its recipe with other seeds."""
    return [run, *(other for other in group.runs if other.seed != run.seed)]


def _measure(name: str, a: Run, b: Run, groups: Sequence[Group]) -> Measured | None:
    group_a, group_b = (next(g for g in groups if run in (*g.runs, *g.repeats)) for run in (a, b))
    same = group_a is group_b
    own = _value(a.result, name), _value(b.result, name)
    of_a, of_b = (group_a.runs, group_a.runs) if same else (_siblings(a, group_a), _siblings(b, group_b))
    values_a = [v for v in (_value(run.result, name) for run in of_a) if v is not None]
    values_b = [v for v in (_value(run.result, name) for run in of_b) if v is not None]
    if own[0] is None or own[1] is None or not values_a or not values_b:
        return None
    freedom = len(values_a) - 1 if same else len(values_a) + len(values_b) - 2
    noise = None
    if freedom > 0:
        squares = _squares(values_a) + (0.0 if same else _squares(values_b))
        noise = math.sqrt(squares / freedom)
    mean_a, mean_b = sum(values_a) / len(values_a), sum(values_b) / len(values_b)
    gap = own[1] - own[0] if same else mean_b - mean_a
    low = high = None
    if noise is not None:
        counts = (1, 1) if same else (len(values_a), len(values_b))
        reach = _quantile(freedom) * noise * math.sqrt(1 / counts[0] + 1 / counts[1])
        low, high = gap - reach, gap + reach
    n_a, n_b = len(values_a), len(values_b)
    verdict = _verdict(gap, noise, low, high)
    return Measured(name, own[0], own[1], mean_a, mean_b, n_a, n_b, noise, low, high, verdict)


def _value(result: Result, name: str) -> float | None:
    return getattr(result, name)


def _squares(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)


def _quantile(freedom: int) -> float:
    """Student's t, two-sided."""
    from scipy.stats import t

    return float(t.ppf((1 + _CONFIDENCE) / 2, freedom))


def _verdict(gap: float, noise: float | None, low: float | None, high: float | None) -> str:
    if gap == 0:
        return "equal"
    if noise is None or low is None or high is None:
        return "one seed each cannot tell"
    return "within the noise of seeds" if low <= 0 <= high else "more than the noise of seeds"


def compose_differences(found: Differences) -> list[Block]:
    """What the comparison says, as a document."""
    blocks: list[Block] = [Heading(1, f"{code(found.a)} and {code(found.b)}")]
    if found.same_recipe:
        blocks.append(
            Paragraph("The same recipe: nothing that changes results differs but what is listed here.")
        )
    blocks += [Heading(2, "Result"), *_result_blocks(found)]
    for title, rows, none in (
        ("Configuration", found.config, "No difference in what changes results."),
        ("Data", found.data, "The same data, as far as configuration and counts tell."),
        ("Code", found.code, "The same commit and versions."),
        ("Machine", found.machine, "The same."),
        ("Settings that change no result", found.neutral, ""),
    ):
        if rows or none:
            blocks += [Heading(2, title), _grid(rows) if rows else Paragraph(none)]
    return blocks


def _result_blocks(found: Differences) -> list[Block]:
    if found.unknown is not None:
        return [Paragraph(f"Nothing to compare: {found.unknown}.")]
    heads = [
        "figure ",
        "A",
        "B",
        "B - A",
        "mean A (n)",
        "mean B (n)",
        "seeds' noise",
        "95 % of B - A",
        "verdict ",
    ]
    rows: list[list[str]] = []
    for m in found.results:
        own = [m.name, f"{m.a:.2f}", f"{m.b:.2f}", f"{m.b - m.a:+.2f}"]
        means = [f"{m.mean_a:.2f} ({m.n_a})", f"{m.mean_b:.2f} ({m.n_b})"]
        noise = "–" if m.noise is None else f"{m.noise:.2f}"
        interval = "–" if m.low is None else f"{m.low:+.2f} to {m.high:+.2f}"
        rows.append([*own, *means, noise, interval, m.verdict])
    said = (
        "Means are over the runs of each recipe that lie beside, one a seed. The noise is the standard deviation over "
        "seeds, pooled; the interval is Student's, of the difference of the means (of the two runs, where both follow "
        "one recipe). Two recipes of one seed each cannot be told apart from their seeds."
    )
    return [Grid(heads, rows), Paragraph(said)]


def _grid(rows: Sequence[Difference]) -> Grid:
    shown = [[code(d.name), _shown(d.a), _shown(d.b)] for d in rows]
    return Grid(["what ", "A ", "B "], shown)


def _shown(value: Any) -> str:
    text = (
        json.dumps(value) if isinstance(value, bool | dict | list) else "–" if value is None else str(value)
    )
    return text if len(text) <= 80 else f"{text[:79]}…"


def record_differences(found: Differences) -> dict[str, Any]:
    """Everything that is shown, for machines."""

    def rows(differing: Sequence[Difference]) -> dict[str, list[Any]]:
        return {d.name: [d.a, d.b] for d in differing}

    return {
        "a": str(found.a),
        "b": str(found.b),
        "same_recipe": found.same_recipe,
        "config": rows(found.config),
        "data": rows(found.data),
        "code": rows(found.code),
        "machine": rows(found.machine),
        "neutral": rows(found.neutral),
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
            for m in found.results
        },
        "unknown": found.unknown,
    }
