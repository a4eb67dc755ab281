"""The run of a search in MLflow, whose children are the trials."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dl2pa.config import Config
from dl2pa.config.tracking import sync_command
from dl2pa.rundir import RunDirectory
from dl2pa.search.journal import FAILED, State
from dl2pa.tracking import Tracker
from dl2pa.tracking.description import NOTE_TAG
from dl2pa.tracking.server import PARENT_TAG, parent_reference
from dl2pa.tracking.spool import read_events

SEARCH_TAG = "search"
_WAIT_S = 20.0
_POLL_S = 0.1


class SearchTracker:
    """Records a search as a run of its own: parameters of the search, and the value of each trial by its number.

    Args:
        config: configuration of a trial; its section `tracking` names the experiment.
        uri: the MLflow server or store; None keeps the events in the folder of the search.
    """

    def __init__(self, folder: Path, name: str, config: Config, uri: str | None) -> None:
        spool = RunDirectory(folder).spool
        starts = sum(entry.event is not None and entry.event["e"] == "start" for entry in read_events(spool))
        self._name = name
        self._uri = uri
        self._tracker = Tracker(
            folder,
            enabled=True,
            uri=uri,
            experiment=config.tracking.experiment,
            run_name=name,
            attempt=starts + 1,
            drain_seconds=10,
            sync_command=sync_command(config.tracking.uri, folder.absolute()),
        )

    def start(self, params: Mapping[str, Any]) -> None:
        """Record the start of a command; wait some seconds until the server has the parent run of the trials."""
        tags = {SEARCH_TAG: self._name, NOTE_TAG: f"Search `{self._name}`; its trials are the runs below it."}
        self._tracker.start({"search": params}, tags)
        deadline = time.monotonic() + (_WAIT_S if self._uri is not None else 0.0)
        while self._tracker.enabled and self._tracker.mlflow_run_id is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def tags(self, number: int) -> dict[str, str]:
        """Return the tags of a trial."""
        uuid = self._tracker.run_uuid
        parent = {} if uuid is None else {PARENT_TAG: parent_reference(uuid, self._name)}
        return {SEARCH_TAG: self._name, "trial": str(number), **parent}

    def ended(self, state: State, *, maximize: bool) -> None:
        """Record the trials that have ended; those recorded before keep their values."""
        best: float | None = None
        for count, trial in enumerate(state.ended, 1):
            if trial.value is None or trial.state == FAILED:
                continue
            self._tracker.metrics(trial.number, {"search/value": trial.value})
            if trial.state == "finished":
                choose = max if maximize else min
                best = trial.value if best is None else choose(best, trial.value)
            if best is not None:
                self._tracker.metrics(count, {"search/best": best})

    def finish(self, description: str, *, finished: bool) -> None:
        """Record the description of the results and the end of this command."""
        self._tracker.tags({NOTE_TAG: description})
        self._tracker.finish("finished" if finished else "stopped")


def recorded_keys(search_keys: Mapping[str, Any], trials: int) -> dict[str, Any]:
    """Return what the run of a search records as its params."""
    parameters: Sequence[tuple[str, Any]] = list(dict(search_keys["parameters"]).items())
    rest = {key: value for key, value in search_keys.items() if key != "parameters"}
    return {**rest, "trials": trials, "parameters": dict(parameters)}
