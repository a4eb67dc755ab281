"""The artifacts of a finished run, drawn by rank 0 after its last validation. A run never fails for them."""

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
from dl2pa.reporting.run_data import RunData, findings, published_beside
from dl2pa.reporting.samples import Chosen, choose
from dl2pa.reporting.summary import summary_page
from dl2pa.rundir import RunDirectory
from dl2pa.tracking.spool import events_file, read_events
from dl2pa.training.data import DataSplits, build_transforms
from dl2pa.training.evaluate import BINS, Predictions
from pipelines.build import Dataset, SyntheticDataset, build_pipeline, num_samples
from pipelines.datasets import ImageTable
from pipelines.encoded import FaultLimits
from pipelines.sampler import SubsetSampler

log = logging.getLogger(__name__)

_THUMBNAIL = 112
"""Longest side, pixels."""
_CHANGED = "dl2pa.changed."


class Artifacts:
    """Makes files one by one; what cannot be made is left out with a warning.

    Attributes:
        made: files and the folder among the run's artifacts that each belongs to.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.made: list[tuple[Path, str]] = []
        self.pictures: dict[str, bytes] = {}
        self._run = run

    def picture(self, name: str, draw: Callable[[], bytes | None]) -> None:
        """One PNG in `pictures/`."""

        def write() -> None:
            png = draw()
            if png is not None:
                self._run.pictures.mkdir(exist_ok=True)
                path = self._run.pictures / f"{name}.png"
                path.write_bytes(png)
                self.pictures[name] = png
                self.made.append((path, "pictures"))

        self.attempt(name, write)

    def text(self, name: str, compose: Callable[[], str]) -> None:
        """One file in the run directory."""

        def write() -> None:
            write_atomically(self._run.root / name, compose())
            self.made.append((self._run.root / name, ""))

        self.attempt(name, write)

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """The action's value; None where it failed."""
        try:
            return action()
        except Exception as error:
            log.warning("%s could not be made (%s: %s); the run goes on", name, type(error).__name__, error)
            return None


def make_artifacts(
    run: RunDirectory, run_data: RunData, config: Config, data: DataSplits, drawn: Sequence[Path]
) -> list[tuple[Path, str]]:
    """Everything that is made of numbers and samples; the summary last, with the pictures `drawn` before."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    began = time.perf_counter()
    art = Artifacts(run)
    for path in drawn:
        art.attempt(path.name, lambda path=path: art.pictures.update({path.stem: path.read_bytes()}))
        art.made.append((path, "pictures"))
    beside = art.attempt("the published figures", lambda: published_beside(run_data)) or []
    confusion = run_data.confusion
    order = art.attempt("the order of the classes", lambda: neighbors_together(confusion))
    order = np.arange(len(run_data.classes)) if order is None else order
    bins, error = reliability(run_data.targets == run_data.predicted, run_data.confidence, BINS)
    figure = next((b.cell.top1 for b in beside if b.length == "full"), None)
    art.picture("curves", lambda: run_plots.curves(run_data.points, run_data.steps_per_epoch, figure))
    art.picture("reliability", lambda: run_plots.reliability_diagram(bins, error))
    art.picture("confusion", lambda: run_plots.confusion_picture(confusion, order, run_data.classes))
    title = (
        f"{run_data.name}: {{}}, {run_data.config.data.dataset}, top-1 {run_data.result['top1_last']:.2f} %"
    )
    art.text(
        "confusion.html",
        lambda: pages.confusion_page(confusion, order, run_data.classes, title.format("confusions")),
    )
    art.text("confusion_pairs.csv", lambda: pages.pairs_csv(confusion, run_data.classes))
    arrays = (run_data.targets, run_data.predicted, run_data.confidence, run_data.in_top5)
    rows = class_rows(*arrays, run_data.classes, run_data.trained, run_data.groups)
    art.text("per_class.html", lambda: pages.classes_page(rows, title.format("classes")))
    art.text("per_class.csv", lambda: pages.classes_csv(rows))
    art.text("per_class.json", lambda: pages.classes_json(rows))
    chosen: Chosen = choose(run_data.targets, run_data.predicted, run_data.confidence)
    places = {i: int(run_data.samples[i]) for i in chosen.all}
    made = art.attempt("samples", lambda: make_thumbnails(config, data.val, list(places.values()))) or {}
    thumbnails = {i: made[place] for i, place in places.items() if place in made}
    art.text(
        "summary.html",
        lambda: summary_page(run_data, findings(run_data), beside, art.pictures, chosen, thumbnails),
    )
    log.info("%d artifacts in %.1f s", len(art.made), time.perf_counter() - began)
    return art.made


def load_run_data(
    run: RunDirectory,
    config: Config,
    data: DataSplits,
    result: dict[str, Any],
    name: str,
    steps_per_epoch: int,
    ids: tuple[str | None, str | None],
) -> RunData:
    """What the run directory holds, read once.

    Args:
        ids: the run's uuid and MLflow's id.

    Raises:
        OSError: no predictions were kept.
    """
    said = Predictions.load(run.predictions)
    points, started, changed = _read_spool(run.root)
    train = data.train
    trained = None
    if not isinstance(train, SyntheticDataset):
        trained = np.bincount(train.labels, minlength=len(data.classes)).tolist()
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
        samples=said.samples,
        targets=said.targets,
        predicted=said.predicted,
        confidence=said.confidence,
        in_top5=said.in_top5,
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
    """Every point, when the first event was (seconds since 1970), and the keys that attempts changed."""
    points: dict[str, list[tuple[float, float]]] = {}
    changed: set[str] = set()
    started = math.inf
    for event, _ in read_events(events_file(root)):
        if event is None:
            continue
        started = min(started, event["t"] / 1000.0)
        if event["e"] == "metrics":
            for name, value in event["v"].items():
                points.setdefault(name, []).append((event["step"], float(value)))
        elif event["e"] == "start":
            changed |= {tag.removeprefix(_CHANGED) for tag in event["tags"] if tag.startswith(_CHANGED)}
    for curve in points.values():
        curve.sort()
    return points, min(started, time.time()), tuple(sorted(changed))


def make_thumbnails(config: Config, dataset: Dataset, samples: Sequence[int]) -> dict[int, bytes]:
    """Samples as the validation's own pipeline prepares them, as JPEG (PNG where they are small), by sample."""
    if not samples:
        return {}
    transforms = build_transforms(config, train=False)
    loader = config.loader
    if isinstance(dataset, ImageTable):
        if loader == "resident":  # a folder held in memory is resized straight to the crop
            transforms = replace(transforms, eval_resize=config.data.image_size)
        loader = "torchvision"  # the same crop without starting DALI for a few images
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
    found: dict[int, bytes] = {}
    try:
        pipeline.start(0)
        for batch in pipeline:
            images = batch.images[: batch.valid]
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (transforms.mean, transforms.std))
            pixels = ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
            for sample, image in zip(
                batch.indices.tolist(), pixels.permute(0, 2, 3, 1).numpy(), strict=False
            ):
                found[sample] = _encode(image)
    finally:
        pipeline.close()
    return found


def _encode(image_hwc: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image_hwc))
    target = io.BytesIO()
    if max(picture.size) <= 64:
        small = 2 * _THUMBNAIL // (2 * max(picture.size)) or 1
        enlarged = (picture.width * small, picture.height * small)
        picture.resize(enlarged, Image.Resampling.NEAREST).save(target, "PNG", optimize=True)
    else:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        picture.save(target, "JPEG", quality=82)
    return target.getvalue()
