"""Everything that one `dl2pa evaluate` measures on named sets with one model, and its record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.nn import functional as F

from dl2pa.config import Config
from dl2pa.evaluation.detection import Scores
from dl2pa.evaluation.layers import Detector, compare_scores, compute_layers, reference_samples
from dl2pa.evaluation.measure import check_classes, evaluate_all, load_image_model
from dl2pa.evaluation.ranks import Job, evaluate_on_ranks
from dl2pa.evaluation.record import Outcome, Recorder, Subject, classification_outcome
from dl2pa.evaluation.retrieval import measure_retrieval
from dl2pa.evaluation.sets import NamedSet, config_of_sets, label_sets
from dl2pa.model.inference import Classifier, load_classifier
from dl2pa.training.data import open_split
from dl2pa.training.distributed import World
from dl2pa.training.evaluate import Evaluation
from pipelines.dataset import Dataset, num_samples

VALIDATION = "validation"
"""Name of the validation split in the record of retrieval."""
_WITHOUT_EFFECT = ("launch.", "train.eval_batch_size", "train.channels_last", "data.threads")
"""Overrides that do not change the result."""


class Session:
    """Measurements on one model.

    Args:
        job: run, overrides and model file; its sets are those that are classified.
        recorder: None if the results are not recorded.
        world: of this process; it runs alone.
    """

    def __init__(self, config: Config, job: Job, recorder: Recorder | None, world: World) -> None:
        self._config, self._job, self._recorder, self._world = config, job, recorder, world
        self._file = Path(job.model)
        kept = sorted(o for o in job.overrides if not o.startswith(_WITHOUT_EFFECT))
        self._options: dict[str, Any] = {"overrides": kept} if kept else {}
        self.results: dict[str, dict[str, Any]] = {}
        """Results by kind (``sets``, ``retrieval``, ``ood``) and name of the set."""

    def classify(self, sets: Sequence[NamedSet], nproc: int) -> None:
        """Evaluate the classification of every set, in `nproc` processes.

        Raises:
            UserError: a set has unknown or missing classes, or its name is recorded with other data.
        """
        classifier = load_image_model(self._file, self._config)
        only_present = self._job.only_present
        labeled = label_sets(sets, classifier.classes, only_present=only_present)
        options = {**self._options, "only_present_classes": only_present}
        subjects = [Subject(one.name, str(one.root), one.images.fingerprint, options) for one in labeled]
        self._check(subjects)
        results: list[Evaluation]
        if nproc > 1:
            results = evaluate_on_ranks(self._job, nproc)
        else:
            results = evaluate_all(self._config, classifier.to(self._world.device), labeled, self._world)
        for one, subject, result in zip(labeled, subjects, results, strict=True):
            title = f"{one.name}, top-1 {result.top1:.2f} %"
            outcome = classification_outcome(result, one.images.classes, title)
            sizes = {"num_classes": len(one.kept), "data_fingerprint": subject.fingerprint}
            self._add("sets", one.name, {**outcome.metrics, **sizes})
            self._record(subject, outcome)

    def retrieve(self, sets: Sequence[NamedSet], val: Dataset | None) -> None:
        """Measure retrieval on every set, or on the validation split if there is none."""
        load = load_image_model if sets else _load_model
        classifier = load(self._file, self._config).to(self._world.device)
        config = config_of_sets(self._config, classifier) if sets else self._config
        named: list[tuple[str, str, Dataset]] = [(one.name, str(one.root), one.images) for one in sets]
        if not sets:
            assert val is not None, "opened without sets"
            data = self._config.data
            named = [(VALIDATION, str(data.val_root or data.root or data.dataset), val)]
        subjects = [Subject(f"retrieval/{n}", root, d.fingerprint, self._options) for n, root, d in named]
        self._check(subjects)
        for (name, _, dataset), subject in zip(named, subjects, strict=True):
            layers = compute_layers(config, classifier, dataset, self._world)
            result = measure_retrieval(F.normalize(layers.embedding, dim=1), layers.labels).metrics()
            self._add("retrieval", name, result)
            self._record(subject, Outcome(result, num_samples(dataset), len(dataset.classes)))

    def detect(self, outside: Sequence[NamedSet], val: Dataset) -> None:
        """Measure the detection of every set as out of distribution, against the validation split."""
        train = open_split(self._config, "train")
        classifier = load_classifier(self._file).to(self._world.device)
        check_classes(self._config, val, classifier)
        inside_data = f"{train.fingerprint}-{val.fingerprint}"
        options = {**self._options, "in_distribution": inside_data}
        subjects = [Subject(f"ood/{s.name}", str(s.root), s.images.fingerprint, options) for s in outside]
        self._check(subjects)
        samples = reference_samples(num_samples(train))
        reference = compute_layers(self._config, classifier, train, self._world, samples)
        detector = Detector(classifier, reference)
        inside = detector.score(compute_layers(self._config, classifier, val, self._world))
        if classifier.takes_features:
            classifier = load_image_model(self._file, self._config).to(self._world.device)
        config = config_of_sets(self._config, classifier)
        for one, subject in zip(outside, subjects, strict=True):
            scores = detector.score(compute_layers(config, classifier, one.images, self._world))
            counts = {"num_inside": _count(inside), "num_outside": _count(scores)}
            metrics = {**compare_scores(inside, scores), **counts, "num_reference": len(reference.labels)}
            self._add("ood", one.name, metrics)
            self._record(subject, Outcome(metrics, len(one.images), len(one.images.classes)))

    def _check(self, subjects: Sequence[Subject]) -> None:
        for subject in subjects:
            if self._recorder is not None:
                self._recorder.check(subject)

    def _record(self, subject: Subject, outcome: Outcome) -> None:
        if self._recorder is not None:
            self._recorder.record(subject, outcome)

    def _add(self, kind: str, name: str, result: dict[str, Any]) -> None:
        self.results.setdefault(kind, {})[name] = result


def _load_model(file: Path, config: Config) -> Classifier:
    return load_classifier(file)


def _count(scores: dict[str, Scores]) -> int:
    return len(next(iter(scores.values())))
