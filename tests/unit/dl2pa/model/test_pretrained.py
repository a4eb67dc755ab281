"""Real ImageNet weights classify real photographs: checks the adapter, the loading and the preprocessing together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dl2pa.config import parse_config
from dl2pa.model.init import load_initial_weights, read_state
from dl2pa.model.model import build_configured_embedder
from dl2pa.model.saved import preprocessing_of
from dl2pa.runplan import follow_weights
from pipelines.single import load_image
from support.paths import SHARED_DATA

pytest.importorskip("timm")
SAMPLES = SHARED_DATA / "imagenet-samples"
SYNSETS = SHARED_DATA / "semantic/imagenet_synsets.txt"
COUNT = 64


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs photographs next to the repository")
def test_pretrained_weights_classify_photographs(tmp_path: Path) -> None:
    from support.pretrained import BACKBONE, write_pretrained_weights

    file = tmp_path / "lite0.safetensors"
    write_pretrained_weights(file)
    data, model = {"dataset": "synthetic", "num_classes": 5}, {"backbone": BACKBONE, "init": str(file)}
    config = follow_weights(parse_config({"data": data, "model": model}))
    embedder = build_configured_embedder(config).eval()
    record = load_initial_weights(config, embedder)
    assert record.missing == ()
    assert sorted(record.unexpected) == ["backbone.classifier.bias", "backbone.classifier.weight"]

    classifier = read_state(file)
    photographs = sorted(SAMPLES.glob("*/*.JPEG"))[::4][:COUNT]
    synsets = SYNSETS.read_text().split()
    labels = torch.tensor([synsets.index(path.parent.name) for path in photographs])
    images = torch.stack([load_image(path, **preprocessing_of(config)) for path in photographs])
    with torch.inference_mode():
        features = embedder.backbone(images)
        logits = features @ classifier["classifier.weight"].T + classifier["classifier.bias"]
    correct = int((logits.argmax(1) == labels).sum())
    assert correct >= 0.85 * COUNT  # all 256: 90.6 %; with the mean and std of ImageNet 77.7 %
