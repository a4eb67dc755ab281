"""`dl2pa bench matching` with real processes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dl2pa.cli import main


def test_json_result(capfd: pytest.CaptureFixture[str]) -> None:
    options = "--classes 20,300 --dim 8 --rounds 2 --nproc 2 --json"
    assert main(["bench", "matching", *options.split()]) == 0
    result: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (result["bench"], result["n"], result["hardware"]["processes"]) == ("matching", 2, 2)
    rows = result["rows"]
    assert [(r["classes"], r["dim"], r["state"]) for r in rows] == [
        (count, 8, state) for count in (20, 300) for state in ("untrained", "trained")
    ]
    for row in rows:
        times = ("reduce_s", "solve_s", "broadcast_s", "again_s", "scipy_s", "lapx_s")
        assert all(row[key] > 0 for key in times)
        assert row["peak_gib"] >= row["torch_gib"] > 0
        assert row["rounds"] >= 1 and row["gap"] < 1e-6
        assert row["dense_gain"] <= 1e-9, "no dense solver finds a better assignment"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--classes", "many"], "--classes"),
        (["--classes", "100,1"], "--classes"),
        (["--nproc", "0"], "--nproc"),
        (["--dim", "-3"], "--dim"),
    ],
)
def test_invalid_options_are_refused(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "matching", *arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["field"] == field
