"""`dl2pa bench classes`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dl2pa.cli import main


def test_json_result(capfd: pytest.CaptureFixture[str]) -> None:
    options = "--classes 20,400 --dim 8 --models resnet8 --batch-size 4 --steps 2 --rounds 2 --json"
    assert main(["bench", "classes", *options.split()]) == 0
    result: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [(row["classes"], row["loss"]) for row in result["rows"]] == [
        (count, loss) for loss in ("squared_cosine", "cross_entropy") for count in (20, 400)
    ]
    for row in result["rows"]:
        assert row["step_ms"] > 0
        assert row["method_gib"] * 2**30 == row["classes"] * (2 * 8 * 4 + 8 + 8 * 8 + 8 + 8 * 8)
    assert result["ratios"]["squared_cosine: 20/20 classes"] == 1.0
    assert result["ratios"]["cross_entropy: 400/20 classes"] > 0
