"""The run directory: its files, written atomically, and the lock that keeps a second owner out."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dl2pa.errors import UserError
from dl2pa.files import open_private
from dl2pa.image import inside_image
from dl2pa.redaction import redact_tree

_HEARTBEAT_S = 3.0
_STALE_S = 15.0
_POLL_S = 0.2
_WAIT_S = 60.0
_EARLY = {"cancelled", "checkpoints", "logs", "slurm", "stop"}
"""What can lie in a run directory before anybody owned it."""


def write_atomically(path: Path, text: str, *, private: bool = False) -> None:
    """Replace a file so that a reader, or a machine that fails, sees the old text or the new one.

    Args:
        private: only its owner may read it.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with open_private(aside, "w") if private else aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """`write_atomically` of JSON, without secrets."""
    write_atomically(path, json.dumps(redact_tree(content), indent=indent) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is absent or unreadable."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class RunDirectory:
    """Paths and small files of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.environment = root / "environment.json"
        self.status_file = root / "status.json"
        self.checkpoints = root / "checkpoints"
        self.logs = root / "logs"
        self.matchings = root / "matchings.jsonl"
        self.pictures = root / "pictures"
        self.profile = root / "profile"
        self.cache = root / "cache"
        self.model = root / "model.safetensors"
        self.result = root / "result.json"
        self.validation = root / "validation.json"
        self.predictions = root / "predictions.npz"
        self.stop_file = root / "stop"
        self.owner_file = root / "owner.json"

    def check_place(self) -> None:
        """Look whether the folders can be made, and make none.

        Raises:
            UserError: the place cannot be written, or is a folder of something else.
        """
        try:
            if self.root.is_dir():
                self._check_ours()
            there = next(place for place in (self.root, *self.root.parents) if place.exists())
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise self._not_writable(error) from None

    def _check_ours(self) -> None:
        """Refuse a folder that holds other files and no run: a home, a checkout, the folder of all runs."""
        # One listing decides: another node may be making the run's files at this moment, its lock the first of them.
        names = {path.name for path in self.root.iterdir()}
        if names & {"owner.lock", self.status_file.name}:
            return
        if foreign := sorted(name for name in names - _EARLY if not name.startswith(".")):
            message = f"holds other files and no run: {', '.join(foreign[:3])}"
            raise UserError("run-dir", str(self.root), message, "Give a new folder, or an empty one.")

    def create(self) -> None:
        """Make the folders.

        Raises:
            UserError: the place cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            probe = self.root / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self._not_writable(error) from None

    def _not_writable(self, error: OSError) -> UserError:
        remedy = "Choose another with --run-dir"
        if inside_image():
            remedy += ', or mount a folder of yours: docker run -v DIR:/runs --user "$(id -u):$(id -g)"'
        return UserError("run-dir", str(self.root), f"cannot be written ({error.strerror})", f"{remedy}.")

    def status(self) -> dict[str, Any]:
        """The last status written; empty before the first."""
        return read_json(self.status_file)

    def write_status(self, **fields: Any) -> None:
        """Merge fields into the status."""
        status = {**self.status(), **fields, "updated": time.time()}
        write_json(self.status_file, status, indent=1)

    def error_file(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.error.json"

    def errors(self, launch: str) -> list[dict[str, Any]]:
        """What the ranks of one launch reported before they ended, the first first."""
        found = [read_json(path) for path in self.logs.glob("rank-*.error.json")]
        ours = (e for e in found if e.get("launch") == launch)
        return sorted(ours, key=lambda e: e.get("time", 0.0))

    def owner(self) -> dict[str, Any]:
        return read_json(self.owner_file)


class Ownership:
    """Exclusive right to write a run directory, held by rank 0 for the life of its process.

    On one machine a file lock decides, which the kernel drops with the process. An owner on another host is
    alive as long as its heartbeat moves.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._file: TextIO | None = None
        self._closing = threading.Event()

    def acquire(self, wait_s: float = _WAIT_S) -> None:
        """Take the directory; waits for an owner that is dying or stopping.

        Raises:
            UserError: its owner is alive, naming host and pid.
        """
        file = (self._run.root / "owner.lock").open("a+", encoding="utf-8")
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not self._is_leaving() or time.monotonic() > deadline:
                    file.close()
                    raise self._refusal() from None
                time.sleep(_POLL_S)
        if self._alive_elsewhere():
            file.close()
            raise self._refusal()
        self._file = file

    def announce(self) -> None:
        """Write who owns the directory and keep its heartbeat going."""
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        write_atomically(self._run.owner_file, json.dumps(owner) + "\n")
        threading.Thread(target=self._beat, name="dl2pa-heartbeat", daemon=True).start()

    def release(self) -> None:
        self._closing.set()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _beat(self) -> None:
        while not self._closing.wait(_HEARTBEAT_S):
            try:
                os.utime(self._run.owner_file)
            except OSError:
                continue

    def _is_leaving(self) -> bool:
        owner = self._run.owner()
        if self._run.stop_file.exists() or self._run.status().get("state") in (
            "stopping",
            "stopped",
            "finished",
        ):
            return True
        return owner.get("host") == socket.gethostname() and not _process_runs(int(owner.get("pid", 0)))

    def _alive_elsewhere(self) -> bool:
        owner = self._run.owner()
        state = self._run.status().get("state")
        if not owner or owner.get("host") == socket.gethostname() or state not in ("running", "stopping"):
            return False
        try:
            before = self._run.owner_file.stat().st_mtime
            if time.time() - before > 4 * _STALE_S:
                return False
            deadline = time.monotonic() + _STALE_S
            while time.monotonic() < deadline:
                if self._run.owner_file.stat().st_mtime != before:
                    return True
                time.sleep(_POLL_S)
        except OSError:
            return False
        return False

    def _refusal(self) -> UserError:
        owner = self._run.owner()
        return UserError(
            "run-dir",
            str(self._run.root),
            f"in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}",
            "Wait for it, stop it, or choose another --run-dir.",
        )


def _process_runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def is_owned(run: RunDirectory) -> bool:
    """Whether a living process owns the directory: by its lock here, by its heartbeat elsewhere."""
    elsewhere = run.owner().get("host") not in (None, socket.gethostname())
    if elsewhere and run.status().get("state") in ("running", "stopping"):
        with suppress(OSError):
            if time.time() - run.owner_file.stat().st_mtime < 4 * _STALE_S:
                return True
    try:
        with (run.root / "owner.lock").open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no directory, or one that nobody can write: nobody owns it
        return False
    return False
