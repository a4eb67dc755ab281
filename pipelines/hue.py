"""Shift of the hue of uint8 images, bit-identical to ``torchvision.transforms.v2.functional.adjust_hue``.

Each step is one elementwise float32 operation, rounded separately, so the result for a pixel is bit-identical in every
batch. The conversions between RGB and HSV are those of Pillow and of Wikipedia's article "HSL and HSV".
"""

from __future__ import annotations

import torch
from torch import Tensor


def shift_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of images on their device.

    Args:
        pixels: uint8 [n, H, W, 3].
        shift: float32 [n] in [-0.5, 0.5], in turns of the color circle.

    Returns:
        uint8 [n, H, W, 3].
    """
    planes = pixels.permute(0, 3, 1, 2).contiguous().float().mul_(1.0 / 255)
    hue, saturation, value = _to_hsv(planes)
    hue.add_(shift.view(-1, 1, 1)).remainder_(1.0)
    shifted = _to_rgb(hue, saturation, value)
    # torchvision's scale: 255.999 truncated maps equal intervals of [0, 1] to the 256 levels.
    return shifted.mul_(256.0 - 1e-3).to(torch.uint8).permute(0, 2, 3, 1)


def _to_hsv(planes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue, saturation and value, each [n, H, W] in [0, 1], of RGB [n, 3, H, W]; gray has hue and saturation 0."""
    red, green, blue = planes.unbind(1)
    lowest, value = torch.aminmax(planes, dim=1)
    is_gray = lowest == value
    spread = value - lowest
    saturation = spread / value.masked_fill(is_gray, 1.0)
    divisor = spread.masked_fill_(is_gray, 1.0)
    r, g, b = (value - red) / divisor, (value - green) / divisor, (value - blue) / divisor
    sixths = torch.where(
        value == red,
        b - g,
        torch.where(value == green, r.add(2.0).sub_(b), g.add(4.0).sub_(r)),
    )
    return sixths.mul_(1.0 / 6.0).add_(1.0).fmod_(1.0), saturation, value


def _to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """RGB [n, 3, H, W] of hue, saturation and value, each [n, H, W]."""
    sixths = hue.mul(6)
    sector = sixths.floor()
    part = sixths.sub_(sector).mul_(saturation)
    rest = 1.0 - saturation
    low = rest.mul(value).clamp_(0.0, 1.0)
    falling = (1.0 - part).mul_(value).clamp_(0.0, 1.0)
    rising = part.add_(rest).mul_(value).clamp_(0.0, 1.0)
    in_sector = [sector == number for number in range(6)]
    in_sector[0].logical_or_(sector == 6)  # a hue that was rounded up to 1

    def channel(turn: int) -> Tensor:
        """Red, or the channel whose curve over the color circle is that of red, `turn` sectors later."""
        falls, rises = in_sector[(1 + turn) % 6], in_sector[(4 + turn) % 6]
        is_low = in_sector[(2 + turn) % 6] | in_sector[(3 + turn) % 6]
        moving = torch.where(falls, falling, torch.where(rises, rising, value))
        return torch.where(is_low, low, moving)

    return torch.stack((channel(0), channel(2), channel(4)), dim=1)
