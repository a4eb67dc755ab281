from __future__ import annotations

from typing import Any

import pytest

from dl2pa.config import Config, merge, parse_config
from dl2pa.config.checks import (
    check_batches,
    check_combination,
    check_lengths,
    check_loader,
    check_method,
    check_num_classes,
    check_recipe,
    check_val_fraction,
)
from dl2pa.config.method_checks import check_contrast
from dl2pa.config.warnings import warnings
from dl2pa.errors import UserError

CIFAR = {"data": {"dataset": "cifar100", "root": "/data", "crop": "pad"}, "model": {"backbone": "resnet32"}}


def config(*trees: dict[str, Any]) -> Config:
    whole: dict[str, Any] = {}
    for tree in trees:
        whole = merge(whole, tree)
    return parse_config(whole)


@pytest.mark.parametrize(
    "data",
    [
        {"val_root": "/val"},
        {"dataset": "svhn_lt_legacy", "crop": "pad"},
        {"dataset": "tiny_imagenet"},
        {"dataset": "synthetic", "num_classes": 2},
    ],
)
def test_val_fraction_is_refused_with_another_validation_split(data: dict[str, Any]) -> None:
    check_val_fraction(config({"data": {"val_fraction": 0.1}}))
    with pytest.raises(UserError) as caught:
        check_val_fraction(config({"data": {"val_fraction": 0.1, **data}}))
    assert (caught.value.field, caught.value.value) == ("data.val_fraction", 0.1)


@pytest.mark.parametrize("betas", [[1.0, 0.999], [0.9, 1.0], [0.9, -0.1]])
def test_decay_rates_of_one_are_refused(betas: list[float]) -> None:
    with pytest.raises(UserError, match="< 1") as caught:
        config({"optim": {"betas": betas}})
    assert caught.value.field == "optim.betas"


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_a_world_that_divides_the_shards_is_accepted(world: int) -> None:
    check_batches(config({"train": {"batch_size": 48}}), world)


@pytest.mark.parametrize(
    ("train", "world", "field"),
    [
        ({"batch_size": 48}, 5, "launch.nproc"),
        ({"batch_size": 7}, 2, "launch.nproc"),
        ({"batch_size": 48, "virtual_shards": 5}, 1, "train.virtual_shards"),
        ({"batch_size": 48, "virtual_shards": 2}, 3, "launch.nproc"),
    ],
)
def test_a_batch_that_does_not_split_is_refused(train: dict[str, int], world: int, field: str) -> None:
    with pytest.raises(UserError) as caught:
        check_batches(config({"train": train}), world)
    assert caught.value.field == field
    assert caught.value.value == (world if field == "launch.nproc" else train["virtual_shards"])


def test_valid_numbers_of_processes_are_listed() -> None:
    with pytest.raises(UserError, match=r"\[1, 2, 3, 4, 6, 12\]"):
        check_batches(config({"train": {"batch_size": 48}}), 5)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    check_lengths(config({"train": {"batch_size": 100}}), 100)
    with pytest.raises(UserError, match="at most 99") as caught:
        check_lengths(config({"train": {"batch_size": 100}}), 99)
    assert caught.value.field == "train.batch_size"


