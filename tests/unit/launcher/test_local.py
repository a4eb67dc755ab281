"""torchrun's agent on this machine, with real ranks that run a tiny module."""

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

from launcher.local import choose_interface

ROOT = Path(__file__).resolve().parents[3]

TINY = """
import json, os, sys, time
from pathlib import Path

def until(place, file):
    deadline = time.monotonic() + 60
    while not (place / file).exists() and time.monotonic() < deadline:
        time.sleep(0.01)

def main(arguments):
    task, place, rank = arguments[0], Path(arguments[1]), int(os.environ["RANK"])
    if task == "fail":
        return 3 if rank == 1 else 0
    if task == "report":
        from dl2pa.process import die_with_parent

        die_with_parent()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "EXTRA")
        assert "DL2PA_SECRET" not in os.environ
        name = Path("/proc/self/comm").read_text().strip()
        recorded = sys.argv == ["dl2pa", *arguments]
        report = {"argv": arguments[2:], "recorded": recorded, "pid": os.getpid(), "name": name}
        report |= {n: os.environ.get(n) for n in names}
        os.write(1, (json.dumps(report) + chr(10)).encode())
        until(place, "never")
    elif rank == 0:
        for number in range(3):
            os.write(1, b"waiting" + bytes([10]))
            until(place, "stop")
            (place / "stop").rename(place / f"stop-{number}")
        (place / "all").touch()
    else:
        until(place, "all")
        (place / "done").touch()
    return 0
"""

DRIVER = """
import sys
from pathlib import Path
from launcher.local import run_local
from launcher.node import this_node
place = Path(sys.argv[2])
sys.exit(run_local(2, ("tiny",), sys.argv[1:], (place / "stop").touch, {"EXTRA": "given; 'so'"}, this_node({})))
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start run_local in a new process, with two ranks of the tiny module."""
    (tmp_path / "tiny.py").write_text(TINY, encoding="utf-8")
    place = tmp_path / "a place; 'quoted'"
    place.mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
    env["PYTHONPATH"] = f"{ROOT}:{tmp_path}"
    env["GLOO_SOCKET_IFNAME"] = "a cluster's default"
    env["DL2PA_SECRET"] = "of the nodes, not of the ranks"
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


def test_ranks_end_when_the_launcher_is_killed(start: Start) -> None:
    process = start("report", "a b", "x='$HOME'; y", "--", "k=")
    assert process.stdout is not None
    reports = sorted((json.loads(process.stdout.readline()) for _ in range(2)), key=lambda r: r["RANK"])
    ends = [os.pidfd_open(report.pop("pid")) for report in reports]
    process.kill()
    for rank, report in enumerate(reports):
        assert report == {
            "argv": ["a b", "x='$HOME'; y", "--", "k="],
            "recorded": True,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
            "GLOO_SOCKET_IFNAME": "lo",
            "name": f"dl2pa:rank {rank}",
            "EXTRA": "given; 'so'",
        }
    for end in ends:
        assert select.select([end], [], [], 30)[0], "the worker still runs"
        os.close(end)


def test_a_failed_rank_fails_the_run(start: Start) -> None:
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GLOO_SOCKET_IFNAME": "probed", "NCCL_SOCKET_IFNAME": "=probed"}),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, {"NCCL_SOCKET_IFNAME": "=ib0"}),
        ({"NCCL_SOCKET_IFNAME": "lo"}, {"GLOO_SOCKET_IFNAME": "lo"}),
        ({"NCCL_SOCKET_IFNAME": "=lo"}, {"GLOO_SOCKET_IFNAME": "lo"}),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, {"GLOO_SOCKET_IFNAME": "probed"}),
        ({"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth0"}, {}),
    ],
    ids=str,
)
def test_gloo_and_nccl_use_one_interface(given: dict[str, str], expected: dict[str, str]) -> None:
    assert choose_interface(given, lambda: "probed") == expected


def test_without_a_route_to_the_first_node_the_interface_is_left_open() -> None:
    assert choose_interface({}, lambda: None) == {}


IMPORT_ALL = """
import importlib, os
from pathlib import Path
from dl2pa.commands.train import _RANK_MODULES
for name in ("launcher.agent", *_RANK_MODULES):
    importlib.import_module(name)
from launcher.agent import launch_config
from launcher.node import this_node
assert launch_config(this_node({}), 2, Path("."), "").numa_options is None
assert launch_config(this_node({}), 2, Path("."), "node").numa_options.affinity_mode == "node"
print(len(os.listdir("/proc/self/task")), "threads")
"""


def test_the_agent_starts_no_thread_and_opens_no_gpu_before_the_fork() -> None:
    """Otherwise a forked rank could inherit a locked lock and could not use its GPU."""
    env = {**os.environ, "LD_DEBUG": "files", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IMPORT_ALL]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    opened = [line for line in done.stderr.splitlines() if "dynamically loaded by" in line]
    assert any("libcublasLt" in line for line in opened), "the loader reports each library"
    # cublasLt looks for the driver when it is loaded; the CUDA runtime, when it is first called.
    assert not [line for line in opened if "libcuda.so" in line and "libcudart" in line]
    assert done.stdout == "1 threads\n"
