"""Benchmark of tracking with a real server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.__main__ import main

pytest.importorskip("mlflow")


@pytest.mark.thorough
def test_json_result(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.tracking._BLOCK_SECONDS", 0.2)
    assert main(["tracking", "--points", "200", "--runs", "2", "--rounds", "1", "--json"]) == 0
    result: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    *steps, volume = result["rows"]
    assert [row["state"] for row in steps] == ["off", "spool", "server", "stopped"]
    for row in steps:
        assert row["steps"] > 0 and 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        if row["state"] != "off":
            ratio = result["ratios"][f"{row['state']}/off p50"]
            assert ratio == pytest.approx(row["p50_ms"] / steps[0]["p50_ms"])
    assert (volume["runs"], volume["points"], volume["runs_left"]) == (2, 200, 0)
