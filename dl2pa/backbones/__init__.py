"""Backbones that map images to embeddings: CIFAR ResNets and torchvision models."""

from dl2pa.backbones.build import Embedder, build_embedder

__all__ = ["Embedder", "build_embedder"]
