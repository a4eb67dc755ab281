"""Settings of DALI's decoder that do not change the images."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderHints:
    """Use of a GPU's hardware JPEG decoder: its fraction of the images, and (width, height) of its buffers."""

    hw_decoder_load: float = 0.65
    hw_decoder_size: tuple[int, int] = (0, 0)

    def dali_options(self) -> dict[str, float]:
        """Arguments of DALI's decoders on a GPU."""
        width, height = self.hw_decoder_size
        options = {"hw_decoder_load": self.hw_decoder_load}
        return {**options, "preallocate_width_hint": width, "preallocate_height_hint": height}
