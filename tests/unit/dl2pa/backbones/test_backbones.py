from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dl2pa.backbones import build_embedder
from dl2pa.backbones.cifar import CifarResNet
from dl2pa.specs import BACKBONES


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def expected_parameters(depth: int, widths: tuple[int, int, int], shortcut: str) -> int:
    """3x3 convolutions without bias, each followed by a BatchNorm's scale and shift."""
    convolutions = [(3, widths[0])]
    inputs = widths[0]
    for outputs in widths:
        blocks = (depth - 2) // 6
        convolutions += [(inputs, outputs)] + [(outputs, outputs)] * (2 * blocks - 1)
        if inputs != outputs and shortcut == "conv":
            convolutions.append((inputs, outputs))
        inputs = outputs
    return sum(9 * a * b + 2 * b for a, b in convolutions)


@pytest.mark.parametrize("shortcut", ["conv", "pad"])
@pytest.mark.parametrize(
    ("depth", "widths"), [(32, (16, 32, 64)), (32, (32, 64, 128)), (8, (16, 32, 64)), (56, (16, 32, 64))]
)
def test_network_has_the_layers_of_its_depth(depth: int, widths: tuple[int, int, int], shortcut: str) -> None:
    network = CifarResNet(depth, widths, shortcut)
    assert parameters(network) == expected_parameters(depth, widths, shortcut)
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(weighted) == depth - 1 + (2 if shortcut == "conv" else 0), "depth counts the classifier"


def test_resnet32_has_the_published_size() -> None:
    """0.46 M parameters with option A and a classifier over 10 classes (He et al., table 6)."""
    network = build_embedder("resnet32", 10, shortcut="pad")
    assert parameters(network) == 464_154
    assert parameters(build_embedder("resnet32", 10)) == 464_154 + 9 * (16 * 32 + 32 * 64) + 2 * (32 + 64)


@pytest.mark.parametrize("shortcut", ["conv", "pad"])
def test_features_are_a_mean_at_a_quarter_of_the_resolution(shortcut: str) -> None:
    network = CifarResNet(32, (16, 32, 64), shortcut)
    images = torch.randn(2, 3, 32, 32)
    stages = network.blocks(F.relu(network.bn1(network.conv1(images))))
    assert stages.shape == (2, 64, 8, 8)
    assert network.eval()(images).shape == (2, 64)
    assert network(torch.randn(1, 3, 17, 23)).shape == (1, 64)


def test_option_a_takes_every_second_pixel_and_pads_channels() -> None:
    """With a zero residual branch, the output of a block is relu(shortcut)."""
    network = CifarResNet(8, (4, 10, 16), "pad")
    block = network.blocks[1]
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert y.shape == (2, 10, 3, 3)
    assert torch.equal(y[:, 3:7], x[:, :, ::2, ::2])
    assert y[:, :3].abs().max() == 0
    assert y[:, 7:].abs().max() == 0


def test_identity_shortcut_adds_the_input() -> None:
    block = CifarResNet(14, (4, 8, 16)).blocks[1]
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x.clone()), x.relu())


def test_linear_and_batchnorm_heads() -> None:
    linear = build_embedder("resnet8", 5)
    assert linear.eval()(torch.randn(3, 3, 32, 32)).shape == (3, 5)
    assert parameters(linear) - parameters(linear.backbone) == 64 * 5 + 5
    batchnorm = build_embedder("resnet8", 128, head="batchnorm", widths=(32, 64, 128), shortcut="pad")
    assert parameters(batchnorm) - parameters(batchnorm.backbone) == 2 * 128
    embedded = batchnorm.train()(torch.randn(64, 3, 16, 16))
    assert embedded.mean(0).abs().max() < 1e-4
    assert (embedded.std(0) - 1).abs().max() < 0.05


@pytest.mark.parametrize(("name", "published"), [("resnet50", 25_557_032), ("swin_t", 28_288_354)])
def test_projection_replaces_the_torchvision_classifier(name: str, published: int) -> None:
    """The published size has a classifier of 1,000 classes, which a Linear to d replaces."""
    embedder = build_embedder(name, 32)
    features = {"resnet50": 2048, "swin_t": 768}[name]
    assert parameters(embedder) == published - (features + 1) * 1000 + (features + 1) * 32
    with torch.no_grad():
        out = embedder.eval()(torch.randn(1, 3, 64, 64))
    assert out.shape == (1, 32)
    assert torch.isfinite(out).all()


def test_weights_are_a_function_of_the_torch_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_embedder("resnet8", 4).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_memory_format_does_not_change_the_result() -> None:
    embedder = build_embedder("resnet8", 4).eval()
    images = torch.randn(2, 3, 32, 32)
    plain = embedder(images)
    last = embedder.to(memory_format=torch.channels_last)(
        images.contiguous(memory_format=torch.channels_last)
    )
    assert torch.allclose(plain, last, atol=1e-5)
    assert BACKBONES["resnet32"].channels_last
    assert not BACKBONES["swin_t"].channels_last
