from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa.config import Config
from dl2pa.config.checks import check_loader, check_method
from dl2pa.config.published import Cell, load_published
from dl2pa.errors import UserError

ROOT = Path(__file__).resolve().parents[4]
PUBLISHED, CELLS = load_published(ROOT / "configs/published.yaml")
RESULTS = ROOT.parent / "shared/paper/results.yaml"
METHODS = {"psc", "word2vec", "hpn", "ebv", "etf", "kasarla", "dnc", "goto", "dl2pa"}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """The published figures as they were handed to us."""
    if not RESULTS.exists():
        pytest.skip(f"needs the published figures: there is no {RESULTS}")
    return yaml.safe_load(RESULTS.read_text(encoding="utf-8"))


def name_of(cell: Cell) -> str:
    return f"{cell.table}-{cell.row}-{cell.column}"


def test_every_cell_has_a_valid_configuration(
    load_shipped: Callable[..., tuple[Config, bool]],
) -> None:
    given = {"method.class_vectors": "vectors.npy"}
    for cell in CELLS:
        config, method_exists = load_shipped(
            cell.config, [*cell.overrides, *(f"{key}={given[key]}" for key in cell.needs), "data.root=/data"]
        )
        check_loader(config)
        assert config.data.num_classes is not None
        if method_exists:
            assert config.method.name == cell.row
            check_method(config, config.data.num_classes)
        columns = {
            "d": config.model.embedding_dim,
            "backbone": config.model.backbone,
            "imbalance": config.data.imbalance,
        }
        assert columns[PUBLISHED.tables[cell.table].column] == cell.column, name_of(cell)


def test_cells_use_the_data_network_and_length_of_their_table(
    load_shipped: Callable[..., tuple[Config, bool]],
) -> None:
    expected: dict[str, tuple[str, set[int], set[str]]] = {
        "cifar100": ("cifar100", {250}, {"resnet32"}),
        "imagenet200": ("tiny_imagenet", {250}, {"resnet32"}),
        "cifar10_lt": ("cifar10", {200}, {"resnet32"}),
        "cifar100_lt": ("cifar100", {200}, {"resnet32"}),
        "stl10_lt": ("stl10", {200}, {"resnet32"}),
        "svhn_lt": ("svhn_lt_legacy", {200}, {"resnet32"}),
    }
    for cell in CELLS:
        config, _ = load_shipped(cell.config, cell.overrides)
        imagenet = ("imagefolder", {100, 105}, {str(cell.column)})
        dataset, epochs, backbones = expected.get(cell.table, imagenet)
        assert config.data.dataset == dataset, name_of(cell)
        assert config.train.epochs in epochs, name_of(cell)
        assert config.model.backbone in backbones, name_of(cell)


def test_sums_over_the_batch_are_converted_to_means() -> None:
    for cell in CELLS:
        if cell.table in ("cifar100", "imagenet200") and cell.row in ("hpn", "dl2pa"):
            config = cell.load()
            assert config.loss == "squared_cosine"
            assert config.optim.lr == pytest.approx(0.01 * config.train.batch_size)
            assert config.optim.weight_decay == pytest.approx(1e-4 / config.train.batch_size)


def test_every_table_has_the_size_of_its_validation_set() -> None:
    official = {"cifar10": 10000, "cifar100": 10000, "stl10": 8000, "svhn_lt_legacy": 26032}
    official |= {"tiny_imagenet": 10000, "imagefolder": 50000}
    for cell in CELLS:
        if cell.row == "dl2pa":
            assert PUBLISHED.tables[cell.table].num_validated == official[cell.load().data.dataset]


def test_rows_are_methods() -> None:
    assert {cell.row for cell in CELLS} <= METHODS


