"""Configuration and weights of an existing run, from its model file or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dl2pa.config import Config, load_recorded_config
from dl2pa.errors import UserError
from dl2pa.model.inference import Classifier, load_classifier
from dl2pa.model.model import build_model, prototypes_of_checkpoint
from dl2pa.model.saved import save_classifier
from dl2pa.rundir import RunDirectory
from dl2pa.training.checkpoint import CheckpointStore
from dl2pa.training.data import groups_of, open_split
from dl2pa.training.distributed import join_world
from dl2pa.training.progress import Progress
from dl2pa.training.train_state import TrainState


def load_run_config(path: Path, overrides: Sequence[str]) -> Config:
    """Load the resolved configuration of a run.

    Raises:
        UserError: the folder is not a run directory.
    """
    run = RunDirectory(path)
    if not run.config.is_file():
        raise UserError("run", str(path), "is not a run directory", "Give a folder that `dl2pa train` wrote.")
    return load_recorded_config(run.config, overrides)


def load_weights(path: Path, config: Config, which: str) -> Classifier:
    """Load a run's model: `final`, or from the `latest` or `best` checkpoint."""
    return load_classifier(model_file(path, config, which))


def model_file(path: Path, config: Config, which: str) -> Path:
    """Return the run's `final` model file, or write one from its `latest` or `best` checkpoint.

    Raises:
        UserError: the run has no such weights.
    """
    run = RunDirectory(path)
    if which == "final":
        if not run.model.is_file():
            remedy = "Use --checkpoint latest, or finish the run with `dl2pa train`."
            raise UserError("run", str(path), "is not finished", remedy)
        return run.model
    store = CheckpointStore(run.checkpoints, config.checkpoint.keep, config.checkpoint.keep_best)
    state = store.load(which)
    if state is None:
        raise UserError("run", str(path), "has no checkpoint yet", "Train it with `dl2pa train`.")
    train = open_split(config, "train")
    classes = tuple(train.classes)
    train_state = TrainState(
        config, build_model(config, len(classes), prototypes_of_checkpoint(state)), join_world(config), 1
    )
    train_state.load(state)
    progress = Progress(**state["progress"])
    # The same epoch as the validation at this step used, also where `train.max_steps` ended inside an epoch.
    inside_epoch = progress.step > 0 and progress.validated
    train_state.begin_epoch(progress.epoch + inside_epoch)
    target = run.checkpoint_model(which)
    save_classifier(target, train_state.evaluated, config, classes, groups_of(config, train))
    return target
