"""Parameter groups: layers, learning rates, weight decay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dl2pa.backbones import build_embedder, layer_numbers
from dl2pa.cli import main
from dl2pa.config import parse_config
from dl2pa.config.schema import OptimConfig
from dl2pa.model.model import build_model
from dl2pa.training.distributed import World
from dl2pa.training.param_groups import param_groups
from dl2pa.training.train_state import TrainState
from pipelines.sampler import TrainSampler
from pipelines.synthetic import SyntheticPipeline


def optim(**values: Any) -> OptimConfig:
    return OptimConfig.model_validate(values)


def layers(backbone: str, size: int = 64) -> dict[str, int]:
    with torch.device("meta"):
        return layer_numbers(build_embedder(backbone, 4, image_size=size).backbone)


@pytest.mark.parametrize(
    ("backbone", "count", "examples"),
    [
        (
            "resnet8",
            4,
            {"conv1.weight": 0, "bn1.weight": 0, "blocks.0.conv2.weight": 1, "blocks.2.bn2.bias": 3},
        ),
        ("resnet18", 9, {"conv1.weight": 0, "layer1.0.conv1.weight": 1, "layer4.1.bn2.weight": 8}),
        (
            "vit_b_32",
            13,
            {
                "class_token": 0,
                "conv_proj.weight": 0,
                "encoder.pos_embedding": 0,
                "encoder.layers.encoder_layer_11.ln_1.weight": 12,
                "encoder.ln.weight": 12,
            },
        ),
        ("convnext_tiny", 1 + 18 + 3, {"features.0.0.weight": 0, "features.1.2.block.0.weight": 3}),
        ("swin_t", 1 + 12 + 3, {"features.0.0.weight": 0, "norm.weight": 15}),
        ("vgg11", 10, {"features.0.weight": 0, "classifier.3.weight": 9}),
        ("timm:test_vit", 8, {"patch_embed.proj.weight": 0, "blocks.0.norm1.weight": 1}),
    ],
)
def test_layers_are_the_blocks_of_a_network(backbone: str, count: int, examples: dict[str, int]) -> None:
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    numbers = layers(backbone, 160 if backbone == "timm:test_vit" else 64)
    assert sorted(set(numbers.values())) == list(range(max(numbers.values()) + 1))
    assert {name: numbers[name] for name in examples} == examples
    if not backbone.startswith("timm:"):
        assert max(numbers.values()) + 1 == count


def test_rates_fall_from_the_head_to_the_first_layer() -> None:
    embedder = build_embedder("resnet8", 4)
    groups = param_groups(embedder, optim(layer_decay=0.5, head_lr_scale=10.0))
    scales = {name: group.lr_scale for group in groups for name in group.names}
    assert scales["head.weight"] == scales["head.bias"] == 10.0
    assert scales["backbone.blocks.2.conv1.weight"] == 0.5
    assert scales["backbone.conv1.weight"] == scales["backbone.bn1.bias"] == 0.5**4
    assert scales.keys() == {name for name, _ in embedder.named_parameters()}
    decays = {name: group.decays for group in groups for name in group.names}
    assert decays["backbone.conv1.weight"] and not decays["backbone.bn1.weight"]


def test_defaults_have_two_groups_in_the_order_of_the_parameters() -> None:
    embedder = build_embedder("resnet8", 4)
    decayed, other = param_groups(embedder, optim())
    assert (decayed.lr_scale, decayed.decays, other.lr_scale, other.decays) == (1.0, True, 1.0, False)
    named = dict(embedder.named_parameters())
    assert [n for n in named if n in decayed.names] == list(decayed.names)
    assert all(named[name].ndim > 1 for name in decayed.names)
    assert [len(group.names) for group in param_groups(embedder, optim(decay_all=True))] == [len(named), 0]


def test_a_step_uses_the_rate_of_each_layer(alone: World) -> None:
    settings = parse_config(
        {
            "data": {"dataset": "synthetic", "num_classes": 5, "image_size": 8},
            "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4]},
            "train": {"batch_size": 8, "epochs": 2},
            "optim": {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"},
        }
    )
    batch = next(iter(SyntheticPipeline(5, 8, TrainSampler(16, 8, 0), 0, torch.device("cpu"))))
    moved: list[dict[str, torch.Tensor]] = []
    for change in ({}, {"layer_decay": 0.5, "head_lr_scale": 4.0}):
        chosen = settings.model_copy(update={"optim": settings.optim.model_copy(update=change)})
        train_state = TrainState(chosen, build_model(chosen, 5), alone, 2)
        before = {name: p.detach().clone() for name, p in train_state.model.named_parameters()}
        train_state.model.train()
        train_state.step(batch, 0)
        moved.append({name: p.detach() - before[name] for name, p in train_state.model.named_parameters()})
    plain, scaled = moved
    for name, factor in (
        ("backbone.conv1.weight", 0.5**4),
        ("backbone.blocks.2.conv2.weight", 0.5),
        ("head.weight", 4),
    ):
        name = f"embedder.{name}"
        assert torch.allclose(scaled[name], factor * plain[name], rtol=1e-2, atol=1e-6), name


def test_the_groups_of_a_configuration_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: {backbone: resnet8, embedding_dim: 4}\noptim: {lr: 1.0, layer_decay: 0.5}\n")
    assert main(["config", str(file), "--groups", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert {group["lr"] for group in groups} == {1.0, 0.5, 0.25, 0.125, 0.0625}
    assert main(["config", str(file), "--groups", "model.freeze_epochs=all"]) == 0
    text = capsys.readouterr().out
    assert "head.weight" in text
    assert "backbone" not in text