@pytest.mark.parametrize(
    ("tree", "field"),
    [
        ({"method": {"name": "psc", "loss": "squared_cosine"}}, "method.loss"),
        ({"method": {"name": "psc", "assignment": "dynamic"}}, "method.assignment"),
        ({"method": {"name": "dnc", "loss": "dot_regression"}}, "method.loss"),
        ({"method": {"name": "goto", "assignment": "dynamic"}}, "method.assignment"),
        (
            {"method": {"name": "goto", "sub_prototypes": 11}, "model": {"embedding_dim": 10}},
            "sub_prototypes",
        ),
        ({"method": {"name": "goto"}, "model": {"embedding_dim": 3}}, "method.sub_prototypes"),
        ({"method": {"name": "word2vec"}}, "method.class_vectors"),
        ({"method": {"name": "kasarla"}, "model": {"embedding_dim": 98}}, "model.embedding_dim"),
        ({"method": {"name": "kasarla", "margin": 0.1}, "model": {"embedding_dim": 99}}, "method.margin"),
        ({"method": {"name": "psc", "normalize": False, "margin": 0.1}}, "method.margin"),
        ({"method": {"loss": "cross_entropy", "normalize": False, "margin": 0.1}}, "method.margin"),
        ({"model": {"head": "batchnorm", "embedding_dim": 63}}, "model.head"),
        ({"model": {"head": "batchnorm", "backbone": "resnet50", "embedding_dim": 64}}, "model.head"),
        ({"model": {"backbone": "swin_t"}, "data": {"image_size": 16}}, "data.image_size"),
    ],
)
def test_a_method_that_cannot_run_is_refused(tree: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as caught:
        check_method(config(CIFAR, tree), 100)
    assert caught.value.field.endswith(field)
    assert caught.value.remedy


def test_refit_is_refused_with_too_many_classes() -> None:
    tree = {"method": {"match": {"refit_cosine": 0.9}}}
    check_method(config(CIFAR, tree), 4096)
    with pytest.raises(UserError) as caught:
        check_method(config(CIFAR, tree), 4097)
    assert caught.value.field == "method.match.refit_cosine"


def test_kasarla_names_the_dimension_it_needs() -> None:
    tree = {"method": {"name": "kasarla"}, "model": {"embedding_dim": 50}}
    with pytest.raises(UserError, match=r"at least 99 dimensions.*embedding_dim=99") as caught:
        check_method(config(CIFAR, tree), 100)
    assert (caught.value.field, caught.value.value) == ("model.embedding_dim", 50)


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="at least two classes"):
        check_method(config(CIFAR), 1)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"method": {"name": "psc"}},
        {"method": {"name": "psc", "margin": 0.3}},
        {"method": {"name": "dnc"}, "model": {"embedding_dim": 3}},
        {"method": {"name": "goto", "sub_prototypes": 10}, "model": {"embedding_dim": 10}},
        {"method": {"name": "word2vec", "class_vectors": "v.npy", "assignment": "dynamic"}},
        {"method": {"name": "kasarla"}, "model": {"embedding_dim": 99}},
        {"method": {"name": "kasarla", "prototypes": "max_cosine"}, "model": {"embedding_dim": 10}},
        {"method": {"name": "etf"}, "model": {"embedding_dim": 10}},
        {"method": {"name": "kasarla", "loss": "squared_cosine", "margin": 0.1}},
        {"model": {"head": "batchnorm", "embedding_dim": 64}},
        {"model": {"head": "batchnorm", "embedding_dim": 128, "widths": [32, 64, 128]}},
    ],
)
def test_a_method_that_can_run_is_accepted(tree: dict[str, Any]) -> None:
    check_method(config(CIFAR, tree), 100)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"dataset": "cifar10", "loader": "dali", "crop": "pad"}, "data.loader"),
        ({"dataset": "cifar10", "loader": "torchvision", "crop": "pad"}, "data.loader"),
        ({"dataset": "imagefolder", "loader": "synthetic"}, "data.loader"),
        ({"dataset": "cifar10"}, "data.crop"),
        ({"dataset": "imagefolder", "crop": "pad"}, "data.crop"),
        ({"dataset": "imagefolder", "crop": "pad", "loader": "torchvision"}, "data.crop"),
        ({"dataset": "synthetic"}, "data.num_classes"),
        ({"dataset": "synthetic", "num_classes": 3, "imbalance": 0.1}, "data.imbalance"),
        ({"dataset": "svhn_lt_legacy", "loader": "dali", "crop": "none"}, "data.loader"),
        ({"dataset": "imagefolder", "crop_scale": [0.9, 0.1]}, "data.crop_scale"),
        ({"dataset": "imagefolder", "crop_scale": [0.0, 1.0]}, "data.crop_scale"),
        ({"dataset": "imagefolder", "crop_ratio": [2.0, 0.5]}, "data.crop_ratio"),
    ],
)
def test_a_loader_that_cannot_read_the_data_is_refused(data: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as caught:
        check_loader(config({"data": data}))
    assert caught.value.field == field


@pytest.mark.parametrize(
    "data",
    [
        {"dataset": "imagefolder"},
        {"dataset": "imagefolder", "loader": "resident", "crop": "pad"},
        {"dataset": "cifar10", "crop": "pad"},
        {"dataset": "svhn", "crop": "none"},
        {"dataset": "cifar100", "crop": "pad", "imbalance": 0.01},
        {"dataset": "synthetic", "num_classes": 3},
    ],
)
def test_a_supported_loader_is_accepted(data: dict[str, Any]) -> None:
    check_loader(config({"data": data}))


@pytest.mark.parametrize(("dim", "expected"), [(98, False), (99, True), (512, True)])
def test_dynamic_assignment_in_a_simplex_gives_a_warning(dim: int, expected: bool) -> None:
    sentences = warnings(config({"model": {"embedding_dim": dim}}), 100)
    assert any("isometry" in s for s in sentences) == expected


def test_static_assignment_in_a_simplex_gives_no_warning() -> None:
    tree = {"model": {"embedding_dim": 512}, "method": {"assignment": "static"}}
    assert warnings(config(tree), 100) == []


SMALL = {"model": {"embedding_dim": 10}, "method": {"assignment": "dynamic"}}
VECTORS = {"data": {"dataset": "features"}, "model": {"backbone": "identity"}}


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"method": {"assignment": "static", "match": {"every_steps": 5}}}, "method.match"),
        ({"method": {"name": "psc", "prototypes": "simplex", "assignment": None}}, "method.prototypes"),
        ({"method": {"scale": 10.0}}, "method.scale"),
        ({"method": {"learn_scale": True}}, "method.learn_scale"),
        ({"method": {"margin": 0.2}}, "method.margin"),
        ({"method": {"logit_adjustment": 1.0}}, "method.logit_adjustment"),
        (
            {"data": {"dataset": "synthetic"}, "method": {"name": "ebv", "logit_adjustment": 1.0}},
            "method.logit_adjustment",
        ),
        ({"method": {"normalize": False}}, "method.normalize"),
        ({"method": {"sub_prototypes": 2}}, "method.sub_prototypes"),
        ({"method": {"centroid_momentum": 0.9}}, "method.centroid_momentum"),
        ({"method": {"name": "dnc", "assignment": None, "scale": 2.0}}, "method.scale"),
        ({"method": {"name": "dnc", "assignment": None, "normalize": True}}, "method.normalize"),
        (
            {"method": {"name": "goto", "assignment": None, "centroid_momentum": 0.9}},
            "method.centroid_momentum",
        ),
        ({"method": {"name": "goto", "assignment": None, "class_vectors": "v.npy"}}, "method.class_vectors"),
        ({"method": {"name": "psc", "assignment": None, "prototype_seed": 3}}, "method.prototype_seed"),
        ({"method": {"name": "psc", "assignment": None, "normalize": False, "scale": 2.0}}, "method.scale"),
        ({"method": {"name": "word2vec", "class_vectors": "v", "prototypes": "hpn"}}, "method.prototypes"),
        ({"method": {"label_smoothing": 0.1}}, "method.label_smoothing"),
        ({"optim": {"milestones": [3]}}, "optim.milestones"),
        ({"optim": {"name": "adamw", "nesterov": True}}, "optim.nesterov"),
        ({"optim": {"name": "adamw", "momentum": 0.5}}, "optim.momentum"),
        ({"optim": {"betas": [0.8, 0.9]}}, "optim.betas"),
        ({"data": {"dataset": "cifar10", "crop": "pad", "eval_resize": 40}}, "data.eval_resize"),
        ({"data": {"rand_magnitude": 5}}, "data.rand_magnitude"),
        (
            {"method": {"assignment": "static", "class_vectors": "x.npy", "match": {"rotate": True}}},
            "method.match.rotate",
        ),
        ({"tracking": {"enabled": False, "uri": "http://x"}}, "tracking.uri"),
        ({"model": {"init": "FILE", "freeze_epochs": "all", "freeze_norm": True}}, "model.freeze_norm"),
        ({"model": {"init": "F", "freeze_epochs": "all", "freeze_before": "x"}}, "model.freeze_before"),
        ({"model": {"init": "FILE", "freeze_norm": True}, "train": {"sync_bn": True}}, "train.sync_bn"),
        ({"optim": {"warmup_start": 0.5}}, "optim.warmup_start"),
        ({"optim": {"nesterov": True, "momentum": 0.0}}, "optim.nesterov"),
        ({"method": {"match": {"early_steps": 5}}}, "method.match.early_steps"),
        ({"method": {"match": {"early_epochs": 5}}}, "method.match.early_epochs"),
        ({"method": {"match": {"warmup_scale": 5.0}}}, "method.match.warmup_scale"),
        ({"data": {"synthetic_samples": [64, 64]}}, "data.synthetic_samples"),
        ({**VECTORS, "optim": {"layer_decay": 0.5}}, "optim.layer_decay"),
        (merge(VECTORS, {"model": {"freeze_epochs": 2}}), "model.freeze_epochs"),
        (merge(VECTORS, {"model": {"freeze_epochs": "all"}}), "model.freeze_epochs"),
    ],
)
def test_an_ignored_setting_gives_a_warning(tree: dict[str, Any], key: str) -> None:
    sentences = warnings(config(SMALL, tree), 100)
    assert len(sentences) == 1
    assert sentences[0].startswith(f"{key} is ignored: ")


