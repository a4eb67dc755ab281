"""Writing of a comparison as files and as a JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dl2pa.errors import UserError
from dl2pa.osutil import replacing
from dl2pa.reporting.compare import Comparison
from dl2pa.reporting.compose import compose
from dl2pa.reporting.document import PICTURES, Block, Heading, pictures_of, to_html, to_markdown
from dl2pa.reporting.groups import Group


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write `report.md`, `report.html`, `report.json` and the plots; return the files in this order.

    Raises:
        UserError: the folder cannot be written.
    """
    return write_document(compose(comparison), record(comparison), folder)


def write_document(blocks: Sequence[Block], content: dict[str, Any], folder: Path) -> list[Path]:
    """Write a document and its content as JSON, as `write_report` does."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    texts = {
        "report.md": to_markdown(blocks),
        "report.html": to_html(blocks, title),
        "report.json": json.dumps(content, indent=1) + "\n",
    }
    files = {folder / name: text.encode() for name, text in texts.items()}
    for picture in pictures_of(blocks):
        files[folder / PICTURES / f"{picture.name}.svg"] = picture.svg
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, len(data)) as temporary:
                temporary.write_bytes(data)
    except OSError as error:
        message = f"cannot be written ({error.strerror})"
        raise UserError("--out", str(folder), message, "Give another folder.") from None
    return list(files)


def record(comparison: Comparison) -> dict[str, Any]:
    """Return the content of the report as a JSON object."""
    return {
        "source": comparison.source,
        "tables": {
            compared.name: [
                {
                    "row": line.cell.row,
                    "column": line.cell.column,
                    "published": line.cell.top1,
                    "suspect": line.cell.suspect,
                    "missing": line.missing,
                    "ours": [{"length": e.length, **_group(e.group)} for e in line.entries],
                }
                for line in compared.lines
            ]
            for compared in comparison.tables
        },
        "others": [
            {
                "dataset": other.group.identity["data.dataset"],
                "remark": other.remark,
                "length": "cut" if other.group.is_cut else "whole",
                **_group(other.group),
            }
            for other in comparison.others
        ],
        "unfinished": [
            {"run_dir": str(run.path), "state": run.state, "reason": run.reason}
            for run in comparison.unfinished
        ],
    }


def _group(group: Group) -> dict[str, Any]:
    summaries = {
        "top1_best": group.best,
        "top1_last": group.last,
        **{name: group.summary(name) for name in ("ece_last", "ece_calibrated", "nll", "nll_calibrated")},
        **{f"top1_{name}": summary for name, summary in group.by_frequency.items()},
    }
    return {
        "method": group.method,
        "dim": group.dim,
        "n": group.n,
        **{name: None if summary is None else asdict(summary) for name, summary in summaries.items()},
        "steps": group.steps,
        "epochs": group.epochs,
        "changed_midway": list(group.changed),
        "data_fingerprint": group.runs[0].data_fingerprint,
        "seeds": [run.seed for run in group.runs],
        "runs": [str(run.path) for run in group.runs],
        "repeats": [str(run.path) for run in group.repeats],
    }
