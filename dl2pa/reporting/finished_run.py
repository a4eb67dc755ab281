"""Figures, tables and pages of a run that has just finished. A failure only logs a warning."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path

import numpy as np

from dl2pa.reporting import nearest, pages, run_plots
from dl2pa.reporting.artifacts import Artifacts
from dl2pa.reporting.assignment_figures import draw_assignment_figures
from dl2pa.reporting.class_metrics import calibration, neighbors_together
from dl2pa.reporting.reliability import reliability_diagram
from dl2pa.reporting.run_data import RunData, load_run_data, published_results
from dl2pa.reporting.samples import make_thumbnails, select_samples
from dl2pa.reporting.summary import summary_page
from dl2pa.training.evaluate import BINS
from dl2pa.training.finish import FinishedRun

log = logging.getLogger(__name__)


def report_run(finished: FinishedRun) -> list[tuple[Path, str]]:
    """Write figures, tables and pages to the run directory.

    Returns:
        Each file that was made, with its folder among the run's artifacts.
    """
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    began = time.perf_counter()
    art = Artifacts(finished.run)
    art.attempt("figures of the assignment", lambda: draw_assignment_figures(art, finished))
    art.attempt("summary of the run", lambda: _make_pages(art, load_run_data(finished)))
    log.info("%d artifacts in %.1f s", len(art.made), time.perf_counter() - began)
    return art.made


def _make_pages(art: Artifacts, run_data: RunData) -> None:
    """Draw the remaining figures and write the tables and pages."""
    published = art.attempt("the published results", lambda: published_results(run_data)) or []
    figure = next((p.cell.top1 for p in published if p.length == "full"), None)
    curve_data = (run_data.points, run_data.steps_per_epoch, figure)
    art.picture("curves", lambda: run_plots.curves(*curve_data))
    predictions = run_data.predictions
    art.picture("reliability", lambda: _reliability(run_data))
    has_nearest = bool(art.attempt("the nearest images", lambda: _make_nearest(art, run_data)))
    _make_tables(art, run_data, has_nearest)
    selection = select_samples(predictions)
    samples = {i: int(predictions.samples[i]) for i in selection.all}
    config, val = run_data.config, run_data.data.val
    images = art.attempt("samples", lambda: make_thumbnails(config, val, list(samples.values()))) or {}
    thumbnails = {i: images[sample] for i, sample in samples.items() if sample in images}
    panels = art.attempt("the curves of the page", lambda: run_plots.curve_panels(*curve_data)) or []
    page = (run_data, published, art.pictures, panels, selection, thumbnails, has_nearest)
    art.text(run_data.run.summary_page, lambda: summary_page(*page))


def _reliability(run_data: RunData) -> bytes:
    """Draw the reliability diagram, also of the calibrated confidences if the run has a temperature."""
    predictions = run_data.predictions
    diagrams = {"Raw": calibration(predictions, BINS)}
    if predictions.calibrated is not None:
        after = calibration(predictions, BINS, predictions.calibrated)
        diagrams[f"Calibrated, temperature {run_data.result['temperature']:.3g}"] = after
    return reliability_diagram(diagrams)


def _make_nearest(art: Artifacts, run_data: RunData) -> bool:
    """Write the page of nearest images; return whether there is one."""
    run, config, val = run_data.run, run_data.config, run_data.data.val
    result = nearest.find_nearest(config, run.model, val, run_data.predictions)
    if result is None:
        return False
    samples = {i: int(run_data.predictions.samples[i]) for i in result.shown}
    images = make_thumbnails(config, val, list(samples.values()))
    thumbnails = {i: images[sample] for i, sample in samples.items() if sample in images}
    title = f"{run_data.name}: nearest images"
    links = pages.page_links(run, run.nearest_page, nearest=True)
    page = (result, run_data.predictions, run_data.classes, thumbnails, title, links)
    art.text(run.nearest_page, lambda: nearest.nearest_page(*page))
    return (run.nearest_page, "") in art.made


def _make_tables(art: Artifacts, run_data: RunData, has_nearest: bool) -> None:
    """Write the confusion matrix and the per-class results."""
    run, confusion, names, rows = run_data.run, run_data.confusion, run_data.classes, run_data.class_rows
    order = art.attempt("the order of the classes", lambda: neighbors_together(confusion))
    order = np.arange(len(names)) if order is None else order
    top1 = run_data.result["top1_last"]
    title = f"{run_data.name}: {{}}, {run_data.config.data.dataset}, top-1 {top1:.2f} %"
    heading = title.format("confusion matrix")
    links = functools.partial(pages.page_links, run, nearest=has_nearest)
    art.picture("confusion", lambda: run_plots.confusion_picture(confusion, order, names))
    art.text(
        run.confusion_page,
        lambda: pages.confusion_page(confusion, order, names, heading, links(run.confusion_page)),
    )
    art.text(run.confusion_pairs, lambda: pages.pairs_csv(confusion, names))
    classes_title = title.format("classes")
    art.text(run.per_class_page, lambda: pages.classes_page(rows, classes_title, links(run.per_class_page)))
    art.text(run.per_class_csv, lambda: pages.classes_csv(rows))
    art.text(run.per_class_json, lambda: pages.classes_json(rows))
