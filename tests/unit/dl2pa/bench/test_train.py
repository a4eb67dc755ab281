"""`dl2pa bench train`."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from dl2pa.bench.runners import TrainStateRunner, synthetic_config
from dl2pa.cli import main
from dl2pa.step_parts import PARTS
from dl2pa.training.distributed import World

SHORT = "bench train --models resnet8 --batch-size 8 --steps 1 --rounds 2 --image-size 8 --json"


def test_json_result(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT.split(), "--loaders", "synthetic,resident", "--precision", "fp32"]) == 0
    output = capfd.readouterr()
    result: dict[str, Any] = json.loads(output.out.splitlines()[-1])
    rows = {row["name"]: row for row in result["rows"]}
    variants = ["resnet8 synthetic fp32 nhwc", "resnet8 resident fp32 nhwc"]
    bare = "bare resnet8 fp32 nhwc"
    references = ["reference resnet8 synthetic fp32", "reference resnet8 resident fp32"]
    assert set(rows) == {*variants, bare, *references}
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(8e3 / row["step_ms"])
    for name in variants:
        row = rows[name]
        assert {"data_ms", "forward_ms", "backward_ms", "optimizer_ms", "statistic_ms"} <= row["parts"].keys()
        assert row["method_ms"] > 0 and row["method_share"] > 0 and 0 < row["matmul_share"] < 1.5
        assert result["ratios"][f"step/bare: {name}"] > 0 and result["ratios"][f"speed/reference: {name}"] > 0
        assert row["epoch_s"] == pytest.approx(50_000 // 8 * row["step_ms"] / 1e3)
    ratios = result["ratios"]
    assert ratios["method_share"] == rows[variants[0]]["method_share"]
    assert ratios["ours/plain_loop"] == ratios[f"speed/reference: {variants[0]}"]
    assert ratios["resident/synthetic"] > 0
    assert [c["precision"] for c in result["ceilings"]] == ["fp32"] and result["n"] == 2
    written = [json.loads(line) for line in output.err.splitlines() if line.startswith("{")]
    assert [row for row in written if "images_per_second" in row] == result["rows"]
    assert [row for row in written if "matmul_tflops" in row] == result["ceilings"]
    assert {(row["name"], row["round"]) for row in written if "round" in row} == {
        (name, number) for name in rows for number in range(2)
    }


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--models", "resnet9"], "--models"),
        (["--loaders", "disk"], "--loaders"),
        (["--loaders", "dali"], "--data"),
        (["--image-size", "0"], "--image-size"),
        (["--models", "resnet50", "--loaders", "resident"], "--loaders"),
        (["--models", "resnet50", "--loaders", "dali"], "--data"),
        (["--models", "resnet50", "--loaders", "dali", "--data", "/nowhere"], "--data"),
        (["--precision", "int8"], "--precision"),
        (["--compile", "maybe"], "--compile"),
        (["--steps", "0"], "--steps"),
        (["--batch-size", "0"], "--batch-size"),
    ],
    ids=" ".join,
)
def test_invalid_options_are_refused(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT.split(), *arguments]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["field"] == field


class HostEvent:
    """Event of the host: the time at which it is recorded."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end_event: HostEvent) -> float:
        return (end_event.time - self.time) * 1e3


def test_events_time_every_part_of_a_step() -> None:
    """On a GPU, kernels that autograd launches in its own thread are missing from ranges of the profiler."""
    world = World(0, 1, 0, 1, torch.device("cpu"), 1)
    runner = TrainStateRunner(synthetic_config("resnet8", 4), world)
    try:
        times = runner.event_times(HostEvent)
    finally:
        runner.close()
    assert set(PARTS) - times.keys() <= {"dl2pa.to_device", "dl2pa.average"}
    assert times["dl2pa.backward"] > 0 and times["dl2pa.forward"] > times["dl2pa.loss"] > 0
