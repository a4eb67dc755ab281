"""`dl2pa bench scaling` with real gloo processes, and its model of many GPUs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dl2pa.bench.scaling import overlap_fraction
from dl2pa.cli import main

SHORT = "bench scaling --models resnet8 --batch-size 4 --steps 1 --rounds 1 --json"


def test_json_result(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT.split(), "--processes", "1,2", "--step-ms", "0.001"]) == 0
    result: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    one, two = result["rows"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["gradient_mib"] == two["gradient_mib"] > 0.3
    assert one["overlap"] is None and 0 <= two["overlap"] <= 1
    for row in (one, two):
        assert row["images_per_second"] == pytest.approx(4e3 * row["processes"] / row["step_ms"])
    ratio = result["ratios"]["2 processes/1"]
    assert ratio == pytest.approx(two["images_per_second"] / one["images_per_second"])
    many = {row["devices"]: row for row in result["model"]}
    assert many[1]["at_least"] == many[1]["hidden"] == 1
    sent_bytes = 2 * 63 / 64 * one["gradient_mib"] * 2**20
    assert many[64]["all_reduce_ms"] == pytest.approx(sent_bytes / 50e9 * 1e3)
    assert many[64]["at_least"] == pytest.approx(0.001 / (0.001 + many[64]["all_reduce_ms"]))
    assert many[8]["at_least"] > many[16]["at_least"], "the link between nodes is slower"


def test_overlap_fraction_of_intervals() -> None:
    assert overlap_fraction([(0, 4), (2, 6)], [(5, 9)]) == pytest.approx(1 / 6)
    assert overlap_fraction([(0, 2)], [(0, 1), (0.5, 1.5)]) == pytest.approx(0.75)
    assert overlap_fraction([], [(0, 1)]) is None


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--processes", "0,1"], "--processes"),
        (["--models", "resnet8,resnet20"], "--models"),
        (["--step-ms", "0"], "--step-ms"),
    ],
    ids=" ".join,
)
def test_invalid_options_are_refused(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT.split(), *arguments]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["field"] == field
