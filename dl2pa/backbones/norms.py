"""Normalization layers with running statistics: find them, and synchronize them over processes."""

from __future__ import annotations

from torch import nn

from dl2pa.specs import backbone_spec

_STATISTICS = ("running_mean", "running_var")


def running_norms(network: nn.Module) -> list[nn.Module]:
    """Normalization layers with running statistics: BatchNorm, SyncBatchNorm and the like, not LayerNorm."""
    return [
        layer
        for layer in network.modules()
        if any(name in _STATISTICS for name, _ in layer.named_buffers(recurse=False))
    ]


def synchronize_norms(network: nn.Module, backbone: str) -> None:
    """Replace every BatchNorm below a network by a SyncBatchNorm with the same state.

    Args:
        network: not a BatchNorm itself.
        backbone: `model.backbone`. Layers of timm contain the activation that follows, which torch's function drops.
    """
    if backbone_spec(backbone).family == "timm":
        from timm.layers import convert_sync_batchnorm

        convert_sync_batchnorm(network)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # pyright: ignore[reportUnknownMemberType]
