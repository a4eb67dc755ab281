"""Networks from images to embeddings: CIFAR ResNets and torchvision's ImageNet models."""

from dl2pa.backbones.build import Embedder, build_embedder

__all__ = ["Embedder", "build_embedder"]
