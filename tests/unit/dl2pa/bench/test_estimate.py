"""`dl2pa estimate`: a measurement, and its extrapolation recomputed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dl2pa.cli import main

SMALL = """
data: {dataset: synthetic, num_classes: 6, image_size: 16, synthetic_samples: [200, 40]}
model: {backbone: resnet8, embedding_dim: 4}
method: {match: {every_epochs: 2, early_steps: 5, early_epochs: 1}}
train: {epochs: 7, batch_size: 16, eval_every_epochs: 3}
optim: {lr: 0.1}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def run_estimate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["estimate", *map(str, arguments), "--steps", "3", "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_hours_consist_of_steps_validations_and_updates(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_estimate(capsys, config)
    assert (result["steps_per_epoch"], result["steps"], result["n"]) == (12, 84, 3)
    updates = 3 + 2  # after epochs 2, 4 and 6; after steps 5 and 10
    seconds = 84 * result["step_ms"] / 1e3 + 3 * result["validate_s"] + updates * result["match_s"]
    assert result["hours"] == pytest.approx(seconds / 3600) == pytest.approx(result["hours_at_most"])
    assert result["images_per_second"] == pytest.approx(16e3 / result["step_ms"])
    assert result["step_ms"] > 0 and 0 <= result["data_wait_share"] < 1 and result["memory_gib"] > 0.1
    assert result["cost"] is None and result["largest_batch"] is None


def test_devices_share_the_batch_and_all_reduce_gradients(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_estimate(capsys, config, "--devices", 4, "--link", 0.001, "--price", 2, "train.max_steps=12")
    import torch

    from dl2pa.config import load_config
    from dl2pa.model.model import build_model

    model = build_model(load_config(config), 6)
    sent_bytes = 2 * 3 / 4 * 4 * sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    assert result["all_reduce_ms"] == pytest.approx(sent_bytes / 1e6 * 1e3)
    assert result["hours_at_most"] - result["hours"] == pytest.approx(12 * sent_bytes / 1e6 / 3600)
    assert result["device_hours"] == pytest.approx(4 * result["hours_at_most"])
    assert result["cost"] == pytest.approx(2 * result["device_hours"])
    assert result["images_per_second"] == pytest.approx(16e3 / result["step_ms"]), "of the global batch"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--devices", "3"], "--devices"),
        (["--devices", "0"], "--devices"),
        (["--steps", "-1"], "--steps"),
        (["--price", "0"], "--price"),
        (["train.lr=1"], "train.lr"),
    ],
    ids=" ".join,
)
def test_invalid_options_are_refused(
    config: Path, arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(config), *arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["field"] == field
