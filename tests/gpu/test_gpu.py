"""Checks that need a GPU: steps without a host sync, equal statistics, training in each precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dl2pa.assignment import AssignmentSolver, ClassStatistic
from dl2pa.config import Config, parse_config
from dl2pa.model.model import build_model
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState
from pipelines.build import build_pipeline
from pipelines.datasets.arrays import ArrayDataset
from pipelines.sampler import TrainSampler
from pipelines.transforms import Transforms
from pipelines.trivial_augment import apply_trivial, draw_trivial

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def world() -> World:
    return World(0, 1, 0, 1, torch.device("cuda", 0), 4)


def _config(method: dict[str, object] | None = None, **train: object) -> Config:
    return parse_config(
        {
            "method": method or {},
            "data": {"dataset": "cifar10", "crop": "pad", "image_size": 32},
            "model": {"backbone": "resnet20", "embedding_dim": 5},
            "train": {"batch_size": 64, "mixup": 0.2, "cutmix": 1.0, "ema": 0.9, **train},
            "optim": {"lr": 0.1},
        }
    )


def _pipeline(world: World, recipe: Transforms):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (640, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, 10, 640)
    dataset = ArrayDataset(images, labels, tuple(str(c) for c in range(10)), "test")
    order = TrainSampler(640, 64, 0)
    return build_pipeline(dataset, recipe, order, loader="resident", seed=0, device=world.device, threads=1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "method",
    [
        {},
        {"name": "psc", "margin": 0.2},
        {"name": "ebv", "learn_scale": True, "margin": 0.2, "prototypes": "max_cosine"},
        {"name": "etf"},
        {"name": "kasarla", "prototypes": "max_cosine"},
        {"name": "dnc"},
        {"name": "goto"},
    ],
    ids=lambda method: str(method.get("name", "dl2pa")),
)
def test_training_step_has_no_host_sync(world: World, precision: str, method: dict[str, object]) -> None:
    config = _config(method, precision=precision)
    recipe = Transforms(image_size=32, train=True, crop="pad", trivial_augment=True, erasing=0.5)
    pipeline = _pipeline(world, recipe)
    train_state = TrainState(config, build_model(config, 10), world, pipeline.steps_per_epoch)
    train_state.wrap()
    train_state.model.train()
    pipeline.start(0)
    for number, batch in enumerate(pipeline):
        if number == 3:  # allocations and constants are in place
            torch.cuda.set_sync_debug_mode("error")
        train_state.step(batch, number)
    torch.cuda.set_sync_debug_mode("default")
    assert train_state.meter.read() > 0


def test_statistic_equals_the_cpu_statistic(world: World) -> None:
    features = torch.randn(512, 16).round(decimals=3)
    features /= features.norm(dim=1, keepdim=True)
    labels = torch.randint(0, 7, (512,))
    share = torch.rand(512)
    here, there = ClassStatistic(7, 16), ClassStatistic(7, 16).to(world.device)
    here.add(features, labels, share)
    there.add(features.to(world.device), labels.to(world.device), share.to(world.device))
    assert torch.equal(here.counts, there.counts.cpu())
    # Normalization may round differently on the device: by a bit of float32 a sample.
    assert (here.sums - there.sums.cpu()).abs().max() < 512 * 2**10


def test_assignment_equals_the_cpu_assignment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates found on the GPU, with TF32 allowed elsewhere, give the same permutation."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    random = np.random.default_rng(0)
    points = random.standard_normal((5000, 128))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    shared = random.standard_normal((1, 128))
    for rows in (0.1 * random.standard_normal((5000, 128)) + shared, points[::-1] + 0.05 * shared):
        current = random.permutation(5000)
        expected = AssignmentSolver().solve(rows, points, current)
        found = AssignmentSolver().solve(rows, points, current, world.device)
        assert np.array_equal(found.assignment, expected.assignment)


def test_trivial_augment_pixels_equal_the_cpu_pixels(world: World) -> None:
    images = torch.randint(0, 256, (128, 3, 64, 64), dtype=torch.uint8)
    draw = draw_trivial(0, 0, np.arange(128))
    there = apply_trivial(images.to(world.device), draw).cpu()
    assert (apply_trivial(images, draw) != there).float().mean() < 1e-3


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.precision=fp32"],
        ["train.precision=bf16", "train.mixup=0.2"],
        ["train.precision=fp16", "optim.clip_norm=1"],
        ["train.precision=bf16", "train.compile=true"],
        ["train.precision=bf16", "train.compile=graphs"],
    ],
    ids=" ".join,
)
def test_training_runs_and_resumes(tmp_path: Path, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "dl2pa", "train", str(ROOT / "configs/quickstart.yaml"), *overrides]
    command += [
        "launch.device=cuda",
        "data.loader=torchvision",
        "tracking.uri=none",
        "--nproc",
        "1",
        "--json",
    ]
    command += ["--run-dir", str(tmp_path / "run"), f"data.root={tmp_path / 'digits'}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for limit in (20, 40):
        done = subprocess.run(
            [*command, f"train.max_steps={limit}"], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["steps"] == limit
