"""Initial weights from files of the right keys and shapes; no network."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dl2pa.cli import main
from dl2pa.commands.submit import check_runs
from dl2pa.config import Config, parse_config
from dl2pa.errors import UserError
from dl2pa.model.init import check_init, load_initial_weights, read_state
from dl2pa.model.model import build_configured_embedder, build_model
from dl2pa.model.saved import save_classifier
from dl2pa.model.weight_sources import LibraryWeights, fetch, find_weights, named_weights
from dl2pa.rundir import RunDirectory
from dl2pa.runplan import RunSpec, follow_weights, plan_runs
from launcher.request import Request


def config(init: str, backbone: str = "resnet18", dim: int = 4, **data: Any) -> Config:
    return parse_config(
        {
            "data": {"dataset": "synthetic", "num_classes": 5, "image_size": 32, **data},
            "model": {"backbone": backbone, "embedding_dim": dim, "init": init, "widths": [4, 4, 4]},
        }
    )


def torchvision_state(name: str = "resnet18", **arguments: Any) -> dict[str, torch.Tensor]:
    import torchvision

    torch.manual_seed(7)
    return getattr(torchvision.models, name)(weights=None, **arguments).state_dict()


def hub_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, tag: str) -> Path:
    """Path of torchvision's weights in an empty cache."""
    from torchvision.models import get_model_weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub home"))
    folder = tmp_path / "hub home/hub/checkpoints"
    folder.mkdir(parents=True)
    return folder / get_model_weights(model)[tag].url.rpartition("/")[2]


def assert_backbone_is(embedder: nn.Module, state: dict[str, torch.Tensor], without: str = "fc.") -> None:
    backbone = embedder.get_submodule("backbone").state_dict()
    assert backbone.keys() == {key for key in state if not key.startswith(without)}
    assert all(torch.equal(value, state[key]) for key, value in backbone.items())


def refused(settings: Config) -> UserError:
    with pytest.raises(UserError) as caught:
        load_initial_weights(settings, build_configured_embedder(settings))
    assert caught.value.field == "model.init"
    return caught.value


