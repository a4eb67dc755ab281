"""torchrun on this machine: its command, and real processes of a tiny module under it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.local import torchrun_command
from launcher.node import Node

ROOT = Path(__file__).resolve().parents[3]
ALONE = Node(0, 1, "localhost", 0, "local")

TINY = """
import json, os, sys, time
from pathlib import Path

task, place, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])

def until(file):
    deadline = time.monotonic() + 60
    while not (place / file).exists() and time.monotonic() < deadline:
        time.sleep(0.01)

if task == "fail":
    sys.exit(3 if rank == 1 else 0)
elif task == "report":
    from dl2pa.training.processes import die_with_parent

    die_with_parent()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "EXTRA")
    report = {"argv": sys.argv[3:], "pid": os.getpid(), **{name: os.environ.get(name) for name in names}}
    os.write(1, (json.dumps(report) + chr(10)).encode())
    until("never")
elif rank == 0:
    for number in range(3):
        os.write(1, b"waiting" + bytes([10]))
        until("stop")
        (place / "stop").rename(place / f"stop-{number}")
    (place / "all").touch()
else:
    until("all")
    (place / "done").touch()
"""

DRIVER = """
import sys
from pathlib import Path
from launcher.local import run_local
from launcher.node import this_node
place = Path(sys.argv[2])
sys.exit(run_local(2, "tiny", sys.argv[1:], place / "stop", {"EXTRA": "given; 'so'"}, this_node({})))
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start run_local in a process of its own, with two processes of the tiny module."""
    (tmp_path / "tiny.py").write_text(TINY, encoding="utf-8")
    place = tmp_path / "a place; 'quoted'"
    place.mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
    env["PYTHONPATH"] = f"{ROOT}:{tmp_path}"
    started: list[subprocess.Popen[str]] = []

    def begin(task: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, task, str(place), *arguments]
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_the_command_starts_one_node_and_leaves_stopping_to_us() -> None:
    command = torchrun_command(4, "dl2pa", ["train", "my config.yaml", "optim.lr=1"], ALONE)
    assert command[0] == sys.executable
    for option in ("--standalone", "--nproc-per-node=4", "--max-restarts=0"):
        assert option in command
    (handled,) = [o for o in command if o.startswith("--signals-to-handle=")]
    assert not {"SIGTERM", "SIGINT", "SIGUSR2"} & set(handled.partition("=")[2].split(","))
    assert command[-5:] == ["--module", "dl2pa", "train", "my config.yaml", "optim.lr=1"]


def test_the_command_of_one_node_of_several_says_where_they_meet() -> None:
    command = torchrun_command(2, "dl2pa", ["train"], Node(1, 3, "node7", 12345, "42.0"))
    assert "--standalone" not in command
    for option in ("--nnodes=3", "--node-rank=1", "--master-addr=node7", "--master-port=12345"):
        assert option in command
    assert command.index("--rdzv-id=42.0") < command.index("--module")


def test_processes_get_their_rank_threads_and_arguments_and_end_when_the_launcher_is_killed(
    start: Start,
) -> None:
    process = start("report", "a b", "x='$HOME'; y", "--", "k=")
    assert process.stdout is not None
    reports = sorted((json.loads(process.stdout.readline()) for _ in range(2)), key=lambda r: r["RANK"])
    ends = [os.pidfd_open(report.pop("pid")) for report in reports]
    process.kill()
    for rank, report in enumerate(reports):
        assert report == {
            "argv": ["a b", "x='$HOME'; y", "--", "k="],
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            "EXTRA": "given; 'so'",
        }
    for end in ends:
        assert select.select([end], [], [], 30)[0], "the worker still runs"
        os.close(end)


def test_a_process_that_fails_fails_the_run(start: Start) -> None:
    assert start("fail").wait(120) == 1


def test_a_stop_signal_writes_the_stop_file_and_waits_for_the_workers(start: Start, tmp_path: Path) -> None:
    process = start("wait")
    assert process.stdout is not None
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(number)
    assert process.wait(60) == 0
    names = {p.name for p in (tmp_path / "a place; 'quoted'").iterdir()}
    assert names == {"stop-0", "stop-1", "stop-2", "all", "done"}
