from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.commands.cells import expand_cells, select
from dl2pa.config.published import Cell, load_published
from dl2pa.errors import UserError

_, CELLS = load_published(Path(__file__).resolve().parents[4] / "configs/published.yaml")


def names(cells: list[Cell]) -> list[tuple[str, str, object]]:
    return [(cell.table, cell.row, cell.column) for cell in cells]


def test_a_table_a_row_a_cell() -> None:
    assert len(select(CELLS, ["cifar100"])) == 16
    assert names(select(CELLS, ["cifar100:hpn"])) == [("cifar100", "hpn", d) for d in (10, 25, 50, 100)]
    assert names(select(CELLS, ["cifar10_lt:dl2pa:0.010"])) == [("cifar10_lt", "dl2pa", 0.01)]
    assert names(select(CELLS, ["imagenet1k:kasarla"])) == [
        ("imagenet1k", "kasarla", "resnet50"),
        ("imagenet1k", "kasarla", "resnet152"),
    ]


def test_cells_are_selected_once_in_the_order_of_the_tables() -> None:
    found = select(CELLS, ["cifar100:dl2pa:10", "cifar100:hpn:25", "cifar100:dl2pa"])
    assert names(found) == [("cifar100", "hpn", 25), *(("cifar100", "dl2pa", d) for d in (10, 25, 50, 100))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cifar", "has the table 'cifar'.*Valid: cifar100, imagenet200"),
        ("cifar100:dnc", "has the row 'dnc'.*Valid: psc, word2vec, hpn, dl2pa"),
        ("cifar100:hpn:11", "has the column '11'.*Valid: 10, 25, 50, 100"),
        ("imagenet1k:psc:resnet101", "has the column 'resnet101'.*Valid: resnet50, swin_t"),
        ("cifar100:hpn:x", "has the column 'x'"),
        ("cifar100:hpn:10:1", "too many parts"),
        ("", "has the table ''"),
    ],
)
def test_an_unknown_cell_is_refused_with_the_valid_names(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        select(CELLS, [text])
    assert (caught.value.field, caught.value.value) == ("--published", text)


def test_each_cell_runs_its_configuration_with_overrides_and_sweeps() -> None:
    cells = select(CELLS, ["cifar100:hpn:10", "cifar100:psc:10"])
    found = expand_cells(cells, ["data.root=/data"], ["train.seed=0..1"])
    psc, hpn = cells
    assert [(e.config, e.overrides) for e in found] == [
        (cell.config, (*cell.overrides, "data.root=/data", f"train.seed={seed}"))
        for cell in (psc, hpn)
        for seed in (0, 1)
    ]
    assert found[3].swept == ("cifar100:hpn:10", "train.seed=1")


def test_a_required_key_is_set_for_its_cells_only() -> None:
    cells = select(CELLS, ["cifar100:word2vec:10", "cifar100:hpn:10"])
    found = expand_cells(cells, ["method.class_vectors=v.npy", "data.root=/data"], [])
    assert {e.swept[0]: "method.class_vectors=v.npy" in e.overrides for e in found} == {
        "cifar100:word2vec:10": True,
        "cifar100:hpn:10": False,
    }
    swept = expand_cells(cells, [], ["method.class_vectors=v.npy,w.npy"])
    assert [e.swept for e in swept] == [
        ("cifar100:word2vec:10", "method.class_vectors=v.npy"),
        ("cifar100:word2vec:10", "method.class_vectors=w.npy"),
        ("cifar100:hpn:10",),
    ]
    with pytest.raises(UserError, match="is required by the cell cifar100:word2vec:10") as caught:
        expand_cells(cells, ["data.root=/data"], [])
    assert caught.value.field == "method.class_vectors"


def test_too_many_cells_times_seeds_are_refused() -> None:
    with pytest.raises(UserError, match="more than 1000 runs"):
        expand_cells(select(CELLS, ["cifar100:hpn", "cifar100:dl2pa"]), [], ["train.seed=0..199"])
