"""A run as it lies on disk: its configuration and its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dl2pa.config import Config, load_config
from dl2pa.errors import UserError
from dl2pa.inference import Classifier, load_classifier, save_classifier
from dl2pa.training.checkpoint import CheckpointStore
from dl2pa.training.data import groups_of, open_split
from dl2pa.training.learner import Learner
from dl2pa.training.model import build_trainee, placement_in
from dl2pa.training.processes import join_world
from dl2pa.training.progress import Progress
from dl2pa.training.rundir import RunDirectory


def load_run_config(path: Path, overrides: Sequence[str]) -> Config:
    """The resolved configuration of a run.

    Raises:
        UserError: the folder is not a run directory.
    """
    run = RunDirectory(path)
    if not run.config.is_file():
        raise UserError("run", str(path), "is not a run directory", "Give the folder `dl2pa train` wrote.")
    return load_config(run.config, overrides)


def load_weights(path: Path, config: Config, which: str) -> Classifier:
    """Model of a run: `final`, or from the `latest` or `best` checkpoint."""
    return load_classifier(model_file(path, config, which))


def model_file(path: Path, config: Config, which: str) -> Path:
    """File of the wanted weights; from a checkpoint it is written beside it.

    Raises:
        UserError: the run has no such weights.
    """
    run = RunDirectory(path)
    if which == "final":
        if not run.model.is_file():
            raise UserError(
                "run",
                str(path),
                "is not finished",
                "Use --checkpoint latest, or let `dl2pa train` finish it.",
            )
        return run.model
    store = CheckpointStore(run.checkpoints, config.checkpoint.keep, config.checkpoint.keep_best)
    state = store.load(which)
    if state is None:
        raise UserError("run", str(path), "has no checkpoint yet", "Train it first.")
    train = open_split(config, "train")
    classes = tuple(train.classes)
    learner = Learner(config, build_trainee(config, len(classes), placement_in(state)), join_world(config), 1)
    learner.load(state)
    at = Progress(**state["progress"])
    cut_short = at.step > 0 and bool(at.history) and at.history[-1]["step"] == at.global_step
    learner.begin_epoch(at.epoch + cut_short)  # as the validation at this step did
    target = path / f"model-{which}.safetensors"
    save_classifier(target, learner.evaluated, config, classes, groups_of(config, train))
    return target
