"""A run's description: its figures, the published figure it may be set against, links that find its siblings."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from dl2pa.config import Config, load_config
from dl2pa.config.identity import group_name
from dl2pa.training.describe import describe_run

CONFIGS = Path(__file__).resolve().parents[4] / "configs"
RESULT: dict[str, Any] = {
    "top1_last": 70.0,
    "top1_best": 71.25,
    "top5_last": 90.0,
    "ece_last": None,
    "num_validated": 10_000,
    "steps": 1000,
    "world_size": 2,
}


@pytest.fixture(autouse=True)
def no_data_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DL2PA_DATA", raising=False)


def described(*overrides: str, **result: Any) -> tuple[Config, str]:
    config = load_config(CONFIGS / "balanced/cifar100_d50.yaml", overrides)
    told = {**RESULT, "epochs": config.train.epochs, **result}
    return config, describe_run(config, "cifar100_d50", "dl2pa train `x`", told)


def test_a_full_run_stands_beside_its_published_figure() -> None:
    config, text = described("train.seed=3")
    assert "| 70.00 | 71.25 | 90.00 |" in text
    assert "seed 3" in text
    assert text.count("Published: ") == 1
    assert "This run's best is " in text
    assert unquote(text).count(f"tags.group = '{group_name(config)}'") == 1
    assert "`dl2pa train x`" in text


@pytest.mark.parametrize(
    ("overrides", "result", "said"),
    [
        (("train.max_steps=100",), {"epochs": 1}, "no comparison"),
        (("optim.lr=0.123",), {}, None),
        ((), {"num_validated": 500}, None),
    ],
    ids=["shorter", "another recipe", "another validation set"],
)
def test_what_is_no_equal_of_a_published_figure_claims_none(
    overrides: tuple[str, ...], result: dict[str, Any], said: str | None
) -> None:
    _, text = described(*overrides, **result)
    assert "This run's best is " not in text
    assert ("Published: " in text) == (said is not None)
    assert said is None or said in text


def test_seeds_share_a_recipe_and_other_settings_do_not() -> None:
    first, second, other = (described(o)[0] for o in ("train.seed=1", "train.seed=2", "optim.lr=0.3"))
    assert group_name(first) == group_name(second) != group_name(other)


def test_a_run_of_a_sweep_links_to_it_and_one_under_way_has_no_figures() -> None:
    config = load_config(CONFIGS / "quickstart.yaml", ["tracking.tags.sweep=s-1"])
    text = describe_run(config, "quickstart", "dl2pa train")
    assert "tags.sweep = 's-1'" in unquote(text)
    assert "Per cent" not in text
