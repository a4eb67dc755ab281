"""Detect a copied run directory and give it an identity of its own.

A run directory that was moved, mounted elsewhere or restored from a backup stays the same run. It is a copy if the
folder where the run last trained still exists elsewhere and contains the same run. If this user cannot read that
folder, the run directory is a copy too: the run belongs to another user.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import uuid
from dataclasses import asdict, replace
from pathlib import Path

from dl2pa.osutil import replacing, write_atomically, write_json
from dl2pa.records import DamagedFile, read_record
from dl2pa.rundir import RunDirectory, warn_damaged
from dl2pa.tracking.spool import load_identity, now_ms
from dl2pa.tracking.sync_state import forget_runs

_log = logging.getLogger(__name__)


def detach_copy(run_dir: Path) -> None:
    """Give a copied run directory a new run uuid, so that it does not continue the original's MLflow run.

    The whole spool is then sent to a new MLflow run, which names the original in the tag ``dl2pa.copied_from``. Call at
    the start of an attempt, before the identity is read and before the spool is opened.

    Raises:
        OSError: the new identity cannot be written.
    """
    run, root = RunDirectory(run_dir), run_dir.resolve()
    _unshare(run)
    original, identity = find_original(run_dir), load_identity(run_dir)
    if original is not None and identity is not None:
        copied = replace(identity, run_uuid=uuid.uuid4().hex, created=now_ms(), copied_from=identity.run_uuid)
        forget_runs(run_dir)
        write_atomically(run.identity, json.dumps(asdict(copied)))
        _log.warning("%s is a copy of %s and is recorded as a new MLflow run", root, original)
    with contextlib.suppress(OSError):
        run.place.parent.mkdir(parents=True, exist_ok=True)
        status = root.stat()
        write_json(run.place, {"path": str(root), "device": status.st_dev, "inode": status.st_ino})


def find_original(run_dir: Path) -> Path | None:
    """Return the run directory that this one is a copy of; None if it is not a copy."""
    run, root = RunDirectory(run_dir), run_dir.resolve()
    try:
        place = read_record(run.place, {"path": str}) or {}
    except DamagedFile as damaged:
        warn_damaged(run.place, damaged.reason)
        return None
    original, identity = Path(place.get("path") or root), load_identity(run_dir)
    if identity is None or original == root or _is_same(original, root):
        return None
    return original if _contains(original, identity.run_uuid) else None


def _contains(folder: Path, run_uuid: str) -> bool:
    """Whether a folder contains the run, or cannot be read by this user."""
    try:
        folder.stat()
        identity = load_identity(folder)
    except PermissionError:
        return True
    except (OSError, ValueError):  # ValueError: not a valid path
        return False
    if identity is None:
        return RunDirectory(folder).identity.exists() and not os.access(
            RunDirectory(folder).identity, os.R_OK
        )
    return identity.run_uuid == run_uuid


def _is_same(first: Path, second: Path) -> bool:
    """Whether two paths name one folder, for instance through two mounts, which may have different device numbers.

    Inode numbers alone are not unique: a copy on another file system can have the same. A new file in one folder must
    appear in the other.
    """
    try:
        if first.samefile(second):
            return True
        if first.stat().st_ino != second.stat().st_ino:
            return False
        probe = f".probe.{uuid.uuid4().hex}"
        (second / probe).touch()
        try:
            return (first / probe).exists()
        finally:
            (second / probe).unlink(missing_ok=True)
    except (OSError, ValueError):
        return False


def _unshare(run: RunDirectory) -> None:
    """Replace hard links among the files that are appended to: a copy made of links would change the original."""
    for file in run.events.glob("*.jsonl"):
        if file.stat().st_nlink > 1:
            with replacing(file) as temporary:
                shutil.copy2(file, temporary)
