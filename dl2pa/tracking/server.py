"""One run on one MLflow server: found or made there, and sent to, so that sending twice changes nothing.

How the SQL store treats a repeat (tried on MLflow 3.17): an identical metric row (name, step, time, value)
is kept once, NaN too; an equal param is accepted, a different one refused; tags and artifacts are replaced.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from dl2pa import envvars
from dl2pa.errors import UserError
from dl2pa.redaction import redact
from dl2pa.tracking.imports import importing
from dl2pa.tracking.model import log_model
from dl2pa.tracking.spool import Event, Identity
from dl2pa.tracking.views import set_up_experiment

_log = logging.getLogger(__name__)

RUN_TAG = "dl2pa.run_uuid"
EXPERIMENT_ID, RUN_ID = "@experiment@", "@run@"
"""What stands for MLflow's ids in a tag that is written before they are known."""
MAX_METRICS = 1000
MAX_PARAMS = 100
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "killed": "KILLED"}
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
_DEFAULTS = {
    # One request is bounded; the sender has its own back-off and sends again.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # MLflow prints to standard output, which is for our own --json line, and draws bars for each file.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Point(NamedTuple):
    """One value of one metric; ``time`` is when it was measured, in milliseconds."""

    name: str
    value: float
    time: int
    step: int


class RunDeleted(RuntimeError):
    """Someone deleted the run on the server."""


def local_uri(base: Path) -> str:
    """The address of the default local store: SQLite in ``base``, its artifacts in ``base/mlartifacts``."""
    return f"sqlite:///{base.absolute()}/mlflow.db"


def choose_uri(configured: str | None, base: Path) -> str | None:
    """Where to send: the configuration's, else MLFLOW_TRACKING_URI's, else a local store; None to spool only.

    A job on a cluster's nodes has no local store: SQLite on a shared file system locks up or breaks.
    """
    if configured == "none":
        return None
    named = configured or os.environ.get(envvars.TRACKING_URI)
    return named or (None if os.environ.get(envvars.SUPERVISED) else local_uri(base))


def set_client_defaults() -> None:
    """Bound MLflow's requests and quieten it, where the user's environment does not say otherwise.

    Called on the main thread: changing the environment beside running threads is not safe in C libraries.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


class Server:
    """A connection to one server for one run. Every method may raise whatever MLflow raises.

    Args:
        trusted: whether the user named the server; false where only a file in the run directory does.
    """

    def __init__(self, uri: str, identity: Identity, noted_run_id: str | None, *, trusted: bool) -> None:
        self._client, self._error = connect(uri)
        run = self._find_or_create_run(uri, identity, noted_run_id)
        self.run_id, self._experiment_id = str(run.info.run_id), str(run.info.experiment_id)
        self._untrusted = None if trusted else uri
        # Models go where the experiment says, which need not be where the run's own artifacts go.
        self._check_place(str(run.info.artifact_uri))
        self._check_place(str(self._client.get_experiment(self._experiment_id).artifact_location))
        self._refused = 0

    def _check_place(self, place: str) -> None:
        if self._untrusted is not None:
            _check_artifacts(self._untrusted, place)

    def take_refused(self) -> int:
        """How many entries the server refused for good since the last call."""
        refused, self._refused = self._refused, 0
        return refused

    def send_points(self, points: Sequence[Point]) -> None:
        """Send points, 1000 a call at most; one the server refuses for good is left out and counted."""
        from mlflow.entities import Metric

        for first in range(0, len(points), MAX_METRICS):
            chunk = points[first : first + MAX_METRICS]
            self._log_all("metrics", [Metric(p.name, p.value, p.time, p.step) for p in chunk])

    def send_start(self, event: Event) -> None:
        """Reopen the run for an attempt, with its new params and its tags."""
        from mlflow.entities import Param

        self._client.update_run(self.run_id, status="RUNNING")
        params = [Param(name, value) for name, value in event["params"].items()]
        for first in range(0, len(params), MAX_PARAMS):
            self._log_all("params", params[first : first + MAX_PARAMS])
        state = {
            RUN_TAG: event["run"]["run_uuid"],
            "dl2pa.attempt": str(event["a"]),
            "dl2pa.state": "running",
        }
        self.send_tags({**event["tags"], **state})

    def send_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; the last value wins."""
        from mlflow.entities import RunTag

        entities = [RunTag(name, self._with_ids(value)) for name, value in tags.items()]
        for first in range(0, len(entities), MAX_PARAMS):
            self._log_all("tags", entities[first : first + MAX_PARAMS])

    def send_inputs(self, datasets: Sequence[Mapping[str, str]]) -> None:
        """Log data sets as the run's inputs; one that is there already is kept once."""
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

    def send_artifact(self, path: Path, folder: str) -> None:
        """Upload a file or a folder, over what is there; one that is gone is counted as refused."""
        if not path.exists():
            self._refused += 1
            _log.warning("the artifact %s is gone and cannot be sent", path)
            return
        self._client.log_artifact(self.run_id, str(path), folder or None)

    def send_model(self, run_dir: Path, event: Event) -> None:
        """Log the finished model, once; one whose weights are gone is counted as refused."""
        if not (run_dir / event["path"]).exists():
            self._refused += 1
            _log.warning("the model %s is gone and cannot be sent", run_dir / event["path"])
            return
        log_model(self._client, self.run_id, run_dir, event, self._check_place)

    def send_end(self, event: Event) -> None:
        """Close the run as the attempt ended."""
        tags = {"dl2pa.state": event["status"]}
        if event.get("dropped"):
            tags["dl2pa.dropped_events"] = str(event["dropped"])
        self.send_tags(tags)
        self._client.set_terminated(
            self.run_id, status=_STATUS.get(event["status"], "FAILED"), end_time=event["t"]
        )

    def status(self) -> str:
        """The run's status on the server.

        Raises:
            RunDeleted: it was deleted there.
        """
        info = self._client.get_run(self.run_id).info
        if info.lifecycle_stage != "active":
            raise RunDeleted(f"the MLflow run {self.run_id} was deleted on the server")
        return str(info.status)

    def is_gone(self, error: Exception) -> bool:
        """Whether ``error`` says that the server does not know the run: its database was replaced."""
        return self._code(error) == "RESOURCE_DOES_NOT_EXIST"

    def _log_all(self, kind: str, entities: list[Any]) -> None:
        """One call for all; should the server refuse it, find the entity it will never take and go on."""
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
                _log.warning(
                    "MLflow refuses one of the %s, %s: %s", kind, entities[0].key, redact(str(error))
                )
                return
            middle = len(entities) // 2
            self._log_all(kind, entities[:middle])
            self._log_all(kind, entities[middle:])

    def _code(self, error: Exception) -> str:
        return str(getattr(error, "error_code", ""))

    def _find_or_create_run(self, uri: str, identity: Identity, noted: str | None) -> Any:
        """The run with our uuid. A search first: a crash or a lost answer may hide one just made."""
        experiment = ensure_experiment(self._client, uri, identity.experiment)
        run = self._carriers(experiment, identity, noted)
        if run is None and noted is not None:
            run = self._get(noted)
        if run is None:
            run = self._client.create_run(
                experiment,
                start_time=identity.created,
                run_name=identity.run_name,
                tags={RUN_TAG: identity.run_uuid},
            )
            _log.info("MLflow run %s (%s)", run.info.run_id, identity.run_name)
        if run.info.lifecycle_stage != "active":
            raise RunDeleted(f"the MLflow run {run.info.run_id} was deleted on the server")
        return run

    def _carriers(self, experiment: str, identity: Identity, noted: str | None) -> Any:
        """The run with our uuid, or None. Of doubles (a create believed lost) one is kept."""
        from mlflow.entities import ViewType

        runs = self._client.search_runs(
            [experiment], f"tags.`{RUN_TAG}` = '{identity.run_uuid}'", run_view_type=ViewType.ALL
        )
        if not runs:
            return None

        def preference(run: Any) -> tuple[bool, bool, bool, str]:
            info = run.info
            return info.run_id != noted, info.lifecycle_stage != "active", not run.data.params, info.run_id

        kept, *others = sorted(runs, key=preference)
        for other in others:
            if other.info.lifecycle_stage == "active" and not other.data.metrics and not other.data.params:
                _log.info(
                    "deleting the empty double %s of MLflow run %s", other.info.run_id, kept.info.run_id
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


def _check_artifacts(uri: str, place: str) -> None:
    """Refuse a server's choice of where this user's files go, where the user has not named the server.

    MLflow's client writes to whatever path or bucket the server says, with this user's rights.

    Raises:
        UserError: it is neither behind the server itself nor beside the run's own database.
    """
    scheme, _, rest = place.partition(":")
    database = sqlite_file(uri)
    if database is not None:
        path = Path(unquote(rest.removeprefix("//")) if scheme == "file" else place).resolve()
        allowed = path.is_relative_to(database.resolve().parent)
    else:
        allowed = scheme in ("mlflow-artifacts", "http", "https")
    if not allowed:
        remedy = f"If you trust it: --uri {redact(uri)}, or MLFLOW_TRACKING_URI={redact(uri)}."
        raise UserError("uri", redact(uri), f"would have artifacts written to {place}", remedy)


def ensure_experiment(client: Any, uri: str, name: str) -> str:
    """The id of the experiment, which is made where there is none."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            client.create_experiment(name, artifact_location=_artifact_location(uri))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
    set_up_experiment(client, experiment)
    return str(experiment.experiment_id)


def connect(uri: str) -> tuple[Any, type[Exception]]:
    """MLflow's client and the class of its errors."""
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


def check_uri(field: str, uri: str) -> None:
    """Refuse what is no address of a tracking store.

    Raises:
        UserError: another scheme than a server's or a database's; `none`, which names no place to send to.
    """
    scheme, colon, _ = uri.partition(":")
    if not colon or scheme.split("+")[0] not in _SCHEMES:
        remedy = f"Give an address that begins with one of {', '.join(f'{s}:' for s in _SCHEMES)}."
        raise UserError(field, redact(uri), "is no address of a tracking server or database", remedy)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for any other."""
    scheme, _, rest = uri.partition(":///")
    return Path(rest.partition("?")[0]) if scheme.split("+")[0] == "sqlite" and rest else None


def _artifact_location(uri: str) -> str | None:
    database = sqlite_file(uri)
    return (database.absolute().parent / "mlartifacts").as_uri() if database is not None else None
