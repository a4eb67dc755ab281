"""Tests over gloo process groups of 1 to 4 processes, which are started once for all tests of this module."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.process_groups import Reports, reports_of


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Reports of the ranks by world size."""
    return reports_of(Path(__file__).with_name("ranks.py"), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_has_the_assignment_of_one_process(reports: Reports, size: int) -> None:
    (expected,) = reports[1]
    assert expected["updates"][0][1] > 0, "without moves the comparison proves nothing"
    for report in reports[size]:
        assert report["updates"] == expected["updates"]
        assert report["rows"] == expected["rows"]
        assert report["refit"] == expected["refit"]
        assert report["pooled"] == expected["pooled"]
    assert expected["refit"]["stayed"] < 0.999, "without moves the comparison proves nothing"
    assert expected["pooled"]["moved"] > 0 and expected["pooled"]["stayed"] < 0.999


@pytest.mark.parametrize("size", [2, 3, 4])
def test_many_classes_have_the_same_assignment_on_every_rank(reports: Reports, size: int) -> None:
    (expected,) = reports[1]
    first, second = expected["many_classes"]
    assert first != second and sorted(second) == list(range(len(second)))
    for report in reports[size]:
        assert report["many_classes"] == expected["many_classes"]


@pytest.mark.parametrize("size", [2, 3])
def test_diagnostics_on_rank_zero_equal_those_of_one_process(reports: Reports, size: int) -> None:
    (expected,) = reports[1]
    assert all(diagnostics["margin"] > 0 for diagnostics in expected["diagnostics"])
    first, *others = (report["diagnostics"] for report in reports[size])
    assert first == expected["diagnostics"]
    assert all(diagnostics == [None, None] for diagnostics in others)


@pytest.mark.parametrize("size", [2, 3])
def test_error_names_the_ranks_that_differ(reports: Reports, size: int) -> None:
    for report in reports[size]:
        assert f"[{size - 1}]" in report["differing"]
        assert "assignment" in report["differing"]
    assert reports[1][0]["differing"] is None


@pytest.mark.parametrize("size", [2, 3])
def test_ddp_does_not_synchronize_the_statistic(reports: Reports, size: int) -> None:
    """DDP would otherwise broadcast the buffers of rank 0 at construction and at each step."""
    for rank, report in enumerate(reports[size]):
        training = report["training"]
        assert training["before"][rank] == (rank + 1) << 32
        assert training["after_wrap"] == training["before"]
        assert training["kept"]
        assert training["weights_agree"]


@pytest.mark.parametrize("size", [2, 3])
def test_saved_statistic_is_the_total_and_moves_to_rank_zero(reports: Reports, size: int) -> None:
    """The checkpoint counts 24 training samples and rank + 1 further samples of each rank once."""
    first, *others = (r["training"] for r in reports[size])
    total = 24 + sum(rank + 1 for rank in range(size))
    assert sum(first["saved"]) == total << 32
    assert first["released"] == first["saved"]
    for other in others:
        assert other["saved"] is None
        assert sum(other["released"]) == 0
    assert all(r["training"]["buffers_agree"] for r in reports[size])


@pytest.mark.parametrize("size", [2, 3])
def test_dot_regression_uses_global_class_counts(reports: Reports, size: int) -> None:
    """The mean of the losses of the ranks, and of their gradients, is that of the global batch."""
    expected = reports[1][0]["dot_regression"]
    assert any(abs(v) > 1e-3 for v in expected[1:])
    for report in reports[size]:
        assert report["dot_regression"] == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_mean_loss_is_over_all_ranks(reports: Reports, size: int) -> None:
    expected = sum(1.0 + rank + step for rank in range(size) for step in range(3)) / (3 * size)
    for report in reports[size]:
        assert report["meter"]["mean"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_nan_loss_error_names_step_rank_and_checkpoint(reports: Reports, size: int) -> None:
    for report in reports[size]:
        assert f"at step {17 + size - 1} on rank {size - 1}" in report["meter"]["failure"]
        assert "step-9" in report["meter"]["failure"]


@pytest.mark.parametrize("size", [2, 3])
def test_validation_counts_every_image_once(reports: Reports, size: int) -> None:
    expected = reports[1][0]["evaluations"]
    assert [e["num_validated"] for e in expected] == [1, 7, 103]
    for report in reports[size]:
        # Counts are exact; on some processors the last bit of a confidence depends on the rows of the product.
        assert [e["ece"] for e in report["evaluations"]] == pytest.approx(
            [e["ece"] for e in expected], abs=1e-3
        )
        counts = [{k: v for k, v in e.items() if k != "ece"} for e in report["evaluations"]]
        assert counts == [{k: v for k, v in e.items() if k != "ece"} for e in expected]
