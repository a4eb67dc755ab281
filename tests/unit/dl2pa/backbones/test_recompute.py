"""Activation checkpointing: the same bits with less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dl2pa.backbones import build_embedder, checkpoint_activations
from dl2pa.backbones.recompute import blocks
from dl2pa.errors import UserError

NETWORKS = [
    ("resnet14", 16),
    ("resnet18", 32),
    ("mobilenet_v3_small", 32),
    ("swin_t", 32),
    ("densenet121", 32),
    ("timm:test_vit", 32),
    ("timm:test_efficientnet", 32),
    ("timm:test_convnext", 32),
]


def passes(network: nn.Module, images: Tensor, precision: torch.dtype) -> tuple[list[Tensor], int]:
    """Output, gradients, buffers and generator after two steps, and the bytes kept for the backward pass of one."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    network.train()
    torch.manual_seed(1)
    for _ in range(2):
        kept = 0
        autocast = torch.autocast("cpu", precision, enabled=precision != torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), autocast:
            output = network(images)
        output.float().square().mean().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return [output.detach(), *gradients, *network.buffers(), torch.get_rng_state()], kept


@pytest.mark.parametrize(("name", "size"), NETWORKS)
def test_checkpointing_changes_no_bit_and_keeps_less(name: str, size: int) -> None:
    """Gradients, BatchNorm statistics and the state of the generator, in networks with dropout and stochastic depth."""
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    plain = build_embedder(name, 3, image_size=size)
    saving = copy.deepcopy(plain)
    checkpoint_activations(saving.backbone, name, size)
    assert list(saving.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, size, size)
    precision = torch.bfloat16 if "resnet" in name else torch.float32
    (expected, before), (result, after) = (passes(n, images, precision) for n in (plain, saving))
    assert len(expected) == len(result)
    assert all(torch.equal(one, other) for one, other in zip(expected, result, strict=True))
    assert after < 0.7 * before


def test_every_block_is_chosen_once() -> None:
    backbone = build_embedder("resnet18", 3, image_size=32).backbone
    assert [type(block).__name__ for block in blocks(backbone)] == ["BasicBlock"] * 8
    backbone = build_embedder("convnext_tiny", 3, image_size=32).backbone
    assert [type(block).__name__ for block in blocks(backbone)].count("CNBlock") == 18


def test_evaluation_and_frozen_blocks_are_not_computed_again() -> None:
    network = build_embedder("resnet14", 3, image_size=16)
    checkpoint_activations(network.backbone, "resnet14", 16)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    first = next(iter(blocks(network.backbone)))
    next(first.children()).register_forward_hook(count)
    images = torch.randn(2, 3, 16, 16)
    network.eval()
    network(images).sum().backward()
    assert calls == 1
    network.train()
    network(images).sum().backward()
    assert calls == 3


def test_a_copy_computes_with_its_own_weights() -> None:
    """The moving average of the weights is a copy of the model."""
    network = build_embedder("resnet14", 3, image_size=16)
    checkpoint_activations(network.backbone, "resnet14", 16)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert not network(torch.randn(2, 3, 16, 16)).any()
    assert other(torch.randn(2, 3, 16, 16)).any()


class Writer(nn.Module):
    """A block that changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU(inplace=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.act(x))


def test_a_block_that_changes_its_input_is_left_as_it_is() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        start = nn.Sequential(nn.Conv2d(3, 8, 4), nn.Flatten())
        block = nn.TransformerEncoderLayer(8, 2, 16)
        return nn.Sequential(start, nn.Sequential(Writer(), block), nn.Sequential(Writer(), Writer()))

    plain, saving = network(), network()
    assert checkpoint_activations(saving, "writers", 4) == 1
    images = torch.randn(2, 3, 4, 4)
    (expected, _), (result, _) = (passes(n, images, torch.float32) for n in (plain, saving))
    assert all(torch.equal(one, other) for one, other in zip(expected, result, strict=True))


def test_a_network_without_blocks_is_refused() -> None:
    backbone = build_embedder("vgg11", 3, image_size=32).backbone
    with pytest.raises(UserError, match=r"train\.checkpoint_activations"):
        checkpoint_activations(backbone, "vgg11", 32)