def test_suspect_cells_are_marked() -> None:
    suspect = {(cell.table, cell.row, cell.column) for cell in CELLS if cell.suspect}
    longtail = {"cifar10_lt", "cifar100_lt", "stl10_lt"}
    assert suspect == {
        (cell.table, cell.row, cell.column)
        for cell in CELLS
        if cell.table == "svhn_lt"
        or (cell.table == "imagenet200" and cell.column != 200)
        or (cell.table in longtail and cell.row == "psc")
    }
    both = next(cell for cell in CELLS if (cell.table, cell.row) == ("svhn_lt", "psc"))
    assert both.suspect is not None
    assert "freezes" in both.suspect
    assert "labels" in both.suspect


def test_every_published_number_is_included(results: dict[str, Any]) -> None:
    expected: dict[tuple[str, str, Any], float] = {}
    tables = {**results["balanced"], **{f"{k}_lt": v for k, v in results["longtail"].items()}}
    for name, table in tables.items():
        columns = table["imbalance"] if name.endswith("_lt") else table["d"]
        for row in METHODS & table.keys():
            expected |= {(name, row, c): v for c, v in zip(columns, table[row], strict=True)}
    for row in results["imagenet1k_d512"]:
        expected["imagenet1k", row["method"], row["backbone"]] = row["top1"]
    assert {(cell.table, cell.row, cell.column): cell.top1 for cell in CELLS} == expected
    assert len(CELLS) == len(expected) == 79
    assert results["source"] in PUBLISHED.source


def test_dimensions_optimizers_venues_and_doubts_are_correct(
    results: dict[str, Any], load_shipped: Callable[..., tuple[Config, bool]]
) -> None:
    for cell in CELLS:
        config, _ = load_shipped(cell.config, cell.overrides)
        if cell.table.endswith("_lt"):
            assert config.model.embedding_dim == results["longtail"][cell.table.removesuffix("_lt")]["d"]
        if cell.table == "imagenet1k":
            row = next(
                r
                for r in results["imagenet1k_d512"]
                if (r["method"], r["backbone"]) == (cell.row, cell.column)
            )
            venue = PUBLISHED.tables[cell.table].rows[cell.row].venue
            assert (config.optim.name, venue) == (row["optimizer"], row["venue"])
            assert config.model.embedding_dim == (999 if cell.row == "kasarla" else 512)
    doubt = results["balanced"]["imagenet200"]["suspect"]
    for cell in CELLS:
        if cell.table == "imagenet200":
            assert cell.suspect == (doubt["why"] if cell.column in doubt["d"] else None)


GOOD: dict[str, Any] = {
    "source": "a paper",
    "tables": {
        "one": {
            "title": "One",
            "column": "d",
            "columns": [10, 25],
            "rows": {
                "hpn": {
                    "top1": [1.5, None],
                    "config": "x_{column}.yaml",
                    "overrides": ["model.embedding_dim={column}"],
                }
            },
        }
    },
}


def written(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    tree = yaml.safe_load(yaml.safe_dump(GOOD))
    change(tree["tables"]["one"])
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_the_column_is_substituted_and_empty_cells_are_skipped(tmp_path: Path) -> None:
    path = written(tmp_path, lambda table: None)
    (tmp_path / "x_10.yaml").write_text("train: {epochs: 3}", encoding="utf-8")
    _, (cell,) = load_published(path)
    assert (cell.table, cell.row, cell.column, cell.top1) == ("one", "hpn", 10, 1.5)
    config = cell.load(["train.seed=4"])
    assert (config.train.epochs, config.model.embedding_dim, config.train.seed) == (3, 10, 4)
    assert (cell.suspect, cell.needs) == (None, ())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table["rows"]["hpn"].update(top1=[1.0]), "row hpn has 1 values for 2 columns"),
        (lambda table: table["rows"]["hpn"].update(top_1=[1.0, 2.0]), "top_1"),
        (lambda table: table.update(suspect={"columns": [11], "why": "?"}), "unknown columns"),
        (lambda table: table.pop("title"), "title"),
    ],
)
def test_an_invalid_file_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    path = written(tmp_path, change)
    with pytest.raises(UserError, match=words) as caught:
        load_published(path)
    assert (caught.value.field, caught.value.value) == ("published", str(path))


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(UserError, match="no such file"):
        load_published(ROOT / "configs/gone.yaml")
