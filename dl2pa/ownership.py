"""Exclusive ownership of a run directory: a file lock on one machine, a heartbeat between machines."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from typing import TextIO

from dl2pa.errors import UserError
from dl2pa.osutil import process_runs, write_atomically
from dl2pa.rundir import RunDirectory

_HEARTBEAT_S = 3.0
_STALE_S = 15.0
_POLL_S = 0.2
_WAIT_S = 60.0


class Ownership:
    """Exclusive right to write a run directory, acquired by rank 0 for the lifetime of its process.

    On one machine a file lock is used, which the kernel releases when the process ends. An owner on another host
    is alive if its heartbeat, the modification time of `owner.json`, changes.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._file: TextIO | None = None
        self._closing = threading.Event()

    def acquire(self, wait_s: float = _WAIT_S) -> None:
        """Acquire the directory; waits for an owner that is ending or stopping.

        Raises:
            UserError: the owner is alive; names its host and process id.
        """
        file = self._run.owner_lock.open("a+", encoding="utf-8")
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not self._is_ending() or time.monotonic() > deadline:
                    file.close()
                    raise self._refusal() from None
                time.sleep(_POLL_S)
        if self._alive_elsewhere():
            file.close()
            raise self._refusal()
        self._file = file

    def announce(self) -> None:
        """Write the owner file and start the heartbeat."""
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        write_atomically(self._run.owner_file, json.dumps(owner) + "\n")
        threading.Thread(target=self._beat, name="dl2pa-heartbeat", daemon=True).start()

    def release(self) -> None:
        """Release the directory and stop the heartbeat."""
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

    def _is_ending(self) -> bool:
        owner = self._run.owner()
        if self._run.stop_file.exists() or self._run.status().get("state") in (
            "stopping",
            "stopped",
            "finished",
        ):
            return True
        return owner.get("host") == socket.gethostname() and not process_runs(int(owner.get("pid", 0)))

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
            "Wait for it, stop it, or give another --run-dir.",
        )


def is_owned(run: RunDirectory) -> bool:
    """Whether a running process owns the directory, by its lock on this host or its heartbeat on another."""
    elsewhere = run.owner().get("host") not in (None, socket.gethostname())
    if elsewhere and run.status().get("state") in ("running", "stopping"):
        with suppress(OSError):
            if time.time() - run.owner_file.stat().st_mtime < 4 * _STALE_S:
                return True
    try:
        with run.owner_lock.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the directory is missing or not writable, so it has no owner
        return False
    return False
