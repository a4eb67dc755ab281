"""`dl2pa bench matching`: what it prints and what it refuses, on real processes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dl2pa.cli import main


def test_rows_for_machines(capfd: pytest.CaptureFixture[str]) -> None:
    command = [
        "bench",
        "matching",
        "--classes",
        "20,300",
        "--dim",
        "8",
        "--rounds",
        "2",
        "--nproc",
        "2",
        "--json",
    ]
    assert main(command) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (found["bench"], found["n"], found["hardware"]["processes"]) == ("matching", 2, 2)
    rows = found["rows"]
    assert [(r["classes"], r["dim"], r["state"]) for r in rows] == [
        (count, 8, state) for count in (20, 300) for state in ("untrained", "trained")
    ]
    for row in rows:
        assert all(
            row[key] > 0 for key in ("reduce_s", "solve_s", "broadcast_s", "again_s", "scipy_s", "lapx_s")
        )
        assert row["peak_gib"] >= row["torch_gib"] > 0
        assert row["rounds"] >= 1 and row["gap"] < 1e-6
        assert row["dense_gain"] <= 1e-9, "no assignment of a dense solver is better"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--classes", "many"], "--classes"),
        (["--classes", "100,1"], "--classes"),
        (["--nproc", "0"], "--nproc"),
        (["--dim", "-3"], "--dim"),
    ],
)
def test_wrong_options_are_named(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "matching", *arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["field"] == field
