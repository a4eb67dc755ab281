"""NCCL between GPUs: training, a killed rank, TERM within a step, a rank 0 that keeps the others waiting."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("pydantic")

from gpu.ranks import start_ranks
from support.runs import Program, processes_of, read_status
from support.waiting import eventually


@pytest.fixture(autouse=True)
def two_gpus(rehearsing: bool) -> None:
    if not rehearsing and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path)
    yield program
    program.close()


@pytest.fixture
def two_ranks(train_command: list[str]) -> list[str]:
    """The arguments of a training of two ranks."""
    command = list(train_command)
    command[command.index("--nproc") + 1] = "2"
    return [*command, "train.log_every_steps=1", "checkpoint.every_steps=10"]


def test_two_ranks_have_equal_weights(device: torch.device) -> None:
    first, second = start_ranks(2, device.type)
    assert first["digests"] == second["digests"] and len(set(first["digests"])) == 1
    if device.type == "cuda":
        assert {first["device"], second["device"]} == {"cuda:0", "cuda:1"} and "nccl" in first["backend"]


def test_the_others_wait_for_rank_0_in_an_assignment_update(device: torch.device, rehearsing: bool) -> None:
    first, second = start_ranks(2, device.type, hold_s=2 if rehearsing else 120, timeout=400)
    assert first["digests"] == second["digests"]


def test_a_killed_rank_ends_the_run(tmp_path: Path, two_ranks: list[str], program: Program) -> None:
    run = tmp_path / "run"
    started = program.start(*two_ranks)
    eventually(lambda: read_status(run).get("step", 0) >= 3, "three steps")
    (rank,) = [process.pid for process in processes_of(run) if process.rank == 1]
    os.kill(rank, signal.SIGKILL)
    assert started.wait(120) == 1
    eventually(lambda: not processes_of(run), "the end of all processes")


def test_term_within_a_step_saves_and_the_run_resumes(
    tmp_path: Path, two_ranks: list[str], program: Program
) -> None:
    run = tmp_path / "run"
    started = program.start(*two_ranks)
    eventually(lambda: read_status(run).get("step", 0) >= 3, "three steps")
    started.process.terminate()
    assert started.wait(120) == 75, started.error
    step = started.completed().result["step"]
    resumed = program.start(*two_ranks, f"train.max_steps={step + 5}").completed(300)
    assert resumed.code == 0, resumed.error
