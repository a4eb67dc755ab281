"""Every chosen recipe is a valid configuration without warnings, and its file reads back as it was chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dl2pa.config import Config, parse_config
from dl2pa.config.paths import expand_paths
from dl2pa.config.validate import DataSizes, validate
from dl2pa.config.warnings import warnings
from dl2pa.config.yaml_core import parse_yaml
from dl2pa.starter.network import Network
from dl2pa.starter.recipe import Machine, Recipe, choose_recipe, embedding_dim
from dl2pa.starter.render import render
from dl2pa.starter.survey import Layout, Survey

PRETRAINED = Network({"backbone": "resnet50"}, "torchvision:IMAGENET1K_V2", True, image_size=224)
SMALL = Network({"backbone": "mobilenet_v3_large"}, "torchvision:IMAGENET1K_V2", True, image_size=224)
CPU, GPU = Machine(0, 2), Machine(1, 8)


def survey(
    classes: int = 10, per_class: int = 48, side: int | None = 224, root: str = "/data/pets"
) -> Survey:
    counts = np.full(classes, per_class)
    names = tuple(map(str, range(classes)))
    folder = Path(root)
    return Survey(
        folder, Layout(folder, has_val=False), 0.1, int(counts.sum()), classes, names, counts, side, classes
    )


def checked(recipe: Recipe, data: Survey, processes: int) -> Config:
    """The configuration of the rendered file, checked like that of a run."""
    tree = parse_yaml(render(recipe, "A header.\nAnother line."))
    assert tree == recipe.tree
    config = parse_config(expand_paths(tree))
    if config.launch.nproc != "auto":
        processes = config.launch.nproc
    validate(config, processes, DataSizes(data.num_train, data.num_val, len(data.classes)))
    assert warnings(config, len(data.classes)) == []
    return config


@pytest.mark.parametrize("network", [None, PRETRAINED, Network({"backbone": "vit_b_16"})])
@pytest.mark.parametrize("gpus", [0, 1, 3, 8])
@pytest.mark.parametrize(
    ("classes", "per_class"), [(2, 1), (3, 2), (10, 48), (10, 6000), (514, 20), (1000, 1300)]
)
def test_recipes_are_valid(network: Network | None, gpus: int, classes: int, per_class: int) -> None:
    data = survey(classes, per_class)
    config = checked(choose_recipe(data, network, Machine(gpus, 4)), data, max(1, gpus))
    assert config.model.init == (network and network.init)
    assert 1 <= config.train.batch_size <= data.num_train


def test_steps_grow_with_the_data_and_the_machine() -> None:
    small, large = survey(10, 48), survey(10, 6000)
    assert (
        choose_recipe(small, SMALL, CPU).tree["train"]["epochs"]
        > (choose_recipe(large, SMALL, CPU).tree["train"]["epochs"])
    )
    assert choose_recipe(large, SMALL, CPU).tree["model"]["freeze_epochs"] == "all"
    assert choose_recipe(large, SMALL, GPU).tree["model"]["freeze_epochs"] == 1
    assert (
        choose_recipe(large, None, GPU).tree["model"]["backbone"]
        != (choose_recipe(large, None, CPU).tree["model"]["backbone"])
    )


def test_random_weights_train_longer_than_pretrained_ones() -> None:
    for machine in (CPU, GPU):
        epochs = [choose_recipe(survey(), n, machine).tree["train"]["epochs"] for n in (None, PRETRAINED)]
        assert epochs[0] > epochs[1]


def test_the_learning_rate_follows_the_batch() -> None:
    one, many = (choose_recipe(survey(10, 6000), PRETRAINED, Machine(n, 8)).tree for n in (1, 4))
    assert many["train"]["batch_size"] == 4 * one["train"]["batch_size"]
    assert many["optim"]["lr"] == pytest.approx(2 * one["optim"]["lr"], rel=0.02)


@pytest.mark.parametrize(("per_class", "frozen"), [(4, 6), (48, 4), (400, 1), (6000, "all")])
def test_the_head_trains_first(per_class: int, frozen: int | str) -> None:
    """About 100 steps, but not more than half of the epochs; at the same rate in all of them."""
    tree = choose_recipe(survey(10, per_class), SMALL, CPU).tree
    assert tree["model"]["freeze_epochs"] == frozen
    optim, batch = tree["optim"], tree["train"]["batch_size"]
    peak = optim["lr"] * optim.get("head_lr_scale", 1.0)
    assert peak == pytest.approx(7e-3 * (batch / 32) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("network", "machine", "per_class", "fixed"),
    [
        (SMALL, CPU, 48, True),
        (SMALL, CPU, 400, True),
        (SMALL, CPU, 6000, None),  # the backbone is not trained
        (PRETRAINED, GPU, 48, True),
        (PRETRAINED, GPU, 6000, None),
        (None, CPU, 48, None),
    ],
)
def test_batch_statistics_are_not_learned_from_few_images(
    network: Network | None, machine: Machine, per_class: int, fixed: bool | None
) -> None:
    model = choose_recipe(survey(10, per_class), network, machine).tree["model"]
    assert model.get("freeze_norm") == fixed


def test_small_images_are_trained_at_their_size() -> None:
    for machine in (CPU, GPU):
        tree = choose_recipe(survey(side=32), None, machine).tree
        assert (tree["data"]["image_size"], tree["model"]["backbone"]) == (32, "resnet8")


@pytest.mark.parametrize(("classes", "dim"), [(2, 2), (3, 2), (10, 9), (513, 512), (514, 512), (21_841, 512)])
def test_embedding_dimension_and_its_reason(classes: int, dim: int) -> None:
    result, reason = embedding_dim(classes)
    assert result == dim
    assert ("simplex" in reason) and (("learned" in reason) == (classes > 513))
    recipe = choose_recipe(survey(classes), PRETRAINED, GPU)
    assert ("assignment" in recipe.tree["method"]) == (classes <= 513)


def test_rare_classes_are_adjusted_for() -> None:
    data = survey()
    data.counts[3] = 4
    tree = choose_recipe(data, PRETRAINED, GPU).tree
    assert tree["method"]["logit_adjustment"] == 1.0
    assert "logit_adjustment" not in choose_recipe(survey(), PRETRAINED, GPU).tree["method"]


@pytest.mark.parametrize(
    "root", ["/a/My pets: 2 # $HOME ${x} 'é' \"q\"", "/a/true", "/a/2024", "/a/" + "long " * 60 + "end"]
)
def test_unusual_folder_names_survive(root: str) -> None:
    data = survey(root=root)
    config = checked(choose_recipe(data, None, CPU), data, 1)
    assert config.data.root == root
    assert config.tracking.experiment == Path(root).name


def test_a_fetch_command_is_on_a_line_of_its_own() -> None:
    name = "torchvision:mobilenet_v3_large.IMAGENET1K_V2"
    network = Network({"backbone": "mobilenet_v3_large"}, "torchvision:IMAGENET1K_V2", True, name, 224)
    text = render(choose_recipe(survey(), network, CPU), "header")
    assert f"  # dl2pa weights fetch {name}\n" in text
