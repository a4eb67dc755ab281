"""Append results to the record of a run that has ended, such as evaluations on further data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dl2pa.errors import UserError
from dl2pa.redaction import redact
from dl2pa.rundir import RunDirectory
from dl2pa.tracking.copies import detach_copy
from dl2pa.tracking.filelock import exclusive_lock
from dl2pa.tracking.sanitize import clean_name, clean_tags
from dl2pa.tracking.spool import Spool, load_identity, read_events
from dl2pa.tracking.sync import sync


@dataclass(frozen=True)
class Results:
    """Results of one evaluation.

    Attributes:
        step: step of the evaluated model.
        metrics: values by name; a name and step that the run already has are not recorded again.
        tags: tags to search runs by.
        datasets: as in ``Tracker.inputs``.
        artifacts: files and folders in the run directory, relative to it.
        folder: folder among the artifacts of the run.
    """

    step: int
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    datasets: Sequence[Mapping[str, str]]
    artifacts: Sequence[str]
    folder: str


def append_results(run_dir: Path, results: Results) -> bool:
    """Append results to the spool of a run whose process has ended, once; return whether they were new.

    Raises:
        Busy: another process is sending or changing the spool.
        OSError: the spool cannot be written.
    """
    run = RunDirectory(run_dir)
    detach_copy(run_dir)
    with exclusive_lock(run.sync_lock):
        missing = _missing(run.spool, results)
        if not missing:
            return False
        spool = Spool(run_dir, int(run.status().get("attempt", 1)))
        try:
            datasets = [{name: redact(value) for name, value in one.items()} for one in results.datasets]
            spool.event("inputs", datasets=datasets)
            spool.event("tags", tags=clean_tags(results.tags))
            for path in results.artifacts:
                spool.event("artifact", path=path, folder=results.folder)
            spool.metrics(results.step, missing)  # last: `_missing` finds none if all was written
            spool.flush()
            if spool.take_waiting():
                raise OSError(f"{run.spool} cannot be written")
        finally:
            spool.close()
    return True


def _missing(spool: Path, results: Results) -> dict[str, float]:
    """Metrics that the spool does not contain at this step."""
    missing = {clean_name(name): value for name, value in results.metrics.items()}
    for entry in read_events(spool):
        event = entry.event
        if event is not None and event["e"] == "metrics" and event["step"] == results.step:
            missing = {name: value for name, value in missing.items() if name not in event["v"]}
    return missing


def is_tracked(run_dir: Path) -> bool:
    """Whether a run has a record in tracking."""
    return load_identity(run_dir) is not None and RunDirectory(run_dir).spool.exists()


def send_appended(run_dir: Path, recorded: str) -> str | None:
    """Try once to send what the server does not have; return why not, None if everything was sent.

    Args:
        recorded: the server that the run's configuration names.
    """
    try:
        return sync(run_dir, recorded=recorded, tries=1).error
    except UserError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
