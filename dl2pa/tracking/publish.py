"""Publish a folder in MLflow as the artifacts of a separate run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dl2pa.errors import UserError
from dl2pa.redaction import redact
from dl2pa.tracking.description import NOTE_TAG
from dl2pa.tracking.sanitize import MAX_TAG, clean_name
from dl2pa.tracking.server import choose_uri, connect, ensure_experiment, set_client_defaults

_TAG = "dl2pa.published"


def publish_folder(
    folder: Path,
    uri: str | None,
    base: Path,
    experiment: str,
    name: str,
    *,
    description: str,
    metrics: Mapping[str, float],
) -> str:
    """Log the folder as artifacts of the run `name` of an experiment; existing artifacts are replaced.

    Args:
        description: Markdown that MLflow shows on the page of the run; cut at a line if it is too long for a tag.
        metrics: values by name; those of an earlier report that are missing here remain.
        uri: the server or store; by default MLFLOW_TRACKING_URI, otherwise the local store in `base`.
        base: folder of the run directories.

    Returns:
        MLflow's id of the run.

    Raises:
        UserError: there is no server, or sending to it fails.
    """
    server = choose_uri(uri, base)
    if server is None:
        raise UserError("--uri", uri, "names no tracking server", "Give --uri, or set MLFLOW_TRACKING_URI.")
    set_client_defaults()
    try:
        client, _ = connect(server)
        experiment_id = ensure_experiment(client, server, experiment)
        runs = client.search_runs([experiment_id], f"tags.`{_TAG}` = '{name}'")
        run = runs[0] if runs else client.create_run(experiment_id, run_name=name, tags={_TAG: name})
        client.log_artifacts(run.info.run_id, str(folder))
        client.set_tag(run.info.run_id, NOTE_TAG, _fitting(description))
        for metric, value in metrics.items():
            client.log_metric(run.info.run_id, clean_name(metric), value)
        client.set_terminated(run.info.run_id)
    except Exception as error:  # any error of MLflow or its transport
        message = f"did not accept the folder: {redact(f'{type(error).__name__}: {error}')}"
        raise UserError("--uri", redact(server), message, "Check that the server answers.") from None
    return str(run.info.run_id)


def _fitting(text: str) -> str:
    """Remove lines at the end of a text that is too long for a tag."""
    if len(text) <= MAX_TAG:
        return text
    rest = "\n\nThe rest is in the artifact `report.md`."
    return text[: MAX_TAG - len(rest)].rpartition("\n")[0] + rest
