"""Compare the configuration, data, code, machine and results of two runs.

Differences between results are compared with the seed noise, the standard deviation over seeds. Runs have the same
recipe if their data is the same and their configurations differ only in the seed and in settings that do not affect
results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl2pa.config import Config, flatten, load_recorded_config
from dl2pa.config.identity import NEUTRAL, SEED, run_identity
from dl2pa.config.load import LOCAL_KEYS
from dl2pa.errors import UserError
from dl2pa.reporting.document import Block, Grid, Heading, Paragraph, code
from dl2pa.reporting.groups import Group, group_runs
from dl2pa.reporting.runs import Run, Unfinished, find_runs, read_run
from dl2pa.rundir import RunDirectory
from dl2pa.terms import term

Values = dict[str, list[Any]]
"""Value in both runs by name, of the names with different values."""

_METRICS = (
    *("top1_last", "top1_best", "top1_head", "top1_medium", "top1_tail"),
    *("ece_last", "ece_calibrated", "nll", "nll_calibrated"),
)
_VERSIONS = ("dl2pa", "torch", "torchvision", "nvidia-dali-cuda130", "numpy", "scipy", "pillow")
_CODE = ("git_commit", "git_dirty", *_VERSIONS)
_MACHINE = ("device", "processor", "python", "world_size", "threads")
_CONFIDENCE = 0.95
_EXPLANATION = (
    "Runs have the same recipe if their data is the same and their configurations differ only in the seed and in "
    "settings that do not affect results. A mean is over the runs found with the recipe of A or B, one run per seed. "
    "The seed noise is the standard deviation over seeds, pooled over both recipes. The interval is Student's 95 % "
    "confidence interval of the difference between the means or, if A and B have the same recipe, between the two "
    "runs. With one seed per recipe the seed noise is unknown. Raw values are measured before, calibrated ones after "
    "the logits are divided by the temperature of the run."
)


@dataclass(frozen=True)
class Measured:
    """One metric of both runs and of their groups. A group is a run and the runs of the same recipe with other seeds.

    Attributes:
        a, b: values of the two runs.
        mean, n: mean and size of each group.
        gap: difference of the group means or, for the same recipe, b - a.
        noise: pooled standard deviation over seeds; None if no group has two seeds.
        interval: 95 % confidence interval of the gap.
        verdict: whether the difference exceeds the seed noise.
    """

    a: float
    b: float
    mean: list[float]
    n: list[int]
    gap: float
    noise: float | None
    interval: list[float] | None
    verdict: str


@dataclass(frozen=True)
class Differences:
    """Content of ``report --compare``; as a dictionary, the JSON object of ``report --json``.

    Attributes:
        conclusion: which run is better, by how much, and whether seeds explain it.
        same_recipe: whether the two runs have the same recipe.
        config, data, code, machine: differing settings that affect results, and other differences.
        neutral: differing settings that do not affect results.
        unknown: reason why the results cannot be compared; None if they can.
    """

    a: str
    b: str
    conclusion: str
    same_recipe: bool
    config: Values
    data: Values
    code: Values
    machine: Values
    neutral: Values
    results: dict[str, Measured]
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
        message = "is the same run as the first one"
        raise UserError("--compare", str(second), message, "Give two different run directories.")
    runs = [read_run(path) for path in paths]
    configs = [_config_of(path) for path in paths]
    environments = [next(reversed(RunDirectory(path).attempts()), {}) for path in paths]
    identities = [run_identity(config) for config in configs]
    # In the identity, defaults that depend on the method are replaced by their values.
    flat = [{**flatten(c), **identity} for c, identity in zip(configs, identities, strict=True)]
    recipe = _differing(identities, {**identities[0], **identities[1]})
    data_keys = [key for key in recipe if key.startswith("data.")]
    fingerprints = [{"dl2pa.data": env.get("data_fingerprint")} for env in environments]
    same_data = len({env["dl2pa.data"] for env in fingerprints} - {None}) < 2
    sizes = [run.result.model_dump() for run in runs if isinstance(run, Run)]
    neutral = [k for k in flat[0] if k.startswith((*LOCAL_KEYS, *NEUTRAL)) and not k.startswith("data.")]
    results, unknown = _results(runs, paths, below)
    return Differences(
        a=str(first),
        b=str(second),
        conclusion=_conclusion(results.get("top1_last"), unknown),
        same_recipe=not recipe and same_data,
        config=_differing(flat, [*(key for key in recipe if key not in data_keys), SEED]),
        data=_differing(flat, [*data_keys, "data.root", "data.val_root", "data.classes"])
        | _differing(fingerprints, ["dl2pa.data"])
        | (_differing(sizes, ["num_classes", "num_validated"]) if len(sizes) == 2 else {}),
        code=_differing(environments, _CODE),
        machine=_differing(environments, _MACHINE),
        neutral=_differing(flat, neutral),
        results=results,
        unknown=unknown,
    )


def _config_of(path: Path) -> Config:
    try:
        return load_recorded_config(RunDirectory(path).config)
    except UserError as error:
        message = f"its configuration cannot be read: {error}"
        raise UserError("--compare", str(path), message, "Give another run.") from None


def _differing(pair: Sequence[Mapping[str, Any]], names: Iterable[str]) -> Values:
    a, b = pair
    return {name: [a.get(name), b.get(name)] for name in names if a.get(name) != b.get(name)}


def _results(
    runs: Sequence[Run | Unfinished], paths: Sequence[Path], below: Path | None
) -> tuple[dict[str, Measured], str | None]:
    """Compare the metrics of two finished runs, or return why they cannot be compared."""
    for run in runs:
        if isinstance(run, Unfinished):
            return {}, f"{run.path} has no result: {run.state}, {run.reason}"
    a, b = (run for run in runs if isinstance(run, Run))
    if a.result.num_validated != b.result.num_validated:
        return {}, "the runs were validated on different numbers of images"
    groups = group_runs([*_others(paths, below), a, b])
    measured = {name: _measure(name, a, b, groups) for name in _METRICS}
    return {name: m for name, m in measured.items() if m is not None}, None


def _others(paths: Sequence[Path], below: Path | None) -> list[Run]:
    """Read the finished runs among which other seeds are searched."""
    folders = [below] if below is not None else list({path.resolve().parent for path in paths})
    compared = {path.resolve() for path in paths}
    others = {path.resolve(): path for folder in folders for path in find_runs([], folder)}
    runs = (read_run(path) for resolved, path in others.items() if resolved not in compared)
    return [run for run in runs if isinstance(run, Run)]


def _measure(name: str, a: Run, b: Run, groups: Sequence[Group]) -> Measured | None:
    """Compare one metric; None if a run lacks it."""
    group_a, group_b = (next(g for g in groups if run in (*g.runs, *g.repeats)) for run in (a, b))
    same = group_a is group_b
    value_a, value_b = getattr(a.result, name), getattr(b.result, name)
    if value_a is None or value_b is None:
        return None
    samples = [_values(group, name, None if same else run) for group, run in ((group_a, a), (group_b, b))]
    if not all(samples):
        return None
    means, counts = [sum(v) / len(v) for v in samples], [len(v) for v in samples]
    gap = value_b - value_a if same else means[1] - means[0]
    noise = _pooled_deviation(samples[:1] if same else samples)
    interval = None if noise is None else _interval(gap, *noise, [1, 1] if same else counts)
    return Measured(
        value_a, value_b, means, counts, gap, noise and noise[0], interval, _verdict(gap, interval)
    )


def difference_of_means(samples: Sequence[Sequence[float]]) -> tuple[float, list[float] | None]:
    """Return the difference of the second mean from the first, and its 95 % interval; None with one seed each."""
    gap = sum(samples[1]) / len(samples[1]) - sum(samples[0]) / len(samples[0])
    noise = _pooled_deviation(samples)
    return gap, None if noise is None else _interval(gap, *noise, [len(sample) for sample in samples])


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, list[float] | None]:
    """Return the mean of second minus first over pairs of equal seeds, and its 95 % interval; None with one pair."""
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    gap = sum(gaps) / len(gaps)
    noise = _pooled_deviation([gaps])
    return gap, None if noise is None else _interval(gap, *noise, [len(gaps)])


def _pooled_deviation(samples: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """Standard deviation pooled over samples, and its degrees of freedom; None if no sample has two values."""
    dof = sum(len(sample) - 1 for sample in samples)
    if dof == 0:
        return None
    squares = (sum((x - sum(sample) / len(sample)) ** 2 for x in sample) for sample in samples)
    return math.sqrt(sum(squares) / dof), dof


def _interval(gap: float, noise: float, dof: int, counts: Sequence[int]) -> list[float]:
    margin = _quantile(dof) * noise * math.sqrt(sum(1 / n for n in counts))
    return [gap - margin, gap + margin]


def _values(group: Group, name: str, run: Run | None) -> list[float]:
    """Values of a metric of a group, one per seed; that of `run` for its own seed."""
    runs = group.runs if run is None else [run, *(r for r in group.runs if r.seed != run.seed)]
    values = (getattr(run.result, name) for run in runs)
    return [value for value in values if value is not None]


def _quantile(dof: int) -> float:
    """Two-sided quantile of Student's t distribution."""
    from scipy.stats import t

    return float(t.ppf((1 + _CONFIDENCE) / 2, dof))


