"""What must hold over a real process group: gloo with 1 to 4 processes, started once for all tests here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[4]
Reports = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """World size to what each of its ranks reported."""
    out = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return {
        size: [json.loads((out / f"{size}-{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]
        for size in (1, 2, 3, 4)
    }


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_holds_the_assignment_that_one_process_finds(reports: Reports, size: int) -> None:
    (alone,) = reports[1]
    assert alone["matchings"][0][1] > 0, "labels moved, else the comparison says nothing"
    for report in reports[size]:
        assert report["matchings"] == alone["matchings"]
        assert report["rows"] == alone["rows"]
        assert report["refit"] == alone["refit"]
    assert alone["refit"]["stayed"] < 0.999, "prototypes moved, else the comparison says nothing"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_many_classes_get_the_same_assignment_on_every_rank(reports: Reports, size: int) -> None:
    (alone,) = reports[1]
    first, second = alone["many_classes"]
    assert first != second and sorted(second) == list(range(len(second)))
    for report in reports[size]:
        assert report["many_classes"] == alone["many_classes"]


@pytest.mark.parametrize("size", [2, 3])
def test_rank_zero_alone_looks_into_a_matching_and_sees_what_one_process_sees(
    reports: Reports, size: int
) -> None:
    (alone,) = reports[1]
    assert all(diagnostics["margin"] > 0 for diagnostics in alone["insights"])
    first, *others = (report["insights"] for report in reports[size])
    assert first == alone["insights"]
    assert all(diagnostics == [None, None] for diagnostics in others)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_differ_are_named(reports: Reports, size: int) -> None:
    for report in reports[size]:
        assert f"[{size - 1}]" in report["differing"]
        assert "assignment" in report["differing"]
    assert reports[1][0]["differing"] is None


@pytest.mark.parametrize("size", [2, 3])
def test_ddp_leaves_each_ranks_statistic_alone(reports: Reports, size: int) -> None:
    """Fails where DDP's buffer synchronization, at its construction or at a step, gives rank 0's to all."""
    for rank, report in enumerate(reports[size]):
        training = report["training"]
        assert training["before"][rank] == (rank + 1) << 32
        assert training["after_wrap"] == training["before"]
        assert training["kept"]
        assert training["weights_agree"]


@pytest.mark.parametrize("size", [2, 3])
def test_a_saved_statistic_is_the_total_which_rank_zero_then_holds_alone(reports: Reports, size: int) -> None:
    """24 training samples and rank + 1 more on each rank, counted once in the checkpoint."""
    first, *others = (r["training"] for r in reports[size])
    total = 24 + sum(rank + 1 for rank in range(size))
    assert sum(first["saved"]) == total << 32
    assert first["released"] == first["saved"]
    for other in others:
        assert other["saved"] is None
        assert sum(other["released"]) == 0
    assert all(r["training"]["buffers_agree"] for r in reports[size])


@pytest.mark.parametrize("size", [2, 3])
def test_class_counts_in_dot_regression_are_the_global_batchs(reports: Reports, size: int) -> None:
    """The mean of the ranks' losses, and so of their gradients, is the loss of the whole batch."""
    expected = reports[1][0]["dot_regression"]
    assert any(abs(v) > 1e-3 for v in expected[1:])
    for report in reports[size]:
        assert report["dot_regression"] == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_mean_loss_is_that_of_all_ranks(reports: Reports, size: int) -> None:
    expected = sum(1.0 + rank + step for rank in range(size) for step in range(3)) / (3 * size)
    for report in reports[size]:
        assert report["meter"]["mean"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_loss_that_is_not_a_number_is_told_with_step_rank_and_checkpoint(
    reports: Reports, size: int
) -> None:
    for report in reports[size]:
        assert f"at step {17 + size - 1} on rank {size - 1}" in report["meter"]["failure"]
        assert "step-9" in report["meter"]["failure"]


@pytest.mark.parametrize("size", [2, 3])
def test_validation_counts_every_image_once_whatever_the_world(reports: Reports, size: int) -> None:
    expected = reports[1][0]["evaluations"]
    assert [e["num_validated"] for e in expected] == [1, 7, 103]
    for report in reports[size]:
        # Counts are exact; a confidence's last bit may depend on how many rows a product has, on some processors.
        assert [e["ece"] for e in report["evaluations"]] == pytest.approx(
            [e["ece"] for e in expected], abs=1e-3
        )
        counts = [{k: v for k, v in e.items() if k != "ece"} for e in report["evaluations"]]
        assert counts == [{k: v for k, v in e.items() if k != "ece"} for e in expected]
