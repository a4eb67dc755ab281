"""Planned runs: grid syntax, combinations, run directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.config import fingerprint, load_config
from dl2pa.config.places import finder
from dl2pa.errors import UserError
from dl2pa.runplan import RunSpec, expand, plan_runs

CONFIG = Path("a config.yaml")


def varied(*grid: str) -> list[tuple[str, ...]]:
    return [spec.varied for spec in expand(CONFIG, ["train.epochs=3"], grid)]


def test_without_a_grid_there_is_one_run() -> None:
    assert expand(CONFIG, ["train.epochs=3"], []) == [RunSpec(CONFIG, ("train.epochs=3",))]


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
        ('"a,b",c', ['"a,b"', "c"]),
        ("'it''s, here', [\"x]\", 1],y", ["'it''s, here'", ' ["x]", 1]', "y"]),
        ("it's,that's", ["it's", "that's"]),
        ('"a\\",b",c', ['"a\\",b"', "c"]),
    ],
)
def test_values_of_a_grid_key(values: str, expected: list[str]) -> None:
    assert varied(f"some.key={values}") == [(f"some.key={value}",) for value in expected]


def test_grid_keys_are_combined_and_the_first_varies_slowest() -> None:
    assert varied("method.name=dl2pa,hpn", "train.seed=-1..1") == [
        (f"method.name={name}", f"train.seed={seed}") for name in ("dl2pa", "hpn") for seed in (-1, 0, 1)
    ]


def test_grid_values_follow_the_overrides_they_replace() -> None:
    first = expand(CONFIG, ["train.seed=9", "optim.lr=1"], ["train.seed=0..1"])[0]
    assert first.overrides == ("train.seed=9", "optim.lr=1", "train.seed=0")


def test_the_grid_key_config_selects_configuration_files() -> None:
    specs = expand(CONFIG, ["x=1"], ["config=a.yaml,b/c d.yaml", "train.seed=0..1"])
    assert [(str(spec.config_file), spec.overrides) for spec in specs] == [
        (file, ("x=1", f"train.seed={seed}")) for file in ("a.yaml", "b/c d.yaml") for seed in (0, 1)
    ]
    assert specs[0].varied == ("config=a.yaml", "train.seed=0")


def test_a_reversed_range_is_refused_with_the_correct_one() -> None:
    with pytest.raises(UserError, match="ends before it begins") as caught:
        expand(CONFIG, [], ["train.seed=4..1"])
    assert caught.value.remedy == "Write train.seed=1..4."


@pytest.mark.parametrize("text", ["", "train.seed", "=1,2", "train.seed=", "train.seed=,"])
def test_a_grid_without_key_or_values_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a key with values.*train\.seed=0\.\.4") as caught:
        expand(CONFIG, [], ["train.epochs=1,2", text], "--array")
    assert (caught.value.field, caught.value.value) == ("--array", text)


@pytest.mark.parametrize(
    ("grid", "count"),
    [
        (["train.seed=0..1000"], 1001),
        (["train.seed=1..40", "optim.lr=1..40"], 1600),
        (["train.seed=0..99999999999999999999"], 10**20),
        ([f"key{k}=1..1000" for k in range(9)], 1000**9),
    ],
)
def test_too_many_runs_are_refused_before_they_are_listed(grid: list[str], count: int) -> None:
    with pytest.raises(UserError, match="more than 1000 runs") as caught:
        expand(CONFIG, [], grid)
    assert (caught.value.field, caught.value.value) == ("--grid", count)


def test_a_thousand_runs_are_accepted() -> None:
    assert len(varied("train.seed=1..40", "optim.lr=1..25")) == 1000


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text("data: {dataset: synthetic, num_classes: 5}\n", encoding="utf-8")
    return Path("small.yaml")


def test_the_default_run_directory_is_named_by_config_and_fingerprint(
    config_file: Path, tmp_path: Path
) -> None:
    (plan,) = plan_runs([RunSpec(config_file, ("train.epochs=3",))], None, nproc=2)
    name = f"small-{fingerprint(load_config(config_file, ['train.epochs=3']))}"
    assert (plan.run_dir, plan.label) == (tmp_path / "runs" / name, "small")
    assert (plan.config.launch.nproc, plan.config.train.epochs) == (2, 3)
    (named,) = plan_runs([RunSpec(config_file, ())], Path("here"))
    assert named.run_dir == tmp_path / "here"


def test_a_problem_of_an_option_does_not_name_the_line_that_it_replaces(config_file: Path) -> None:
    with config_file.open("a", encoding="utf-8") as file:
        file.write("launch: {nproc: 2}\n")
    (plan,) = plan_runs([RunSpec(config_file, ())], None)
    assert finder([plan.source])("launch.nproc") == "small.yaml:2"
    for nproc, gpus in ((5, None), (None, 5)):
        (plan,) = plan_runs([RunSpec(config_file, ())], None, nproc=nproc, gpus=gpus)
        assert finder([plan.source])("launch.nproc") is None
    with pytest.raises(UserError) as caught:
        plan_runs([RunSpec(config_file, ())], None, nproc=0)
    assert (caught.value.field, caught.value.place) == ("launch.nproc", None)


def test_identical_runs_are_refused(config_file: Path) -> None:
    with pytest.raises(UserError, match="two runs are identical") as caught:
        plan_runs([RunSpec(config_file, ()), RunSpec(config_file, ())], None, option="--array")
    assert caught.value.field == "--array"
