"""DALI decodes, crops, resamples, mirrors and normalizes what a ``Plan`` says: on the CPU, or on a GPU.

Its own readers, shufflers and random operators stay out: they draw from state that no resume can restore.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dl2pa.errors import UserError
from pipelines.encoded import Encoded
from pipelines.transforms import Transforms

_PREFETCH = 2
_MORE_THREADS = 2
"""DALI's threads wait for one another between operators: a few more than there are cores keep the cores busy."""


class DaliDecoder:
    """Streams of encoded steps in, images [B, S, S, 3] on the device out.

    They are normalized (float32) unless the recipe has a step that works on pixels as they are (uint8).
    """

    def __init__(self, transforms: Transforms, max_batch: int, threads: int, device: torch.device) -> None:
        self._square = (
            transforms.train
        )  # the plan resamples to the final square itself: nothing is left to cut off
        self._normalize = None if transforms.works_on_pixels else transforms.scaled_statistics()
        self._size = transforms.image_size
        self._max_batch = max_batch
        self._threads = threads
        self._device = device
        self._source: Iterator[Encoded] = iter(())
        self._given: deque[Encoded] = deque()
        self._held: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._pipe: Any = None
        self._drained = True

    def decode(self, source: Iterator[Encoded]) -> Iterator[tuple[Encoded, Tensor]]:
        """Images of each step; a decoding error leaves the steps under way in ``in_flight``."""
        self._source = source
        self._given.clear()
        # An iteration that was given up on, or failed, leaves its steps in DALI's queue.
        if self._pipe is None or not self._drained:
            self._pipe = self._build()
        else:
            self._pipe.reset()
        self._drained = False
        while True:
            try:
                (output,) = self._pipe.run()
            except StopIteration:
                self._drained = True
                return
            yield self._given.popleft(), self._as_tensor(output)

    def in_flight(self) -> list[Encoded]:
        """Steps handed to DALI whose images have not come back."""
        return list(self._given)

    def close(self) -> None:
        self._pipe = None
        self._source = iter(())

    def _next(self) -> tuple[Any, ...]:
        step = next(self._source)
        self._given.append(step)
        crop = step.crop
        anchor, shape = crop.window[:, :2].astype(np.int32), crop.window[:, 2:].astype(np.int32)
        always = (step.data, anchor, shape, crop.flip.astype(np.int32))
        if self._square:
            return always
        return (*always, crop.resized.astype(np.float32), crop.offset.astype(np.int32))

    def _build(self) -> Any:
        try:
            from nvidia import dali
        except ImportError:
            raise UserError(
                "data.loader",
                "dali",
                "DALI is not installed",
                "Install nvidia-dali, or set data.loader=torchvision.",
            ) from None
        # DALI makes its operators at import: a type checker cannot see them.
        fn: Any = dali.fn
        types: Any = dali.types
        pipeline_def: Any = dali.pipeline_def
        gpu = self._device.type == "cuda"

        @pipeline_def(
            batch_size=self._max_batch,
            num_threads=self._threads + _MORE_THREADS,
            device_id=self._device.index if gpu else None,
            prefetch_queue_depth=_PREFETCH,
        )
        def graph() -> Any:
            data, anchor, shape, mirror, *rest = fn.external_source(
                source=self._next, num_outputs=4 if self._square else 6, batch=True
            )
            side = np.array([self._size, self._size], dtype=np.int32)
            size, offset = rest or ([float(self._size)] * 2, None)
            images = fn.decoders.image_slice(
                data,
                anchor,
                shape,
                device="mixed" if gpu else "cpu",
                axis_names="HW",
                normalized_anchor=False,
                normalized_shape=False,
                # DALI's defaults are the opposite of PIL's on both counts.
                jpeg_fancy_upsampling=True,
                adjust_orientation=False,
                output_type=types.RGB,
            )
            images = fn.resize(images, size=size, interp_type=types.INTERP_TRIANGULAR, antialias=True)
            if offset is not None:
                images = fn.slice(images, offset, side, axis_names="HW")
            if self._normalize is None:
                return fn.flip(images, horizontal=mirror)
            mean, std = self._normalize
            return fn.crop_mirror_normalize(
                images, mirror=mirror, mean=mean, std=std, dtype=types.FLOAT, output_layout="HWC"
            )

        pipe = graph()
        pipe.build()
        return pipe

    def _as_tensor(self, output: Any) -> Tensor:
        images = torch.from_dlpack(output.as_tensor())
        if self._device.type == "cuda":
            # DALI may reuse the buffer once the tensor dies: keep it until the device has read it.
            while self._held and self._held[0][0].query():
                self._held.popleft()
            copy = images.clone()
            event = torch.cuda.Event()
            event.record()
            self._held.append((event, images))
            return copy
        return images
