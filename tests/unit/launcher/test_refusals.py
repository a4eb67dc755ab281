"""Kinds of sbatch's refusals."""

from __future__ import annotations

import pytest

from launcher.refusals import Refusal, kind_of


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", Refusal.OUTAGE),
        ("Batch job submission failed: Socket timed out on send/recv operation", Refusal.OUTAGE),
        (
            'auth_munge: Munge encode failed: Failed to connect to "/run/munge/munge.socket.2": Permission denied',
            Refusal.OUTAGE,
        ),
        ("auth/munge: _decode_cred: Munge decode failed: Invalid credential format", Refusal.OUTAGE),
        ("Batch job submission failed: Protocol authentication error", Refusal.OUTAGE),
        ("fatal: Could not establish a configuration source", Refusal.OUTAGE),
        ("AssocMaxSubmitJobLimit; Job violates accounting/QOS policy (job submit limit)", Refusal.FULL),
        ("QOSMaxSubmitJobPerUserLimit", Refusal.FULL),
        ("invalid partition specified: none", Refusal.INVALID),
        ("Batch job submission failed: User's group not permitted to use this partition", Refusal.INVALID),
        ("Batch job submission failed: Requested node configuration is not available", Refusal.INVALID),
        (
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            Refusal.OTHER,
        ),
        ("lua: this project has no hours left", Refusal.OTHER),
    ],
)
def test_a_refusal_is_classified_by_its_message(message: str, kind: Refusal) -> None:
    assert kind_of(message) is kind
