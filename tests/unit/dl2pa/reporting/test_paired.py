"""Paired comparison of variants, and its command."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from dl2pa.errors import UserError
from dl2pa.reporting.paired import PairedTable, compare_paired, compose_paired
from dl2pa.reporting.runs import Run, read_run
from support.commands import run_here

BASE, OTHER = [50.0, 52.0, 54.0], [51.0, 53.5, 54.5]


@pytest.fixture
def runs(make_run: Callable[..., Path]) -> Path:
    """Variants `base` and `other` with three common seeds, and a fourth of `other`."""
    for variant, lr, values in (("base", 0.1, BASE), ("other", 0.2, [*OTHER, 60.0])):
        for seed, value in enumerate(values):
            changes = {"train.seed": seed, "optim.lr": lr, "tracking.tags": {"variant": variant}}
            make_run(changes, last=value, best=70.0, ece_last=value / 10)
    return make_run({"train.seed": 0, "tracking.tags": {"variant": "base"}, "model.embedding_dim": 3}).parent


def tables(folder: Path, reference: str, metric: str = "top1_last") -> list[PairedTable]:
    found = [read_run(path) for path in sorted(folder.iterdir())]
    return compare_paired([run for run in found if isinstance(run, Run)], reference, metric)


def test_differences_are_taken_seed_by_seed(runs: Path) -> None:
    small, table = tables(runs, "base")
    assert ("d = 3" in small.title, "d = 6" in table.title) == (True, True)
    first, second = table.rows
    assert (first.name, first.summary.n, first.difference) == ("base", 3, None)
    assert (second.name, second.summary.n, second.pairs) == ("other", 4, 3)
    gaps = [b - a for a, b in zip(BASE, OTHER, strict=True)]
    mean = sum(gaps) / 3
    deviation = math.sqrt(sum((g - mean) ** 2 for g in gaps) / 2)
    half = 4.30265 * deviation / math.sqrt(3)  # 97.5 % quantile of Student's t with 2 degrees of freedom
    assert second.difference == pytest.approx(mean)
    assert second.interval == pytest.approx([mean - half, mean + half], rel=1e-4)


def test_another_metric_and_reference(runs: Path) -> None:
    *_, table = tables(runs, "other", "ece_last")
    assert [row.name for row in table.rows] == ["other", "base"]
    assert table.rows[1].difference == pytest.approx(-0.1)


def test_several_recipes_of_a_variant_are_told_apart(runs: Path, make_run: Callable[..., Path]) -> None:
    make_run({"train.seed": 1, "optim.lr": 0.3, "tracking.tags": {"variant": "other"}}, last=40.0)
    *_, table = tables(runs, "base")
    assert {row.name for row in table.rows} == {"base", "other (optim.lr=0.2)", "other (optim.lr=0.3)"}


@pytest.mark.parametrize(
    ("reference", "metric", "field"), [("no", "top1_last", "--paired"), ("base", "nll", "--metric")]
)
def test_what_no_run_has_is_refused(runs: Path, reference: str, metric: str, field: str) -> None:
    with pytest.raises(UserError) as caught:
        tables(runs, reference, metric)
    assert caught.value.field == field


def test_the_command_prints_the_comparison(runs: Path, tmp_path: Path) -> None:
    done = run_here("report", "--all", runs, "--paired", "base", "--out", tmp_path / "out")
    assert done.code == 0, done.error
    assert "| other | 4 | 54.75 ± 3.80 | +1.00 | -0.24 to +2.24 | 3 |" in " ".join(done.output.split("  "))
    assert (tmp_path / "out/report.html").is_file()
    record = run_here("report", "--all", runs, "--paired", "base", "--json").result
    assert record["tables"][1]["rows"][1]["difference"] == pytest.approx(1.0)
    for options, field in (
        (["--metric", "nll"], "--metric"),
        (["--paired", "base", "--published"], "--published"),
    ):
        refused = run_here("report", "--all", runs, *options, "--json")
        assert (refused.code, refused.result["error"]["field"]) == (2, field)


def test_the_document_names_the_reference(runs: Path) -> None:
    blocks = compose_paired(tables(runs, "base"), "base", "top1_last")
    assert len(blocks) == 6
