"""The examples in docs/examples run unchanged; the output of the notebook is that of its page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import process_state_restored
from support.notebook import render, without_numbers
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


def test_training_loops_import_only_assignment_and_geometry() -> None:
    for name in ("plain_loop.py", "timm_model.py"):
        modules = re.findall(r"^(?:from|import) (dl2pa[\w.]*)", (EXAMPLES / name).read_text(), re.MULTILINE)
        assert set(modules) == {"dl2pa.assignment", "dl2pa.geometry"}


def test_notebook_prints_what_its_page_shows(tmp_path: Path) -> None:
    """Processors may differ: in accuracies by 10 points, in cosines and probabilities by 0.3, in the second class."""
    with process_state_restored():
        page = render(EXAMPLES / "python_api.py", tmp_path)
    text, numbers = without_numbers(page)
    expected_text, expected = without_numbers((EXAMPLES / "python_api.md").read_text(encoding="utf-8"))
    again = "PYTHONPATH=.:tests python -m support.notebook docs/examples/python_api.py > docs/examples/python_api.md"
    text, expected_text = (re.sub(r"then \d", "then #", part) for part in (text, expected_text))
    assert text == expected_text, f"write the page again: {again}"
    assert numbers == [pytest.approx(value, abs=10 if value > 1 else 0.3) for value in expected], page
