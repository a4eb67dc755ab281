"""Start the ranks of `worker.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def start_ranks(
    size: int, device: str, *, backend: str = "auto", nodes: int = 1, hold_s: float = 0, timeout: float = 240
) -> list[dict[str, Any]]:
    """Run `size` ranks on this machine and return their results in rank order.

    Args:
        nodes: into which the ranks are divided; ranks of different nodes use the same GPU here.
        hold_s: seconds that rank 0 spends in an assignment update.

    Raises:
        AssertionError: a rank failed.
    """
    local = size // nodes
    options = json.dumps({"device": device, "backend": backend, "steps": 3, "hold_s": hold_s})
    with tempfile.TemporaryDirectory() as folder:
        started: list[subprocess.Popen[str]] = []
        for rank in range(size):
            env = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank % local),
                "LOCAL_WORLD_SIZE": str(local),
                "DL2PA_STORE": str(Path(folder) / "store"),
            }
            command = [sys.executable, str(Path(__file__).with_name("worker.py")), options]
            started.append(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        try:
            outputs = [process.communicate(timeout=timeout) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
    failed = [err[-2000:] for process, (_, err) in zip(started, outputs, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]
