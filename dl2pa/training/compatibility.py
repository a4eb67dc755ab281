"""Check that a checkpoint can be resumed with the current configuration."""

from __future__ import annotations

import logging
from typing import Any

from dl2pa.config import Config, flatten
from dl2pa.config.load import PLACES
from dl2pa.errors import UserError

log = logging.getLogger(__name__)

# Keys that may change between attempts, with a warning. Every other change requires a new run.
_MAY_CHANGE = (
    "optim.",
    "train.epochs",
    "train.max_steps",
    "train.log_every_steps",
    "train.eval_every_epochs",
    "train.eval_batch_size",
    "train.precision",
    "train.compile",
    "train.deterministic",
    "train.channels_last",
    "train.ema",
    "method.match.",
    "data.threads",
    "data.max_bad_fraction",
    "data.loader",
)
_FIXED_EXCEPTIONS = ("optim.name", "optim.decay_all", "method.match.warmup_epochs")


def identity_of(config: Config) -> dict[str, Any]:
    """Flat configuration values that a checkpoint is compared on."""
    return {k: v for k, v in flatten(config).items() if not k.startswith(PLACES)}


def check_resumable(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare a checkpoint's identity with the current one and warn about permitted changes.

    Raises:
        UserError: a change that requires a new run; names the key and both values.
    """
    before = {**identity_of(Config()), **before}  # a key added since the checkpoint had its default value
    # The data fingerprint comes last: if another key changed too, that key explains the difference better.
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key == "data.fingerprint", key)):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key.startswith(_MAY_CHANGE) and key not in _FIXED_EXCEPTIONS:
            log.warning("%s changed from %s to %s; training continues with the new value", key, old, new)
            continue
        remedy = "Use another --run-dir for a new run, or restore the old value."
        if key == "data.fingerprint":
            raise UserError(
                "data.root", new, "the images differ from those this run was started with", remedy
            )
        raise UserError(key, new, f"this run was started with {old!r}", remedy)
