"""Load a model once and evaluate it on the validation split or on named sets, on every rank alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.evaluation.ranks import Job
from dl2pa.evaluation.sets import SET, LabeledSet, NamedFolder, evaluate_set, label_sets, open_sets
from dl2pa.evaluation.sizes import check_image_size
from dl2pa.model.compose import join_frozen
from dl2pa.model.inference import Classifier, load_classifier
from dl2pa.recorded_run import load_run_config
from dl2pa.training.data import build_eval_pipeline, open_split
from dl2pa.training.distributed import World
from dl2pa.training.evaluate import Evaluation, Likelihood, evaluate
from dl2pa.training.train_state import autocast
from pipelines.dataset import Dataset

Targets = Dataset | Sequence[LabeledSet]
"""The validation split, or named sets."""


def load_image_model(file: Path, config: Config) -> Classifier:
    """Load a model of images; a model of features is joined with its frozen network."""
    classifier = load_classifier(file)
    return join_frozen(classifier, config) if classifier.takes_features else classifier


def open_job(job: Job) -> tuple[Config, Targets, Classifier]:
    """Open the sets of a job and load its model.

    Raises:
        UserError: as for the command that created the job.
    """
    config = load_run_config(Path(job.run), job.overrides)
    if not job.sets:
        dataset, classifier = open_split(config, "val"), load_classifier(Path(job.model))
        check_classes(config, dataset, classifier)
        return config, dataset, classifier
    sets = open_sets(SET, [NamedFolder(name, Path(root)) for name, root in job.sets])
    classifier = load_image_model(Path(job.model), config)
    return config, label_sets(sets, classifier.classes, only_present=job.only_present), classifier


def check_classes(config: Config, dataset: Dataset, classifier: Classifier) -> None:
    """Refuse a validation split with other classes than the model's."""
    if list(dataset.classes) != classifier.classes:
        field = "data.val_root" if config.data.val_root else "data.root"
        remedy = "Give a data set with the classes of the model, or set data.classes."
        folder = config.data.val_root or config.data.root
        raise UserError(field, folder, "has other classes than the model was trained on", remedy)


def evaluate_all(config: Config, classifier: Classifier, targets: Targets, world: World) -> list[Evaluation]:
    """Evaluate on the validation split, or on every set in order; a collective."""
    if isinstance(targets, Sequence):
        return [evaluate_set(config, classifier, one, world) for one in targets]
    return [evaluate_split(config, classifier, targets, world)]


def evaluate_split(config: Config, classifier: Classifier, dataset: Dataset, world: World) -> Evaluation:
    """Evaluate on the validation split; a collective."""
    check_image_size(config, classifier)
    pipeline = build_eval_pipeline(config, dataset, world)
    try:
        with autocast(config.train.precision, world.device):
            result = evaluate(
                classifier.score,
                pipeline,
                len(classifier.classes),
                groups=classifier.groups,
                likelihood=Likelihood(classifier.fitted_temperature),
            )
    finally:
        pipeline.close()
    assert result is not None, "only training stops an evaluation"
    return result
