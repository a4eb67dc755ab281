"""Benchmarks of concurrent runs and of checkpoints."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.__main__ import main

SHORT = ["--models", "resnet8", "--batch-size", "4", "--steps", "1", "--rounds", "1", "--json"]


def _last(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capfd.readouterr().out.splitlines()[-1])


@pytest.mark.thorough
def test_concurrent_runs_are_compared_with_a_single_run(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["concurrent", *SHORT, "--processes", "2"]) == 0
    result = _last(capfd)
    (row,) = result["rows"]
    assert row["runs"] == 2
    assert row["images_per_second"] == pytest.approx(8e3 / row["step_ms"])
    ratio = row["images_per_second"] / row["alone_images_per_second"]
    assert result["ratios"] == {"2 runs/1": pytest.approx(ratio)}


def test_steps_with_a_save_are_compared_with_steps_without(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", *SHORT]) == 0
    result = _last(capfd)
    (row,) = result["rows"]
    assert row["mib"] > 0.3 and 0 < row["held_ms"] <= 1e3 * row["written_s"]
    assert row["epoch_s"] == pytest.approx(12_500 * row["step_ms"] / 1e3)
    assert row["share"] == pytest.approx(row["cost_s"] / row["epoch_s"])
    assert result["ratios"].keys() == {"with a save/without: resnet8"}


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["concurrent", "--models", "resnet50"], "--models"),
        (["concurrent", "--processes", "0"], "--processes"),
        (["concurrent", "--compile", "off,on"], "--compile"),
        (["checkpoint", "--precision", "fp32,bf16"], "--precision"),
    ],
    ids=" ".join,
)
def test_invalid_options_are_refused(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json"]) == 2
    assert capsys.readouterr().err.startswith(f"benchmarks: {field}=")
