"""Batch script of the job of a search, run by bash with a fake scontrol."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher import controller
from launcher.request import Request, Setup

STOPPABLE = "trap 'exit 75' TERM; echo ready; while kill -0 $PPID; do /bin/sleep 0.02; done"


@contextmanager
def job(tmp_path: Path, command: str, *lines: str) -> Iterator[subprocess.Popen[str]]:
    """Run the script of a command as SLURM does."""
    request = Request(setup=Setup(lines=lines, environment={"OF_SITE": "it's"}))
    script, fake = tmp_path / "script.sh", tmp_path / "bin/scontrol"
    script.write_text(controller.script(request, "dl2pa-x", tmp_path / "log", ["bash", "-c", command], {}))
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/bash\necho \"$*\" >>'{tmp_path}/scontrol.log'\n")
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    process = subprocess.Popen(["bash", str(script)], env=env, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def requests(tmp_path: Path) -> list[str]:
    log = tmp_path / "scontrol.log"
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("line", ["true", "set -euo pipefail", "set -eE; trap 'exit 9' ERR"])
@pytest.mark.parametrize(
    ("number", "code", "expected"), [(signal.SIGUSR2, 0, ["requeue 7"]), (signal.SIGTERM, 75, [])]
)
def test_only_the_time_limit_requeues_a_search(
    number: int, code: int, expected: list[str], line: str, tmp_path: Path
) -> None:
    with job(tmp_path, STOPPABLE, line) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(60) == code
    assert requests(tmp_path) == expected


@pytest.mark.parametrize("code", [0, 3])
def test_a_search_that_ends_is_not_requeued(code: int, tmp_path: Path) -> None:
    with job(tmp_path, f'echo "$OF_SITE"; exit {code}', "set -e") as process:
        assert process.stdout is not None and process.stdout.read() == "it's\n"
        assert process.wait(60) == code
    assert requests(tmp_path) == []
