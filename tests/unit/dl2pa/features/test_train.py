"""Training on features: the same as a frozen backbone on images, every method, exact resume, prediction."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dl2pa.config import Config, merge, parse_config
from dl2pa.config.load import fingerprint
from dl2pa.config.validate import validate
from dl2pa.errors import UserError
from dl2pa.model.compose import load_image_classifier
from dl2pa.model.model import build_model
from dl2pa.specs import METHODS
from dl2pa.training.data import build_train_pipeline, class_counts, groups_of, open_data, open_split
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState
from pipelines.batch import Batch
from support.commands import run_here

ALONE = World(0, 1, 0, 1, torch.device("cpu"), 1)
Make = Callable[..., Config]
MLP = {"backbone": "mlp", "hidden": [6, 5], "dropout": 0.3, "hidden_norm": "batchnorm"}


def batches(config: Config) -> list[Batch]:
    return list(build_train_pipeline(config, open_split(config, "train"), ALONE))


def build(config: Config) -> TrainState:
    model = build_model(config, 3)
    counts = class_counts(open_split(config, "train"))
    assert counts is not None
    model.method.set_class_counts(torch.from_numpy(counts))
    train_state = TrainState(config, model, ALONE, 6)
    train_state.wrap()
    train_state.begin_epoch(0)
    train_state.model.train()
    return train_state


def trained_part(train_state: TrainState) -> dict[str, torch.Tensor]:
    """Copy of everything after the backbone."""
    state = train_state.model.state_dict()
    return {name: value.clone() for name, value in state.items() if not name.startswith("embedder.backbone.")}


def train(config: Config, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    train_state = build(config)
    train_state.model.load_state_dict(start, strict=False)
    for step, batch in enumerate(batches(config)):
        train_state.step(batch, step)
    return trained_part(train_state)


def test_a_probe_learns_what_a_frozen_backbone_learns_from_the_images(
    settings: Make, on_features: Make
) -> None:
    change: dict[str, Any] = {"method": {"name": "psc"}, "optim": {"lr": 0.1}}
    frozen = settings(**merge(change, {"model": {"freeze_epochs": "all"}}))
    start = trained_part(build(frozen))
    expected = train(frozen, start)
    trained = train(on_features(**change), start)
    head = "embedder.head.weight"
    assert not torch.allclose(expected[head], start[head], atol=1e-3)
    for name, value in expected.items():
        assert torch.allclose(trained[name], value, atol=1e-5), name


@pytest.mark.parametrize("name", [name for name in METHODS if name != "word2vec"])
@pytest.mark.parametrize("model", [{"backbone": "identity"}, MLP])
def test_every_method_trains_on_features(name: str, model: dict[str, Any], on_features: Make) -> None:
    sub = {"sub_prototypes": 2} if name in ("dnc", "goto") else {}
    train_state = build(on_features(model=model, method={"name": name, **sub}, optim={"lr": 0.01}))
    config = on_features(model=model)
    before = [p.clone() for p in train_state.model.parameters()]
    for step, batch in enumerate(batches(config)[:2]):
        train_state.step(batch, step)
    train_state.rematch()
    assert any(not torch.equal(a, b) for a, b in zip(before, train_state.model.parameters(), strict=True))
    assert all(bool(p.isfinite().all()) for p in train_state.model.parameters())


def test_a_long_tailed_subset_is_that_of_the_images(settings: Make, on_features: Make) -> None:
    change = {"data": {"imbalance": 0.3}}
    images, features = settings(**change), on_features(**change)
    one, other = open_split(images, "train"), open_split(features, "train")
    assert np.array_equal(one.labels, other.labels)  # pyright: ignore
    assert np.bincount(other.labels).tolist() == [8, 4, 2]  # pyright: ignore
    whole = open_split(on_features(), "train")
    kept = {row.tobytes() for row in other.features}  # pyright: ignore
    assert kept < {row.tobytes() for row in whole.features}  # pyright: ignore
    assert groups_of(features, other) == groups_of(images, one)
    assert whole.fingerprint != other.fingerprint
    adjusted = merge(change, {"method": {"name": "psc", "logit_adjustment": 1.0}})
    train_state = build(on_features(**adjusted))
    train_state.step(batches(features)[0], 0)


def test_validation_sees_every_feature_once(on_features: Make) -> None:
    from dl2pa.training.data import build_eval_pipeline

    config = on_features(train={"eval_batch_size": 5})
    dataset = open_split(config, "val")
    seen = [b.indices[: b.valid] for b in build_eval_pipeline(config, dataset, ALONE)]
    assert torch.cat(seen).tolist() == list(range(12))


RELEASED = {
    "loss": "cross_entropy",
    "assignment": "static",
    "negatives": {"neighbors": 1, "random": 2},
    "release_epoch": 0,
}


@pytest.mark.parametrize("change", [{}, {"train": {"mixup": 0.4, "ema": 0.9}}, {"method": RELEASED}])
def test_a_stopped_training_resumes_with_the_same_bits(change: dict[str, Any], on_features: Make) -> None:
    config = on_features(**merge({"model": MLP, "method": {"name": "dl2pa"}}, change))
    steps = batches(config)
    undisturbed, stopped = build(config), build(config)
    for step in range(6):
        undisturbed.step(steps[step], step)
    for step in range(3):
        stopped.step(steps[step], step)
    file = io.BytesIO()
    torch.save(stopped.state(), file)
    file.seek(0)
    torch.manual_seed(99)
    resumed = build(config)
    resumed.load(torch.load(file, weights_only=True))
    resumed.begin_epoch(0)
    resumed.model.train()
    for step in range(3, 6):
        resumed.step(steps[step], step)
    expected = undisturbed.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory, on_features: Make) -> Path:
    """A finished run on features, stopped once in the middle of an epoch."""
    import yaml

    place = tmp_path_factory.mktemp("probe")
    config = on_features(model={"backbone": "mlp", "hidden": [8]}, method={"name": "psc"})
    file = place / "probe.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    first = run_here("train", file, "--run-dir", place / "run", "train.max_steps=8", "tracking.figures=false")
    assert first.code == 0, first.error
    done = run_here("train", file, "--run-dir", place / "run", "--json")
    assert done.code == 0, done.error
    assert done.result["num_validated"] == 12
    again = run_here("train", file, "--run-dir", place / "whole", "tracking.figures=false")
    assert again.code == 0, again.error
    return place / "run"


def test_a_run_on_features_is_resumed_exactly_and_reported(probe: Path) -> None:
    model = (probe / "model.safetensors").read_bytes()
    assert model == (probe.parent / "whole/model.safetensors").read_bytes()
    assert (probe / "summary.html").is_file()


def test_a_probe_classifies_images_with_its_frozen_network(probe: Path, images: Path, tmp_path: Path) -> None:
    files = sorted((images / "val").rglob("*.png"))
    done = run_here("predict", probe, *files, "--top", "1", "--json")
    assert done.code == 0, done.error
    predicted = [row["top"][0]["class"] for row in done.result["predictions"]]
    evaluated = run_here("evaluate", probe, "--json")
    assert evaluated.code == 0, evaluated.error
    hits = sum(file.parent.name == name for file, name in zip(files, predicted, strict=True))
    assert 100 * hits / len(files) == pytest.approx(evaluated.result["top1"])
    embedded = run_here("embed", probe, images / "val", "--out", tmp_path / "e.npz", "--json")
    assert embedded.code == 0, embedded.error
    vectors = load_image_classifier(probe).embed(files)
    assert np.array_equal(np.load(tmp_path / "e.npz")["embedding"], vectors)
    exported = run_here("export", probe, "--out", tmp_path / "export")
    assert exported.code == 0, exported.error
    again = run_here("predict", tmp_path / "export", *files, "--top", "1", "--json")
    assert again.result == done.result
    assert load_image_classifier(tmp_path / "export").description["frozen"]["dim"] == 8


def test_a_probe_is_evaluated_on_images_through_its_frozen_network(
    probe: Path, images: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(probe, tmp_path / "run"))
    on_features = run_here("evaluate", run, "--json").result
    done = run_here("evaluate", run, "--set", f"val={images}", "--ood", f"same={images}", "--json")
    assert done.code == 0, done.error
    assert done.result["sets"]["val"]["num_correct"] == on_features["num_correct"]
    assert done.result["ood"]["same"]["embedding_knn_auroc"] == pytest.approx(50, abs=2)


def test_a_probe_without_its_run_directory_and_its_registration_are_refused(
    probe: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes((probe / "model.safetensors").read_bytes())
    image = next((images / "val").rglob("*.png"))
    alone = run_here("predict", tmp_path, image)
    assert alone.code == 2
    assert "dl2pa export RUN" in alone.error
    registered = run_here("register", probe, "--name", "probe")
    assert registered.code == 2
    assert "--mlflow" in registered.error
    other = run_here("evaluate", probe, "data.dataset=imagefolder", f"data.root={images}")
    assert other.code == 2
    assert "takes features" in other.error


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": {"backbone": "resnet8"}}, "model.backbone"),
        ({"data": {"dataset": "imagefolder"}}, "model.backbone"),
        ({"data": {"loader": "dali"}}, "data.loader"),
        ({"train": {"cutmix": 1.0}}, "train.cutmix"),
        ({"data": {"root": "/nowhere"}}, "data.root"),
        ({"data": {"val_root": "/nowhere"}}, "data.val_root"),
    ],
)
def test_what_does_not_fit_features_is_refused(change: dict[str, Any], field: str, on_features: Make) -> None:
    with pytest.raises(UserError) as caught:
        open_data(on_features(**change), 1)
    assert caught.value.field == field


def test_a_head_of_another_dimension_is_refused_before_training(on_features: Make, file_of: Any) -> None:
    done = run_here("train", file_of(on_features(model={"head": "batchnorm", "embedding_dim": 5})))
    assert done.code == 2
    assert "model.embedding_dim" in done.error


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["data.imbalance=0.1"], "data.imbalance"),
        (["model.backbone=mlp"], "model.backbone"),
        (["data.dataset=features"], "data.dataset"),
        (["data.crop=random_resized"], "data.crop"),
        (["--nproc", "-1"], "--nproc"),
    ],
)
def test_the_command_refuses_what_has_no_images(
    arguments: list[str], field: str, settings: Make, file_of: Any, tmp_path: Path
) -> None:
    done = run_here("features", file_of(settings()), "--out", tmp_path / "f", *arguments, "--json")
    assert done.code == 2
    assert done.result["error"]["field"] == field
    assert not (tmp_path / "f").exists()


def test_the_command_writes_what_train_reads(settings: Make, file_of: Any, tmp_path: Path) -> None:
    done = run_here("features", file_of(settings()), "--out", tmp_path / "f", "--pca", "4", "--json")
    assert done.code == 0, done.error
    result = done.result
    assert (result["train"], result["val"], result["dim"], result["dtype"]) == (24, 12, 4, "float16")
    data = {"dataset": "features", "root": str(tmp_path / "f")}
    validate(parse_config({"data": data, "model": {"backbone": "mlp"}}), 1)


def test_the_new_keys_change_no_fingerprint() -> None:
    assert fingerprint(parse_config({})) == fingerprint(
        parse_config({"model": {"hidden": [512], "dropout": 0}})
    )
    assert fingerprint(parse_config({})) != fingerprint(parse_config({"model": {"hidden": [256]}}))
