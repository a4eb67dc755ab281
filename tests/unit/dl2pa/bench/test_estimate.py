"""`dl2pa estimate`: a real probe, and arithmetic that can be done by hand."""

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


def estimated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["estimate", *map(str, arguments), "--steps", "3", "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_hours_are_steps_validations_and_matchings(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = estimated(capsys, config)
    assert (found["steps_per_epoch"], found["steps"], found["n"]) == (12, 84, 3)
    matchings = 3 + 2  # after epochs 2, 4 and 6; after steps 5 and 10
    seconds = 84 * found["step_ms"] / 1e3 + 3 * found["validate_s"] + matchings * found["match_s"]
    assert found["hours"] == pytest.approx(seconds / 3600) == pytest.approx(found["hours_at_most"])
    assert found["images_per_second"] == pytest.approx(16e3 / found["step_ms"])
    assert found["step_ms"] > 0 and 0 <= found["data_wait_share"] < 1 and found["memory_gib"] > 0.1
    assert found["cost"] is None and found["largest_batch"] is None


def test_devices_share_the_batch_and_pay_for_their_gradients(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = estimated(capsys, config, "--devices", 4, "--link", 0.001, "--price", 2, "train.max_steps=12")
    import torch

    from dl2pa.config import load_config
    from dl2pa.model.model import build_model

    model = build_model(load_config(config), 6)
    carried = 2 * 3 / 4 * 4 * sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    assert found["all_reduce_ms"] == pytest.approx(carried / 1e6 * 1e3)
    assert found["hours_at_most"] - found["hours"] == pytest.approx(12 * carried / 1e6 / 3600)
    assert found["device_hours"] == pytest.approx(4 * found["hours_at_most"])
    assert found["cost"] == pytest.approx(2 * found["device_hours"])
    assert found["images_per_second"] == pytest.approx(16e3 / found["step_ms"]), "of the whole batch"


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
def test_wrong_options_are_named(
    config: Path, arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(config), *arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["field"] == field
