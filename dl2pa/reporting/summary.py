"""Summary page of one run: results, run checks, per-class accuracy, samples and commands."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median_high
from typing import Any

from dl2pa.config.identity import describe, run_identity
from dl2pa.config.published import PublishedMatch
from dl2pa.reporting.class_metrics import ClassRow, worst_pairs
from dl2pa.reporting.document import Grid, code, grid
from dl2pa.reporting.pages import page_links
from dl2pa.reporting.render import render
from dl2pa.reporting.run_data import RunData, check_run
from dl2pa.reporting.samples import SampleSelection
from dl2pa.terms import term
from pipelines.dataset import num_samples
from pipelines.longtail import GROUPS

_PAIRS, _LOWEST = 12, 12
_LEVELS = {"bad": "✗", "note": "!", "good": "✓"}
"""Marks of the check levels, most severe first."""
_LENGTHS = {
    "full": "full length",
    "short": "not compared: this run is shorter",
    "other": "not compared: this run has another length",
}


def summary_page(
    run_data: RunData,
    published: Sequence[PublishedMatch],
    pictures: Mapping[str, bytes],
    panels: Sequence[tuple[str, bytes]],
    selection: SampleSelection,
    thumbnails: Mapping[int, bytes],
    has_nearest: bool = False,
) -> str:
    """Render the page.

    Args:
        pictures: PNG by name; a missing one is left out.
        panels: title and PNG of each curve.
        thumbnails: JPEG or PNG of the selected samples; a missing one is left out.
        has_nearest: whether the run has the page of nearest images.
    """
    levels, names = list(_LEVELS), run_data.classes
    pairs = [
        (names[p.true], names[p.predicted], f"{p.count:,}", f"{100 * p.share:.0f} %", f"{p.back:,}")
        for p in worst_pairs(run_data.confusion, _PAIRS)
    ]
    both = [("Most confident errors", selection.errors)]
    both.append(("Most confident correct predictions", selection.hits))
    by_class = [(names[c], samples) for c, samples in selection.by_class.items()]
    return render(
        "summary.html",
        title=run_data.name,
        overview=_overview(run_data),
        cards=_cards(run_data, published),
        checks=sorted(check_run(run_data), key=lambda check: levels.index(check.level)),
        marks=_LEVELS,
        published=_published(run_data, published),
        pictures=pictures,
        panels=panels,
        links=page_links(run_data.run, run_data.run.summary_page, has_nearest),
        has_nearest=has_nearest,
        pairs=Grid(["true ", "predicted ", "images", "of true", "reverse"], pairs),
        details=_details(run_data),
        run_dir=run_data.run,
        run=shlex.quote(str(run_data.run.root)),
        run_id=run_data.mlflow_run_id,
        command=run_data.environment.get("command", ""),
        reproduce=_reproduce(run_data),
        calibration=_calibration(run_data.result),
        kind="raw" if run_data.predictions.calibrated is None else "calibrated",
        strips=_strips(run_data, both, thumbnails),
        class_strips=_strips(run_data, by_class, thumbnails),
        **_lowest_classes(run_data),
    )


def _overview(run_data: RunData) -> str:
    config, data = run_data.config, run_data.data
    model = config.model
    kind = f"{config.method.name} ({config.assignment} assignment) on {model.backbone}, d = {model.embedding_dim}"
    classes = f"{config.data.dataset} with {len(run_data.classes):,} classes"
    images = f"{num_samples(data.train):,} training images, {num_samples(data.val):,} validation images"
    ended = time.strftime("%d %B %Y %H:%M UTC", time.gmtime(run_data.ended))
    return f"{kind}; {classes}, {images}. Finished {ended}."


def _cards(run_data: RunData, published: Sequence[PublishedMatch]) -> list[tuple[str, str, str]]:
    """Return name, value and remark of each headline figure."""
    result = run_data.result
    cards = [
        ("top-1, last", f"{result['top1_last']:.2f} %", f"{result['num_validated']:,} images"),
        ("top-1, best", f"{result['top1_best']:.2f} %", f"epoch {run_data.best_epoch}"),
        ("top-5, last", f"{result['top5_last']:.2f} %", ""),
        _calibration_card(result),
    ]
    for name in GROUPS:
        if (value := result.get(f"top1_{name}")) is not None:
            cards.append((f"top-1, {name}", f"{value:.2f} %", "mean over classes"))
    full = next((p for p in published if p.length == "full"), None)
    if full is not None:
        gap = result["top1_best"] - full.cell.top1
        cards.append(("published", f"{full.cell.top1:g} %", f"best epoch of this run: {gap:+.2f} points"))
    if speed := result.get("images_per_second"):
        world = result["world_size"]
        cards.append(("images per second", f"{speed:,.0f}", f"{world} process{'es' * (world != 1)}"))
    length = f"{result['epochs']} epochs, {result['steps']:,} steps"
    length += ", stopped early" if result.get("stopped_early") else ""
    return [*cards, ("elapsed time", _duration(run_data.ended - run_data.started), length)]


def _calibration_card(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """The calibrated error with the raw one as remark, or the raw one without a temperature."""
    raw = f"{result['ece_last']:.2f} %"
    if (calibrated := result.get("ece_calibrated")) is None:
        return term("ece"), raw, "15 bins; not calibrated"
    return term("ece_calibrated"), f"{calibrated:.2f} %", f"raw {raw}"


def _published(run_data: RunData, published: Sequence[PublishedMatch]) -> Grid:
    best, last = run_data.result["top1_best"], run_data.result["top1_last"]
    rows = [
        [
            f"{p.cell.table}: {p.cell.row}, {p.cell.column}",
            *(f"{p.cell.top1:g}", f"{best:.2f}", f"{last:.2f}"),
            f"{best - p.cell.top1:+.2f}" if p.length == "full" else "–",
            _LENGTHS[p.length] + (f"; the figure is suspect: {p.cell.suspect}" if p.cell.suspect else ""),
        ]
        for p in published
    ]
    return Grid(["table ", "published", "best", "last", "difference", "remark "], rows)


_FITTED_ON = {
    "training": "{n} training images that were not trained on",
    "validation": "{n} validation images; each half is evaluated with the temperature of the other half",
}


def _calibration(result: Mapping[str, Any]) -> str:
    """Return calibration error, NLL and temperature as a sentence."""
    ece = f"Expected calibration error (ECE): raw {result['ece_last']:.2f} %"
    if result.get("temperature") is None:
        return f"{ece}. The probabilities are not calibrated."
    source = _FITTED_ON[result["calibrated_on"]].format(n=f"{result['num_calibration']:,}")
    return (
        f"{ece}, calibrated {result['ece_calibrated']:.2f} %. Mean negative log-likelihood (NLL): raw "
        f"{result['nll']:.3f}, calibrated {result['nll_calibrated']:.3f}. The calibrated probabilities, which "
        "predictions and exports give, are the softmax of the logits divided by the temperature "
        f"{result['temperature']:.4g}, fitted on {source}."
    )


def _lowest_classes(run_data: RunData) -> dict[str, Any]:
    """Return the spread of the class accuracies and a table of the lowest ones."""
    rows = [(row.top1, row) for row in run_data.class_rows if row.top1 is not None]
    rows.sort(key=lambda pair: (pair[0], pair[1].label))
    top1 = [accuracy for accuracy, _ in rows]
    spread = f"lowest {top1[0]:.1f} %, median {median_high(top1):.1f} %, highest {top1[-1]:.1f} %"
    lowest = [row for _, row in rows[:_LOWEST]]
    columns: dict[str, Callable[[ClassRow], str]] = {
        "class ": lambda r: r.name,
        "group ": lambda r: r.group or "",
        "training images": lambda r: _number(r.trained),
        "images": lambda r: _number(r.images),
        "top-1 %": lambda r: _number(r.top1),
        "precision %": lambda r: _number(r.precision),
        "most confused with ": lambda r: (
            "" if r.taken_for is None else f"{r.taken_for} ({r.taken_for_count})"
        ),
    }
    for head, known in (("group ", lowest[0].group), ("training images", lowest[0].trained)):
        if known is None:
            del columns[head]
    return {"spread": spread, "lowest": grid(columns, lowest)}


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}"


def _strips(
    run_data: RunData, rows: Iterable[tuple[str, Sequence[int]]], thumbnails: Mapping[int, bytes]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return titles and samples of rows of thumbnails; empty rows are left out."""
    strips = (
        (title, [_sample(run_data, i, thumbnails) for i in row if i in thumbnails]) for title, row in rows
    )
    return [(title, samples) for title, samples in strips if samples]


