"""Whether this is the container image, and what it was built from. A leaf without heavy imports."""

from __future__ import annotations

import os

IMAGE_VARIABLE = "DL2PA_IMAGE"
"""Environment variable that the Dockerfile sets, to the commit or `unknown`."""


def inside_image() -> bool:
    """Whether the program runs from the container image, under whatever engine."""
    return IMAGE_VARIABLE in os.environ


def image_revision() -> str | None:
    """The commit the image was built from; None outside it or where the builder did not say."""
    revision = os.environ.get(IMAGE_VARIABLE, "unknown")
    return None if revision in ("", "unknown") else revision
