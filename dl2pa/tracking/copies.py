"""Detect a copied run directory and give it an identity of its own.

A run directory that was moved, mounted elsewhere or restored from a backup stays the same run. It is a copy if the
folder where the run last trained still exists elsewhere and contains the same run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from dataclasses import asdict, replace
from pathlib import Path

from dl2pa.osutil import read_json, write_atomically, write_json
from dl2pa.rundir import RunDirectory
from dl2pa.tracking.spool import load_identity, now_ms
from dl2pa.tracking.sync_state import forget_runs

_log = logging.getLogger(__name__)


def detach_copy(run_dir: Path) -> None:
    """Give a copied run directory a new run uuid, so that it does not continue the original's MLflow run.

    The whole spool is then sent to a new MLflow run, which names the original in the tag ``dl2pa.copied_from``. Call at
    the start of an attempt, before the identity is read.

    Raises:
        OSError: the new identity cannot be written.
    """
    run, identity = RunDirectory(run_dir), load_identity(run_dir)
    root = run_dir.resolve()
    if identity is not None:
        original = Path(str(read_json(run.place).get("path", root)))
        if original != root and not _is_same(original, root) and _contains(original, identity.run_uuid):
            copied = replace(
                identity, run_uuid=uuid.uuid4().hex, created=now_ms(), copied_from=identity.run_uuid
            )
            forget_runs(run_dir)
            write_atomically(run.identity, json.dumps(asdict(copied)))
            _log.warning("%s is a copy of %s and is recorded as a new MLflow run", root, original)
    with contextlib.suppress(OSError):
        run.place.parent.mkdir(parents=True, exist_ok=True)
        status = root.stat()
        write_json(run.place, {"path": str(root), "device": status.st_dev, "inode": status.st_ino})


def _contains(folder: Path, run_uuid: str) -> bool:
    identity = load_identity(folder)
    return identity is not None and identity.run_uuid == run_uuid


def _is_same(first: Path, second: Path) -> bool:
    """Whether two paths name one folder, for instance through two mounts."""
    try:
        return first.samefile(second) or first.stat().st_ino == second.stat().st_ino
    except OSError:
        return False
