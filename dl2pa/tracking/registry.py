"""A run's logged model as a version of a registered one, under aliases such as ``candidate`` and ``champion``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl2pa.errors import UserError
from dl2pa.redaction import redact
from dl2pa.rundir import RunDirectory
from dl2pa.tracking.filelock import exclusive_lock
from dl2pa.tracking.model import log_model
from dl2pa.tracking.server import connect

_NO_REGISTRY = ("ENDPOINT_NOT_FOUND", "FEATURE_DISABLED", "NOT_IMPLEMENTED")
_MOST = 255


@dataclass(frozen=True)
class Registered:
    """A version in the registry."""

    name: str
    version: str
    created: bool
    """False where the run's model was registered under this name before."""
    aliases: list[str]
    """All that the version has now."""
    moved_from: dict[str, str]
    """For each alias given that another version had: that version."""
    model_id: str
    uri: str
    """For `mlflow models serve -m`."""


def check_names(name: str, aliases: Sequence[str]) -> None:
    """Refuse what MLflow's registry would, before anything is made there.

    Raises:
        UserError: naming the option.
    """
    if name.strip() in ("", ".", "..") or len(name) > _MOST or re.search(r"[/:'\"\x00-\x1f]", name):
        remedy = f"Choose up to {_MOST} characters without slashes, colons and quotes."
        raise UserError("--name", name, "cannot name a registered model", remedy)
    for alias in aliases:
        reserved = alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias)
        if reserved or len(alias) > _MOST or not re.fullmatch(r"[\w\-]+", alias, re.ASCII):
            remedy = "Choose letters, digits, `_` and `-`; `latest` and `v1` mean versions already."
            raise UserError("--alias", alias, "cannot be an alias", remedy)


def register_model(
    uri: str, run_id: str, run_dir: Path, model: Mapping[str, Any], name: str, aliases: Sequence[str]
) -> Registered:
    """Register the run's model, once, and point the aliases to it. Doing it again changes nothing.

    Args:
        run_id: MLflow's id of the run on this server.
        model: as ``log_model`` takes it; logged where the server does not have it.

    Raises:
        UserError: a name that cannot be, or a server that has no registry, does not answer or refuses.
    """
    check_names(name, aliases)
    client, error_class = connect(uri)
    try:
        with exclusive_lock(RunDirectory(run_dir).sync_lock):  # as whoever sends the spool
            model_id = log_model(client, run_id, run_dir, dict(model))
        return _register(client, error_class, run_id, model_id, name, aliases)
    except Exception as error:  # whatever MLflow and its transports raise
        code = str(getattr(error, "error_code", ""))
        text = redact(f"{type(error).__name__}: {error}")
        if code in _NO_REGISTRY or "UnsupportedModelRegistry" in type(error).__name__:
            remedy = "Give a server that has one; MLFLOW_REGISTRY_URI names a registry elsewhere."
            raise UserError("--uri", redact(uri), f"has no model registry ({text})", remedy) from None
        remedy = "See whether the server answers and allows it."
        raise UserError("--uri", redact(uri), f"did not register the model: {text}", remedy) from None


def _register(
    client: Any,
    error_class: type[Exception],
    run_id: str,
    model_id: str,
    name: str,
    aliases: Sequence[str],
) -> Registered:
    _ensure_name(client, error_class, name)
    model = client.get_logged_model(model_id)
    # Not `models:/ID` as the source: an SQL store would look that up at MLflow's global address (3.17).
    version = _version_of(client, name, model.artifact_location)
    created = version is None
    if version is None:
        tags = {**model.tags, **{f"dl2pa.{key}": value for key, value in model.params.items()}}
        made = client.create_model_version(
            name, model.artifact_location, run_id, tags=tags, model_id=model_id
        )
        version = str(made.version)
    before = dict(client.get_registered_model(name).aliases)
    for alias in aliases:
        if str(before.get(alias)) != version:
            client.set_registered_model_alias(name, alias, version)
    now = client.get_registered_model(name).aliases
    return Registered(
        name=name,
        version=version,
        created=created,
        aliases=sorted(alias for alias, at in now.items() if str(at) == version),
        moved_from={a: str(before[a]) for a in aliases if a in before and str(before[a]) != version},
        model_id=model_id,
        uri=f"models:/{name}@{aliases[0]}" if aliases else f"models:/{name}/{version}",
    )


def _ensure_name(client: Any, error_class: type[Exception], name: str) -> None:
    try:
        client.create_registered_model(name)
    except error_class as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_of(client: Any, name: str, source: str) -> str | None:
    """The version under this name made from the logged model that lies at `source`."""
    quoted = name.replace("'", "''")
    found = [int(v.version) for v in client.search_model_versions(f"name = '{quoted}'") if v.source == source]
    return str(max(found)) if found else None
