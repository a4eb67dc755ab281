"""Find or create a run on an MLflow server and send events to it; sending twice changes nothing.

Duplicates in the SQL store (tested with MLflow 3.17): an identical metric row (name, step, time, value), also NaN, is
kept once; an equal param is accepted and a different one rejected; tags and artifacts are replaced.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from dl2pa import envvars
from dl2pa.errors import UserError
from dl2pa.redaction import redact
from dl2pa.tracking.imports import importing
from dl2pa.tracking.model import log_model
from dl2pa.tracking.refusal import ExperimentDeleted
from dl2pa.tracking.spool import Event, Identity
from dl2pa.tracking.views import set_up_experiment

_log = logging.getLogger(__name__)

RUN_TAG = "dl2pa.run_uuid"
COPIED_TAG = "dl2pa.copied_from"
"""run_uuid of the run whose directory was copied."""
EXPERIMENT_ID, RUN_ID = "@experiment@", "@run@"
"""Placeholders for MLflow ids in tag values that are written before the ids are known."""
PARENT_TAG = "mlflow.parentRunId"
"""MLflow's tag with the id of the run that a run is shown below."""
MAX_METRICS = 1000
MAX_PARAMS = 100
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "killed": "KILLED"}
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")
_DEFAULTS = {
    # Requests are bounded; the sender retries with back-off.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # MLflow prints URLs to standard output, which is reserved for the --json line, and progress bars.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Point(NamedTuple):
    """One value of one metric; ``time`` is the time of measurement in milliseconds."""

    name: str
    value: float
    time: int
    step: int


def parent_reference(run_uuid: str, name: str) -> str:
    """Value of `PARENT_TAG` that names the parent by its own id; each server replaces it by MLflow's.

    Args:
        run_uuid: see `Identity`.
        name: name of the parent, in case it has to be created.
    """
    return f"@parent@{run_uuid}@{name}"


class RunDeleted(RuntimeError):
    """The run was deleted on the server."""


def local_uri(base: Path) -> str:
    """URI of the default local store: SQLite in ``base``, with artifacts in ``base/mlartifacts``."""
    return f"sqlite:///{base.absolute()}/mlflow.db"


def choose_uri(configured: str | None, base: Path) -> str | None:
    """Choose the server: the configured one, MLFLOW_TRACKING_URI, or a local store; None for the spool only.

    A SLURM job uses no local store, because SQLite on a shared file system hangs or fails.
    """
    if configured == "none":
        return None
    uri = configured or os.environ.get(envvars.TRACKING_URI)
    return uri or (None if os.environ.get(envvars.SUPERVISED) else local_uri(base))


def set_client_defaults() -> None:
    """Set MLflow's time limits and output in the environment, without overriding variables set by the user.

    Call on the main thread: changing the environment while other threads run is not safe in C libraries.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


class Server:
    """Connection to one server for one run. Every method may raise any error of MLflow.

    Args:
        last_run_id: id of the run on this server in the sync state, if any.
        trusted: whether the user named the server; False if only a file in the run directory names it.
    """

    def __init__(self, uri: str, identity: Identity, last_run_id: str | None, *, trusted: bool) -> None:
        self._client, self._error = connect(uri)
        self._run_uuid = identity.run_uuid
        run = self._find_or_create_run(uri, identity, last_run_id)
        self.run_id, self._experiment_id = str(run.info.run_id), str(run.info.experiment_id)
        self._untrusted = None if trusted else uri
        # Models use the location of the experiment, which can differ from that of the run.
        self._check_location(str(run.info.artifact_uri))
        self._check_location(str(self._client.get_experiment(self._experiment_id).artifact_location))
        self._refused = 0

    def _check_location(self, location: str) -> None:
        if self._untrusted is not None:
            _check_artifacts(self._untrusted, location)

    def pop_refused(self) -> int:
        """Return the number of entries that the server rejected permanently since the last call."""
        refused, self._refused = self._refused, 0
        return refused

    def send_points(self, points: Sequence[Point]) -> None:
        """Send points, at most 1000 per request; a point that the server rejects is counted and skipped."""
        from mlflow.entities import Metric

        for first in range(0, len(points), MAX_METRICS):
            chunk = points[first : first + MAX_METRICS]
            self._log_all("metrics", [Metric(p.name, p.value, p.time, p.step) for p in chunk])

    def send_start(self, event: Event) -> None:
        """Set the run to RUNNING for an attempt and send its new params and tags."""
        from mlflow.entities import Param

        self._client.update_run(self.run_id, status="RUNNING")
        params = [Param(name, value) for name, value in event["params"].items()]
        for first in range(0, len(params), MAX_PARAMS):
            self._log_all("params", params[first : first + MAX_PARAMS])
        state = {
            RUN_TAG: self._run_uuid,
            "dl2pa.attempt": str(event["a"]),
            "dl2pa.state": "running",
        }
        self.send_tags({**event["tags"], **state})

    def send_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; the last value wins."""
        from mlflow.entities import RunTag

        entities = [
            RunTag(name, self._parent_id(value) if name == PARENT_TAG else self._with_ids(value))
            for name, value in tags.items()
        ]
        for first in range(0, len(entities), MAX_PARAMS):
            self._log_all("tags", entities[first : first + MAX_PARAMS])

    def send_inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Log data sets as inputs of the run; MLflow keeps duplicates once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(d["name"], d["digest"], "dl2pa", d["source"], profile=d["profile"]),
                [InputTag("mlflow.data.context", d["context"])],
            )
            for d in datasets
        ]
        self._client.log_inputs(self.run_id, inputs)

    def _with_ids(self, value: str) -> str:
        return value.replace(EXPERIMENT_ID, self._experiment_id).replace(RUN_ID, self.run_id)

    def _parent_id(self, value: str) -> str:
        """Return MLflow's id of a parent; see `parent_reference`. It is created if its own events are sent later."""
        if not value.startswith("@parent@"):
            return value
        run_uuid, _, name = value.removeprefix("@parent@").partition("@")
        if not re.fullmatch(r"[0-9a-f]{32}", run_uuid):  # it is inserted into a query to the server
            return value
        parent = self._find_run(self._experiment_id, Identity(run_uuid, "", name, 0), None)
        if parent is None:
            tags = {RUN_TAG: run_uuid}
            parent = self._client.create_run(self._experiment_id, run_name=name, tags=tags)
        return str(parent.info.run_id)

    def send_artifact(self, path: Path, folder: str) -> None:
        """Upload a file or folder and replace the existing one; a missing file is counted as refused."""
        if not path.exists():
            self._refused += 1
            _log.warning("the artifact %s no longer exists and is not sent", path)
            return
        self._client.log_artifact(self.run_id, str(path), folder or None)

    def send_model(self, run_dir: Path, event: Event) -> None:
        """Log the finished model, once; missing weights are counted as refused."""
        if not (run_dir / event["path"]).exists():
            self._refused += 1
            _log.warning("the model %s no longer exists and is not sent", run_dir / event["path"])
            return
        log_model(self._client, self.run_id, run_dir, event, self._check_location)

    def send_end(self, event: Event) -> None:
        """End the run with the status of the attempt."""
        tags = {"dl2pa.state": event["status"]}
        if event.get("dropped"):
            tags["dl2pa.dropped_events"] = str(event["dropped"])
        self.send_tags(tags)
        self._client.set_terminated(
            self.run_id, status=_STATUS.get(event["status"], "FAILED"), end_time=event["t"]
        )

    def status(self) -> str:
        """Return the status of the run on the server.

        Raises:
            RunDeleted: the run was deleted.
        """
        info = self._client.get_run(self.run_id).info
        if info.lifecycle_stage != "active":
            raise RunDeleted(f"the MLflow run {self.run_id} was deleted on the server")
        return str(info.status)

    def is_gone(self, error: Exception) -> bool:
        """Return whether the server does not know the run, because its database was replaced."""
        return self._code(error) == "RESOURCE_DOES_NOT_EXIST"

    def _log_all(self, kind: str, entities: list[Any]) -> None:
        """Send all entities in one request; if it is rejected, bisect to skip only the invalid entities."""
        if not entities:
            return
        try:
            self._client.log_batch(self.run_id, **{kind: entities}, synchronous=True)
        except self._error as error:
            if self._code(error) not in _REFUSALS:
                raise
            self.status()
            if len(entities) == 1:
                self._refused += 1
                _log.warning("MLflow rejected %s of %s: %s", entities[0].key, kind, redact(str(error)))
                return
            middle = len(entities) // 2
            self._log_all(kind, entities[:middle])
            self._log_all(kind, entities[middle:])

    def _code(self, error: Exception) -> str:
        return str(getattr(error, "error_code", ""))

    def _find_or_create_run(self, uri: str, identity: Identity, last_run_id: str | None) -> Any:
        """Return the run with this uuid. Search first: after a crash or a lost response, the run may exist."""
        experiment = ensure_experiment(self._client, uri, identity.experiment)
        run = self._find_run(experiment, identity, last_run_id)
        if run is None and last_run_id is not None:
            run = self._get(last_run_id)
        if run is None:
            copied = {COPIED_TAG: identity.copied_from} if identity.copied_from else {}
            run = self._client.create_run(
                experiment,
                start_time=identity.created,
                run_name=identity.run_name,
                tags={RUN_TAG: identity.run_uuid, **copied},
            )
            _log.info("MLflow run %s (%s)", run.info.run_id, identity.run_name)
        if run.info.lifecycle_stage != "active":
            raise RunDeleted(f"the MLflow run {run.info.run_id} was deleted on the server")
        return run

    def _find_run(self, experiment: str, identity: Identity, last_run_id: str | None) -> Any:
        """Return the run with this uuid, or None. Empty duplicates (from lost responses) are deleted."""
        from mlflow.entities import ViewType

        runs = self._client.search_runs(
            [experiment], f"tags.`{RUN_TAG}` = '{identity.run_uuid}'", run_view_type=ViewType.ALL
        )
        if not runs:
            return None

        def preference(run: Any) -> tuple[bool, bool, bool, str]:
            info = run.info
            return (
                info.run_id != last_run_id,
                info.lifecycle_stage != "active",
                not run.data.params,
                info.run_id,
            )

        kept, *others = sorted(runs, key=preference)
        for other in others:
            if other.info.lifecycle_stage == "active" and not other.data.metrics and not other.data.params:
                _log.info(
                    "deleting %s, empty duplicate of MLflow run %s", other.info.run_id, kept.info.run_id
                )
                self._client.delete_run(other.info.run_id)
        return kept

    def _get(self, run_id: str) -> Any:
        try:
            return self._client.get_run(run_id)
        except self._error as error:
            if self.is_gone(error):
                return None
            raise


