"""Finished runs: whether a planned run is finished, and with the data of its configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from dl2pa.config import Config, fingerprint, flatten, load_recorded_config
from dl2pa.config.identity import Identity, data_identity
from dl2pa.errors import UserError
from dl2pa.rundir import RunDirectory, checkpoint_steps
from dl2pa.runplan import RunPlan

log = logging.getLogger(__name__)

_RECORDED = {"data.fingerprint": "data_fingerprint", "data.classes": "data_classes"}
"""Key of a data set's identity to its name in `environment.json`."""


class FinishedRuns:
    """Check which runs are finished, and compare their data. Opens each data set once."""

    def __init__(self) -> None:
        self._opened: dict[str, Identity | UserError] = {}

    def among(self, plans: Iterable[RunPlan]) -> list[RunPlan]:
        """Return the finished runs; see `contains`."""
        return [plan for plan in plans if self.contains(plan)]

    def contains(self, plan: RunPlan) -> bool:
        """Whether a run is finished under this configuration and on its data.

        If the data cannot be opened but is configured as it was in training, the run is finished; a warning says that
        its data was not checked. A run with checkpoints is not finished if one of its files was deleted: training
        writes it again.

        Raises:
            UserError: the run was trained on other data, or the data is configured differently and cannot be opened.
        """
        run, config = plan.directory, plan.config
        status = run.status()
        if status.get("state") != "finished" or status.get("fingerprint") != fingerprint(config):
            return False
        if not run.model.exists():
            return False
        if not (run.config.is_file() and run.result.is_file()) and checkpoint_steps(run.checkpoints):
            return False
        self._check_data(run, config)
        return True

    def _check_data(self, run: RunDirectory, config: Config) -> None:
        attempt = run.last_attempt()
        compared = {key: name for key, name in _RECORDED.items() if attempt.get(name)}
        opened = self._open(config)
        if isinstance(opened, UserError):
            if _changed_keys(run, config):
                raise opened
            reason = f"{opened.field}={opened.value!r}: {opened.message}"
            log.warning("%s: the data was not checked (%s)", run.root, reason)
            return
        if not compared:
            log.warning("%s: the data was not compared, because the run did not record it", run.root)
        for key in reversed(compared):
            before, now = attempt[compared[key]], opened[key]
            if before != now:
                raise _other_data(run, config, key, before, now)

    def _open(self, config: Config) -> Identity | UserError:
        """Identity of the configured data, or why it cannot be opened."""
        from dl2pa.training.data import DataSplits, open_split

        key = config.data.model_dump_json()
        if key not in self._opened:
            try:
                train, val = open_split(config, "train"), open_split(config, "val")
                splits = DataSplits(train, val, tuple(train.classes))
                self._opened[key] = data_identity(splits.fingerprint, splits.classes)
            except UserError as error:
                self._opened[key] = error
        return self._opened[key]


def _changed_keys(run: RunDirectory, config: Config) -> list[str]:
    """Keys of the section `data` that identify the data and differ from the recorded ones; all if none is recorded."""
    now = _data_keys(config)
    before: dict[str, Any] = {}
    if run.config.is_file():
        before = _data_keys(load_recorded_config(run.config))
    return [key for key, value in now.items() if key not in before or before[key] != value]


_DATA_KEYS = ("data.dataset", "data.root", "data.val_root", "data.classes", "data.index")


def _data_keys(config: Config) -> dict[str, Any]:
    flat = flatten(config)
    return {key: flat[key] for key in _DATA_KEYS}


def _other_data(run: RunDirectory, config: Config, key: str, before: str, now: str) -> UserError:
    data = config.data
    is_named = key == "data.classes" and data.classes is not None
    field, value = ("data.classes", data.classes) if is_named else ("data.root", data.root)
    what = "classes" if key == "data.classes" else "images"
    message = f"{run.root} was trained on other {what} ({before}; these are {now})"
    remedy = "Use another --run-dir for a new run, or restore the old value."
    return UserError(field, value if value is None else str(value), message, remedy)
