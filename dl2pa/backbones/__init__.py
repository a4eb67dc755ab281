"""Backbones that map images to embeddings: CIFAR ResNets, and the models of torchvision and timm; and small networks on
feature vectors."""

from dl2pa.backbones.build import Embedder, build_embedder
from dl2pa.backbones.layers import layer_numbers
from dl2pa.backbones.norms import synchronize_norms
from dl2pa.backbones.probe import prefers_channels_last, probe_forward
from dl2pa.backbones.recompute import checkpoint_activations

__all__ = [
    "Embedder",
    "build_embedder",
    "checkpoint_activations",
    "layer_numbers",
    "prefers_channels_last",
    "probe_forward",
    "synchronize_norms",
]
