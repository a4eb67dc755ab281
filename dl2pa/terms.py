"""Names of results in texts for people, the same in every table, page and message.

A raw value is measured on the softmax of the logits; a calibrated one on the softmax of the logits divided by the
temperature of the model.
"""

from __future__ import annotations

NAMES = {
    "top1_last": "top-1, last epoch",
    "top1_best": "top-1, best epoch",
    "top5_last": "top-5, last epoch",
    "top1_head": "top-1, head classes",
    "top1_medium": "top-1, medium classes",
    "top1_tail": "top-1, tail classes",
    "ece": "ECE, raw",
    "ece_last": "ECE, raw",
    "ece_calibrated": "ECE, calibrated",
    "nll": "NLL, raw",
    "nll_calibrated": "NLL, calibrated",
    "confidence": "confidence, raw",
    "confidence_calibrated": "confidence, calibrated",
}
"""Name by the key of a JSON object or of a metric without its prefix; keys that are not listed are used as they are."""


def term(key: str) -> str:
    """Name of a result."""
    return NAMES.get(key, key)
