"""Artifacts of a finished run, made by rank 0 after the last validation. A failure only logs a warning."""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dl2pa.config import Config
from dl2pa.osutil import read_json, write_atomically
from dl2pa.reporting import pages, run_plots
from dl2pa.reporting.class_metrics import class_rows, neighbors_together, reliability
from dl2pa.reporting.run_data import RunData, check_run, published_results
from dl2pa.reporting.runs import CHANGED_TAG
from dl2pa.reporting.samples import select_samples
from dl2pa.reporting.summary import summary_page
from dl2pa.rundir import RunDirectory
from dl2pa.tracking.spool import read_events
from dl2pa.training.data import DataSplits, build_transforms
from dl2pa.training.evaluate import BINS, Predictions
from pipelines.build import Dataset, SyntheticDataset, build_pipeline, num_samples
from pipelines.datasets import ImageTable
from pipelines.encoded import FaultLimits
from pipelines.sampler import SubsetSampler

log = logging.getLogger(__name__)

_THUMBNAIL = 112
"""Longest side, pixels."""


class Artifacts:
    """Writes artifacts one by one; a failure leaves that artifact out and logs a warning.

    Attributes:
        made: files with their folder among the artifacts of the run.
        pictures: PNG by name.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.made: list[tuple[Path, str]] = []
        self.pictures: dict[str, bytes] = {}
        self._run = run

    def picture(self, name: str, draw: Callable[[], bytes | None]) -> None:
        """Write one PNG to the pictures folder; None draws nothing."""

        def write() -> None:
            png = draw()
            if png is not None:
                path = self._run.picture(name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(png)
                self.pictures[name] = png
                self.made.append((path, "pictures"))

        self.attempt(name, write)

    def add_drawn(self, path: Path) -> None:
        """Add a PNG that has already been written."""
        self.made.append((path, "pictures"))
        self.attempt(path.name, lambda: self.pictures.update({path.stem: path.read_bytes()}))

    def text(self, path: Path, compose: Callable[[], str]) -> None:
        """Write one text file of the run directory."""

        def write() -> None:
            write_atomically(path, compose())
            self.made.append((path, ""))

        self.attempt(path.name, write)

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """Return the value of the action, or None if it fails."""
        try:
            return action()
        except Exception as error:
            log.warning("could not create %s (%s: %s); the run continues", name, type(error).__name__, error)
            return None


def make_artifacts(
    run: RunDirectory, run_data: RunData, config: Config, data: DataSplits, drawn: Sequence[Path]
) -> list[tuple[Path, str]]:
    """Write all figures, tables and pages.

    Args:
        drawn: figures that have already been written; the summary includes them.
    """
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    began = time.perf_counter()
    art = Artifacts(run)
    for path in drawn:
        art.add_drawn(path)
    published = art.attempt("the published results", lambda: published_results(run_data)) or []
    figure = next((p.cell.top1 for p in published if p.length == "full"), None)
    art.picture("curves", lambda: run_plots.curves(run_data.points, run_data.steps_per_epoch, figure))
    bins, error = reliability(run_data.targets == run_data.predicted, run_data.confidence, BINS)
    art.picture("reliability", lambda: run_plots.reliability_diagram(bins, error))
    _make_tables(art, run, run_data)
    selection = select_samples(run_data.targets, run_data.predicted, run_data.confidence)
    samples = {i: int(run_data.samples[i]) for i in selection.all}
    images = art.attempt("samples", lambda: make_thumbnails(config, data.val, list(samples.values()))) or {}
    thumbnails = {i: images[sample] for i, sample in samples.items() if sample in images}
    shown = (published, art.pictures, selection, thumbnails)
    art.text(run.summary_page, lambda: summary_page(run_data, check_run(run_data), *shown))
    log.info("%d artifacts in %.1f s", len(art.made), time.perf_counter() - began)
    return art.made


def _make_tables(art: Artifacts, run: RunDirectory, run_data: RunData) -> None:
    """Write the confusion matrix and the per-class results."""
    confusion, names = run_data.confusion, run_data.classes
    order = art.attempt("the order of the classes", lambda: neighbors_together(confusion))
    order = np.arange(len(names)) if order is None else order
    title = (
        f"{run_data.name}: {{}}, {run_data.config.data.dataset}, top-1 {run_data.result['top1_last']:.2f} %"
    )
    heading = title.format("confusion matrix")
    art.picture("confusion", lambda: run_plots.confusion_picture(confusion, order, names))
    art.text(run.confusion_page, lambda: pages.confusion_page(confusion, order, names, heading))
    art.text(run.confusion_pairs, lambda: pages.pairs_csv(confusion, names))
    arrays = (run_data.targets, run_data.predicted, run_data.confidence, run_data.in_top5)
    rows = class_rows(*arrays, names, run_data.trained, run_data.groups)
    art.text(run.per_class_page, lambda: pages.classes_page(rows, title.format("classes")))
    art.text(run.per_class_csv, lambda: pages.classes_csv(rows))
    art.text(run.per_class_json, lambda: pages.classes_json(rows))


def load_run_data(
    run: RunDirectory,
    config: Config,
    data: DataSplits,
    result: dict[str, Any],
    name: str,
    steps_per_epoch: int,
    ids: tuple[str | None, str | None],
) -> RunData:
    """Read the predictions, the metrics and the environment of a run.

    Args:
        ids: UUID and MLflow id of the run.

    Raises:
        OSError: there is no predictions file.
    """
    predictions = Predictions.load(run.predictions)
    points, started, changed = _read_spool(run.root)
    trained = None
    if not isinstance(data.train, SyntheticDataset):
        trained = np.bincount(data.train.labels, minlength=len(data.classes)).tolist()
    return RunData(
        name=name,
        run_dir=run.root,
        config=config,
        result=result,
        attempts=read_json(run.environment).get("attempts", []),
        points=points,
        classes=data.classes,
        groups=data.groups,
        trained=trained,
        samples=predictions.samples,
        targets=predictions.targets,
        predicted=predictions.predicted,
        confidence=predictions.confidence,
        in_top5=predictions.in_top5,
        steps_per_epoch=steps_per_epoch,
        images=(num_samples(data.train), num_samples(data.val)),
        fingerprint=data.fingerprint,
        started=started,
        ended=time.time(),
        run_uuid=ids[0],
        run_id=ids[1],
        changed=changed,
    )


def _read_spool(root: Path) -> tuple[dict[str, list[tuple[float, float]]], float, tuple[str, ...]]:
    """Return the points per metric, the time of the first event (seconds since 1970) and the changed keys."""
    points: dict[str, list[tuple[float, float]]] = {}
    changed: set[str] = set()
    started = math.inf
    for event, _ in read_events(RunDirectory(root).spool):
        if event is None:
            continue
        started = min(started, event["t"] / 1000.0)
        if event["e"] == "metrics":
            for name, value in event["v"].items():
                points.setdefault(name, []).append((event["step"], float(value)))
        elif event["e"] == "start":
            changed |= {tag.removeprefix(CHANGED_TAG) for tag in event["tags"] if tag.startswith(CHANGED_TAG)}
    for curve in points.values():
        curve.sort()
    return points, min(started, time.time()), tuple(sorted(changed))


def make_thumbnails(config: Config, dataset: Dataset, samples: Sequence[int]) -> dict[int, bytes]:
    """Encode samples, as validation preprocesses them, as JPEG (PNG if small); returns images by sample."""
    if not samples:
        return {}
    transforms = build_transforms(config, train=False)
    loader = config.loader
    if isinstance(dataset, ImageTable):
        if loader == "resident":  # a data set in memory is resized to the crop size directly
            transforms = replace(transforms, eval_resize=config.data.image_size)
        loader = "torchvision"  # same crop; starting DALI for a few images is slow
    pipeline = build_pipeline(
        dataset,
        transforms,
        SubsetSampler(tuple(samples), min(16, len(samples))),
        loader=loader,
        seed=config.train.seed,
        device=torch.device("cpu"),
        threads=1,
        limits=FaultLimits(max_bad_fraction=1.0, max_bad_val_fraction=1.0),
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (transforms.mean, transforms.std))
    thumbnails: dict[int, bytes] = {}
    try:
        pipeline.start(0)
        for batch in pipeline:
            images = batch.images[: batch.valid]
            pixels = ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
            for sample, image in zip(
                batch.indices.tolist(), pixels.permute(0, 2, 3, 1).numpy(), strict=False
            ):
                thumbnails[sample] = _encode(image)
    finally:
        pipeline.close()
    return thumbnails


def _encode(image_hwc: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image_hwc))
    target = io.BytesIO()
    if max(picture.size) <= 64:
        factor = 2 * _THUMBNAIL // (2 * max(picture.size)) or 1
        enlarged = (picture.width * factor, picture.height * factor)
        picture.resize(enlarged, Image.Resampling.NEAREST).save(target, "PNG", optimize=True)
    else:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        picture.save(target, "JPEG", quality=82)
    return target.getvalue()
