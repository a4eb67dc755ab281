"""The examples in docs/examples run unchanged and import only prototypes and matching from dl2pa."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import REPOSITORY

EXAMPLES = REPOSITORY / "docs/examples"


def run(name: str, folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name)]
    process = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, timeout=600)
    assert process.returncode == 0, process.stderr
    assert not any(folder.iterdir()), "an example writes no files"
    return process.stdout


def test_plain_loop_example_runs(tmp_path: Path) -> None:
    output = run("plain_loop.py", tmp_path)
    moved = [int(n) for n in re.findall(r": (\d+) labels moved", output)]
    assert sum(moved) > 0
    top1 = re.search(r"top-1 ([\d.]+) % of 397", output)
    assert top1 is not None
    assert float(top1[1]) > 80


@pytest.mark.thorough
def test_timm_example_runs(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    moved = re.search(r"step 6: (\d+) labels moved, ([-\d.]+) from ([-\d.]+)", run("timm_model.py", tmp_path))
    assert moved is not None, "the assignment is updated after step 6"
    assert int(moved[1]) > 100
    assert float(moved[2]) > float(moved[3])


def test_examples_import_only_assignment_and_geometry() -> None:
    for file in EXAMPLES.glob("*.py"):
        modules = re.findall(r"^(?:from|import) (dl2pa[\w.]*)", file.read_text(), re.MULTILINE)
        assert set(modules) == {"dl2pa.assignment", "dl2pa.geometry"}
