"""Configurations and model file of an existing run. Imports no torch, so that a wrong folder is refused at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dl2pa.config import Config, dump_config, load_recorded_config, parse_config
from dl2pa.config.load import read_recorded
from dl2pa.errors import UserError
from dl2pa.osutil import write_atomically
from dl2pa.redaction import HIDDEN
from dl2pa.rundir import RunDirectory, checkpoint_steps


def load_run_config(path: Path, overrides: Sequence[str]) -> Config:
    """Load the resolved configuration of a run.

    Raises:
        UserError: the folder is not a run directory.
    """
    run = RunDirectory(path)
    if not run.config.is_file():
        raise UserError("run", str(path), "is not a run directory", "Give a folder that `dl2pa train` wrote.")
    return load_recorded_config(run.config, overrides)


def check_weights(path: Path, which: str) -> None:
    """Check that a run has its `final` model file, or a checkpoint for `latest` and `best`.

    Raises:
        UserError: the run has no such weights.
    """
    run = RunDirectory(path)
    if which == "final":
        if not run.model.is_file():
            remedy = "Use --checkpoint latest, or finish the run with `dl2pa train`."
            raise UserError("run", str(path), "is not finished", remedy)
    elif not checkpoint_steps(run.checkpoints):
        raise no_checkpoint(path)


def restore_submission(run: RunDirectory) -> None:
    """Replace a submitted configuration that a job refused by the last one that a job accepted, if there is one.

    The accepted one contains no secrets; they are taken from the refused one.
    """
    if run.accepted_config.is_file() and run.submitted_config.is_file():
        accepted = load_recorded_config(run.accepted_config).model_dump(mode="json")
        tree = _with_secrets(accepted, read_recorded(run.submitted_config))
        write_atomically(run.submitted_config, dump_config(parse_config(tree)), private=True)


def _with_secrets(redacted: Any, original: Any) -> Any:
    """Replace redacted texts by those at the same place of another tree."""
    if isinstance(redacted, dict):
        others = original if isinstance(original, dict) else {}
        return {key: _with_secrets(value, others.get(key)) for key, value in redacted.items()}
    return original if isinstance(redacted, str) and HIDDEN in redacted else redacted


def no_checkpoint(path: Path) -> UserError:
    """Error of a run without a usable checkpoint."""
    return UserError("run", str(path), "has no checkpoint yet", "Train it with `dl2pa train`.")
