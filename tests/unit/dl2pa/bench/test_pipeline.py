"""`dl2pa bench pipeline` with a few generated JPEGs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dl2pa.bench import LOADERS
from dl2pa.bench.loaders import RepeatedSampler, Source, open_loader
from dl2pa.bench.pipeline import Turn, _row, _thread_seconds, generate_images
from dl2pa.cli import main

SHORT = ["bench", "pipeline", "--batch-size", "4", "--steps", "1", "--rounds", "2", "--json"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return generate_images(tmp_path / "images", 6)


@pytest.mark.thorough
def test_json_result(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    assert main([*SHORT, "--data", str(root)]) == 0
    result: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert {"bench", "ratios", "rows", "n", "hardware", "versions"} == result.keys()
    assert (result["bench"], result["n"]) == ("pipeline", 2)
    assert [row["loader"] for row in result["rows"]] == list(LOADERS)
    for row in result["rows"]:
        assert row["images_per_second"] > 0 and row["cpu_seconds_per_image"] >= 0 and row["peak_gib"] > 0
        assert len(row["by_round"]) == 2
        assert ("reader_user_us" in row) == (row["loader"] == "ours")
    assert [row["images"] for row in result["rows"][:3]] == [6, 6, 6]
    assert result["ratios"]["ours/native_dali"] > 0 and result["ratios"]["ours/torchvision"] > 0


@pytest.mark.thorough
def test_packed_shards_are_compared_with_the_folder(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    assert main([*SHORT, "--loaders", "ours,packed", "--data", str(root)]) == 0
    result: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [(row["loader"], row["images"]) for row in result["rows"]] == [("ours", 6), ("packed", 6)]
    assert result["ratios"]["ours/packed"] > 0


def test_all_loaders_yield_equivalent_batches(root: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    for name in ("ours", "native-dali", "synthetic"):
        loader = open_loader(name, Source(root, 4))
        batch = next(loader.batches)
        images = batch if isinstance(batch, torch.Tensor) else batch.images
        assert images.shape == (4, 3, 224, 224) and images.dtype == torch.float32, name
        assert images.is_contiguous(memory_format=torch.channels_last), name
        assert images.abs().max() < 3, name
        loader.close()


def test_cpu_time_per_image_of_readers_and_feeder() -> None:
    """Two turns of 100 images; user and system time in seconds."""
    threads = [
        {"reader": (0.01, 0.02), "feeder": (0.01, 0.0), "loop": (0.0, 0.01)},
        {"reader": (0.03, 0.02), "feeder": (0.01, 0.0), "loop": (0.0, 0.03)},
    ]
    row = _row("ours", [Turn(1.0, 1.0, 1, each) for each in threads], 100, 6)
    assert [row[f"reader_{kind}_us"] for kind in ("user", "system")] == pytest.approx([200, 200])
    assert [row[f"feeder_{kind}_us"] for kind in ("user", "system")] == pytest.approx([100, 0])
    assert [row[f"loop_{kind}_us"] for kind in ("user", "system")] == pytest.approx([0, 200])
    assert row["reader_images_per_second_per_core"] == pytest.approx(2500)
    assert row["feeder_images_per_second_per_core"] == pytest.approx(1e6 / 300)
    assert "reader_user_us" not in _row("native-dali", [Turn(1.0, 1.0, 1, threads[0])], 100, 6)


def test_cpu_time_is_attributed_to_the_threads_of_a_loader(root: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    loader = open_loader("ours", Source(root, 4))
    next(loader.batches)
    assert {"reader", "loop"} <= _thread_seconds().keys()
    loader.close()


def test_a_repeated_sampler_uses_each_image_equally_often() -> None:
    sampler = RepeatedSampler(24, 4, 0, distinct=6)
    indices = [int(i) for step in range(sampler.steps_per_epoch) for i in sampler.indices(0, step)]
    assert sorted(indices) == sorted([*range(6)] * 4)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--loaders", "ours,disk"], "--loaders"),
        (["--loaders", "synthetic", "--rounds", "0"], "--rounds"),
        (["--loaders", "torchvision", "--data", "/nowhere"], "--data"),
        (["--loaders", "packed", "--data", "/nowhere"], "--data"),
    ],
)
def test_invalid_options_are_refused(
    arguments: list[str], field: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, *arguments]) == 2
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["error"]["field"] == field


def test_loaders_that_require_dali_are_refused_without_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia", None)
    assert main([*SHORT, "--loaders", "native-dali,synthetic"]) == 2
    error = json.loads(capfd.readouterr().out.splitlines()[-1])["error"]
    assert (error["field"], error["value"]) == ("--loaders", "native-dali")
    assert "nvidia-dali" in error["remedy"]
