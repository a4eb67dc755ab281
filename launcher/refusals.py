"""Kinds of sbatch's refusals, by the texts of SLURM's error messages (slurm_errno.c and the limits of accounting)."""

from __future__ import annotations

import re
from enum import Enum

_OUTAGE = re.compile(
    r"unable to contact|timed out|munge|protocol authentication|temporarily un|backup controller|zero bytes were"
    r"|connection (refused|reset)|not connected|missing socket|configuration source|establish controller",
    re.IGNORECASE,
)
_FULL = re.compile(r"SubmitJob")
"""As in `AssocMaxSubmitJobLimit` and `QOSMaxSubmitJobPerUserLimit`."""
_INVALID = re.compile(
    r"\binvalid\b(?! (authentication|job) )|(not|than) permitted|\bdenied\b|not authorized|unrecognized option"
    r"|can ?not be satisfied|configuration is not available",
    re.IGNORECASE,
)


class Refusal(Enum):
    """Kind of a refusal.

    Attributes:
        OUTAGE: SLURM does not answer; it may have queued the job.
        FULL: a limit on the number of queued jobs is reached, so a job can be queued when another one has ended.
        INVALID: SLURM does not accept this request.
        OTHER: any other message, for example that of a site's plugin.
    """

    OUTAGE = "outage"
    FULL = "full"
    INVALID = "invalid"
    OTHER = "other"

    @property
    def is_temporary(self) -> bool:
        return self in (Refusal.OUTAGE, Refusal.FULL)


def kind_of(message: str) -> Refusal:
    """Return the kind of a refusal from sbatch's messages."""
    kinds = {Refusal.OUTAGE: _OUTAGE, Refusal.FULL: _FULL, Refusal.INVALID: _INVALID}
    return next((kind for kind, texts in kinds.items() if texts.search(message)), Refusal.OTHER)
