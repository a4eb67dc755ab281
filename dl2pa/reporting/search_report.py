"""Report of a search: the best trial with its command, and a table of all trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dl2pa.reporting.document import Block, Bullets, Grid, Heading, Paragraph, code


def compose_search(result: Mapping[str, Any]) -> list[Block]:
    """Compose the results of a search, see `dl2pa.search.results`, as a document."""
    best, metric = result["best"], result["metric"]
    lead = "No trial has finished yet."
    if best is not None:
        lead = f"Best: trial {best['trial']}, {metric} {best['value']:.2f} % at epoch {best['epoch']}."
    blocks: list[Block] = [Heading(1, f"Search {result['search']}"), Paragraph(lead, is_lead=True)]
    if best is not None:
        blocks.append(Bullets([f"command: {code(best['command'])}", f"run: {code(best['run_dir'])}"]))
    blocks += [Paragraph(_counts(result)), Heading(2, "Trials"), _table(result)]
    failed = [trial for trial in result["trials"] if trial["error"]]
    if failed:
        texts = [f"trial {trial['trial']}: {trial['error']}" for trial in failed]
        blocks += [Heading(2, "Failed trials"), Bullets(texts)]
    return blocks


def search_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the table of the trials as text, the header first."""
    return [("trial", *_keys(result), "state", str(result["metric"]), "epoch", "steps", "directory")] + [
        (*cells, trial["run_dir"]) for cells, trial in zip(_cells(result), result["trials"], strict=True)
    ]


def _table(result: Mapping[str, Any]) -> Grid:
    heads = [
        "trial",
        *(f"{key} " for key in _keys(result)),
        "state ",
        str(result["metric"]),
        "epoch",
        "steps",
    ]
    return Grid(heads, _cells(result))


def _keys(result: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(key for trial in result["trials"] for key in trial["parameters"]))


def _cells(result: Mapping[str, Any]) -> list[list[str]]:
    keys = _keys(result)
    return [
        [
            str(trial["trial"]),
            *(str(trial["parameters"].get(key, "-")) for key in keys),
            trial["state"],
            "-" if trial["value"] is None else f"{trial['value']:.2f}",
            _number(trial["epoch"]),
            _number(trial["steps"]),
        ]
        for trial in result["trials"]
    ]


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _counts(result: Mapping[str, Any]) -> str:
    states: Sequence[str] = ("finished", "pruned", "failed", "open")
    counts = ", ".join(f"{result[state]} {state}" for state in states if result[state])
    text = f"{len(result['trials'])} trials: {counts or 'none started'}."
    full = result["steps_without_pruning"]
    if full:
        share = 100.0 * result["steps"] / full
        text += f" {result['steps']:,} of {full:,} steps were trained ({share:.0f} %)."
    return text
