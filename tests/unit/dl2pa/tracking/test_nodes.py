from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dl2pa.rundir import RunDirectory
from dl2pa.tracking import Tracker
from dl2pa.tracking.nodes import NodeFile, NodeWatch, OtherNodes
from dl2pa.tracking.spool import now_ms, read_events

pytest.importorskip("psutil")


def spooled(run: Path) -> list[tuple[int, int, dict[str, Any]]]:
    events = [e for e, _ in read_events(RunDirectory(run).spool) if e and e["e"] == "metrics"]
    return [(e["t"], e["step"], e["v"]) for e in events]


def tracker_of(run: Path, attempt: int = 1) -> Tracker:
    tracker = Tracker(run, enabled=True, uri=None, experiment="e", run_name="r", attempt=attempt)
    tracker.start({}, {})
    return tracker


def test_system_metrics_have_mlflows_names(tmp_path: Path) -> None:
    points: list[tuple[int, Mapping[str, Any], int]] = []
    watch = NodeWatch(3, lambda *point: points.append(point), now_ms() - 5000, 60.0, [], tmp_path)
    watch.start()
    watch.stop()
    assert points, "a run shorter than the interval has a point"
    step, values, _ = points[0]
    assert step >= 5, "the step is the number of seconds since the start of the run"
    assert all(name.startswith("system/node-3/") for name in values)
    assert 0 <= values["system/node-3/cpu_utilization_percentage"] <= 100
    assert 0 < values["system/node-3/system_memory_usage_percentage"] < 100


def test_rank_zero_copies_points_of_other_nodes_once(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path)
    node = NodeFile(tmp_path, 1, 1)
    others = OtherNodes(tmp_path)
    node.write(0, {"system/node-1/cpu": 7.0}, 1000)
    others.collect(tracker.metrics)
    with RunDirectory(tmp_path).node_metrics(1).open("a") as file:
        file.write('{"e":"metrics","t":1')  # truncated by a kill
    node.write(9, {"system/node-1/cpu": 8.0}, 2000)
    others.collect(tracker.metrics)
    OtherNodes(tmp_path).collect(tracker.metrics)  # the next attempt reads all of it again
    expected = [(1000, 0, {"system/node-1/cpu": 7.0}), (2000, 9, {"system/node-1/cpu": 8.0})]
    assert spooled(tmp_path) == expected
    again = tracker_of(tmp_path, 2)
    OtherNodes(tmp_path).collect(again.metrics)
    assert spooled(tmp_path) == expected


def test_failing_to_write_points_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "events").write_text("a file where the folder should be")
    node = NodeFile(tmp_path, 1, 1)
    node.write(0, {"a": 1.0}, 1)
    node.write(1, {"a": 1.0}, 2)
    assert caplog.text.count("cannot write points") == 1


def test_a_failed_reading_ends_only_the_measuring_thread(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*point: Any) -> None:
        raise RuntimeError("full")

    watch = NodeWatch(0, broken, now_ms(), 0.01, [], tmp_path)
    watch.start()
    watch.join(timeout=60)
    assert not watch.is_alive()
    assert "system metrics stopped" in caplog.text


def test_the_last_mean_use_of_the_gpus_is_kept_for_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(gpu: int) -> dict[str, float]:
        return {"utilization_percentage": 60.0 + 20.0 * gpu, "memory_usage_percentage": 5.0}

    watch = NodeWatch(0, lambda *_: None, now_ms(), 60.0, [], tmp_path)
    assert watch.gpu_use is None
    machine = watch._machine  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(machine, "_gpus", [0, 1])
    monkeypatch.setattr(machine, "_read_gpu", read)
    watch.start()
    watch.stop()
    assert watch.gpu_use == 70.0
