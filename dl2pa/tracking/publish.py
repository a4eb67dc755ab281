"""A folder of files in MLflow under a run of its own, outside any training."""

from __future__ import annotations

from pathlib import Path

from dl2pa.errors import UserError
from dl2pa.redaction import redact
from dl2pa.tracking.server import choose_uri, connect, ensure_experiment, set_client_defaults

_TAG = "dl2pa.published"


def publish_folder(folder: Path, uri: str | None, base: Path, experiment: str, name: str) -> str:
    """Log everything in the folder as artifacts of the experiment's run of this name, over what it had.

    Args:
        uri: the server or store; by default MLFLOW_TRACKING_URI's, else the local store in `base`.
        base: folder of the runs.

    Returns:
        MLflow's id of the run.

    Raises:
        UserError: no server, or one that does not take it.
    """
    where = choose_uri(uri, base)
    if where is None:
        raise UserError("--uri", uri, "names no tracking server", "Give --uri, or set MLFLOW_TRACKING_URI.")
    set_client_defaults()
    try:
        client, _ = connect(where)
        place = ensure_experiment(client, where, experiment)
        found = client.search_runs([place], f"tags.`{_TAG}` = '{name}'")
        run = found[0] if found else client.create_run(place, run_name=name, tags={_TAG: name})
        client.log_artifacts(run.info.run_id, str(folder))
        client.set_terminated(run.info.run_id)
    except Exception as error:  # whatever MLflow and its transports raise
        message = f"did not take it: {redact(f'{type(error).__name__}: {error}')}"
        raise UserError("--uri", redact(where), message, "See whether the server answers.") from None
    return str(run.info.run_id)
