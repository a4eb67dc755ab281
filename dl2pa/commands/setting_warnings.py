"""Warnings about the settings of runs before they start, because nobody reads the log of each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dl2pa.commands.output import note
from dl2pa.config.sweep import VARIANT_KEY
from dl2pa.config.warnings import warnings
from dl2pa.runplan import DataFacts, RunPlan

_MAX_NAMES = 5
"""Names of variants in a line."""


def note_warnings(plans: Sequence[RunPlan], facts: Mapping[str, DataFacts]) -> None:
    """Print each warning once, with the variants and the number of runs that it concerns unless it concerns all.

    Args:
        facts: see `runplan.check_trainings`.
    """
    found: dict[str, list[RunPlan]] = {}
    for plan in plans:
        for text in warnings(plan.config, facts[plan.config.data.model_dump_json()].num_classes):
            found.setdefault(text, []).append(plan)
    for text, concerned in found.items():
        note(f"warning{_of(concerned, len(plans))}: {text}")


def _of(concerned: Sequence[RunPlan], total: int) -> str:
    if len(concerned) == total:
        return ""
    tags = [plan.config.tracking.tags.get(VARIANT_KEY) for plan in concerned]
    names = list(dict.fromkeys(f"{tag}" for tag in tags if tag is not None))
    more = len(names) - _MAX_NAMES
    shown = [*names[:_MAX_NAMES], f"{more} more"] if more > 0 else names
    return f" for {len(concerned)} of {total} runs" + (f" ({'; '.join(shown)})" if shown else "")
