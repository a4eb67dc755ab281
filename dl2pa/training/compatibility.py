"""Whether a checkpoint may be continued under the configuration at hand."""

from __future__ import annotations

import logging
from typing import Any

from dl2pa.config import Config, flatten
from dl2pa.config.load import PLACES
from dl2pa.errors import UserError

log = logging.getLogger(__name__)

# What may change between attempts: said, and then in force. Everything else is another run.
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
    """Flat values that belong to the run's identity or may change with a word said."""
    return {k: v for k, v in flatten(config).items() if not k.startswith(PLACES)}


def check_resumable(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare a checkpoint's identity with today's.

    Raises:
        UserError: a change that makes it another run, naming the key and both values.
    """
    before = {**identity_of(Config()), **before}  # an option that came later was at its default
    # The data's fingerprint last: what the user changed has a key of its own, which says more.
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key == "data.fingerprint", key)):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key.startswith(_MAY_CHANGE) and key not in _FIXED_EXCEPTIONS:
            log.warning("%s changed from %s to %s: the new value holds from here on", key, old, new)
            continue
        what = (
            "the images differ from those" if key == "data.fingerprint" else f"was {old!r} in the checkpoint"
        )
        raise UserError(
            "data.root" if key == "data.fingerprint" else key,
            new,
            f"{what} this run directory was started with",
            "Use another --run-dir for another run, or give the old value.",
        )
