"""Benchmark of the data index."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.__main__ import main


@pytest.mark.thorough
def test_json_result(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "--entries", "70000,2000", "--rounds", "1", "--json"]) == 0
    result: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    large, small = result["rows"]
    assert (large["entries"], small["entries"]) == (70000, 2000)
    for row in (large, small):
        assert 0 < row["open_s"] < row["first_batch_s"] and row["own_mib"] >= 0
        assert row["node_mib"] == pytest.approx(8 * row["own_mib"] + row["index_mib"])
    assert large["index_mib"] > 30 * small["index_mib"]


def test_fewer_entries_than_a_batch_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "--entries", "10", "--json"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks: --entries=")
