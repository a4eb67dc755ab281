"""Register the logged model of a run as a model version with aliases such as ``candidate`` and ``champion``."""

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
_MAX_LENGTH = 255


@dataclass(frozen=True)
class Registered:
    """A model version in the registry."""

    name: str
    version: str
    created: bool
    """False if the model was already registered under this name."""
    aliases: list[str]
    """All current aliases of the version."""
    moved_from: dict[str, str]
    """For each given alias that another version had: that version."""
    model_id: str
    uri: str
    """Argument of `mlflow models serve -m`."""


def check_names(name: str, aliases: Sequence[str]) -> None:
    """Refuse names that MLflow's registry rejects, before the registry is changed.

    Raises:
        UserError: naming the invalid option.
    """
    if name.strip() in ("", ".", "..") or len(name) > _MAX_LENGTH or re.search(r"[/:'\"\x00-\x1f]", name):
        remedy = f"Use up to {_MAX_LENGTH} characters without slashes, colons and quotes."
        raise UserError("--name", name, "is not a valid name of a registered model", remedy)
    for alias in aliases:
        reserved = alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias)
        if reserved or len(alias) > _MAX_LENGTH or not re.fullmatch(r"[\w\-]+", alias, re.ASCII):
            remedy = (
                "Use letters, digits, `_` and `-`; names such as `latest` and `v1` are reserved for versions."
            )
            raise UserError("--alias", alias, "is not a valid alias", remedy)


def register_model(
    uri: str, run_id: str, run_dir: Path, model: Mapping[str, Any], name: str, aliases: Sequence[str]
) -> Registered:
    """Register the model of a run, once, and set the aliases to it; repeating this changes nothing.

    Args:
        run_id: MLflow's id of the run on this server.
        model: event for ``log_model``; the model is logged if it is not on the server.

    Raises:
        UserError: a name is invalid, or the server has no registry, does not answer or rejects the request.
    """
    check_names(name, aliases)
    client, error_class = connect(uri)
    try:
        with exclusive_lock(RunDirectory(run_dir).sync_lock):
            model_id = log_model(client, run_id, run_dir, dict(model))
        return _register(client, error_class, run_id, model_id, name, aliases)
    except Exception as error:  # any error of MLflow or its transport
        code = str(getattr(error, "error_code", ""))
        text = redact(f"{type(error).__name__}: {error}")
        if code in _NO_REGISTRY or "UnsupportedModelRegistry" in type(error).__name__:
            remedy = "Use a server with a registry, or set MLFLOW_REGISTRY_URI to another registry."
            raise UserError("--uri", redact(uri), f"has no model registry ({text})", remedy) from None
        remedy = "Check that the server answers and that you have permission."
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
    # The source is not `models:/ID`, because an SQL store resolves it at MLflow's global URI (3.17).
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
    """Return the latest version of a registered model with artifacts at `source`; None if there is none."""
    quoted = name.replace("'", "''")
    versions = client.search_model_versions(f"name = '{quoted}'")
    numbers = [int(v.version) for v in versions if v.source == source]
    return str(max(numbers)) if numbers else None
