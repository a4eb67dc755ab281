"""Encoded images of a data set: the input example of a logged model, and images for checking an export."""

from __future__ import annotations

import io
from pathlib import Path

from dl2pa.osutil import replacing
from dl2pa.rundir import RunDirectory
from pipelines.dataset import Dataset, num_samples
from pipelines.datasets import ArrayDataset, ImageTable
from pipelines.datasets.folder import IMAGE_SUFFIXES
from pipelines.images import BadImage, image_suffix, open_image

_MAX_BYTES = 1 << 20
_MAX_TRIES = 16


def write_example(run: RunDirectory, val: Dataset) -> Path | None:
    """Write the first readable validation image of at most 1 MiB to the run directory; None if the set has none."""
    for sample in range(min(_MAX_TRIES, num_samples(val))):
        image = _readable_image(val, sample)
        if image is not None and len(image[0]) <= _MAX_BYTES:
            path = run.example_file(image[1])
            with replacing(path) as temporary:
                temporary.write_bytes(image[0])
            return path
    return None


def _readable_image(dataset: Dataset, sample: int) -> tuple[bytes, str] | None:
    """Like `encoded_image`, but None for an image that `data.max_bad_val_fraction` leaves out of the validation."""
    try:
        encoded = encoded_image(dataset, sample)
        if encoded is not None:
            with open_image(encoded[0]) as image:
                image.load()
        return encoded
    except (OSError, BadImage):
        return None


def encoded_image(dataset: Dataset, sample: int) -> tuple[bytes, str] | None:
    """Encoded bytes and file suffix of one image; None for a synthetic data set."""
    if isinstance(dataset, ImageTable):
        data = dataset.read(sample)
        suffix = dataset.path(sample).suffix.lstrip(".").lower()
        return data, suffix if suffix in IMAGE_SUFFIXES else image_suffix(data) or "jpg"
    if isinstance(dataset, ArrayDataset):
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(dataset.images[sample]).save(file, "PNG")
        return file.getvalue(), "png"
    return None