def _sample(run_data: RunData, index: int, thumbnails: Mapping[int, bytes]) -> dict[str, Any]:
    predictions, names = run_data.predictions, run_data.classes
    true, predicted = int(predictions.targets[index]), int(predictions.predicted[index])
    return {
        "index": index,
        "true": names[true],
        "predicted": names[predicted],
        "correct": true == predicted,
        "confidence": f"{100 * predictions.final_confidence[index]:.0f}",
        "image": thumbnails[index],
    }


def _details(run_data: RunData) -> Grid:
    config, env = run_data.config, run_data.environment
    commit = str(env.get("git_commit") or "unknown") + (" with changes" if env.get("git_dirty") else "")
    versions = [f"{k} {env[k]}" for k in ("torch", "nvidia-dali-cuda130", "python", "dl2pa") if env.get(k)]
    device = f"{run_data.result['world_size']} × {env.get('device')} ({env.get('processor')})"
    rows = [
        ["recipe", describe(run_identity(config))],
        ["data", f"{config.data.dataset}, fingerprint {code(run_data.data.fingerprint)}"],
        ["seed", str(config.train.seed)],
        ["hardware", f"{device}, {env.get('threads')} threads each"],
        ["hosts", str(env.get("hosts", ""))],
        ["software", ", ".join(versions)],
        ["code", code(commit)],
        ["command", code(env.get("command", ""))],
        ["attempts", str(len(run_data.attempts))],
        ["SLURM job", " ".join(str(env[k]) for k in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID") if env.get(k))],
        ["MLflow run", code(run_data.mlflow_run_id or f"tags.dl2pa.run_uuid = {run_data.run_uuid}")],
        ["run directory", code(run_data.run.root)],
    ]
    return Grid(["name ", "value "], [row for row in rows if row[1]])


def _reproduce(run_data: RunData) -> str:
    """Return the commands that repeat the run from its artifacts."""
    env = run_data.environment
    lines = [f"git checkout {env['git_commit']}"] if env.get("git_commit") else []
    if env.get("git_dirty"):
        patch = f"git apply attempt-{len(run_data.attempts)}.diff"
        lines.append(f"{patch}    # artifact code/, if tracked files had changed")
    lines.append("pip install -r requirements.txt    # artifact code/")
    train = f"dl2pa train config.yaml --nproc {run_data.result['world_size']} --run-dir again"
    return "\n".join([*lines, f"{train}    # artifact config.yaml"])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
