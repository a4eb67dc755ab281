"""Paths that tests refer to."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
TESTCLUSTER = REPOSITORY / "slurm/testcluster"
SHARED_DATA = REPOSITORY.parent / "shared/data"
"""Real data next to the repository; tests that need it are skipped if it is missing."""
