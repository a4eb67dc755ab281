"""Reference decoder: PIL decodes and resizes by ``CropParams`` in a thread pool (PIL releases the GIL)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dl2pa.osutil import started_pool
from pipelines.crop import decode_image
from pipelines.encoded import Encoded


class PillowDecoder:
    """Decode encoded steps to uint8 images [B, S, S, 3] on the host."""

    def __init__(self, image_size: int, threads: int, interpolation: str = "bilinear") -> None:
        self._size = image_size
        self._interpolation = interpolation
        self._pool = started_pool(threads, "dl2pa-decode")
        self._current: list[Encoded] = []

    def decode(self, source: Iterator[Encoded]) -> Iterator[tuple[Encoded, Tensor]]:
        """Yield each step with its images; after a decoding error, ``in_flight`` returns the unfinished step."""
        for step in source:
            self._current = [step]
            images = list(self._pool.map(self._decode_one, [step] * len(step.data), range(len(step.data))))
            yield step, torch.from_numpy(np.stack(images))

    def in_flight(self) -> list[Encoded]:
        """The step being decoded."""
        return self._current

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _decode_one(self, step: Encoded, i: int) -> NDArray[np.uint8]:
        crop = step.crop
        image = decode_image(
            step.data[i].tobytes(),
            crop.window[i].tolist(),
            crop.resized[i].tolist(),
            crop.offset[i].tolist(),
            self._size,
            self._interpolation,
        )
        pixels = np.asarray(image)
        return pixels[:, ::-1] if crop.flip[i] else pixels
