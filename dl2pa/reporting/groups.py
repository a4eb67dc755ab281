"""Groups of runs that differ only in their seed, with mean and standard deviation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dl2pa.config.identity import Identity, run_identity
from dl2pa.reporting.runs import Run
from pipelines.longtail import GROUPS


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of n values; the deviation of one value is None."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


@dataclass(frozen=True, eq=False)
class Group:
    """Finished runs with the same recipe and images, one per seed.

    Attributes:
        identity: the recipe; `train.max_steps` is None unless it ended the runs early.
        runs: ordered by seed.
        repeats: further runs of a seed. Only the first finished run of a seed counts: repeats would reduce the
            standard deviation.
        steps, epochs: length of training; of the longest run if `train.patience` ended some.
        is_cut: whether `train.max_steps` ended the runs before their last epoch.
        changed: configuration keys that changed between attempts.
        images: fingerprint of the data if the recipe was trained on several data sets, `unknown` for runs that did not
            record it; None if there is only one.
    """

    identity: Identity
    runs: tuple[Run, ...]
    repeats: tuple[Run, ...]
    steps: int
    epochs: int
    num_validated: int
    is_cut: bool
    changed: tuple[str, ...]
    images: str | None = None

    @property
    def method(self) -> str:
        return str(self.identity["method.name"])

    @property
    def data(self) -> str:
        """Data set and imbalance."""
        name, imbalance = str(self.identity["data.dataset"]), self.identity["data.imbalance"]
        return name if imbalance is None else f"{name}, imbalance {imbalance:g}"

    @property
    def dim(self) -> int:
        return int(self.identity["model.embedding_dim"])

    @property
    def n(self) -> int:
        return len(self.runs)

    @property
    def num_stopped_early(self) -> int:
        """Number of the runs that `train.patience` ended."""
        return sum(run.result.stopped_early for run in self.runs)

    @property
    def change_remark(self) -> str | None:
        return f"{', '.join(self.changed)} changed between attempts" if self.changed else None

    @property
    def last(self) -> Summary:
        return Summary.of([run.result.top1_last for run in self.runs])

    @property
    def best(self) -> Summary:
        return Summary.of([run.result.top1_best for run in self.runs])

    def summary(self, metric: str) -> Summary | None:
        """Summarize a field of `Result`; None if a run lacks it."""
        values: list[float | None] = [getattr(run.result, metric) for run in self.runs]
        known = [value for value in values if value is not None]
        return Summary.of(known) if len(known) == len(values) else None

    @property
    def by_frequency(self) -> dict[str, Summary]:
        """Last accuracy over head, medium and tail classes; empty for balanced data."""
        summaries = {name: self.summary(f"top1_{name}") for name in GROUPS}
        return {name: summary for name, summary in summaries.items() if summary is not None}


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Group runs by recipe and data; groups are ordered by method and embedding dimension."""
    by_recipe: dict[str, tuple[Identity, list[Run]]] = {}
    data: dict[str, set[str]] = {}
    for run in runs:
        identity = run_identity(run.config, run.result.epochs)
        result = run.result
        ends_early = run.config.train.patience is not None and not run.is_cut
        steps = None if ends_early else result.steps
        size = (result.num_validated, result.num_classes, steps, run.changed)
        key = json.dumps([identity, size], sort_keys=True)
        by_recipe.setdefault(key, (identity, []))[1].append(run)
        known = data.setdefault(_text(identity), set())
        if run.data_fingerprint is not None:
            known.add(run.data_fingerprint)
    groups = [
        _group(identity, part, images)
        for identity, same in by_recipe.values()
        for images, part in _by_images(same, len(data[_text(identity)]) > 1).items()
    ]
    return sorted(groups, key=lambda g: (g.method, g.dim, g.is_cut, -g.epochs, str(g.runs[0].path)))


def _text(identity: Identity) -> str:
    return json.dumps(identity, sort_keys=True)


def _by_images(runs: Sequence[Run], several: bool) -> dict[str | None, list[Run]]:
    """Divide runs of a recipe by the fingerprint of their data, because its path is not part of the recipe.

    Args:
        several: whether the recipe, perhaps in other runs, was trained on several data sets.
    """
    if not several:
        return {None: list(runs)}
    parts: dict[str | None, list[Run]] = {}
    for run in runs:
        parts.setdefault(run.data_fingerprint or "unknown", []).append(run)
    return parts


def _group(identity: Identity, runs: Sequence[Run], images: str | None) -> Group:
    seeds: dict[int, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.finished, str(run.path))):
        seeds.setdefault(run.seed, []).append(run)
    counted = tuple(same[0] for same in seeds.values())
    repeats = tuple(run for same in seeds.values() for run in same[1:])
    first, longest = counted[0], max((run.result for run in counted), key=lambda r: r.steps)
    size = (longest.steps, longest.epochs, longest.num_validated)
    return Group(identity, counted, repeats, *size, first.is_cut, first.changed, images)
