"""Networks from images to embeddings: CIFAR ResNets and torchvision's ImageNet models."""

from dl2pa.backbones.build import TORCHVISION, Embedder, build_embedder, is_small, likes_channels_last

__all__ = ["TORCHVISION", "Embedder", "build_embedder", "is_small", "likes_channels_last"]
