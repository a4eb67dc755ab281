"""ONNX export, which writes a file only if its results equal those of the model."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dl2pa.cli import main
from dl2pa.config import Config, dump_config, parse_config
from dl2pa.errors import UserError
from dl2pa.model import onnx_export
from dl2pa.model.inference import Classifier, load_classifier
from dl2pa.model.model import build_model
from dl2pa.model.saved import save_classifier

IMAGES = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def classifier(folder: Path, method: str, seed: int) -> Classifier:
    config = parse_config(
        {
            "data": {"dataset": "synthetic", "num_classes": 5, "image_size": 8},
            "model": {"backbone": "resnet8", "embedding_dim": 4, "widths": [4, 4, 4]},
            "method": {"name": method},
            "train": {"seed": seed},
        }
    )
    file = folder / f"{method}-{seed}.safetensors"
    save_classifier(file, build_model(config, 5), config, tuple("abcde"), temperature=0.05)
    return load_classifier(file)


@pytest.mark.parametrize("method", ["dl2pa", "goto", "dnc"])
def test_every_classifier_head_is_exported(method: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    file, original = tmp_path / "model.onnx", classifier(tmp_path, method, 0)
    check = onnx_export.export_onnx(file, original, IMAGES)
    assert (check.images, check.top1_equal) == (7, 100.0)
    assert check.relative_difference < 1e-4
    model = onnx.load(file)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    metadata = {p.key: p.value for p in model.metadata_props}
    assert (metadata["classes"], metadata["temperature"]) == (json.dumps(list("abcde")), "0.05")
    session = importlib.import_module("onnxruntime").InferenceSession(str(file))
    (probabilities,) = session.run(["probabilities"], {"images": IMAGES.numpy()})
    expected = torch.softmax(original.score(IMAGES) / 0.05, dim=1)
    assert torch.allclose(torch.from_numpy(probabilities), expected, atol=1e-3)
    assert str(Path(onnx_export.__file__).parent).encode() not in file.read_bytes(), "contains a local path"


def test_file_with_different_results_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter is replaced by one that writes other weights."""
    pytest.importorskip("onnx")
    convert, other = onnx_export._convert, classifier(tmp_path, "dl2pa", 1)
    monkeypatch.setattr(onnx_export, "_convert", lambda _, side: convert(other, side))
    file = tmp_path / "model.onnx"
    file.write_text("an earlier export")
    with pytest.raises(UserError, match="differ by"):
        onnx_export.export_onnx(file, classifier(tmp_path, "dl2pa", 0), IMAGES)
    assert file.read_text() == "an earlier export"
    assert not list(tmp_path.glob(".*"))


def test_error_names_the_missing_package_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "onnxruntime" else find_spec(name, *rest)

    (tmp_path / "config.yaml").write_text(dump_config(Config()))
    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert main(["export", str(tmp_path), "--onnx", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["field"], error["value"]) == ("--onnx", "onnxruntime")
    assert "[onnx]" in error["remedy"]
    assert not (tmp_path / "export").exists()
