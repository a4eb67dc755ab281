"""Exclusive ownership of a run directory: a file lock on one machine, a heartbeat between machines."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dl2pa import envvars, fence
from dl2pa.errors import UserError
from dl2pa.osutil import (
    LockResult,
    is_file_of,
    process_runs,
    process_start,
    remove_locked,
    start_thread,
    try_lock,
    write_atomically,
)
from dl2pa.rundir import DAMAGED, RunDirectory

log = logging.getLogger(__name__)

_HEARTBEAT_S = 3.0
_STALE_S = 15.0
_POLL_S = 0.2
_WAIT_S = 60.0
_SETTLE_S = 2.0
"""Without locks: time between writing the owner record and checking that no other process wrote it too."""
_RECHECK_S = 1.0
"""A process that sent a heartbeat less than this long ago cannot have been replaced."""


class Ownership:
    """Exclusive right to write a run directory, acquired by rank 0 for the lifetime of its process.

    On one machine a file lock is used, which the kernel releases when the process ends; an owner that ends normally
    removes the file. An owner on another machine,
    or on a file system without locks, is alive if its heartbeat, the modification time of `owner.json`, changes.
    A process that finds another process's record there ends (`fence`).
    """

    def __init__(self, run: RunDirectory) -> None:
        self.id = uuid.uuid4().hex
        self._run = run
        self._file: TextIO | None = None
        self._locked = True
        self._announced = False
        self._follows = False
        self._checked = -_RECHECK_S
        self._closing = threading.Event()

    def acquire(self, wait_s: float = _WAIT_S) -> None:
        """Acquire the directory; waits for an owner that is ending or stopping.

        Raises:
            UserError: the owner is alive, with its host and process id; or the directory cannot be written.
        """
        file = self._open_lock()
        deadline = time.monotonic() + wait_s
        while True:
            lock = try_lock(file.fileno())
            is_free = lock is not LockResult.HELD and not _is_alive(self._run, lock)
            if not is_file_of(self._run.owner_lock, file.fileno()):  # its owner has removed it
                file.close()
                file = self._open_lock()
            elif is_free:
                break
            elif not self._is_ending() or time.monotonic() > deadline:
                file.close()
                raise self._refusal()
            else:
                time.sleep(_POLL_S)
        self._locked = lock is LockResult.ACQUIRED
        self._file = file

    def _open_lock(self) -> TextIO:
        try:
            return self._run.owner_lock.open("a+", encoding="utf-8")
        except OSError as error:
            raise self._run.not_writable(error) from None

    def announce(self) -> None:
        """Write the owner file and start the heartbeat.

        Raises:
            UserError: without locks, another process has written the owner file at the same time.
        """
        host, pid = socket.gethostname(), os.getpid()
        owner = {"host": host, "pid": pid, "started": time.time(), "id": self.id}
        owner |= {"launch": os.environ.get(envvars.LAUNCH, self.id), **_place(), "start": process_start(pid)}
        write_atomically(self._run.owner_file, json.dumps(owner) + "\n")
        if not self._locked:
            log.warning(
                "the file system of %s does not support locks: a heartbeat protects the run from a second start",
                self._run.root,
            )
            time.sleep(_SETTLE_S)
            if self.is_lost(fresh=True):
                raise self._refusal()
        self._announced = True
        fence.guard(self._run.root, self)
        start_thread(self._beat, "dl2pa-heartbeat")

    def follow(self, owner_id: str) -> None:
        """On a rank other than 0: end this process when rank 0, whose id is given, loses the directory."""
        self.id = owner_id
        self._follows = True
        fence.guard(self._run.root, self)
        start_thread(self._beat, "dl2pa-heartbeat")

    def release(self) -> None:
        """Release the directory, stop the heartbeat and remove the lock file."""
        self._closing.set()
        fence.unguard(self._run.root)
        if self._file is not None:
            if self._announced and self._locked and not self.is_lost(fresh=True):
                remove_locked(self._run.owner_lock, self._file.fileno())
            self._file.close()
            self._file = None

    def is_lost(self, *, fresh: bool) -> bool:
        """Whether another process has written the owner file; False if the file cannot be read."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)  # also counts the time that the machine was suspended
        if not fresh and now - self._checked < _RECHECK_S:
            return False
        owner = self._run.owner()
        if owner and owner.get("id") != self.id:
            return True
        self._checked = now
        return False

    def describe_loss(self) -> str:
        """Message of a process that lost the directory; empty on ranks other than 0, whose log is in it."""
        if self._follows:
            return ""
        return (
            f"{self._run.root} was taken over by {_name(self._run.owner())} while this process (process {os.getpid()} "
            f"on {socket.gethostname()}) did not respond. This process ends and writes nothing more to it"
        )

    def _beat(self) -> None:
        while not self._closing.wait(_HEARTBEAT_S):
            with suppress(OSError, MemoryError):  # a failed heartbeat is repeated
                fence.check(self._run.root)
                if not self._follows:
                    os.utime(self._run.owner_file)

    def _is_ending(self) -> bool:
        owner = self._run.owner()
        if self._run.stop_file.exists() or self._run.status().get("state") in (
            "stopping",
            "stopped",
            "finished",
        ):
            return True
        return _is_near(owner) and not process_runs(owner.get("pid", 0))

    def _refusal(self) -> UserError:
        return UserError(
            "run-dir",
            str(self._run.root),
            f"in use by {_name(self._run.owner())}",
            "Wait for it, stop it, or give another --run-dir.",
        )


