from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.commands.expand import Element, check_distinct, expand
from dl2pa.errors import UserError

CONFIG = Path("configs/quickstart.yaml")


def swept(*sweeps: str) -> list[tuple[str, ...]]:
    return [element.swept for element in expand(CONFIG, ["train.epochs=3"], sweeps)]


def test_without_a_sweep_there_is_one_run() -> None:
    assert expand(CONFIG, ["train.epochs=3"], []) == [Element(CONFIG, ("train.epochs=3",))]


def test_all_combinations_the_first_sweep_slowest() -> None:
    assert swept("method.name=dl2pa,hpn", "train.seed=-1..1") == [
        ("method.name=dl2pa", "train.seed=-1"),
        ("method.name=dl2pa", "train.seed=0"),
        ("method.name=dl2pa", "train.seed=1"),
        ("method.name=hpn", "train.seed=-1"),
        ("method.name=hpn", "train.seed=0"),
        ("method.name=hpn", "train.seed=1"),
    ]


def test_swept_values_come_after_the_overrides_they_replace() -> None:
    first = expand(CONFIG, ["train.seed=9", "optim.lr=1"], ["train.seed=0..1"])[0]
    assert first.overrides == ("train.seed=9", "optim.lr=1", "train.seed=0")


def test_values_with_brackets_are_not_cut() -> None:
    assert swept("model.widths=[4,4,8],[8,8,16]", "tracking.tags={a: b, c: d}") == [
        ("model.widths=[4,4,8]", "tracking.tags={a: b, c: d}"),
        ("model.widths=[8,8,16]", "tracking.tags={a: b, c: d}"),
    ]


def test_the_key_config_sweeps_files() -> None:
    found = expand(CONFIG, [], ["config=a.yaml,b/c.yaml", "train.seed=0..1"])
    assert [(str(e.config), e.overrides) for e in found] == [
        ("a.yaml", ("train.seed=0",)),
        ("a.yaml", ("train.seed=1",)),
        ("b/c.yaml", ("train.seed=0",)),
        ("b/c.yaml", ("train.seed=1",)),
    ]
    assert found[0].swept == ("config=a.yaml", "train.seed=0")


def test_a_range_written_backwards_is_told_how_it_reads() -> None:
    with pytest.raises(UserError, match="ends before it begins") as caught:
        expand(Path("a.yaml"), [], ["train.seed=4..1"])
    assert caught.value.remedy == "Write train.seed=1..4."


@pytest.mark.parametrize("text", ["train.seed", "=3", "train.seed=", "train.seed=,", ""])
def test_a_sweep_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="names no key with values") as caught:
        expand(CONFIG, [], [text])
    assert (caught.value.field, caught.value.value) == ("--array", text)


@pytest.mark.parametrize("sweeps", [["train.seed=0..1000000000"], ["train.seed=0..99", "a=0..10"]])
def test_too_many_runs_are_refused_before_they_are_made(sweeps: list[str]) -> None:
    with pytest.raises(UserError, match="more than 1000 runs"):
        expand(CONFIG, [], sweeps)


def test_two_runs_in_one_directory_are_refused() -> None:
    check_distinct([Path("a"), Path("b")])
    with pytest.raises(UserError, match="two of the array's runs are the same") as caught:
        check_distinct([Path("a"), Path("b"), Path("a")])
    assert caught.value.value == "a"
