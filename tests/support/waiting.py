"""Wait for a condition."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

DEADLINE_S = 480.0
"""Detects a hang; far longer than any step takes on a busy machine."""


def eventually(
    condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S, poll_s: float = 0.005
) -> Any:
    """Return the first truthy value of `condition`; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not reached within {seconds:.0f} s: {what}"
        time.sleep(poll_s)
    return value
