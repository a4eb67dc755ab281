"""Paired comparison of the variants of a sweep: differences to a reference, seed by seed.

Runs with the same seed have the same initial weights, batches and augmentation, so the difference of two variants
varies less over seeds than their results do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dl2pa.config.identity import differing, group_name
from dl2pa.config.sweep import VARIANT_KEY
from dl2pa.errors import UserError
from dl2pa.reporting.differences import paired_difference
from dl2pa.reporting.document import Block, Grid, Heading, Paragraph
from dl2pa.reporting.groups import Group, Summary, group_runs
from dl2pa.reporting.metric import Metric
from dl2pa.reporting.runs import Run


@dataclass(frozen=True)
class Row:
    """A variant and its difference to the reference.

    Attributes:
        summary: over all its seeds.
        pairs: number of seeds that the reference has too; 0 for the reference itself.
        difference: mean of variant minus reference over these seeds; None without any.
        interval: its 95 % confidence interval by Student's t distribution; None with fewer than two pairs.
    """

    name: str
    summary: Summary
    pairs: int = 0
    difference: float | None = None
    interval: list[float] | None = None


@dataclass(frozen=True)
class PairedTable:
    """Variants on the same data in the same dimension; the reference first, the others by their mean."""

    title: str
    rows: tuple[Row, ...]


def compare_paired(runs: Sequence[Run], reference: str, metric: str = "top1_last") -> list[PairedTable]:
    """Compare the variants of each data set and dimension with the reference.

    A variant is the runs with its tag and the same recipe; runs without the tag have the name of their group. If the
    runs of a tag have several recipes or images, the settings or the data that differ are added to its name.

    Args:
        metric: name of a ``Metric``.

    Raises:
        UserError: there is no such variant, or it has several recipes for one table (``--paired``), or no run has the
            metric (``--metric``).
    """
    Metric(metric)  # refuses other names before the runs are read
    tables: dict[str, list[Group]] = {}
    for group in group_runs(runs):
        tables.setdefault(_title(group), []).append(group)
    named = {title: _named(groups) for title, groups in tables.items()}
    known = sorted({name for groups in named.values() for name in groups})
    if not any(reference in groups for groups in named.values()):
        remedy = f"Use one of {'; '.join(known)}." if known else "Give a folder with finished runs."
        raise UserError("--paired", reference, "no finished run has this variant", remedy)
    result = [_table(title, groups, reference, Metric(metric)) for title, groups in sorted(named.items())]
    if not any(table.rows for table in result):
        remedy = "Run `dl2pa evaluate` for each run, or use another metric."
        raise UserError("--metric", metric, "no run has this metric", remedy)
    return [table for table in result if table.rows]


def _title(group: Group) -> str:
    parts = [
        str(group.identity["data.dataset"]),
        f"d = {group.dim}",
        f"{group.runs[0].result.num_classes} classes",
    ]
    for key in ("imbalance", "label_noise", "val_fraction"):
        if value := group.identity[f"data.{key}"]:
            parts.append(f"{key.replace('_', ' ')} {value:g}")
    return ", ".join([*parts, f"{group.num_validated:,} validated"])


def _named(groups: Sequence[Group]) -> dict[str, Group]:
    """Name the groups of a table."""
    tags = [g.runs[0].config.tracking.tags.get(VARIANT_KEY) or group_name(g.runs[0].config) for g in groups]
    names: dict[str, Group] = {}
    for tag, group in zip(tags, groups, strict=True):
        same = [other for name, other in zip(tags, groups, strict=True) if name == tag]
        keys = sorted(set().union(*(differing(group.identity, other.identity) for other in same)))
        parts = [f"{key}={group.identity.get(key)}" for key in keys]
        if group.images is not None and any(o.identity == group.identity for o in same if o is not group):
            parts.append(f"data {group.images}")
        suffix = ", ".join(parts)
        name = f"{tag} ({suffix})" if suffix else tag
        while name in names:  # equal recipes of different length
            name += "'"
        names[name] = group
    return names


def _table(title: str, groups: dict[str, Group], reference: str, metric: Metric) -> PairedTable:
    base = _by_seed(groups[reference], metric) if reference in groups else {}
    rows: list[Row] = []
    for name, group in groups.items():
        values = _by_seed(group, metric)
        if not values:
            continue
        summary, seeds = Summary.of(list(values.values())), sorted(values.keys() & base.keys())
        if name == reference or not seeds:
            rows.append(Row(name, summary))
            continue
        gap, interval = paired_difference([base[s] for s in seeds], [values[s] for s in seeds])
        rows.append(Row(name, summary, len(seeds), gap, interval))
    rows.sort(key=lambda row: (row.name != reference, -row.summary.mean))
    return PairedTable(title, tuple(rows))


def _by_seed(group: Group, metric: Metric) -> dict[int, float]:
    values = {run.seed: metric.of(run) for run in group.runs}
    return {seed: value for seed, value in values.items() if value is not None}


def compose_paired(tables: Sequence[PairedTable], reference: str, metric: str) -> list[Block]:
    """Compose the comparison as a document."""
    text = (
        f"Mean ± standard deviation over n seeds of {metric}. The difference is that to {reference!r} over the seeds "
        "that both have, with Student's 95 % confidence interval of the mean of the paired differences."
    )
    blocks: list[Block] = [Heading(1, f"Comparison with {reference}"), Paragraph(text)]
    heads = ["variant ", "n", metric, "difference", "95 % interval", "pairs"]
    for table in tables:
        blocks += [Heading(2, table.title), Grid(heads, [_cells(row) for row in table.rows])]
    return blocks


def _cells(row: Row) -> list[str]:
    difference = "–" if row.difference is None else f"{row.difference:+.2f}"
    interval = "–" if row.interval is None else "{:+.2f} to {:+.2f}".format(*row.interval)
    return [row.name, str(row.summary.n), str(row.summary), difference, interval, str(row.pairs or "–")]


def paired_record(tables: Sequence[PairedTable], reference: str, metric: str) -> dict[str, Any]:
    """Return the comparison as a JSON object."""
    return {
        "reference": reference,
        "metric": metric,
        "tables": [
            {
                "title": table.title,
                "rows": [
                    {
                        "variant": row.name,
                        "mean": row.summary.mean,
                        "std": row.summary.std,
                        "n": row.summary.n,
                        "pairs": row.pairs,
                        "difference": row.difference,
                        "interval": row.interval,
                    }
                    for row in table.rows
                ],
            }
            for table in tables
        ],
    }