@pytest.mark.parametrize("tag", ["IMAGENET1K_V1", "resnet18.IMAGENET1K_V1", "DEFAULT"])
def test_weights_of_torchvision_are_loaded_from_its_cache(
    tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = hub_file(tmp_path, monkeypatch, "resnet18", "IMAGENET1K_V1")
    settings = config(f"torchvision:{tag}")
    error = refused(settings)
    assert "dl2pa weights fetch torchvision:resnet18.IMAGENET1K_V1" in error.remedy
    with pytest.raises(UserError, match="not on this machine"):
        check_init(settings, RunDirectory(tmp_path / "run"))
    state = torchvision_state()
    torch.save(state, file)
    check_init(settings, RunDirectory(tmp_path / "run"))
    embedder = build_configured_embedder(settings)
    record = load_initial_weights(settings, embedder)
    assert_backbone_is(embedder, state)
    assert record.unexpected == ("backbone.fc.weight", "backbone.fc.bias")
    assert (record.missing, record.left_out) == ((), ())
    assert record.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def timm_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: str, file: Path) -> None:
    """A cache of the Hugging Face hub with one file."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    file.rename(folder / "snapshots/abc/model.safetensors")


@pytest.mark.parametrize(("model", "size"), [("test_vit", 160), ("test_vit", 96), ("test_efficientnet", 64)])
def test_weights_of_timm_are_loaded_from_the_cache_of_the_hub(
    model: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(7)
    network = timm.create_model(model)
    save_file(network.state_dict(), tmp_path / "file.safetensors")
    settings = config("timm:r160_in1k", f"timm:{model}", image_size=size)
    timm_hub(tmp_path, monkeypatch, f"timm/{model}.r160_in1k", tmp_path / "file.safetensors")
    embedder = build_configured_embedder(settings)
    record = load_initial_weights(settings, embedder)
    assert record.source == f"timm:{model}.r160_in1k"
    assert (record.missing, record.unexpected, record.left_out) == ((), (), ())
    state = network.state_dict()
    for name, value in embedder.backbone.state_dict().items():
        assert torch.equal(value, state[name]) or (name == "pos_embed" and value.shape != state[name].shape)


def test_weights_of_timm_that_were_not_fetched_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (
        "weights fetch timm:test_vit.r160_in1k" in refused(config("timm:r160_in1k", "timm:test_vit")).remedy
    )
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch(named_weights("timm:test_vit.r160_in1k"))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model."])
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_may_have_the_prefix_of_its_program(
    prefix: str, wrapper: str | None, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"weights of 'x'{suffix}"
    state = torchvision_state()
    named = {prefix + key: value for key, value in state.items()}
    if suffix == ".safetensors":
        save_file(named, file)
    else:
        torch.save({wrapper: named, "epoch": 3} if wrapper else named, file)
    settings = config(str(file))
    embedder = build_configured_embedder(settings)
    load_initial_weights(settings, embedder)
    assert_backbone_is(embedder, state)


def test_missing_and_unexpected_tensors_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = torchvision_state()
    del state["layer1.0.bn1.weight"]
    state["extra.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "a.pth")
    settings = config(str(tmp_path / "a.pth"))
    with caplog.at_level(logging.INFO):
        record = load_initial_weights(settings, build_configured_embedder(settings))
    assert record.missing == ("backbone.layer1.0.bn1.weight",)
    assert "backbone.extra.weight" in record.unexpected
    assert "layer1.0.bn1.weight" in caplog.text
    assert "extra.weight" in caplog.text


def run_of(folder: Path, dim: int, **data: Any) -> Path:
    """Model file of a finished run."""
    settings = config("", "resnet8", dim, **data)
    folder.mkdir()
    save_classifier(folder / "model.safetensors", build_model(settings, 5), settings, tuple("abcde"))
    return folder


def test_a_run_gives_backbone_and_head(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", 4)
    settings = config(str(run), "resnet8")
    embedder = build_configured_embedder(settings)
    record = load_initial_weights(settings, embedder)
    state = read_state(run / "model.safetensors")
    assert all(torch.equal(value, state[f"embedder.{key}"]) for key, value in embedder.state_dict().items())
    assert record.left_out == ()


def test_a_head_of_another_size_is_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path / "run", 4)
    settings = config(str(run), "resnet8", dim=3)
    embedder = build_configured_embedder(settings)
    before = embedder.head.weight.clone()
    with caplog.at_level(logging.INFO):
        record = load_initial_weights(settings, embedder)
    assert sorted(record.left_out) == ["head.bias", "head.weight"]
    assert "another size and was left out: head." in caplog.text
    assert torch.equal(embedder.head.weight, before)


def test_a_head_with_one_tensor_of_another_size_is_left_out_entirely(tmp_path: Path) -> None:
    """The bias has the size of that of a BatchNorm, but is that of a projection."""
    run = run_of(tmp_path / "run", 4)
    settings = config(str(run), "resnet8")
    model = settings.model.model_copy(update={"head": "batchnorm"})
    settings = settings.model_copy(update={"model": model})
    embedder = build_configured_embedder(settings)
    record = load_initial_weights(settings, embedder)
    assert sorted(record.left_out) == ["head.bias", "head.weight"]
    assert not embedder.head.bias.any()


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(torchvision_state("resnet18"), tmp_path / "a.pth")
    assert "another shape" in refused(config(str(tmp_path / "a.pth"), "resnet50")).message
    assert "of the backbone" in refused(config(str(tmp_path / "a.pth"), "convnext_tiny")).message
    assert "not made for" in refused(config("torchvision:IMAGENET1K_V1", "resnet8")).message
    assert "not made for" in refused(config("torchvision:resnet50.DEFAULT")).message
    assert "IMAGENET1K_V1" in refused(config("torchvision:V9")).remedy
    with pytest.raises(UserError, match="another shape"):
        check_init(config(str(tmp_path / "a.pth"), "resnet50"), RunDirectory(tmp_path / "run"))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("pwned").touch, ())


@pytest.mark.parametrize("content", ["objects", "text", "empty", "nothing"])
def test_a_file_without_plain_weights_is_one_message(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.pth"
    if content == "objects":
        torch.save({"state_dict": {"a": Payload()}}, file)
    elif content == "nothing":
        torch.save({"epoch": 1}, file)
    else:
        file.write_text("hello" if content == "text" else "")
    refused(config(str(file)))
    assert not (tmp_path / "pwned").exists()
    file.rename(tmp_path / "a.safetensors")
    refused(config(str(tmp_path / "a.safetensors")))


def test_position_embeddings_follow_the_image_size(tmp_path: Path) -> None:
    state = torchvision_state("vit_b_32", image_size=64, num_classes=3)
    torch.save(state, tmp_path / "vit.pth")
    settings = config(str(tmp_path / "vit.pth"), "vit_b_32", image_size=96)
    embedder = build_configured_embedder(settings)
    record = load_initial_weights(settings, embedder)
    assert record.missing == ()
    loaded = embedder.state_dict()["backbone.encoder.pos_embedding"]
    assert loaded.shape == (1, 10, 768)
    assert torch.equal(loaded[:, 0], state["encoder.pos_embedding"][:, 0])


def test_preprocessing_follows_the_weights_unless_set() -> None:
    base = {"dataset": "synthetic", "num_classes": 5}
    model = {"backbone": "efficientnet_b1", "init": "torchvision:IMAGENET1K_V2"}
    data = follow_weights(parse_config({"data": base, "model": model})).data
    assert (data.image_size, data.eval_resize, data.interpolation) == (240, 255, "bilinear")
    model["init"] = "torchvision:IMAGENET1K_V1"
    data = follow_weights(parse_config({"data": base, "model": model})).data
    assert (data.image_size, data.eval_resize, data.interpolation) == (240, 256, "bicubic")
    chosen = {**base, "image_size": 120, "interpolation": "bilinear"}
    data = follow_weights(parse_config({"data": chosen, "model": model})).data
    assert (data.image_size, data.eval_resize, data.interpolation) == (120, 128, "bilinear")
    unset = parse_config({"data": base})
    assert follow_weights(unset) is unset


def test_preprocessing_of_a_run_survives_its_removal(tmp_path: Path) -> None:
    """A resumed run takes it from its own record."""
    source = run_of(tmp_path / "source", 4, mean=[0.1, 0.2, 0.3], interpolation="bicubic")
    file = tmp_path / "tuned.yaml"
    file.write_text(json.dumps({"model": {"backbone": "resnet8", "init": str(source)}}))
    specs = [RunSpec(file, ())]
    (first,) = plan_runs(specs, None)
    assert first.config.data.mean == (0.1, 0.2, 0.3)
    assert first.config.data.interpolation == "bicubic"
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.init"):
        plan_runs(specs, None)
    (tmp_path / "run").mkdir()
    from dl2pa.config import dump_config

    (tmp_path / "run/config.yaml").write_text(dump_config(first.config))
    (again,) = plan_runs(specs, tmp_path / "run")
    assert again.config == first.config


def test_submit_and_train_refuse_weights_that_were_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_file(tmp_path, monkeypatch, "resnet18", "IMAGENET1K_V1")
    file = tmp_path / "tuned.yaml"
    data = {"dataset": "synthetic", "num_classes": 5, "synthetic_samples": [32, 8]}
    model = {"backbone": "resnet18", "init": "torchvision:IMAGENET1K_V1"}
    file.write_text(json.dumps({"data": data, "model": model, "train": {"batch_size": 8}}))
    with pytest.raises(UserError, match="not on this machine"):
        check_runs(plan_runs([RunSpec(file, ())], tmp_path / "run"), Request())
    assert main(["train", str(file), "--run-dir", str(tmp_path / "run")]) == 2
    assert "dl2pa weights fetch torchvision:resnet18.IMAGENET1K_V1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["weights", "list", "resnet50", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["weights"]
    assert listed == ["torchvision:resnet50.IMAGENET1K_V1", "torchvision:resnet50.IMAGENET1K_V2"]
    file = hub_file(tmp_path, monkeypatch, "resnet50", "IMAGENET1K_V2")
    file.write_bytes(b"weights")
    assert main(["weights", "fetch", listed[1], "--json"]) == 0
    fetched = json.loads(capsys.readouterr().out)
    assert fetched == {
        "name": listed[1],
        "file": str(file),
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }
    for name in ("resnet50", "timm:nothing", "torchvision:resnet50.V9", "timm:resnet50.V9", "list"):
        assert main(["weights", "fetch", name]) == 2
        assert f"weights='{name}': is not the name of pretrained weights" in capsys.readouterr().err
    assert main(["weights", "list", "resnet8"]) == 2


def test_a_download_goes_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file URL replaces that of the server; a wrong hash leaves no file."""
    from torchvision.models import ResNet18_Weights

    path = hub_file(tmp_path, monkeypatch, "resnet18", "IMAGENET1K_V1")
    served = tmp_path / "served"
    served.mkdir()
    content = b"some weights"
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (served / name).write_bytes(content)
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", f"file://{served / name}", raising=False)
    weights = named_weights("torchvision:resnet18.IMAGENET1K_V1")
    assert fetch(weights).read_bytes() == content
    (path.parent / name).unlink()
    (served / name).write_bytes(b"other bytes")
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch(weights)
    assert list(path.parent.iterdir()) == []


def test_a_name_without_tag_is_the_default() -> None:
    source = find_weights("torchvision:DEFAULT", "resnet18")
    assert isinstance(source, LibraryWeights)
    assert source.name == named_weights("torchvision:resnet18").name == "torchvision:resnet18.IMAGENET1K_V1"
