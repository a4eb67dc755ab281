"""Everything that one `dl2pa evaluate` measures on named sets with one model, and its record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from dl2pa.config import Config
from dl2pa.evaluation.detection import Scores
from dl2pa.evaluation.layers import Detector, Layers, compare_scores
from dl2pa.evaluation.measure import check_classes, evaluate_all, load_image_model
from dl2pa.evaluation.ranks import Job, evaluate_on_ranks, layers_on_ranks
from dl2pa.evaluation.record import Outcome, Recorder, Subject, classification_outcome
from dl2pa.evaluation.retrieval import measure_retrieval
from dl2pa.evaluation.sets import NamedSet, label_sets
from dl2pa.evaluation.sources import Source, compute_sources
from dl2pa.model.inference import load_classifier
from dl2pa.training.data import open_split
from dl2pa.training.distributed import World
from dl2pa.training.embedding import EmbeddingQuality, measure_quality
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
        nproc: number of processes that compute.
    """

    def __init__(self, config: Config, job: Job, recorder: Recorder | None, world: World, nproc: int) -> None:
        self._config, self._job, self._recorder, self._world = config, job, recorder, world
        self._nproc = nproc
        self._file = Path(job.model)
        kept = sorted(o for o in job.overrides if not o.startswith(_WITHOUT_EFFECT))
        self._options: dict[str, Any] = {"overrides": kept} if kept else {}
        self.results: dict[str, dict[str, Any]] = {}
        """Results by kind (``sets``, ``retrieval``, ``ood``) and name of the set."""

    def classify(self, sets: Sequence[NamedSet]) -> None:
        """Evaluate the classification of every set.

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
        if self._nproc > 1:
            results = evaluate_on_ranks(self._job, self._nproc)
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
        sources: list[tuple[Source, Dataset]] = [(_folder("set", one), one.images) for one in sets]
        named = [(one.name, str(one.root)) for one in sets]
        if not sets:
            assert val is not None, "opened without sets"
            data = self._config.data
            sources = [(Source("val"), val)]
            named = [(VALIDATION, str(data.val_root or data.root or data.dataset))]
        subjects = [
            Subject(f"retrieval/{name}", root, dataset.fingerprint, self._options)
            for (name, root), (_, dataset) in zip(named, sources, strict=True)
        ]
        self._check(subjects)
        computed = self._layers(sources, with_backbone=False)
        for (name, _), (_, dataset), subject, layers in zip(named, sources, subjects, computed, strict=True):
            result = measure_retrieval(layers.unit, layers.labels).metrics()
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
        sources: list[tuple[Source, Dataset]] = [(Source("reference"), train), (Source("val"), val)]
        sources += [(_folder("ood", one), one.images) for one in outside]
        computed = self._layers(sources, with_backbone=True)
        reference = next(computed)
        detector = Detector(classifier, reference)
        inside = detector.score(next(computed))
        for one, subject, layers in zip(outside, subjects, computed, strict=True):
            scores = detector.score(layers)
            counts = {"num_inside": _count(inside), "num_outside": _count(scores)}
            metrics = {**compare_scores(inside, scores), **counts, "num_reference": len(reference.labels)}
            self._add("ood", one.name, metrics)
            self._record(subject, Outcome(metrics, len(one.images), len(one.images.classes)))

    def embedding(self, val: Dataset) -> EmbeddingQuality:
        """Measure the embedding on the validation split; the reference is the training split."""
        train = open_split(self._config, "train")
        sources: list[tuple[Source, Dataset]] = [(Source("train"), train), (Source("val"), val)]
        reference, validated = self._layers(sources, with_backbone=False)
        parts = (reference.unit, reference.labels, validated.unit, validated.labels)
        return measure_quality(*parts, len(train.classes))

    def _layers(self, sources: Sequence[tuple[Source, Dataset]], *, with_backbone: bool) -> Iterator[Layers]:
        """Layers of each source, on the device of this process."""
        if self._nproc == 1:
            yield from compute_sources(self._config, self._file, sources, self._world, with_backbone)
            return
        for layers in layers_on_ranks(self._job, [s for s, _ in sources], with_backbone, self._nproc):
            yield layers.to(self._world.device)

    def _check(self, subjects: Sequence[Subject]) -> None:
        for subject in subjects:
            if self._recorder is not None:
                self._recorder.check(subject)

    def _record(self, subject: Subject, outcome: Outcome) -> None:
        if self._recorder is not None:
            self._recorder.record(subject, outcome)

    def _add(self, kind: str, name: str, result: dict[str, Any]) -> None:
        self.results.setdefault(kind, {})[name] = result


def _folder(kind: Literal["set", "ood"], one: NamedSet) -> Source:
    return Source(kind, str(one.root.absolute()))


def _count(scores: dict[str, Scores]) -> int:
    return len(next(iter(scores.values())))
