"""Detection of the container image, and the commit that it was built from."""

from __future__ import annotations

import os

from dl2pa import envvars


def in_container() -> bool:
    """Return whether the program runs from the container image, under any engine."""
    return envvars.IMAGE in os.environ


def image_revision() -> str | None:
    """Return the commit that the image was built from; None outside the image or if the build did not set it."""
    revision = os.environ.get(envvars.IMAGE, "unknown")
    return None if revision in ("", "unknown") else revision
