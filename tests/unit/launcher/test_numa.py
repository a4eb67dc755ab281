"""Choice of NUMA binding on simulated machines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dl2pa import gpus
from dl2pa.config.schema import LaunchConfig
from launcher import numa
from launcher.numa import binding_mode

Machine = Callable[[int, int, bool], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Simulate a machine: numbers of NUMA nodes and GPUs, and whether numactl is installed."""

    def make(nodes: int, count: int, numactl: bool) -> None:
        places = {"nodes": [f"node{n}" for n in range(nodes)], "dev": [f"nvidia{n}" for n in range(count)]}
        for folder, names in {**places, "bin": ["numactl"] if numactl else []}.items():
            (tmp_path / folder).mkdir()
            for name in names:
                (tmp_path / folder / name).touch(mode=0o755)
        monkeypatch.setattr(numa, "NUMA_NODES", tmp_path / "nodes")
        monkeypatch.setattr(gpus, "DEVICE_FILES", tmp_path / "dev")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


@pytest.mark.parametrize(
    ("nodes", "count", "numactl", "setting", "mode"),
    [
        (2, 8, True, "auto", "node"),
        (1, 8, True, "auto", ""),
        (2, 8, False, "auto", ""),
        (2, 0, True, "auto", ""),
        (2, 8, True, "off", ""),
        (1, 8, True, "exclusive", "exclusive"),
    ],
)
def test_ranks_are_bound_where_binding_works(
    nodes: int,
    count: int,
    numactl: bool,
    setting: str,
    mode: str,
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine(nodes, count, numactl)
    launch = LaunchConfig.model_validate({"numa_binding": setting})
    assert binding_mode(launch, 8) == mode
    assert binding_mode(launch.model_copy(update={"device": "cpu"}), 8) == ""
    assert not caplog.records


@pytest.mark.parametrize(("count", "numactl", "reason"), [(8, False, "numactl"), (4, True, "fewer GPUs")])
def test_a_binding_that_does_not_work_is_ignored_with_the_reason(
    count: int, numactl: bool, reason: str, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine(2, count, numactl)
    assert binding_mode(LaunchConfig(numa_binding="socket"), 8) == ""
    assert [reason in record.getMessage() for record in caplog.records] == [True]
