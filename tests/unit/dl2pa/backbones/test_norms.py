"""Normalization layers with running statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dl2pa.backbones import build_embedder, synchronize_norms
from dl2pa.backbones.norms import running_norms


def test_layers_with_running_statistics_are_found() -> None:
    layers = [
        nn.BatchNorm2d(2),
        nn.BatchNorm1d(2, affine=False),
        nn.SyncBatchNorm(2),
        nn.InstanceNorm2d(2, track_running_stats=True),
    ]
    others = [
        *(nn.BatchNorm2d(2, track_running_stats=False), nn.InstanceNorm2d(2), nn.LayerNorm(2)),
        *(nn.GroupNorm(1, 2), nn.Conv2d(1, 1, 1), nn.Sequential(nn.Linear(1, 1))),
    ]
    assert running_norms(nn.Sequential(*layers, *others)) == layers


@pytest.mark.parametrize("backbone", ["timm:test_efficientnet", "timm:test_resnet", "resnet8"])
def test_synchronized_layers_compute_the_same(backbone: str) -> None:
    """Layers of timm contain the activation that follows."""
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    embedder = build_embedder(backbone, 3, image_size=32).eval()
    images, names = torch.randn(2, 3, 32, 32), set(embedder.state_dict())
    expected = embedder(images)
    synchronize_norms(embedder, backbone)
    norms = running_norms(embedder)
    assert norms and all(isinstance(layer, nn.SyncBatchNorm) for layer in norms)
    assert set(embedder.state_dict()) == names
    assert torch.equal(embedder.eval()(images), expected)