def _verdict(gap: float, interval: list[float] | None) -> str:
    if gap == 0:
        return "equal"
    if interval is None:
        return "undecided: one seed each"
    return "within seed noise" if interval[0] <= 0 <= interval[1] else "exceeds seed noise"


def _conclusion(top1: Measured | None, unknown: str | None) -> str:
    """Compare the top-1 accuracy of the last epoch in one sentence."""
    if unknown is not None or top1 is None:
        return "No conclusion: the results cannot be compared"
    gap = top1.gap
    if gap == 0:
        return f"A and B have the same top-1 accuracy, {top1.a:.2f} %"
    better = f"{'B' if gap > 0 else 'A'} is better by {abs(gap):.2f} points of top-1 accuracy"
    if top1.interval is None:
        return f"{better}; with one seed each, seeds may explain it"
    explained = top1.interval[0] <= 0 <= top1.interval[1]
    return f"{better}; seeds {'may explain' if explained else 'do not explain'} it"


def compose_differences(content: Differences) -> list[Block]:
    """Compose the comparison as a document."""
    blocks: list[Block] = [
        Heading(1, content.conclusion),
        Paragraph(f"A is {code(content.a)}, B is {code(content.b)}."),
    ]
    if content.same_recipe:
        text = "Both runs have the same recipe: of the settings that change results only the seed may differ."
        blocks.append(Paragraph(text))
    blocks += [Heading(2, "Results"), *_result_blocks(content)]
    for title, values, none in (
        ("Configuration", content.config, "No differences in settings that change results."),
        ("Data", content.data, "No differences in data configuration, fingerprint and counts."),
        ("Code", content.code, "No differences in commit and versions."),
        ("Machine", content.machine, "No differences."),
        ("Settings without effect on results", content.neutral, ""),
    ):
        if values or none:
            rows = [[code(name), _shown(a), _shown(b)] for name, (a, b) in values.items()]
            blocks += [Heading(2, title), Grid(["name ", "A ", "B "], rows) if rows else Paragraph(none)]
    return blocks


def _result_blocks(content: Differences) -> list[Block]:
    if content.unknown is not None:
        return [Paragraph(f"The results cannot be compared: {content.unknown}.")]
    heads = ["metric ", "A", "B", "B - A", "mean A (n)", "mean B (n)", "seed noise"]
    rows: list[list[str]] = []
    for name, m in content.results.items():
        means = [f"{mean:.2f} ({n})" for mean, n in zip(m.mean, m.n, strict=True)]
        noise = "–" if m.noise is None else f"{m.noise:.2f}"
        interval = "–" if m.interval is None else "{:+.2f} to {:+.2f}".format(*m.interval)
        rows.append(
            [term(name), f"{m.a:.2f}", f"{m.b:.2f}", f"{m.b - m.a:+.2f}", *means, noise, interval, m.verdict]
        )
    return [Grid([*heads, "95 % interval of B - A", "verdict "], rows), Paragraph(_EXPLANATION)]


def _shown(value: Any) -> str:
    text = "–" if value is None else str(value)
    if isinstance(value, bool | dict | list):
        text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
