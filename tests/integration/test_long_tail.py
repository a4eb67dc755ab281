"""Long-tailed runs of the shipped configurations on small files in the official formats."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.commands import run_here
from support.paths import CONFIGS
from support.runs import outcome_of

GROUPS = ("top1_head", "top1_medium", "top1_tail")
SMALL = [
    *("model.backbone=resnet8", "model.widths=[4,4,8]", "model.embedding_dim=8"),
    *("train.batch_size=8", "train.max_steps=3", "train.log_every_steps=1", "checkpoint.every_epochs=1"),
    *(
        "data.imbalance=0.1",
        "tracking.uri=none",
        "tracking.figures=false",
        "launch.device=cpu",
        "launch.threads=1",
    ),
]


def images_of(counts: list[int], side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, side, side, 3] in the color of their class, labels [N], shuffled."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    noise = rng.integers(0, 30, (len(labels), side, side, 3))
    colors = rng.integers(0, 200, (len(counts), 3))
    return (noise + colors[labels][:, None, None]).astype(np.uint8), labels


def write_stl10(root: Path) -> None:
    (root / "class_names.txt").write_text("\n".join(f"class{k}" for k in range(10)))
    for part, per_class in (("train", 20), ("test", 3)):
        images, labels = images_of([per_class] * 10, 96, 1)
        (root / f"{part}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
        (root / f"{part}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())


def write_svhn(root: Path) -> None:
    from scipy.io import savemat

    # As in the real data, the digit 0 has fewer images than its share of the long tail.
    for part, counts in (("train", [15, 25, *[20] * 8]), ("test", [3] * 10), ("extra", [25, 35, *[30] * 8])):
        images, labels = images_of(counts, 32, 2)
        savemat(
            root / f"{part}_32x32.mat",
            {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]},
        )


@pytest.mark.parametrize(
    ("name", "write"), [("stl10", write_stl10), ("svhn", write_svhn), ("svhn_lt_legacy", write_svhn)]
)
def test_longtail_config_trains_and_reports_class_groups(
    name: str, write: Callable[[Path], None], tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    write(data)
    arguments = [
        CONFIGS / "longtail" / f"{name}.yaml",
        f"data.root={data}",
        *SMALL,
        "--run-dir",
        run,
        "--json",
    ]
    trained = run_here("train", *arguments)
    assert trained.code == 0, trained.error
    result = trained.result
    assert result["num_validated"] == 30, "validation stays whole"
    validation = json.loads((run / "validation.json").read_text())
    assert validation["class_total"] == [3] * 10
    rates = np.array(validation["class_correct"]) / 3
    parts = (rates[:3], rates[3:7], rates[7:])
    expected = {key: pytest.approx(100 * part.mean()) for key, part in zip(GROUPS, parts, strict=True)}
    assert {key: result[key] for key in GROUPS} == expected
    assert {key: validation[key] for key in GROUPS} == expected
    stored = json.loads((run / "result.json").read_text())
    assert {key: stored[key] for key in GROUPS} == expected
    points = outcome_of(run).points
    assert {key: points[f"val/{key}", 3] for key in GROUPS} == expected
    evaluated = run_here("evaluate", run, "--json")
    assert evaluated.code == 0, evaluated.error
    assert {key: evaluated.result[key] for key in GROUPS} == expected
    latest = run_here("evaluate", run, "--checkpoint", "latest", "--json")
    calibrated = evaluated.result.keys() - latest.result.keys()
    assert calibrated == {"temperature", "ece_calibrated", "nll_calibrated"}, "of the best model"
    assert latest.result.items() <= evaluated.result.items()


def test_logit_adjustment_uses_the_thinned_class_counts(tmp_path: Path) -> None:
    """With equal weights the losses of the first step differ by at most the logarithm of the class ratio."""
    (tmp_path / "data").mkdir()
    write_stl10(tmp_path / "data")
    losses: list[float] = []
    for strength in (0.0, 1.0):
        run = tmp_path / f"run{strength:g}"
        changed = ["method.name=psc", "method.loss=cross_entropy", f"method.logit_adjustment={strength}"]
        arguments = [
            CONFIGS / "longtail" / "stl10.yaml",
            f"data.root={tmp_path / 'data'}",
            *SMALL,
            "train.mixup=0",
            *changed,
        ]
        trained = run_here("train", *arguments, "--run-dir", run, "--json")
        assert trained.code == 0, trained.error
        losses.append(outcome_of(run).points["train/loss", 1])
        if strength:
            evaluated = run_here("evaluate", run, "--json")
            assert evaluated.result["top1"] == pytest.approx(trained.result["top1_last"])
    counts = [int(20 * 0.1 ** (k / 9)) for k in range(10)]
    spread = math.log(max(counts) / min(counts))
    assert 0.01 < abs(losses[1] - losses[0]) < spread