def _check_artifacts(uri: str, location: str) -> None:
    """Refuse an artifact location given by a server that the user has not named.

    MLflow's client writes to any path or bucket that the server returns, with the permissions of this user.

    Raises:
        UserError: the location is neither on the server itself nor in the folder of its database.
    """
    scheme, _, rest = location.partition(":")
    database = sqlite_file(uri)
    if database is not None:
        path = Path(unquote(rest.removeprefix("//")) if scheme == "file" else location).resolve()
        allowed = path.is_relative_to(database.resolve().parent)
    else:
        allowed = scheme in ("mlflow-artifacts", "http", "https")
    if not allowed:
        remedy = (
            f"If you trust the server, give --uri {redact(uri)}, or set MLFLOW_TRACKING_URI={redact(uri)}."
        )
        raise UserError("uri", redact(uri), f"would write artifacts to {location}", remedy)


def ensure_experiment(client: Any, uri: str, name: str) -> str:
    """Return the id of an experiment; create the experiment if it does not exist."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            client.create_experiment(name, artifact_location=_artifact_location(uri))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage != "active":
        raise ExperimentDeleted(f"the experiment {name} (id {experiment.experiment_id}) was deleted")
    set_up_experiment(client, experiment)
    return str(experiment.experiment_id)


def connect(uri: str) -> tuple[Any, type[Exception]]:
    """Return MLflow's client and its exception class."""
    database = sqlite_file(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    with importing():
        import mlflow
        from mlflow.exceptions import MlflowException

        importlib.import_module("mlflow.entities")
        if not uri.startswith("http"):
            importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    return mlflow.MlflowClient(tracking_uri=uri), MlflowException


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite store; None for other stores."""
    scheme, _, rest = uri.partition(":///")
    return Path(rest.partition("?")[0]) if scheme.split("+")[0] == "sqlite" and rest else None


def _artifact_location(uri: str) -> str | None:
    database = sqlite_file(uri)
    return (database.absolute().parent / "mlartifacts").as_uri() if database is not None else None
