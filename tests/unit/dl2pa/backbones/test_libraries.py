"""Networks of torchvision and timm by name."""

from __future__ import annotations

import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dl2pa import zoo
from dl2pa.backbones import build_embedder, prefers_channels_last, probe_forward
from dl2pa.config import parse_config
from dl2pa.errors import UserError, install_command
from dl2pa.specs import backbone_spec


def config_error(backbone: str) -> UserError:
    with pytest.raises(UserError) as caught:
        parse_config({"model": {"backbone": backbone}})
    assert caught.value.field == "model.backbone"
    return caught.value


def test_names_are_those_that_the_libraries_register() -> None:
    import torchvision

    assert set(zoo.torchvision_models()) == set(torchvision.models.list_models(module=torchvision.models))
    timm = pytest.importorskip("timm")
    assert set(zoo.timm_models()) == set(timm.list_models())


@pytest.mark.parametrize(
    ("backbone", "near"),
    [("resnet19", "resnet18"), ("convnext_tny", "convnext_tiny"), ("timm:resnet18_", "timm:resnet18")],
)
def test_an_unknown_name_is_refused_with_the_nearest(backbone: str, near: str) -> None:
    assert near in config_error(backbone).remedy


def test_a_tag_of_weights_is_no_architecture() -> None:
    pytest.importorskip("timm")
    assert "model.init=timm:a1_in1k" in config_error("timm:resnet18.a1_in1k").remedy


def test_a_missing_timm_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert install_command("timm") in config_error("timm:resnet18").remedy


def test_a_name_is_checked_without_importing_the_libraries() -> None:
    code = (
        "from dl2pa.config import parse_config\nimport sys\n"
        "parse_config({'model': {'backbone': 'vit_b_16'}})\n"
        "assert not {'torch', 'torchvision', 'timm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("backbone", "image_size", "features", "layout", "stochastic"),
    [
        ("resnet18", 32, 512, True, False),
        ("convnext_tiny", 32, 768, True, True),
        ("vit_b_16", 48, 768, False, False),
        ("swin_v2_t", 64, 768, False, True),
        ("squeezenet1_1", 32, 512, True, True),
        ("googlenet", 32, 1024, True, True),
        ("timm:convnext_atto", 32, 320, True, False),
        ("timm:vit_tiny_patch16_224", 48, 192, False, False),
        ("timm:mobilenetv3_small_050", 32, 1024, True, False),
    ],
)
def test_features_layout_and_randomness_are_found(
    backbone: str, image_size: int, features: int, layout: bool, stochastic: bool
) -> None:
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    embedder = build_embedder(backbone, 5, image_size=image_size)
    assert isinstance(embedder.head, nn.Linear)
    assert embedder.head.in_features == features
    assert prefers_channels_last(embedder.backbone) == layout
    assert probe_forward(embedder, image_size).draws_random_numbers == stochastic
    with torch.no_grad():
        assert embedder.eval()(torch.randn(2, 3, image_size, image_size)).shape == (2, 5)


def first_of_each_family() -> list[str]:
    """One network of each module of torchvision, whose networks differ in their sizes."""
    import torchvision

    families: dict[str, str] = {}
    for name in zoo.torchvision_models():
        families.setdefault(torchvision.models.get_model_builder(name).__module__, name)
    return list(families.values())


@pytest.mark.parametrize(
    "names",
    [first_of_each_family, pytest.param(zoo.torchvision_models, marks=pytest.mark.thorough)],
    ids=["one of each family", "all"],
)
def test_every_torchvision_model_is_accepted(names: Callable[[], list[str]]) -> None:
    """Without weights; the networks that compute with them while being built are covered by `test_libraries`."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names():
            if not name.startswith("regnet"):
                embedder = build_embedder(name, 7, image_size=224)
                assert isinstance(embedder.head, nn.Linear), name


class RandomAddition(nn.Module):
    """A stochastic layer that no library knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x) if self.training else x


@pytest.mark.parametrize(
    ("layer", "stochastic"),
    [
        (RandomAddition(), True),
        (nn.Dropout(0.1), True),
        (nn.Dropout2d(0.1), True),
        (nn.AlphaDropout(0.1), True),
        (nn.Dropout(0.0), False),
        (nn.RReLU(), True),
        (nn.ReLU(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_layer_that_draws_is_detected(layer: nn.Module, stochastic: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.BatchNorm2d(4))
    before = [tensor.clone() for tensor in network.state_dict().values()]
    generator = torch.get_rng_state()
    assert probe_forward(network, 8).draws_random_numbers == stochastic
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(map(torch.equal, before, network.state_dict().values()))


@pytest.mark.parametrize("name", ["DropPath", "DropBlock2d"])
def test_layers_of_timm_that_draw_are_detected(name: str) -> None:
    layers: Any = pytest.importorskip("timm.layers")
    network = nn.Sequential(nn.Conv2d(3, 4, 3), getattr(layers, name)(0.2))
    assert probe_forward(network, 16).draws_random_numbers


def test_control_flow_on_values_falls_back_to_a_computed_pass() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(192)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            return torch.nn.functional.dropout(self.norm(x) if float(x.sum()) >= 0 else x, 0.5)

    network = Network()
    traits = probe_forward(network, 8)
    assert traits.shape == (2, 192)
    assert traits.draws_random_numbers
    assert network.norm.num_batches_tracked == 0


@pytest.mark.parametrize(("backbone", "size"), [("vit_b_16", 50), ("inception_v3", 32)])
def test_an_image_size_that_the_network_refuses_is_one_message(backbone: str, size: int) -> None:
    with pytest.raises(UserError) as caught:
        build_embedder(backbone, 4, image_size=size)
    assert caught.value.field == "data.image_size"


def test_weights_of_the_rows_did_not_change() -> None:
    """The first ten backbones draw their weights in the order of their builders, without a probe."""
    import torchvision

    for name in ("resnet50", "swin_t"):
        torch.manual_seed(3)
        expected = getattr(torchvision.models, name)(weights=None)
        spec = backbone_spec(name)
        head = nn.Linear(spec.features or 0, 16)
        torch.manual_seed(3)
        embedder = build_embedder(name, 16, image_size=random.choice([64, 224]))
        assert torch.equal(embedder.head.weight, head.weight)
        weights = expected.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in embedder.backbone.state_dict().items())
