from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa.config import Config
from dl2pa.config.published import load_published
from dl2pa.errors import UserError
from dl2pa.reporting import Comparison, compare, read_run
from dl2pa.reporting.compare import Line

MakeRun = Callable[..., Path]
ConfigWith = Callable[..., Config]
SHIPPED = Path(__file__).resolve().parents[4] / "configs/published.yaml"


@pytest.fixture
def tables(tmp_path: Path, config_with: ConfigWith) -> Callable[..., Path]:
    """Write one published table for the small configuration: ``tables({"num_validated": 100})``."""

    def write(changes: Mapping[str, Any] | None = None) -> Path:
        folder = tmp_path / "published"
        folder.mkdir(exist_ok=True)
        (folder / "small.yaml").write_text(yaml.safe_dump(config_with().model_dump(mode="json")))
        override = ["model.embedding_dim={column}"]
        rows: dict[str, Any] = {
            "dl2pa": {"top1": [60.0, 70.5], "config": "small.yaml", "overrides": override},
            "hpn": {
                "top1": [50.0, None],
                "config": "small.yaml",
                "overrides": [*override, "method.name=hpn"],
                "suspect": "made up",
            },
            "later": {"top1": [None, 40.25], "config": "small.yaml", "overrides": ["method.name=later"]},
            "psc": {
                "top1": [30.0, None],
                "config": "small.yaml",
                "overrides": [*override, "method.name=psc"],
                "needs": ["method.class_vectors"],
                "note": "given vectors",
            },
        }
        table = {"title": "Small", "column": "d", "columns": [6, 12], "num_validated": 200, "rows": rows}
        tree = {"source": "a paper", "tables": {"small": {**table, **(changes or {})}}}
        (folder / "published.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        return folder / "published.yaml"

    return write


def compared(published: Path | None, *paths: Path) -> Comparison:
    return compare([read_run(path) for path in paths], published)


def line_of(comparison: Comparison, row: str, column: int) -> Line:
    (table,) = comparison.tables
    (result,) = [line for line in table.lines if (line.cell.row, line.cell.column) == (row, column)]
    return result


def test_runs_are_assigned_to_their_cell(tables: Any, make_run: MakeRun) -> None:
    paths = [make_run({"train.seed": seed, "train.log_every_steps": 7}, last=60 + seed) for seed in range(3)]
    wide = make_run({"model.embedding_dim": 12}, last=72.0)
    static = make_run({"method.name": "hpn"}, last=51.0)
    comparison = compared(tables(), *paths, wide, static)
    (entry,) = line_of(comparison, "dl2pa", 6).entries
    assert (entry.length, entry.group.n, entry.group.last.mean) == ("full", 3, 61.0)
    assert [group.last.mean for group in line_of(comparison, "dl2pa", 12).full] == [72.0]
    assert [group.last.mean for group in line_of(comparison, "hpn", 6).full] == [51.0]
    assert comparison.others == ()
    assert len(comparison.groups) == 3


def test_runs_of_another_length_are_separate_from_full_runs(tables: Any, make_run: MakeRun) -> None:
    full = [make_run({"train.seed": s}, last=60.0) for s in range(2)]
    cut = [make_run({"train.seed": s, "train.max_steps": 300}, last=20.0) for s in range(2, 4)]
    fewer = make_run({"train.seed": 4, "train.epochs": 5, "optim.milestones": [2, 3]}, last=30.0)
    longer = make_run({"train.seed": 5, "train.epochs": 40}, last=65.0)
    line = line_of(compared(tables(), *cut, fewer, longer, *full), "dl2pa", 6)
    actual = [(e.length, e.group.n, e.group.last.mean, e.group.steps) for e in line.entries]
    assert actual == [
        ("full", 2, 60.0, 2000),
        ("other", 1, 65.0, 4000),
        ("short", 1, 30.0, 500),
        ("short", 2, 20.0, 300),
    ]
    assert [group.n for group in line.full] == [2]


def test_a_method_missing_in_this_version_keeps_its_figure(tables: Any, make_run: MakeRun) -> None:
    line = line_of(compared(tables(), make_run()), "later", 12)
    assert line.cell.top1 == 40.25
    assert line.missing == "method later is not available in this version"
    assert line.entries == ()


def test_an_invalid_cell_configuration_is_a_user_error(tables: Any, make_run: MakeRun) -> None:
    rows = {"dl2pa": {"top1": [1.0, 2.0], "config": "small.yaml", "overrides": ["optim.lrr=1"]}}
    with pytest.raises(UserError, match="unknown key") as caught:
        compared(tables({"rows": rows}), make_run())
    assert caught.value.field == "optim.lrr"


def test_required_keys_are_free_and_separate_the_groups(tables: Any, make_run: MakeRun) -> None:
    psc = {"method.name": "psc"}
    paths = [
        make_run({**psc, "method.class_vectors": f"{name}.npy", "train.seed": seed}, last=30.0 + at)
        for at, name in enumerate(("glove", "other"))
        for seed in range(2)
    ]
    line = line_of(compared(tables(), *paths), "psc", 6)
    assert sorted((g.n, g.last.mean, g.identity["method.class_vectors"]) for g in line.full) == [
        (2, 30.0, "glove.npy"),
        (2, 31.0, "other.npy"),
    ]


def test_a_run_on_other_data_matches_no_cell(tables: Any, make_run: MakeRun) -> None:
    comparison = compared(tables(), make_run(num_validated=20))
    assert line_of(comparison, "dl2pa", 6).entries == ()
    (other,) = comparison.others
    assert other.remark == "matches small dl2pa 6 except: validated on 20 images instead of 200"
    assert (
        len(line_of(compared(tables({"num_validated": None}), make_run(num_validated=20)), "dl2pa", 6).full)
        == 1
    )


def test_a_recipe_changed_between_attempts_matches_no_cell(
    tables: Any, make_run: MakeRun, config_with: ConfigWith
) -> None:
    path = make_run(attempts=[config_with({"optim.lr": 0.5}), config_with()])
    comparison = compared(tables(), path)
    assert line_of(comparison, "dl2pa", 6).entries == ()
    (other,) = comparison.others
    assert other.remark == "matches small dl2pa 6 except: optim.lr changed between attempts"


def test_unmatched_runs_are_grouped_and_related_by_data(tables: Any, make_run: MakeRun) -> None:
    seeds = [make_run({"train.seed": s, "method.loss": "cross_entropy"}, last=63.0 + s) for s in range(2)]
    odd = make_run({"model.embedding_dim": 7})
    elsewhere = make_run({"model.backbone": "resnet14"})
    matched = make_run()
    comparison = compared(tables(), *seeds, odd, elsewhere, matched)
    actual = [([run.path for run in other.group.runs], other.remark) for other in comparison.others]
    assert sorted(actual) == sorted([(seeds, None), ([odd], None), ([elsewhere], None)])
    (table,) = comparison.tables
    assert {run.path for group in table.related for run in group.runs} == {*seeds, odd}


def test_runs_without_published_tables(make_run: MakeRun) -> None:
    comparison = compared(None, make_run(), make_run({"train.seed": 1}), make_run(state="running"))
    assert (comparison.source, comparison.tables) == (None, ())
    assert [other.group.n for other in comparison.others] == [2]
    assert [run.state for run in comparison.unfinished] == ["running"]


def test_a_run_of_each_shipped_cell_matches_only_that_cell(make_run: MakeRun) -> None:
    """The runs differ from the cell in seed, data path and launch settings."""
    published, cells = load_published(SHIPPED)
    expected: dict[Path, tuple[str, str, Any]] = {}
    for cell in cells:
        size = published.tables[cell.table].num_validated
        assert size is not None
        vectors = [f"{key}=vectors.npy" for key in cell.needs]
        try:
            config = cell.load(
                [*vectors, "train.seed=5", "data.root=/my/data", "launch.nproc=2", "train.log_every_steps=9"]
            )
        except UserError as error:
            assert error.field == "method.name"
            continue
        expected[make_run(config, num_validated=size)] = (cell.table, cell.row, cell.column)
    assert len(expected) >= 50
    comparison = compared(SHIPPED, *expected)
    actual: dict[Path, tuple[str, str, Any]] = {}
    for table in comparison.tables:
        for line in table.lines:
            for entry in line.entries:
                assert entry.length == "full"
                (run,) = entry.group.runs
                assert run.path not in actual, "a run of two figures"
                actual[run.path] = (line.cell.table, line.cell.row, line.cell.column)
    assert actual == expected
    assert comparison.others == ()


def test_the_strong_psc_is_not_the_published_one(make_run: MakeRun) -> None:
    from dl2pa.config import load_config

    strong = load_config(SHIPPED.parent / "balanced/cifar100_psc.yaml", ["model.embedding_dim=10"])
    comparison = compared(SHIPPED, make_run(strong, num_validated=10000))
    assert len(comparison.others) == 1
    table = next(table for table in comparison.tables if table.name == "cifar100")
    assert table.entries == []
    assert [group.method for group in table.related] == ["psc"]