@pytest.mark.parametrize(
    ("tree", "field"),
    [
        ({"data": {"trivial_augment": True, "rand_augment": 2}}, "data.rand_augment"),
        ({"train": {"patience": 4, "eval_every_epochs": 5}}, "train.patience"),
    ],
)
def test_a_contradictory_recipe_is_refused(tree: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as caught:
        check_recipe(config(tree))
    assert caught.value.field == field
    assert caught.value.remedy


def test_a_warm_up_that_no_assignment_update_ends_is_noted() -> None:
    match = {"warmup_epochs": 3, "last_epoch": 2}
    (sentence,) = warnings(config(SMALL, {"method": {"match": match}}), 100)
    assert "no assignment update is made" in sentence
    trial = {"method": {"match": {"warmup_epochs": 3, "last_epoch": 3}}, "train": {"epochs": 2}}
    (sentence,) = warnings(config(SMALL, trial), 100)
    assert "longer than the 2 epochs" in sentence
    assert warnings(config(SMALL, trial, {"train": {"epochs": 3}}), 100) == []


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"optim": {"min_lr": 0.6}}, "rises"),
        ({"optim": {"warmup_epochs": 4}}, "does not reach its peak"),
        ({"optim": {"schedule": "step", "milestones": [2, 4, 9]}}, "milestones: 4, 9 has no effect"),
        ({"optim": {"schedule": "step"}}, "keeps the learning rate constant"),
        ({"method": {"match": {"every_epochs": 0}}}, "no assignment update is made"),
        ({"method": {"match": {"every_epochs": 5}}}, "no assignment update is made"),
        ({"method": {"match": {"every_epochs": 3, "last_epoch": 2}}}, "no assignment update is made"),
        ({"method": {"match": {"last_epoch": 4}, "release_epoch": 4}}, "release_epoch = 4 has no effect"),
    ],
)
def test_a_schedule_that_the_run_does_not_reach_gives_a_warning(tree: dict[str, Any], words: str) -> None:
    (sentence,) = warnings(config(SMALL, {"train": {"epochs": 4}}, tree), 100)
    assert words in sentence


