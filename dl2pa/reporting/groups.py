"""Runs of one recipe over several seeds, and their mean and spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dl2pa.config.identity import Identity, identity_of
from dl2pa.reporting.runs import Run
from pipelines.longtail import GROUPS


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of n values; no deviation for one."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"

    def as_dict(self) -> dict[str, float | int | None]:
        return {"mean": self.mean, "std": self.std, "n": self.n}


@dataclass(frozen=True)
class Group:
    """Finished runs of one recipe on data of one size, one run a seed.

    Attributes:
        identity: the recipe; `train.max_steps` only where it cut the run short.
        runs: by seed.
        repeats: further runs of the same recipe and seed. They would make the spread over seeds look smaller than
            it is, so the first that finished counts.
    """

    identity: Identity
    runs: tuple[Run, ...]
    repeats: tuple[Run, ...]

    @property
    def method(self) -> str:
        return str(self.identity["method.name"])

    @property
    def data(self) -> str:
        """The data set, and how far it is thinned."""
        name, imbalance = str(self.identity["data.dataset"]), self.identity["data.imbalance"]
        return name if imbalance is None else f"{name}, imbalance {imbalance:g}"

    @property
    def dim(self) -> int:
        return int(self.identity["model.embedding_dim"])

    @property
    def n(self) -> int:
        return len(self.runs)

    @property
    def steps(self) -> int:
        return self.runs[0].result.steps

    @property
    def epochs(self) -> int:
        """Epochs trained."""
        return self.runs[0].result.epochs

    @property
    def is_cut(self) -> bool:
        """Whether `train.max_steps` ended the runs before their last epoch."""
        return self.runs[0].is_cut

    @property
    def num_validated(self) -> int:
        return self.runs[0].result.num_validated

    @property
    def changed(self) -> tuple[str, ...]:
        """Keys that changed midway."""
        return self.runs[0].changed

    @property
    def last(self) -> Summary:
        return Summary.of([run.result.top1_last for run in self.runs])

    @property
    def best(self) -> Summary:
        return Summary.of([run.result.top1_best for run in self.runs])

    @property
    def ece(self) -> Summary | None:
        """Calibration error at the end."""
        return _summary([run.result.ece_last for run in self.runs])

    @property
    def by_frequency(self) -> dict[str, Summary]:
        """Accuracy at the end over head, medium and tail classes; empty where the data has no long tail."""
        found = {name: _summary([run.result.of_group(name) for run in self.runs]) for name in GROUPS}
        return {name: summary for name, summary in found.items() if summary is not None}


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Runs with equal configurations but for the seed, on as much data, in the order of their methods and d."""
    together: dict[str, tuple[Identity, dict[int, list[Run]]]] = {}
    for run in runs:
        identity = _recipe_of(run)
        result = run.result
        size = (result.num_validated, result.num_classes, result.steps, run.changed)
        key = json.dumps([identity, size], sort_keys=True)
        _, seeds = together.setdefault(key, (identity, {}))
        seeds.setdefault(run.seed, []).append(run)
    groups: list[Group] = []
    for identity, seeds in together.values():
        ordered = [
            sorted(seeds[seed], key=lambda run: (run.finished, str(run.path))) for seed in sorted(seeds)
        ]
        counted = tuple(same[0] for same in ordered)
        groups.append(Group(identity, counted, tuple(run for same in ordered for run in same[1:])))
    return sorted(groups, key=lambda g: (g.method, g.dim, g.is_cut, -g.epochs, str(g.runs[0].path)))


def _recipe_of(run: Run) -> Identity:
    """A limit that was never met leaves the run what it would have been without."""
    identity = identity_of(run.config)
    return identity if run.is_cut else {**identity, "train.max_steps": None}


def _summary(values: Sequence[float | None]) -> Summary | None:
    known = [value for value in values if value is not None]
    return Summary.of(known) if len(known) == len(values) else None
