import itertools
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dl2pa.rundir import RunDirectory
from dl2pa.tracking.delivery import read_batches
from dl2pa.tracking.spool import (
    Identity,
    SeenPoints,
    Spool,
    ensure_identity,
    load_identity,
    now_ms,
    read_events,
)

IDENTITY = Identity("a" * 32, "exp", "name", 1)


def events(run: Path) -> list[dict[str, Any]]:
    return [entry.event for entry in read_events(RunDirectory(run).spool) if entry.event is not None]


def points(run: Path) -> dict[tuple[str, int], Any]:
    values: dict[tuple[str, int], Any] = {}
    for event in events(run):
        for name, value in event.get("v", {}).items():
            assert (name, event["step"]) not in values
            values[name, event["step"]] = value
    return values


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """Limit file sizes to ``size``: a write across it is truncated, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_first_value_of_a_step_wins_within_and_across_attempts(tmp_path: Path) -> None:
    first = Spool(tmp_path, 1)
    first.metrics(1, {"loss": 1.0})
    first.metrics(1, {"loss": 9.0, "lr": 0.1})
    first.metrics(2, {"loss": 2.0})
    second = Spool(tmp_path, 2)
    second.metrics(2, {"loss": 8.0})
    second.metrics(3, {"loss": 3.0})
    assert points(tmp_path) == {("loss", 1): 1.0, ("lr", 1): 0.1, ("loss", 2): 2.0, ("loss", 3): 3.0}


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_truncated_by_a_kill_is_removed(tmp_path: Path, cut: int) -> None:
    spool = Spool(tmp_path, 1)
    for step in range(3):
        spool.metrics(step, {"loss": step / 3})
    content = RunDirectory(tmp_path).spool.read_bytes()
    RunDirectory(tmp_path).spool.write_bytes(content[:-cut])

    resumed = Spool(tmp_path, 2)
    for step in range(1, 4):
        resumed.metrics(step, {"loss": step / 3})

    lines = RunDirectory(tmp_path).spool.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    assert points(tmp_path) == {("loss", step): step / 3 for step in range(4)}


def test_the_reader_skips_an_incomplete_last_line(tmp_path: Path) -> None:
    Spool(tmp_path, 1).metrics(0, {"loss": 1.0})
    whole = RunDirectory(tmp_path).spool.stat().st_size
    with RunDirectory(tmp_path).spool.open("ab") as file:
        file.write(b'{"e":"metrics","t":1')
    assert [entry.end for entry in read_events(RunDirectory(tmp_path).spool)] == [whole]


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1)
    spool.metrics(0, {"loss": 1.0})
    with RunDirectory(tmp_path).spool.open("ab") as file:
        file.write(b'garbage\n{"e":"metrics","t":1,"a":1}\n[]\n')
    spool.metrics(1, {"loss": 2.0})
    Spool(tmp_path, 2).metrics(2, {"loss": 3.0})
    assert points(tmp_path) == {("loss", 0): 1.0, ("loss", 1): 2.0, ("loss", 2): 3.0}
    (batch,) = read_batches(RunDirectory(tmp_path).spool, 0, 1000)
    assert batch.end == RunDirectory(tmp_path).spool.stat().st_size
    assert batch.events == 3


@pytest.mark.parametrize(
    "line",
    [
        b'{"e":"metrics","t":1,"a":1,"step":"x","v":{}}',
        b'{"e":"metrics","t":1,"a":1,"step":1,"v":3}',
        b'{"e":"metrics","t":1,"a":1,"step":1,"v":{"loss":"high"}}',
        b'{"e":["metrics"],"t":1,"a":1}',
        b'{"e":"start","t":1,"a":1,"run":3,"params":[],"tags":null}',
        b'{"e":"model","t":1,"a":1,"path":"model.safetensors"}',
    ],
)
def test_a_line_with_wrong_types_is_damaged(tmp_path: Path, line: bytes) -> None:
    """Otherwise it would end `sync` or block all later events."""
    Spool(tmp_path, 1).metrics(0, {"loss": 1.0})
    with RunDirectory(tmp_path).spool.open("ab") as file:
        file.write(line + b"\n")
    Spool(tmp_path, 2).metrics(1, {"loss": 2.0})
    assert points(tmp_path) == {("loss", 0): 1.0, ("loss", 1): 2.0}


def test_nan_and_infinity_are_strict_json(tmp_path: Path) -> None:
    values = {"nan": float("nan"), "up": float("inf"), "down": float("-inf")}
    Spool(tmp_path, 1).metrics(0, values)
    line = RunDirectory(tmp_path).spool.read_text()
    content = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["v"] == {"nan": "nan", "up": "inf", "down": "-inf"}


def test_only_a_value_that_is_not_a_number_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values: dict[str, Any] = {"good": 1, "bad": "text"}
    spool = Spool(tmp_path, 1)
    spool.metrics(0, values)
    assert points(tmp_path) == {("good", 0): 1.0}
    assert spool.dropped == 1
    assert "bad" in caplog.text


def test_events_wait_in_memory_while_the_disk_is_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path, 1)
    spool.start(IDENTITY, {}, {})
    for step in range(5):
        spool.metrics(step, {"loss": 1.0})
    size = RunDirectory(tmp_path).spool.stat().st_size
    with full_at(size + 20):
        for step in range(5, 10):
            spool.metrics(step, {"loss": 1.0})
            spool.metrics(step, {"loss": 9.0})
        spool.event("tags", tags={"state": "kept in memory"})
        assert RunDirectory(tmp_path).spool.stat().st_size == size
        full_until = now_ms()
    assert len([r for r in caplog.records if "cannot write tracking events" in r.message]) == 1

    time.sleep(0.002)
    spool.metrics(10, {"loss": 1.0})
    assert (spool.dropped, spool.take_waiting()) == (0, [])
    assert events(tmp_path)[-2]["tags"] == {"state": "kept in memory"}
    assert points(tmp_path) == {("loss", step): 1.0 for step in range(11)}
    times = [event["t"] for event in events(tmp_path)]
    assert times == sorted(times)
    assert times[-2] <= full_until < times[-1]


@pytest.mark.parametrize("bound", ["MAX_WAITING_BYTES", "MAX_SPOOL_BYTES"])
def test_memory_and_disk_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr(f"dl2pa.tracking.spool.{bound}", 1000)
    spool = Spool(tmp_path, 1)
    spool.start(IDENTITY, {}, {})
    size = RunDirectory(tmp_path).spool.stat().st_size
    with full_at(size if bound == "MAX_WAITING_BYTES" else 1 << 20):
        for step in range(100):
            spool.metrics(step, {"loss": 1.0})
        spool.event("end", status="finished")
        waiting = spool.take_waiting()
    assert sum(len(line) for line in waiting) < 1200
    assert RunDirectory(tmp_path).spool.stat().st_size < 1200
    kept = [*events(tmp_path), *(json.loads(line) for line in waiting)]
    assert kept[-1]["e"] == "end"
    steps = [event["step"] for event in kept if event["e"] == "metrics"]
    assert 0 < len(steps) < 20
    assert (steps, spool.dropped) == (list(range(len(steps))), 100 - len(steps))


def test_the_next_attempt_ends_a_killed_one(tmp_path: Path) -> None:
    first = Spool(tmp_path, 1)
    first.start(IDENTITY, {}, {})
    first.metrics(1, {"loss": 1.0})
    second = Spool(tmp_path, 2)
    second.start(IDENTITY, {}, {})
    second.event("end", status="stopped")
    Spool(tmp_path, 3).start(IDENTITY, {}, {})
    actual = [(event["e"], event["a"], event.get("status")) for event in events(tmp_path)]
    assert actual == [
        *(("start", 1, None), ("metrics", 1, None), ("end", 1, "killed")),
        *(("start", 2, None), ("end", 2, "stopped"), ("start", 3, None)),
    ]
    assert events(tmp_path)[2]["t"] == events(tmp_path)[1]["t"]


def test_failing_to_create_the_spool_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "events").write_text("a file where the folder should be")
    identity = ensure_identity(tmp_path, "exp", "name")
    spool = Spool(tmp_path, 1)
    spool.start(identity, {}, {})
    spool.metrics(0, {"loss": 1.0})

    (tmp_path / "events").unlink()
    spool.metrics(1, {"loss": 1.0})
    assert [event["e"] for event in events(tmp_path)] == ["start", "metrics", "metrics"]
    assert load_identity(tmp_path) == identity


def test_identity_is_kept_and_recovered_from_the_spool(tmp_path: Path) -> None:
    identity = ensure_identity(tmp_path, "exp", "name")
    Spool(tmp_path, 1).start(identity, {}, {})
    assert ensure_identity(tmp_path, "other", "other") == identity
    (tmp_path / "events" / "run.json").write_text("")
    assert ensure_identity(tmp_path, "other", "other") == identity
    assert load_identity(tmp_path) == identity


def test_param_changed_on_resume_becomes_a_tag(tmp_path: Path) -> None:
    Spool(tmp_path, 1).start(IDENTITY, {"lr": 0.1, "data": {"root": "/d", "classes": 10}}, {})
    Spool(tmp_path, 2).start(IDENTITY, {"lr": 0.2, "data": {"root": "/d"}, "new": 1}, {})
    Spool(tmp_path, 3).start(IDENTITY, {"lr": 0.1}, {})
    first, second, third = (event for event in events(tmp_path) if event["e"] == "start")
    assert first["params"] == {"lr": "0.1", "data.root": "/d", "data.classes": "10"}
    assert (second["params"], second["tags"]) == ({"new": "1"}, {"dl2pa.changed.lr": "0.2"})
    assert (third["params"], third["tags"]) == ({}, {"dl2pa.changed.lr": "0.1"})


def test_batches_respect_the_limit_and_event_boundaries(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1)
    spool.start(IDENTITY, {}, {})
    for step in range(10):
        spool.metrics(step, {"a": 1.0, "b": 1.0, "c": 1.0})
    spool.metrics(10, {f"class{i}": 1.0 for i in range(25)})
    spool.event("tags", tags={})
    batches = list(read_batches(RunDirectory(tmp_path).spool, 0, 10))
    assert [len(batch.points) for batch in batches] == [0, 9, 9, 9, 3, 25, 0]
    assert [batch.events for batch in batches] == [1, 3, 3, 3, 1, 1, 1]
    for batch, after in itertools.pairwise(batches):
        assert batch.end == after.start
        assert next(read_batches(RunDirectory(tmp_path).spool, batch.end, 10)).points == after.points


def test_seen_points_take_steps_in_any_order() -> None:
    seen = SeenPoints()
    for step in [5, 1, 3, 3, 9, 1]:
        seen.add("loss", step)
    assert [step for step in range(11) if ("loss", step) in seen] == [1, 3, 5, 9]
    assert ("lr", 5) not in seen
