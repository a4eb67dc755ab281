"""Checkpoints on disk: written aside, synced, renamed, a completeness marker last; a damaged one is passed over."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

from dl2pa.errors import UserError
from dl2pa.osutil import read_json, write_atomically

log = logging.getLogger(__name__)

_MARKER = "COMPLETE"
_NAME = re.compile(r"step-(\d{9,})")
_CHUNK = 1 << 22


class CheckpointStore:
    """`checkpoints/step-N/` of one run; rank 0 writes, every rank reads.

    Args:
        folder: the run's checkpoints folder.
        keep: how many of the latest stay.
        keep_best: whether the best one stays too.
    """

    def __init__(self, folder: Path, keep: int, keep_best: bool) -> None:
        self.folder = folder
        self._keep = keep
        self._keep_best = keep_best
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, state: dict[str, Any], *, best: bool = False, wait: bool = False) -> None:
        """Copy the state to host memory now and write it in the background.

        Raises:
            OSError: an earlier write failed (disk full, say).
        """
        self.wait()
        snapshot = _to_host(state)
        self._writer = threading.Thread(
            target=self._write_guarded, args=(step, snapshot, best), name="dl2pa-save"
        )
        self._writer.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way and raise what it met."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        found = (_NAME.fullmatch(p.parent.name) for p in self.folder.glob(f"step-*/{_MARKER}"))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def latest_name(self) -> str:
        """The last complete checkpoint, for messages."""
        steps = self.steps()
        return str(self.path(steps[-1])) if steps else "none"

    def load(self, which: str = "latest", *, discard: bool = False) -> dict[str, Any] | None:
        """State of the latest (or `best`) checkpoint, on the host; None where none was ever written.

        A damaged one is passed over with a warning in favor of the one before.

        Args:
            discard: unmark the damaged ones that are newer than the one loaded, so that they displace no good one.

        Raises:
            UserError: there are checkpoints, and none can be read; or the best one was not kept.
        """
        steps = self.steps()
        if which == "best" and steps:
            best = self.best_step()
            if best not in steps:
                message, remedy = "was not kept", "Use --checkpoint latest; checkpoint.keep_best keeps it."
                raise UserError("--checkpoint", which, message, remedy)
            steps = [best]
        for step in reversed(steps):
            try:
                state = self._read(step)
                for damaged in [s for s in steps if s > step] if discard else []:
                    (self.path(damaged) / _MARKER).unlink(missing_ok=True)
                return state
            except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                log.warning("checkpoint %s is damaged (%s): trying the one before", self.path(step), error)
        if steps:
            raise UserError(
                "checkpoint",
                self.path(steps[-1]),
                "damaged, and so is every other in the folder",
                "Restore one from a copy, or start afresh with another --run-dir.",
            )
        return None

    def best_step(self) -> int | None:
        value = read_json(self.folder / "best.json").get("step")
        return int(value) if value is not None else None

    def clean(self) -> None:
        """Finish or remove what an interrupted save left."""
        for path in sorted(self.folder.glob(".aside-*")):
            step = read_json(path / _MARKER).get("step")
            if isinstance(step, int) and not self.path(step).exists():
                path.replace(self.path(step))  # killed between the two renames of a rewrite
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("step-*"):
            if _NAME.fullmatch(path.name) and path.is_dir() and not (path / _MARKER).exists():
                shutil.rmtree(path, ignore_errors=True)

    def _read(self, step: int) -> dict[str, Any]:
        file = self.path(step) / "state.pt"
        marker = read_json(self.path(step) / _MARKER)
        if file.stat().st_size != marker.get("bytes") or _digest(file) != marker.get("sha256"):
            raise ValueError("its contents do not match its checksum")
        return torch.load(file, map_location="cpu", weights_only=True)

    def _write_guarded(self, step: int, state: dict[str, Any], best: bool) -> None:
        try:
            self._write(step, state, best)
        except BaseException as error:
            self._failure = error

    def _write(self, step: int, state: dict[str, Any], best: bool) -> None:
        aside = self.folder / f".aside-{step}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        file = aside / "state.pt"
        with file.open("wb") as out:
            torch.save(state, out)
            out.flush()
            os.fsync(out.fileno())
        marker = {"step": step, "bytes": file.stat().st_size, "sha256": _digest(file)}
        write_atomically(aside / _MARKER, json.dumps(marker) + "\n")
        _sync_folder(aside)
        target = self.path(step)
        if target.exists():
            target.replace(self.folder / f".aside-{step}-old")
        aside.replace(target)
        _sync_folder(self.folder)
        write_atomically(self.folder.parent / "latest", target.name + "\n")
        if best and self._keep_best:
            write_atomically(self.folder / "best.json", json.dumps({"step": step}) + "\n")
        self._prune()

    def _prune(self) -> None:
        steps = self.steps()
        kept = set(steps[-self._keep :])
        if self._keep_best:
            kept.add(self.best_step() or -1)
        for step in steps:
            if step not in kept:
                (self.path(step) / _MARKER).unlink(missing_ok=True)
                shutil.rmtree(self.path(step), ignore_errors=True)
        for path in self.folder.glob(".aside-*-old"):
            shutil.rmtree(path, ignore_errors=True)


def _to_host(node: Any) -> Any:
    if isinstance(node, torch.Tensor):
        return node.detach().to("cpu", copy=True)
    if isinstance(node, dict):
        return {key: _to_host(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_to_host(value) for value in node)
    return node


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while chunk := data.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
