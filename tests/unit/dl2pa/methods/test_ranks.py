"""Methods in real process groups: gloo with 1 to 3 processes, started once per module."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.process_groups import Reports, reports_of

WORLDS = (1, 2, 3)
NAMES = ("dnc", "goto", "ebv", "sampled", "kasarla")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Reports of all ranks by world size."""
    return reports_of(Path(__file__).with_name("ranks.py"), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size", WORLDS[1:])
def test_sub_centroids_are_bit_identical_for_all_world_sizes(reports: Reports, size: int) -> None:
    (single,) = reports[1]
    assert len(set(single["clustering"])) == 4, "each batch changed some"
    for report in reports[size]:
        assert report["clustering"] == single["clustering"]


@pytest.mark.parametrize("size", WORLDS[1:])
def test_sub_centroids_that_differ_are_not_saved(reports: Reports, size: int) -> None:
    for report in reports[size]:
        assert f"sub-centroids of rank(s) [{size - 1}]" in report["drifting"]


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_rank_has_the_same_method_after_training(reports: Reports, name: str, size: int) -> None:
    states = [report["training"][name]["state"] for report in reports[size]]
    assert all(state == states[0] for state in states)
    learned = set(reports[size][0]["training"][name]["learned"])
    expected = {
        "dnc": {"method.centroids", "method.class_norm.weight", "method.feature_norm.bias"},
        "goto": {"method.frames", "method.scale.shift"},
        "ebv": {"method.warmup", "method.scale.shift", "method.assignment"},
        "sampled": {"method.warmup", "method.learned", "method.prototypes"},
        "kasarla": {"method.assignment"},
    }[name]
    assert expected <= learned


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_bit_identical(reports: Reports, name: str, size: int) -> None:
    for report in reports[size]:
        assert report["training"][name]["resumed_differs"] == []