def test_patience_without_the_best_checkpoint_gives_a_warning() -> None:
    (sentence,) = warnings(config(SMALL, {"train": {"patience": 3}, "checkpoint": {"keep_best": False}}), 100)
    assert "checkpoint.keep_best=true" in sentence
    (sentence,) = warnings(config(SMALL, {"train": {"patience": 3, "epochs": 3}}), 100)
    assert "train.patience = 3 has no effect" in sentence
    frozen = config(SMALL, {"model": {"freeze_epochs": 3, "init": "FILE"}, "train": {"epochs": 3}})
    (sentence,) = warnings(frozen, 100)
    assert "model.freeze_epochs=all" in sentence


def test_a_small_validation_crop_gives_a_warning() -> None:
    small = {"data": {"dataset": "imagefolder", "image_size": 64}}
    (sentence,) = warnings(config(SMALL, small), 100)
    assert "middle 6 % of a square image; data.eval_resize=73 " in sentence
    assert warnings(config(SMALL, small, {"data": {"eval_resize": 73}}), 100) == []


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"method": {"loss": "cross_entropy", "scale": 10.0, "label_smoothing": 0.1, "margin": 0.2}},
        {"method": {"loss": "cross_entropy", "normalize": False, "learn_scale": True}},
        {"method": {"name": "ebv", "scale": 5.0, "prototype_seed": 2, "class_vectors": "v.npy"}},
        {"method": {"name": "psc", "assignment": None, "margin": 0.2, "learn_scale": True}},
        {"method": {"name": "psc", "assignment": None, "normalize": False, "logit_adjustment": 1.0}},
        {"method": {"name": "goto", "assignment": None, "margin": 0.2, "sub_prototypes": 3}},
        {"method": {"name": "dnc", "assignment": None, "sub_prototypes": 3, "centroid_momentum": 0.9}},
        {"optim": {"schedule": "step", "milestones": [3]}},
        {"optim": {"name": "adamw", "betas": [0.8, 0.9], "momentum": 0.9}},
        {"tracking": {"enabled": False, "experiment": "dl2pa"}},
        {"method": {"match": {"every_epochs": 0, "every_steps": 5}}},
        {"method": {"match": {"every_epochs": 0, "early_steps": 5, "early_epochs": 1}}},
        {"method": {"match": {"every_epochs": 0, "warmup_epochs": 2, "warmup_scale": 5.0}}},
        {"optim": {"warmup_epochs": 2, "warmup_start": 0.5, "nesterov": True, "min_lr": 0.01}},
    ],
)
def test_effective_settings_give_no_warning(tree: dict[str, Any]) -> None:
    assert warnings(config(SMALL, tree), 100) == []


