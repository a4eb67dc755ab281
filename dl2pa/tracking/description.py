"""Description of a run in MLflow: settings, results, published accuracy of the same configuration, related runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from dl2pa.config import Config
from dl2pa.config.identity import Length, group_name
from dl2pa.config.published import Cell, matching_cells
from dl2pa.errors import UserError
from dl2pa.terms import term
from dl2pa.tracking.sanitize import markdown_text
from dl2pa.tracking.server import EXPERIMENT_ID
from dl2pa.tracking.views import view_link

NOTE_TAG = "mlflow.note.content"
STOPPED_EARLY_TAG = "dl2pa.stopped_early"
"""Tag of a run that `train.patience` ended, with its last epoch."""
_RESULTS = (
    *("top1_last", "top1_best", "top5_last", "ece_last", "ece_calibrated"),
    *("top1_head", "top1_medium", "top1_tail"),
)


def describe_run(config: Config, name: str, command: str, result: Mapping[str, Any] | None = None) -> str:
    """Markdown for the tag that MLflow shows as the run's description.

    Args:
        name: name of the configuration.
        command: command that started the attempt, without secrets.
        result: content of ``result.json``; None before the run is finished.
    """
    data, model, train = config.data, config.model, config.train
    subject = f"**{config.method.name}** ({config.loss}, {config.assignment}) on **{data.dataset}**"
    if data.imbalance is not None:
        subject += f", imbalance {data.imbalance:g}"
    settings = f"{model.backbone}, d = {model.embedding_dim}, seed {train.seed}, "
    settings += f"{train.epochs} epochs of batch {train.batch_size}"
    parts = [f"{subject}: {settings}. Configuration `{name}`, group `{group_name(config)}`."]
    if result is not None:  # MLflow shows only the first lines before "Show more"
        lead = f"**Top-1 {result['top1_last']:.2f} %** at the last epoch, {result['top1_best']:.2f} % at the best"
        parts = [f"{lead}.", *parts, _results_table(result), *_published_sentences(config, result)]
    parts.append(_links(config))
    parts.append(
        f"Command: `{command.replace('`', '')}`. Compare two runs: `dl2pa report --compare RUN RUN`."
    )
    return "\n\n".join(parts)


def _results_table(result: Mapping[str, Any]) -> str:
    """Table of one result per row, rounded to one hundredth, with the meaning of each."""
    epoch = result.get("epoch_best")
    remarks = {
        "top1_best": f"epoch {epoch}" if epoch else "",
        "ece_last": "expected calibration error, 15 bins",
    }
    if (temperature := result.get("temperature")) is not None:
        remarks["ece_calibrated"] = f"temperature {temperature:.4g}"
    rows = [("result", "&emsp;%", ""), (":--", "--:", ":--")]
    rows += [
        (term(key), f"&emsp;{result[key]:.2f}", f"&emsp;{remarks.get(key, '')}")
        for key in _RESULTS
        if result.get(key) is not None
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    length = f"{result['epochs']} epochs, {result['steps']:,} steps"
    length += " (stopped early)" if result.get("stopped_early") else ""
    images = f"{result['num_validated']:,} validation images"
    processes = result["world_size"]
    return f"{table}\n\n{length}, {images}, {processes} process{'es' * (processes != 1)}."


def _published_sentences(config: Config, result: Mapping[str, Any]) -> list[str]:
    """One sentence per published accuracy of the run's configuration."""
    try:
        return [
            _published_sentence(match.cell, match.length, float(result["top1_best"]), match.title)
            for match in matching_cells(config, int(result["epochs"]), int(result["num_validated"]))
        ]
    except UserError:  # an installation without the tables
        return []


def _published_sentence(cell: Cell, length: Length, best: float, title: str) -> str:
    text = f"Published: {cell.top1} % ({title}, {cell.row}, {cell.column}; best epoch)"
    if cell.suspect:
        text += f", suspect: {cell.suspect}"
    if length == "full":
        return f"{text}. This run's best epoch differs by {best - cell.top1:+.2f}."
    return f"{text}. Not compared: this run {'is shorter' if length == 'short' else 'has another length'}."


def _links(config: Config) -> str:
    links = [f"[curves of all runs]({view_link(EXPERIMENT_ID)}&compareRunsMode=CHART)"]
    links.append(_search("other seeds of this recipe", f"tags.group = '{group_name(config)}'"))
    sweep = config.tracking.tags.get("sweep")
    if sweep:
        links.append(_search(f"the sweep {markdown_text(sweep)}", f"tags.sweep = '{sweep}'"))
    links.append(_search(f"all on {config.data.dataset}", f"tags.dataset = '{config.data.dataset}'"))
    return "See " + " · ".join(links) + "."


def _search(text: str, query: str) -> str:
    return f"[{text}]({view_link(EXPERIMENT_ID, None)}&searchFilter={quote(query)})"
