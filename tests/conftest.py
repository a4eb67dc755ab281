"""Distribute test files over the workers of pytest-xdist."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests work on small tensors; a second thread per process only competes with the other worker.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Runs that use two threads wait for the second one without occupying the core of the other worker.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

os.environ["DL2PA_CLUSTER"] = ""  # not the site file of the user who runs the tests

TESTS = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file on one worker, so that they share its fixtures, unless it names another group."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(TESTS).as_posix()))