def test_a_resolved_file_gives_no_warning() -> None:
    resolved = config(SMALL)
    assert warnings(parse_config(resolved.model_dump(mode="json")), 100) == []


SAMPLED = {"loss": "cross_entropy", "negatives": {"random": 4}}


@pytest.mark.parametrize(
    ("tree", "field"),
    [
        ({"method": {**SAMPLED, "name": "dnc"}}, "method.negatives.random"),
        ({"method": {**SAMPLED, "label_smoothing": 0.1}}, "method.negatives.random"),
        ({"method": {"name": "psc", "negatives": {"neighbors": 4}}}, "method.negatives.neighbors"),
        ({"method": {"name": "ebv", "gce_q": 0.5}}, "method.gce_q"),
        ({"method": {"match": {"statistic": "input"}}}, "method.match.statistic"),
        ({"method": {"name": "goto", "loss": "ntce"}}, "method.loss"),
        ({"method": {"name": "psc", "loss": "ntce", "normalize": False}}, "method.loss"),
        ({"method": {"match": {"rotate": True, "refit_cosine": 0.9}}}, "method.match.rotate"),
    ],
)
def test_settings_of_losses_and_statistics_that_contradict(tree: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as caught:
        check_combination(config(tree))
    assert caught.value.field == field


@pytest.mark.parametrize(
    "method",
    [
        SAMPLED,
        {"name": "psc", **SAMPLED},
        {"name": "ebv", "gce_q": 0.5, "label_smoothing": 0.0},
        {"name": "psc", "loss": "ntce"},
        {"name": "kasarla", "loss": "ntce"},
        {"match": {"rotate": True, "refit_cosine": 0.9, "statistic": "pooled"}},
    ],
)
def test_settings_of_losses_and_statistics_that_fit(method: dict[str, Any]) -> None:
    check_combination(config({"method": method}))


@pytest.mark.parametrize(("key", "value", "largest"), [("neighbors", 10, 9), ("random", 11, 10)])
def test_more_negatives_than_classes_are_refused(key: str, value: int, largest: int) -> None:
    method = {"loss": "cross_entropy", "negatives": {key: value}}
    with pytest.raises(UserError) as caught:
        check_num_classes(config({"method": method}), 10)
    assert caught.value.field == f"method.negatives.{key}"
    check_num_classes(config({"method": {**method, "negatives": {key: largest}}}), 10)


def test_a_loss_over_the_batch_needs_the_batch_in_one_pass() -> None:
    ntce = config({"method": {"name": "psc", "loss": "ntce"}, "train": {"accumulate": 2}})
    with pytest.raises(UserError) as caught:
        check_contrast(ntce, 2)
    assert [problem.field for problem in caught.value.problems] == ["launch.nproc", "train.accumulate"]
    check_contrast(config({"method": {"name": "psc"}, "train": {"accumulate": 2}}), 2)
