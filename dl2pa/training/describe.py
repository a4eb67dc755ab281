"""A run's description in MLflow: what it is, how it went, beside which published figure, and where its siblings are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from dl2pa.config import Config
from dl2pa.config.identity import Length, group_name, identity_of, length_beside
from dl2pa.config.published import Cell, load_published, published_file
from dl2pa.errors import UserError
from dl2pa.escaping import markdown_text
from dl2pa.tracking.server import EXPERIMENT_ID

NOTE_TAG = "mlflow.note.content"
_FIGURES = {
    "top1_last": "top-1, last",
    "top1_best": "top-1, best",
    "top5_last": "top-5",
    "ece_last": "ECE",
    "top1_head": "head",
    "top1_medium": "medium",
    "top1_tail": "tail",
}


def describe_run(config: Config, name: str, command: str, result: Mapping[str, Any] | None = None) -> str:
    """Markdown for the tag that MLflow shows as the run's description.

    Args:
        name: of the configuration.
        command: that started the attempt, without secrets.
        result: what ``result.json`` holds; None while the run is under way.
    """
    data, model, train = config.data, config.model, config.train
    what = f"**{config.method.name}** ({config.loss}, {config.assignment}) on **{data.dataset}**"
    if data.imbalance is not None:
        what += f", imbalance {data.imbalance:g}"
    facts = f"{model.backbone}, d = {model.embedding_dim}, seed {train.seed}, "
    facts += f"{train.epochs} epochs of batch {train.batch_size}"
    parts = [f"{what}: {facts}. Configuration `{name}`, group `{group_name(config)}`."]
    if result is not None:
        parts += [_figures(result), *_published(config, result)]
    parts.append(_links(config))
    parts.append(f"Made by `{command.replace('`', '')}`. Compare two runs: `dl2pa report --compare RUN RUN`.")
    return "\n\n".join(parts)


def _figures(result: Mapping[str, Any]) -> str:
    shown = {text: result[key] for key, text in _FIGURES.items() if result.get(key) is not None}
    rows = [shown.keys(), ["--:"] * len(shown), [f"{value:.2f}" for value in shown.values()]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    done = (
        f"{result['epochs']} epochs, {result['steps']:,} steps, {result['num_validated']:,} images validated"
    )
    return f"{table}\n\nPer cent. {done}; {result['world_size']} processes."


def _published(config: Config, result: Mapping[str, Any]) -> list[str]:
    """A sentence for each published figure whose configuration this run follows."""
    try:
        return [
            _beside(cell, length, float(result["top1_best"]), title)
            for cell, length, title in cells_of(config, int(result["epochs"]), int(result["num_validated"]))
        ]
    except UserError:  # an installation without the tables
        return []


def cells_of(config: Config, epochs: int, num_validated: int) -> list[tuple[Cell, Length, str]]:
    """The published figures whose configuration a run follows, how long it is beside them, and their table's title.

    Raises:
        UserError: there is no file of published tables.
    """
    published, cells = load_published(published_file())
    own = identity_of(config)
    found: list[tuple[Cell, Length, str]] = []
    for cell in cells:
        table = published.tables[cell.table]
        if table.num_validated not in (None, num_validated):
            continue
        try:
            length = length_beside(own, epochs, identity_of(cell.load()), cell.needs)
        except UserError:  # a method or file that this version lacks
            continue
        if length is not None:
            found.append((cell, length, table.title))
    return found


def _beside(cell: Cell, length: Length, best: float, title: str) -> str:
    said = f"Published: {cell.top1} % ({title}, {cell.row}, {cell.column}; best epoch)"
    if cell.suspect:
        said += f", suspect: {cell.suspect}"
    if length == "full":
        return f"{said}. This run's best is {best - cell.top1:+.2f} from it."
    return f"{said}. This run is {'shorter' if length == 'short' else 'of another length'}: no comparison."


def _links(config: Config) -> str:
    links = [_search("other seeds of this recipe", f"tags.group = '{group_name(config)}'")]
    sweep = config.tracking.tags.get("sweep")
    if sweep:
        links.append(_search(f"the sweep {markdown_text(sweep)}", f"tags.sweep = '{sweep}'"))
    links.append(_search(f"all on {config.data.dataset}", f"tags.dataset = '{config.data.dataset}'"))
    return "See " + " · ".join(links) + "."


def _search(text: str, query: str) -> str:
    return f"[{text}](#/experiments/{EXPERIMENT_ID}/runs?searchFilter={quote(query)}&workflowType=machine_learning)"
