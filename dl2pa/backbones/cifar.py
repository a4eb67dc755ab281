"""ResNets for small images (He et al., CVPR 2016, section 4.2) in the two variants of the DL2PA authors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _PadShortcut(nn.Module):
    """Shortcut option A: subsample pixels by the stride and pad the new channels with zeros."""

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.before = extra_channels // 2
        self.after = extra_channels - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            if shortcut not in ("conv", "pad"):
                raise ValueError(f"{shortcut!r} is not a shortcut; use conv or pad")
            if shortcut == "pad":
                self.shortcut = _PadShortcut(outputs - inputs, stride)
            else:
                conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x), inplace=True)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 with three stages and global average pooling; features [B, widths[-1]].

    Args:
        depth: 6n + 2.
        widths: channels of the three stages.
        shortcut: `conv` for a 3x3 convolution with BatchNorm, `pad` for option A.
    """

    def __init__(
        self, depth: int, widths: tuple[int, int, int] = (16, 32, 64), shortcut: str = "conv"
    ) -> None:
        super().__init__()
        assert (depth - 2) % 6 == 0, "a CIFAR ResNet has depth 6n + 2"
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        inputs = widths[0]
        for stage, outputs in enumerate(widths):
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(_Block(inputs, outputs, stride, shortcut))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.blocks(x)
        return torch.mean(x, dim=(2, 3))
