"""Selection of published results and the runs that reproduce them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.commands.published_runs import expand_results, select_results
from dl2pa.config.published import Cell, load_published
from dl2pa.errors import UserError

_, RESULTS = load_published(Path(__file__).resolve().parents[4] / "configs/published.yaml")


def names(results: list[Cell]) -> list[tuple[str, str, object]]:
    return [(result.table, result.row, result.column) for result in results]


def test_select_by_table_row_and_column() -> None:
    assert len(select_results(RESULTS, ["cifar100"])) == 16
    assert names(select_results(RESULTS, ["cifar100:hpn"])) == [
        ("cifar100", "hpn", d) for d in (10, 25, 50, 100)
    ]
    assert names(select_results(RESULTS, ["cifar10_lt:dl2pa:0.010"])) == [("cifar10_lt", "dl2pa", 0.01)]
    assert names(select_results(RESULTS, ["imagenet1k:kasarla"])) == [
        ("imagenet1k", "kasarla", "resnet50"),
        ("imagenet1k", "kasarla", "resnet152"),
    ]


def test_several_names_select_each_result_once_in_table_order() -> None:
    results = select_results(RESULTS, ["cifar100:dl2pa:10", "cifar100:hpn:25", "cifar100:dl2pa"])
    assert names(results) == [("cifar100", "hpn", 25), *(("cifar100", "dl2pa", d) for d in (10, 25, 50, 100))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cifar", "there is no table 'cifar'.*Known: cifar100, imagenet200"),
        ("cifar100:dnc", "there is no row 'dnc'.*Known: psc, word2vec, hpn, dl2pa"),
        ("cifar100:hpn:11", "there is no column '11'.*Known: 10, 25, 50, 100"),
        ("imagenet1k:psc:resnet101", "there is no column 'resnet101' with a result.*Known: resnet50, swin_t"),
        ("cifar100:hpn:x", "there is no column 'x'"),
        ("cifar100:hpn:10:1", "too many parts"),
        ("", "there is no table ''"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        select_results(RESULTS, [text])
    assert (caught.value.field, caught.value.value) == ("--published", text)


def test_each_result_runs_its_configuration_with_overrides_and_grid() -> None:
    results = select_results(RESULTS, ["cifar100:hpn:10", "cifar100:psc:10"])
    runs = expand_results(results, ["data.root=/data"], ["train.seed=0..1"])
    psc, hpn = results
    assert [(run.config_file, run.overrides) for run in runs] == [
        (result.config, (*result.overrides, "data.root=/data", f"train.seed={seed}"))
        for result in (psc, hpn)
        for seed in (0, 1)
    ]
    assert runs[3].varied == ("cifar100:hpn:10", "train.seed=1")


def test_a_required_key_is_passed_only_to_results_that_need_it() -> None:
    results = select_results(RESULTS, ["cifar100:word2vec:10", "cifar100:hpn:10"])
    runs = expand_results(results, ["method.class_vectors=v.npy", "data.root=/data"], [])
    assert {run.varied[0]: "method.class_vectors=v.npy" in run.overrides for run in runs} == {
        "cifar100:word2vec:10": True,
        "cifar100:hpn:10": False,
    }
    runs = expand_results(results, [], ["method.class_vectors=v.npy,w.npy"])
    assert [run.varied for run in runs] == [
        ("cifar100:word2vec:10", "method.class_vectors=v.npy"),
        ("cifar100:word2vec:10", "method.class_vectors=w.npy"),
        ("cifar100:hpn:10",),
    ]
    with pytest.raises(UserError, match="is required for cifar100:word2vec:10") as caught:
        expand_results(results, ["data.root=/data"], [])
    assert caught.value.field == "method.class_vectors"


def test_too_many_runs_are_refused() -> None:
    with pytest.raises(UserError, match="more than 1000 runs"):
        expand_results(select_results(RESULTS, ["cifar100:hpn", "cifar100:dl2pa"]), [], ["train.seed=0..199"])
