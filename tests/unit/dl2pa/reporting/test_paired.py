"""Paired comparison of variants, and its command."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from dl2pa.errors import UserError
from dl2pa.osutil import write_json
from dl2pa.records import DamagedFile
from dl2pa.reporting.metric import Metric
from dl2pa.reporting.paired import PairedTable, compare_paired, compose_paired
from dl2pa.reporting.runs import Run, read_run
from dl2pa.rundir import RunDirectory
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


def test_variants_on_other_images_are_told_apart(make_run: Callable[..., Path]) -> None:
    # The path of the data is not part of a recipe: features of two networks have the same configuration.
    runs = [
        make_run({"train.seed": s, "tracking.tags": {"variant": v}}, last=last + s, fingerprint=data)
        for v, data, last in (("a", "one", 50.0), ("b", "other", 60.0))
        for s in (0, 1)
    ]
    (table,) = tables(runs[0].parent, "a")
    assert [(row.name, row.summary.n, row.difference) for row in table.rows] == [
        ("a", 2, None),
        ("b", 2, 10.0),
    ]
    make_run({"train.seed": 0, "tracking.tags": {"variant": "b"}}, last=40.0, fingerprint="third")
    (table,) = tables(runs[0].parent, "a")
    assert {row.name for row in table.rows} == {"a", "b (data other)", "b (data third)"}


def evaluate(folder: Path, name: str, metrics: dict[str, object], fingerprint: str = "f") -> None:
    """Record an evaluation of every run; a metric may be a function of the top-1 accuracy."""
    for path in folder.iterdir():
        result = RunDirectory(path).read_result()
        top1 = result["top1_last"]
        file = RunDirectory(path).evaluation_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        values = {key: value(top1) if callable(value) else value for key, value in metrics.items()}
        record = {
            "data_fingerprint": fingerprint,
            "options": {},
            "model_sha256": "m",
            "step": result["steps"],
        }
        write_json(file, {**record, "metrics": values})


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("retrieval/validation", "retrieval/validation/recall_at_1"),
        ("v2", "eval/v2/recall_at_1"),
        ("ood/svhn", "ood/svhn/recall_at_1"),
    ],
)
def test_a_metric_of_a_recorded_evaluation(name: str, metric: str, runs: Path) -> None:
    evaluate(runs, name, {"recall_at_1": lambda top1: 2 * top1})
    *_, table = tables(runs, "base", metric)
    _, other = table.rows
    assert other.difference == pytest.approx(2.0)


def test_evaluations_on_different_images_are_not_compared(runs: Path, make_run: Callable[..., Path]) -> None:
    evaluate(runs, "v2", {"top1": 50.0, "name": "text", "flag": True})
    for metric in ("eval/v2/name", "eval/v2/flag", "eval/v2/top5", "eval/other/top1"):
        with pytest.raises(UserError, match="no run has this metric"):
            tables(runs, "base", metric)
    late = make_run({"train.seed": 9, "tracking.tags": {"variant": "late"}}, last=50.0)
    evaluate(late.parent, "v2", {"top1": 50.0}, "f")
    tables(runs, "base", "eval/v2/top1")
    record = RunDirectory(late).evaluation_file("v2")
    record.write_text(record.read_text().replace('"f"', '"g"'))
    with pytest.raises(UserError, match="on other images or with other options") as caught:
        tables(runs, "base", "eval/v2/top1")
    assert caught.value.field == "--metric"
    assert str(record) in str(caught.value)
    small = make_run({"train.seed": 0, "tracking.tags": {"variant": "base"}, "model.embedding_dim": 4})
    evaluate(small.parent, "v2", {"top1": 50.0}, "f")
    file = RunDirectory(small).evaluation_file("v2")
    file.write_text(file.read_text().replace('"f"', '"g"'))
    assert len(tables(runs, "base", "eval/v2/top1")) == 3, "data sets are told apart by their table"
    record.write_text("{}")
    with pytest.raises(DamagedFile):
        tables(runs, "base", "eval/v2/top1")


def test_an_evaluation_before_the_last_training_is_refused(runs: Path) -> None:
    evaluate(runs, "v2", {"top1": 50.0})
    run = next(runs.iterdir())
    result = RunDirectory(run).read_result()
    write_json(run / "result.json", {**result, "steps": result["steps"] + 100})
    with pytest.raises(UserError, match=r"at step 2,000 of .* ended at 2,100") as caught:
        tables(runs, "base", "eval/v2/top1")
    assert (caught.value.field, "dl2pa evaluate" in caught.value.remedy) == ("--metric", True)


@pytest.mark.parametrize(
    "name", ["top2", "eval", "eval/", "eval/x", "eval//y", "train/x/y", "/x/y", "TOP1_LAST"]
)
def test_a_text_that_is_no_metric_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not the name of a metric") as caught:
        Metric(name)
    assert caught.value.field == "--metric"


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
