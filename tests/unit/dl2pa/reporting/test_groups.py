from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl2pa.config import Config
from dl2pa.reporting.compare import compare
from dl2pa.reporting.groups import Group, Summary, group_runs
from dl2pa.reporting.runs import Run, read_run
from dl2pa.reporting.verdict import metrics

MakeRun = Callable[..., Path]


def groups_of(*paths: Path) -> list[Group]:
    runs = [read_run(path) for path in paths]
    assert all(isinstance(run, Run) for run in runs), runs
    return group_runs(run for run in runs if isinstance(run, Run))


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_mean_and_sample_deviation_equal_numpy(n: int) -> None:
    values = [random.Random(n * 100 + i).uniform(0, 100) for i in range(n)]
    summary = Summary.of(values)
    assert summary.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert summary.std == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert summary.n == n
    assert str(summary) == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def test_one_value_has_no_deviation() -> None:
    assert Summary.of([57.214]) == Summary(57.214, None, 1)
    assert str(Summary.of([57.214])) == "57.21"


def test_seeds_of_a_recipe_are_one_group(make_run: MakeRun) -> None:
    last, best = [50.0, 51.5, 49.0], [52.0, 51.5, 50.5]
    paths = [
        make_run(
            {"train.seed": s, "tracking.run_name": f"r{s}"}, last=last[s], best=best[s], top1_tail=s + 1.0
        )
        for s in range(3)
    ]
    (group,) = groups_of(*reversed(paths))
    assert [run.seed for run in group.runs] == [0, 1, 2]
    assert (group.n, group.method, group.dim, group.steps, group.epochs) == (3, "dl2pa", 6, 2000, 20)
    assert group.last.mean == pytest.approx(np.mean(last))
    assert group.last.std == pytest.approx(np.std(last, ddof=1))
    assert group.best.mean == pytest.approx(np.mean(best))
    assert group.best.std == pytest.approx(np.std(best, ddof=1))
    assert group.by_frequency == {"tail": Summary.of([1.0, 2.0, 3.0])}
    assert group.summary("ece_last") == Summary(3.0, 0.0, 3)


def test_seeds_that_stopped_early_are_one_group(make_run: MakeRun) -> None:
    lengths = [(700, 7, True), (1200, 12, True), (2000, 20, False)]
    paths = [
        make_run({"train.seed": s, "train.patience": 3}, steps=steps, epochs=epochs, stopped_early=early)
        for s, (steps, epochs, early) in enumerate(lengths)
    ]
    (group,) = groups_of(*paths)
    assert (group.n, group.num_stopped_early, group.is_cut) == (3, 2, False)
    assert (group.steps, group.epochs) == (2000, 20)


def test_recipe_dimension_and_method_separate_groups(make_run: MakeRun) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"optim.lr": 0.2},
        {"model.embedding_dim": 5},
        {"method.name": "hpn"},
    ]
    groups = groups_of(*(make_run({**change, "train.seed": s}) for change in changes for s in (0, 1)))
    assert [group.n for group in groups] == [2, 2, 2, 2]
    assert [(group.method, group.dim) for group in groups] == [
        *(("dl2pa", 5), ("dl2pa", 6), ("dl2pa", 6)),
        ("hpn", 6),
    ]


def test_the_first_finished_run_of_a_seed_counts(make_run: MakeRun) -> None:
    late = make_run({"train.seed": 1}, last=90.0, status={"updated": 300.0})
    early = make_run({"train.seed": 1}, last=40.0, status={"updated": 200.0})
    other = make_run({"train.seed": 2}, last=42.0)
    (group,) = groups_of(late, early, other)
    assert [run.path for run in group.runs] == [early, other]
    assert [run.path for run in group.repeats] == [late]
    assert (group.n, group.last.mean) == (2, 41.0)


def test_only_a_reached_step_limit_separates_groups(make_run: MakeRun) -> None:
    complete = make_run({"train.seed": 0})
    unmet = make_run({"train.seed": 1, "train.max_steps": 9000})
    cut = make_run({"train.seed": 2, "train.max_steps": 300})
    cut_elsewhere = make_run({"train.seed": 3, "train.max_steps": 400})
    groups = groups_of(complete, unmet, cut, cut_elsewhere)
    assert [[run.path for run in group.runs] for group in groups] == [
        [complete, unmet],
        [cut_elsewhere],
        [cut],
    ]
    assert [group.is_cut for group in groups] == [False, True, True]


def test_the_data_size_separates_groups(make_run: MakeRun) -> None:
    groups = groups_of(
        make_run({"train.seed": 0}),
        make_run({"train.seed": 1}, num_validated=100),
        make_run({"train.seed": 2}, steps_per_epoch=90),
    )
    assert [group.n for group in groups] == [1, 1, 1]


def test_other_images_separate_groups(make_run: MakeRun) -> None:
    # The path of the data is not part of a recipe: features of two networks have the same configuration.
    paths = [
        make_run({"train.seed": seed, "data.root": root}, last=last + seed, fingerprint=root)
        for root, last in (("one", 50.0), ("other", 70.0))
        for seed in (0, 1)
    ]
    groups = groups_of(*paths)
    assert [(group.last.mean, group.n, group.repeats) for group in groups] == [(50.5, 2, ()), (70.5, 2, ())]
    assert [group.images for group in groups] == ["one", "other"]


def test_data_sets_of_different_size_are_told_apart(make_run: MakeRun) -> None:
    runs = [make_run(fingerprint=name, num_validated=n, last=n) for name, n in (("one", 20), ("other", 30))]
    assert [group.images for group in groups_of(*runs)] == ["one", "other"]
    comparison = compare([read_run(path) for path in runs], None)
    assert sorted(metrics(comparison).values()) == [20.0, 30.0]


def test_a_run_with_changes_does_not_replace_the_metrics_of_its_recipe(
    make_run: MakeRun, config_with: Callable[..., Config]
) -> None:
    config, other = (config_with({"train.seed": 1, "optim.lr": lr}) for lr in (0.1, 9.0))
    runs = [
        make_run(last=50.0),
        make_run(config, last=20.0, attempts=[other, config]),
    ]
    comparison = compare([read_run(path) for path in runs], None)
    assert [group.changed for group in comparison.groups] == [(), ("optim.lr",)]
    assert list(metrics(comparison).values()) == [50.0]


def test_a_run_that_did_not_record_its_images_joins_the_only_ones(make_run: MakeRun) -> None:
    old, new = make_run({"train.seed": 0}), make_run({"train.seed": 1}, fingerprint="one")
    assert [(group.n, group.images) for group in groups_of(old, new)] == [(2, None)]
    third = make_run({"train.seed": 2}, fingerprint="other")
    assert {group.images for group in groups_of(old, new, third)} == {"unknown", "one", "other"}


def test_a_metric_missing_in_one_run_is_not_averaged(make_run: MakeRun) -> None:
    (group,) = groups_of(
        make_run({"train.seed": 0}, top1_head=50.0), make_run({"train.seed": 1}, ece_last=None)
    )
    assert group.by_frequency == {}
    assert group.summary("ece_last") is None
