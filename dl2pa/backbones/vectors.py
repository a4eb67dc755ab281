"""Networks on feature vectors, and the frozen network that computes such features from images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def build_mlp(inputs: int, hidden: Sequence[int], norm: str = "none", dropout: float = 0.0) -> nn.Sequential:
    """Build the hidden layers of a multilayer perceptron, [B, inputs] to [B, hidden[-1]]; without any, the identity.

    Args:
        norm: `batchnorm` puts a BatchNorm before each ReLU; `none`.
        dropout: probability after each ReLU.
    """
    layers: list[nn.Module] = []
    for width in hidden:
        layers.append(nn.Linear(inputs, width))
        if norm == "batchnorm":
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        inputs = width
    return nn.Sequential(*layers)


class FrozenBackbone(nn.Module):
    """Maps images [B, 3, H, W] to the features [B, D] of a feature data set.

    Args:
        network: the frozen network.
        projection: PCA as a linear layer; None without one.
    """

    def __init__(self, network: nn.Module, projection: nn.Linear | None = None) -> None:
        super().__init__()
        self.network = network
        self.projection = projection

    def forward(self, images: Tensor) -> Tensor:
        features = self.network(images)
        return features if self.projection is None else self.projection(features)
