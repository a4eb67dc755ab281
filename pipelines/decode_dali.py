"""DALI decoder: decode, crop, resize, mirror and normalize by ``CropParams``, on the CPU or on a GPU.

DALI's readers, shuffling and random operators are not used: their random state cannot be restored on resume.
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
from pipelines.hints import DecoderHints
from pipelines.transforms import Transforms

_PREFETCH = 2
_EXTRA_THREADS = 2
"""DALI's threads wait for each other between operators; a few more threads than cores keep the cores busy."""


class DaliDecoder:
    """Decode encoded steps to images [B, S, S, 3] on the device.

    The images are normalized float32, or uint8 if the transforms need unnormalized pixels.
    """

    def __init__(
        self,
        transforms: Transforms,
        max_batch: int,
        threads: int,
        device: torch.device,
        hints: DecoderHints | None = None,
    ) -> None:
        self._hints = hints or DecoderHints()
        # In training, the window is resized to the final square: no second crop is needed.
        self._square = transforms.train
        self._normalize = None if transforms.works_on_pixels else transforms.scaled_statistics()
        self._size = transforms.image_size
        self._bicubic = transforms.interpolation == "bicubic"
        self._max_batch = max_batch
        self._threads = threads
        self._device = device
        self._source: Iterator[Encoded] = iter(())
        # With the inputs of DALI, which are not copied.
        self._submitted: deque[tuple[Encoded, tuple[Any, ...]]] = deque()
        self._unread: deque[tuple[torch.cuda.Event, Tensor, tuple[Any, ...]]] = deque()
        self._pipe: Any = None
        self._drained = True

    def decode(self, source: Iterator[Encoded]) -> Iterator[tuple[Encoded, Tensor]]:
        """Yield each step with its images; after a decoding error, ``in_flight`` returns the unfinished steps."""
        self._source = source
        # An abandoned or failed iteration leaves its steps in DALI's queue.
        if self._pipe is not None and self._drained:
            self._pipe.reset()
        else:
            self._shut_down()
            self._pipe = self._build()
        self._submitted.clear()
        self._drained = False
        stream: tuple[Any, ...] = ()
        if self._device.type == "cuda":
            # Called in any thread. With a stream, DALI orders its work before that of the stream and does not block.
            torch.cuda.set_device(self._device)
            stream = (torch.cuda.current_stream(self._device),)
        while True:
            try:
                (output,) = self._pipe.run(*stream)
            except StopIteration:
                self._drained = True
                return
            images = self._as_tensor(output)
            yield self._submitted.popleft()[0], images

    def in_flight(self) -> list[Encoded]:
        """Steps passed to DALI whose images have not been returned."""
        return [step for step, _ in self._submitted]

    def close(self) -> None:
        self._shut_down()
        self._source = iter(())

    def _shut_down(self) -> None:
        """End the pipeline; only then may its inputs be freed."""
        if self._pipe is not None:
            self._pipe._shutdown()
            self._pipe = None

    def _next(self) -> tuple[Any, ...]:
        step = next(self._source)
        crop = step.crop
        # Contiguous: DALI copies other arrays into one that it does not keep.
        anchor, shape = crop.window[:, :2].astype(np.int32, "C"), crop.window[:, 2:].astype(np.int32, "C")
        inputs: tuple[Any, ...] = (step.data, anchor, shape, crop.flip.astype(np.int32))
        if not self._square:
            inputs = (*inputs, crop.resized.astype(np.float32, "C"), crop.offset.astype(np.int32, "C"))
        self._submitted.append((step, inputs))
        return inputs

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
        # DALI creates its operators at import: type checkers cannot see them.
        fn: Any = dali.fn
        types: Any = dali.types
        pipeline_def: Any = dali.pipeline_def
        gpu = self._device.type == "cuda"

        @pipeline_def(
            batch_size=self._max_batch,
            num_threads=self._threads + _EXTRA_THREADS,
            device_id=self._device.index if gpu else None,
            prefetch_queue_depth=_PREFETCH,
        )
        def graph() -> Any:
            data, anchor, shape, mirror, *rest = fn.external_source(
                source=self._next, num_outputs=4 if self._square else 6, batch=True, no_copy=True
            )
            size, offset = rest or ([float(self._size)] * 2, None)
            images = fn.decoders.image_slice(
                data,
                anchor,
                shape,
                device="mixed" if gpu else "cpu",
                axis_names="HW",
                normalized_anchor=False,
                normalized_shape=False,
                # Match PIL; both defaults of DALI differ.
                jpeg_fancy_upsampling=True,
                adjust_orientation=False,
                output_type=types.RGB,
                **(self._hints.dali_options() if gpu else {}),
            )
            filter_type = types.INTERP_CUBIC if self._bicubic else types.INTERP_TRIANGULAR
            images = fn.resize(images, size=size, interp_type=filter_type, antialias=True)
            if offset is not None:
                # An argument, not a constant input, which would be copied to the GPU in every step.
                images = fn.slice(images, start=offset, shape=[self._size] * 2, axis_names="HW")
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
            # DALI may reuse the buffer once the tensor is freed: keep it until the device has read it.
            while self._unread and self._unread[0][0].query():
                self._unread.popleft()
            copy = images.clone()
            event = torch.cuda.Event()
            event.record()
            self._unread.append((event, images, self._submitted[0][1]))
            return copy
        return images
