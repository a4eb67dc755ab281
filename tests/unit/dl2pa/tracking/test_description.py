"""Description of a run in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from dl2pa.config import Config, load_config
from dl2pa.config.identity import group_name
from dl2pa.redaction import redact
from dl2pa.tracking.description import describe_run

CONFIGS = Path(__file__).resolve().parents[4] / "configs"
RESULT: dict[str, Any] = {
    "top1_last": 70.0,
    "top1_best": 71.25,
    "top5_last": 90.0,
    "epoch_best": 40,
    "ece_last": None,
    "num_validated": 10_000,
    "steps": 1000,
    "world_size": 2,
}


@pytest.fixture(autouse=True)
def no_data_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DL2PA_DATA", raising=False)


def describe(*overrides: str, **result: Any) -> tuple[Config, str]:
    config = load_config(CONFIGS / "balanced/cifar100_d50.yaml", overrides)
    result = {**RESULT, "epochs": config.train.epochs, **result}
    return config, describe_run(config, "cifar100_d50", "dl2pa train `x`", result)


def test_a_full_run_is_compared_with_its_published_accuracy() -> None:
    config, text = describe("train.seed=3")
    assert text.startswith("**Top-1 70.00 %** at the last epoch, 71.25 % at the best.")
    assert "| top-1, best epoch | &emsp;71.25 | &emsp;epoch 40 |" in text
    assert "ECE" not in text, "not measured"
    assert redact(text) == text and "viewStateShareKey=dl2pa-runs" in text
    assert "seed 3" in text
    assert text.count("Published: ") == 1
    assert "This run's best epoch differs by " in text
    assert unquote(text).count(f"tags.group = '{group_name(config)}'") == 1
    assert "`dl2pa train x`" in text


@pytest.mark.parametrize(
    ("overrides", "result", "expected"),
    [
        (("train.max_steps=100",), {"epochs": 1}, "Not compared"),
        (("optim.lr=0.123",), {}, None),
        ((), {"num_validated": 500}, None),
    ],
    ids=["shorter", "another recipe", "another validation set"],
)
def test_runs_that_differ_from_a_publication_are_not_compared(
    overrides: tuple[str, ...], result: dict[str, Any], expected: str | None
) -> None:
    _, text = describe(*overrides, **result)
    assert "best epoch differs" not in text
    assert ("Published: " in text) == (expected is not None)
    assert expected is None or expected in text


def test_the_group_ignores_the_seed_and_no_other_setting() -> None:
    first, second, other = (describe(o)[0] for o in ("train.seed=1", "train.seed=2", "optim.lr=0.3"))
    assert group_name(first) == group_name(second) != group_name(other)


def test_an_unfinished_run_has_no_figures_and_links_to_its_sweep() -> None:
    config = load_config(CONFIGS / "quickstart.yaml", ["tracking.tags.sweep=s-1"])
    text = describe_run(config, "quickstart", "dl2pa train")
    assert "tags.sweep = 's-1'" in unquote(text)
    assert "Top-1" not in text and "result" not in text
