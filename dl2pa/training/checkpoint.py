"""Checkpoints on disk, written atomically and verified by checksum; a damaged one is skipped."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import torch

from dl2pa import fence
from dl2pa.errors import UserError
from dl2pa.osutil import describing_full_disk, sha256_of, start_thread, write_atomically
from dl2pa.records import DamagedFile, read_record
from dl2pa.rundir import (
    CHECKPOINT_BEST,
    CHECKPOINT_LATEST,
    CHECKPOINT_MARKER,
    CHECKPOINT_STATE,
    checkpoint_name,
    checkpoint_step,
    checkpoint_steps,
    warn_damaged,
)

log = logging.getLogger(__name__)

_POLL_S = 1.0
_STALL_S = 900.0
"""Time without progress after which waiting for a write fails."""
_MARKER = {"step": int, "bytes": int, "sha256": str, "best": bool}
_Job = tuple[int, dict[str, Any], bool]


class CheckpointStore:
    """`checkpoints/step-N/` of one run; rank 0 writes, every rank reads.

    A checkpoint is written to a temporary folder, synced to disk, marked complete and renamed.

    Args:
        folder: the run's checkpoints folder.
        keep: number of latest checkpoints to keep.
        keep_best: whether to keep the best checkpoint too.
    """

    def __init__(self, folder: Path, keep: int, keep_best: bool) -> None:
        self.folder = folder
        self._best_file = folder / CHECKPOINT_BEST
        self._keep = keep
        self._keep_best = keep_best
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._progress = 0

    def start(self) -> None:
        """Start the thread that writes; later there may be too little memory for it."""
        if self._writer is None:
            self._writer = start_thread(self._work, "dl2pa-save")

    def save(self, step: int, state: dict[str, Any], *, best: bool = False, wait: bool = False) -> None:
        """Copy the state to host memory and write it in the background.

        Raises:
            DiskFull, OSError: the previous write failed.
        """
        self.wait()
        self.start()
        snapshot = _to_host(state)
        self._idle.clear()
        self._jobs.put((step, snapshot, best))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the current write and raise its error, if any.

        Raises:
            TimeoutError: the file system does not respond.
            RuntimeError: the writing thread has ended.
        """
        progress, since = self._progress, time.monotonic()
        while not self._idle.wait(_POLL_S):
            if self._writer is None or not self._writer.is_alive():
                self._abandon()
                raise RuntimeError("the thread that writes checkpoints has ended; see the error before")
            if self._progress != progress:
                progress, since = self._progress, time.monotonic()
            elif time.monotonic() - since > _STALL_S:
                self._abandon()
                minutes = _STALL_S / 60
                raise TimeoutError(f"writing to {self.folder} made no progress for {minutes:.0f} minutes")
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Finish the current write and end the thread. A failure is logged: the run ends with another error."""
        try:
            self.wait()
        except Exception as error:
            log.warning("the last checkpoint could not be written: %s", error)
        if self._writer is not None:
            self._jobs.put(None)
            self._writer.join(_POLL_S)
            self._writer = None

    def _abandon(self) -> None:
        """Leave the current write to itself, so that nothing waits for it again."""
        self._writer = None
        self._idle.set()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return checkpoint_steps(self.folder)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint at a step."""
        return self.folder / checkpoint_name(step)

    def state_file(self, step: int) -> Path:
        """State file of the checkpoint at a step."""
        return self.path(step) / CHECKPOINT_STATE

    def latest_name(self) -> str:
        """Path of the latest complete checkpoint, for messages; `none` without one."""
        steps = self.steps()
        return str(self.path(steps[-1])) if steps else "none"

    def load(self, which: str = "latest", *, discard: bool = False) -> dict[str, Any] | None:
        """Load the `latest` or `best` state to the host; None if there is no checkpoint.

        If the latest checkpoint is damaged, the one before it is loaded with a warning.

        Args:
            discard: unmark damaged checkpoints, so that they do not count when old ones are deleted.

        Raises:
            UserError: no checkpoint can be read, or the best one was not kept.
        """
        steps = self.steps()
        if which == "best" and steps:
            best = self.best_step()
            if best not in steps:
                remedy = "Use --checkpoint latest, or train with checkpoint.keep_best=true."
                raise UserError("--checkpoint", which, "was not kept", remedy)
            steps = [best]
        for step in reversed(steps):
            try:
                state = self._read(step)
                for damaged in [s for s in steps if s > step] if discard else []:
                    self._unmark(damaged)
                return state
            except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                log.warning("checkpoint %s is damaged (%s): trying the one before", self.path(step), error)
        if steps:
            raise UserError(
                "checkpoint",
                self.path(steps[-1]),
                "is damaged, like every other checkpoint of this run",
                "Restore one from a backup, or start a new run with another --run-dir.",
            )
        return None

    def best_step(self) -> int | None:
        """Step of the best checkpoint; None if none is recorded. Damage is repaired from the checkpoints' markers."""
        try:
            best = read_record(self._best_file, {"step": int}, ["step"])
            return None if best is None else best["step"]
        except DamagedFile as damaged:
            warn_damaged(self._best_file, damaged.reason)
            return next(reversed(self._marked_best()), None)

    def _marked_best(self) -> list[int]:
        """Steps of the checkpoints that were the best when they were written, ascending."""
        return [step for step in self.steps() if _read_marker(self.path(step)).get("best")]

    def clean(self) -> None:
        """Complete or remove what an interrupted write left."""
        for path in sorted(self.folder.glob(".aside-*")):
            step = _read_marker(path).get("step")
            if isinstance(step, int) and not self.path(step).exists():
                path.replace(self.path(step))  # killed between the two renames of a rewrite
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("step-*"):
            is_checkpoint = checkpoint_step(path.name) is not None and path.is_dir()
            if is_checkpoint and not (path / CHECKPOINT_MARKER).exists():
                shutil.rmtree(path, ignore_errors=True)
        marked = self._marked_best()
        if marked and marked[-1] >= (self.best_step() or -1):
            self._record_best(marked[-1])  # killed, or the disk was full, after the checkpoint was complete

    def _unmark(self, step: int) -> None:
        (self.path(step) / CHECKPOINT_MARKER).unlink(missing_ok=True)

    def _read(self, step: int) -> dict[str, Any]:
        file = self.state_file(step)
        marker = _read_marker(self.path(step))
        if file.stat().st_size != marker.get("bytes") or sha256_of(file) != marker.get("sha256"):
            raise ValueError("its contents do not match its checksum")
        return torch.load(file, map_location="cpu", weights_only=True)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._write(*job)
            except BaseException as error:
                self._failure = error
            finally:
                del job  # free the copy of the state
                self._idle.set()

    def _write(self, step: int, state: dict[str, Any], best: bool) -> None:
        fence.check(self.folder)
        temporary = self.folder / f".aside-{step}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        with describing_full_disk(self.folder, _bytes_of(state)):
            try:
                self._write_files(temporary, step, state, best)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        self._publish(temporary, step)
        if best:
            self._record_best(step)
        self._prune()

    def _record_best(self, step: int) -> None:
        if self._keep_best:
            write_atomically(self._best_file, json.dumps({"step": step}) + "\n")

    def _write_files(self, temporary: Path, step: int, state: dict[str, Any], best: bool) -> None:
        temporary.mkdir(parents=True)
        file = temporary / CHECKPOINT_STATE
        with file.open("wb") as out:
            target: Any = _Output(out, file, self._advance)
            try:
                torch.save(state, target)
            except RuntimeError:
                if target.error is None:
                    raise
                raise target.error from None
            out.flush()
            os.fsync(out.fileno())
        marker = {
            "step": step,
            "bytes": file.stat().st_size,
            "sha256": sha256_of(file, self._advance),
            "best": best,
        }
        write_atomically(temporary / CHECKPOINT_MARKER, json.dumps(marker) + "\n")
        _sync_folder(temporary)

    def _advance(self) -> None:
        self._progress += 1

    def _publish(self, temporary: Path, step: int) -> None:
        fence.check(self.folder)
        target = self.path(step)
        if target.exists():
            target.replace(self.folder / f".aside-{step}-old")
        temporary.replace(target)
        _sync_folder(self.folder)
        write_atomically(self.folder.parent / CHECKPOINT_LATEST, target.name + "\n")

    def _prune(self) -> None:
        steps = self.steps()
        kept = set(steps[-self._keep :])
        if self._keep_best:
            kept.add(self.best_step() or -1)
        for step in steps:
            if step not in kept:
                self._unmark(step)
                shutil.rmtree(self.path(step), ignore_errors=True)
        for path in self.folder.glob(".aside-*-old"):
            shutil.rmtree(path, ignore_errors=True)


