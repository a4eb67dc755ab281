from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa.cli import main
from dl2pa.config import Config, parse_config
from dl2pa.config.rate import describe_rate


def config(**optim: Any) -> Config:
    return parse_config({"optim": {"lr": 0.1, **optim}, "train": {"batch_size": 1024, "epochs": 30}})


@pytest.mark.parametrize(("rule", "rate"), [("none", 0.1), ("linear", 0.4), ("sqrt", 0.2)])
def test_the_peak_rate_follows_the_rule(rule: str, rate: float) -> None:
    assert config(lr_scaling=rule).scaled_optim.lr == pytest.approx(rate)


def test_rule_warm_up_and_schedule_are_stated() -> None:
    assert describe_rate(config()) == (
        "0.1 for the global batch of 1024 (not scaled); cosine schedule to 0 at epoch 30"
    )
    scaled = describe_rate(config(lr_scaling="linear", warmup_epochs=5, schedule="step", milestones=[10, 20]))
    assert scaled == (
        "0.4 for the global batch of 1024: linear scaling of optim.lr = 0.1 for 256 images; "
        "linear warm-up from 0.004 over 5 epochs; times 0.1 after epochs 10, 20"
    )


def test_the_resolved_configuration_ends_with_the_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.yaml"
    file.write_text("optim: {lr: 0.1, lr_scaling: linear}\ntrain: {batch_size: 512}\n")
    assert main(["config", str(file)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1].startswith(
        "# Learning rate: 0.2 for the global batch of 512: linear scaling"
    )
    assert yaml.safe_load(text)["optim"]["lr"] == 0.1