def is_owned(run: RunDirectory) -> bool:
    """Whether a running process owns the directory, by its lock on this machine or its heartbeat."""
    lock = LockResult.ACQUIRED  # the directory is missing or not writable: only another machine can own it
    with suppress(OSError):  # FileNotFoundError: the last owner has ended normally
        while True:
            with run.owner_lock.open("r+", encoding="utf-8") as file:
                lock = try_lock(file.fileno())
                if is_file_of(run.owner_lock, file.fileno()):
                    break
    return lock is LockResult.HELD or _is_alive(run, lock, watch=False)


def seems_alive(run: RunDirectory) -> bool:
    """Whether the recorded owner's process runs, or its heartbeat is of the last minute by this machine's clock.

    Unlike ``is_owned`` it writes nothing and takes no lock, so it can be called at any time on any run.
    """
    owner = run.owner()
    if owner and "start" in owner and _is_near(owner):
        return process_start(owner["pid"]) == owner["start"] is not None
    try:
        return bool(owner) and time.time() - run.owner_file.stat().st_mtime <= 4 * _STALE_S
    except OSError:
        return False


def _is_alive(run: RunDirectory, lock: LockResult, *, watch: bool = True) -> bool:
    """Whether the recorded owner is alive, although its lock is not visible to this process.

    Args:
        watch: wait for a heartbeat; otherwise one of the last minute is sufficient.
    """
    owner = run.owner()
    if not owner or run.status().get("state") not in ("running", "stopping", DAMAGED):
        return False
    if lock is LockResult.ACQUIRED and _is_on_this_machine(owner):
        return False
    if "start" in owner and _is_near(owner):
        return process_start(owner["pid"]) == owner["start"] is not None
    return _has_heartbeat(run, watch)


def _has_heartbeat(run: RunDirectory, watch: bool) -> bool:
    try:
        before = run.owner_file.stat().st_mtime
        if _clock_of(run.owner_lock) - before > 4 * _STALE_S:
            return False
        deadline = time.monotonic() + _STALE_S
        while watch and time.monotonic() < deadline:
            if run.owner_file.stat().st_mtime != before:
                return True
            time.sleep(_POLL_S)
    except OSError:
        return False
    return not watch


def _clock_of(file: Path) -> float:
    """Time by the clock of the file system, which can differ from the clock of this machine."""
    try:
        os.utime(file)
        return file.stat().st_mtime
    except OSError:
        return time.time()


def _place() -> dict[str, str]:
    """The machine, and the process namespace in which a process id is valid; containers have their own."""
    place = {"machine": socket.gethostname(), "processes": ""}
    with suppress(OSError):
        place["machine"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        place["processes"] = str(Path("/proc/self/ns/pid").readlink())
    return place


def _is_on_this_machine(owner: dict[str, Any]) -> bool:
    if "machine" not in owner:  # written by an older version
        return owner.get("host") == socket.gethostname()
    return owner["machine"] == _place()["machine"]


def _is_near(owner: dict[str, Any]) -> bool:
    """Whether the process id of the owner is valid in this process."""
    processes = _place()["processes"]
    return _is_on_this_machine(owner) and owner.get("processes", processes) == processes


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