def _read_marker(folder: Path) -> dict[str, Any]:
    """Read the marker of a checkpoint; empty if it is missing or damaged, so that the checkpoint is not used."""
    try:
        return read_record(folder / CHECKPOINT_MARKER, _MARKER) or {}
    except DamagedFile as damaged:
        warn_damaged(folder / CHECKPOINT_MARKER, damaged.reason)
        return {}


def _to_host(node: Any) -> Any:
    """Copy the tensors of a nested structure to host memory."""
    if isinstance(node, torch.Tensor):
        return node.detach().to("cpu", copy=True)
    if isinstance(node, dict):
        return {key: _to_host(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_to_host(value) for value in node)
    return node


def _bytes_of(node: Any) -> int:
    """Total size of the tensors of a nested structure."""
    if isinstance(node, torch.Tensor):
        return node.nbytes
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
    return sum(map(_bytes_of, children))


class _Output:
    """File for torch.save, which replaces the error of a failed write with one of its own.

    Attributes:
        error: the first error of a write.
    """

    def __init__(self, file: IO[bytes], path: Path, advance: Callable[[], None]) -> None:
        self.error: OSError | None = None
        self._file = file
        self._path = path
        self._advance = advance

    def write(self, data: Any) -> int:
        fence.check(self._path, fresh=False)
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self._advance()
        return written

    def flush(self) -> None:
        """Do nothing: the caller flushes the file."""


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
