"""Exit code of torchrun's agent on a node whose partners do not connect."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dl2pa.commands import train
from dl2pa.errors import EXIT_STOPPED
from dl2pa.rundir import RunDirectory
from launcher import agent, local, rendezvous
from launcher.meeting import NodesMissing
from launcher.node import Node
from support.servers import free_port


def test_agents_that_do_not_connect_end_with_exit_code_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Node 1 has met node 0, and ended before its agent connected."""
    monkeypatch.setattr(rendezvous, "_TIMEOUT", datetime.timedelta(milliseconds=50))
    monkeypatch.setenv("DL2PA_AGENT_PID", str(os.getpid()))
    for name in ("TORCHELASTIC_SIGNALS_TO_HANDLE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.setenv(name, "")  # restored after the test
    node = Node(0, 2, "127.0.0.1", free_port(), "launch")
    assert agent.main(node, 1, tmp_path, ["launcher.node"], []) == EXIT_STOPPED
    assert "clients joined" in capfd.readouterr().err


def test_nodes_that_do_not_connect_are_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    monkeypatch.setattr(local, "run_local", lambda *_: EXIT_STOPPED)
    monkeypatch.setattr(train, "meet", lambda node, secret: "launch")
    launch: Any = SimpleNamespace(nproc="auto", numa_binding="off")
    plan: Any = SimpleNamespace(directory=run, run_dir=run.root, nproc=1, overrides=(), config_file=tmp_path)
    plan.config = SimpleNamespace(launch=launch)
    for index in (0, 1):
        with pytest.raises(NodesMissing, match="could not connect for the training"):
            train._launch_torchrun(plan, {}, Node(index, 2, "127.0.0.1", 1, "dl2pa"))


def test_missing_nodes_give_exit_code_75_outside_slurm(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def missing(args: object, plan: object) -> int:
        raise NodesMissing("not all nodes connected")

    monkeypatch.setattr(train, "_run_here", missing)
    monkeypatch.setattr(train, "_plan", lambda args: None)
    for name in ("SLURM_STEP_ID", "DL2PA_AGENT_PID", "DL2PA_SUPERVISED", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DL2PA_COMMAND_AT", "")
    monkeypatch.setenv("DL2PA_NODES", "2")
    assert train.run(SimpleNamespace()) == EXIT_STOPPED  # pyright: ignore[reportArgumentType]
    assert "not all nodes connected" in capfd.readouterr().err
    monkeypatch.delenv("DL2PA_NODES")
    with pytest.raises(NodesMissing):
        train.run(SimpleNamespace())  # pyright: ignore[reportArgumentType]
