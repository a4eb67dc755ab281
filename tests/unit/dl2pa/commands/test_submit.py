"""The runs of an array: what `--array` is understood to mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.commands.expand import expand
from dl2pa.errors import UserError

CONFIG = Path("a config.yaml")


def runs(overrides: list[str], *sweeps: str) -> list[tuple[Path, list[str]]]:
    return [(e.config, list(e.overrides)) for e in expand(CONFIG, overrides, sweeps)]


def overrides_of(*sweeps: str) -> list[list[str]]:
    return [overrides for _, overrides in runs([], *sweeps)]


def test_without_a_sweep_there_is_one_run() -> None:
    assert runs(["optim.lr=1"]) == [(CONFIG, ["optim.lr=1"])]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("0..3", ["0", "1", "2", "3"]),
        ("5..5", ["5"]),
        ("-1..1", ["-1", "0", "1"]),
        ("7", ["7"]),
        ("0.1,0.2", ["0.1", "0.2"]),
        ("sgd, adamw", ["sgd", " adamw"]),
        ("1,2,", ["1", "2"]),
        ("0..2,5", ["0..2", "5"]),
        ("[1,2],[3,4]", ["[1,2]", "[3,4]"]),
        ("{a: [1,2], b: 3},{}", ["{a: [1,2], b: 3}", "{}"]),
        ("a=b,c=d", ["a=b", "c=d"]),
    ],
)
def test_the_values_of_a_key(values: str, expected: list[str]) -> None:
    assert overrides_of(f"some.key={values}") == [[f"some.key={value}"] for value in expected]


def test_several_keys_give_all_combinations_behind_the_common_overrides() -> None:
    found = runs(["train.epochs=5"], "optim.lr=0.1,0.2", "train.seed=0..1")
    assert found == [
        (CONFIG, ["train.epochs=5", f"optim.lr={lr}", f"train.seed={seed}"])
        for lr in ("0.1", "0.2")
        for seed in (0, 1)
    ]


def test_configurations_can_be_swept_with_other_keys() -> None:
    found = runs(["x=1"], "config=a.yaml,b/c d.yaml", "train.seed=0..1")
    assert found == [
        (Path(file), ["x=1", f"train.seed={seed}"]) for file in ("a.yaml", "b/c d.yaml") for seed in (0, 1)
    ]


@pytest.mark.parametrize("sweep", ["", "train.seed", "=1,2", "train.seed=", "train.seed=,"])
def test_a_sweep_without_key_or_values_is_refused(sweep: str) -> None:
    with pytest.raises(UserError, match=r"names no key with values.*train\.seed=0\.\.4") as caught:
        overrides_of("train.epochs=1,2", sweep)
    assert (caught.value.field, caught.value.value) == ("--array", sweep)


@pytest.mark.parametrize(
    ("sweeps", "count"),
    [
        (["train.seed=0..1000"], 1001),
        (["train.seed=1..40", "optim.lr=1..40"], 1600),
        (["train.seed=0..99999999999999999999"], 10**20),
        ([f"key{k}=1..1000" for k in range(9)], 1000**9),
    ],
)
def test_too_many_runs_are_refused_at_once(sweeps: list[str], count: int) -> None:
    with pytest.raises(UserError, match=f"--array = {count}: more than 1000 runs"):
        overrides_of(*sweeps)


def test_a_thousand_runs_are_not_too_many() -> None:
    assert len(overrides_of("train.seed=1..40", "optim.lr=1..25")) == 1000
