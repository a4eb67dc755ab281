"""Cost of a checkpoint for the training during which it is written."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from dl2pa.bench.runners import TrainStateRunner, synchronize, synthetic_config
from dl2pa.training.checkpoint import CheckpointStore
from dl2pa.training.distributed import World

_WARM_UP = 3


def bench_checkpoint(
    models: list[str],
    batch_size: int,
    steps: int,
    rounds: int,
    precision: str,
    world: World,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure alternating blocks of `steps` steps: without a save, and with a save that is written during the steps.

    Checkpoints are written to the folder for temporary files (TMPDIR).

    Returns:
        Ratios of the time of a block with a save to one without, medians over the rounds; rows of `model mib step_ms
        held_ms written_s cost_s epoch_s share`: time for which the save blocks training, seconds until it is on disk
        (at least the block), difference between the blocks, epoch of CIFAR or ImageNet, and their quotient.
    """
    ratios: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for model in models:
        runner = TrainStateRunner(synthetic_config(model, batch_size, train={"precision": precision}), world)
        with tempfile.TemporaryDirectory() as folder:
            store = CheckpointStore(Path(folder) / "checkpoints", keep=1, keep_best=False)
            try:
                row = _measure(runner, store, steps, rounds, world)
            finally:
                store.wait()
                runner.close()
        ratios[f"with a save/without: {model}"] = row.pop("ratio")
        rows.append({"model": model, **row})
    return ratios, rows


def _measure(
    runner: TrainStateRunner, store: CheckpointStore, steps: int, rounds: int, world: World
) -> dict[str, Any]:
    runner.run(_WARM_UP)
    without: list[float] = []
    with_save: list[float] = []
    blocked: list[float] = []
    written: list[float] = []
    for number in range(rounds):
        synchronize(world.device)
        start = time.perf_counter()
        runner.run(steps)
        synchronize(world.device)
        without.append(time.perf_counter() - start)
        start = time.perf_counter()
        store.save(number, runner.train_state.state())
        blocked.append(time.perf_counter() - start)
        runner.run(steps)
        synchronize(world.device)
        with_save.append(time.perf_counter() - start)
        store.wait()
        written.append(time.perf_counter() - start)
    cost = statistics.median(b - a for a, b in zip(without, with_save, strict=True))
    step_s = statistics.median(without) / steps
    epoch_s = runner.steps_per_epoch * step_s
    return {
        "mib": store.state_file(rounds - 1).stat().st_size / 2**20,
        "step_ms": step_s * 1e3,
        "held_ms": statistics.median(blocked) * 1e3,
        "written_s": statistics.median(written),
        "cost_s": cost,
        "epoch_s": epoch_s,
        "share": cost / epoch_s,
        "ratio": statistics.median(b / a for a, b in zip(without, with_save, strict=True)),
    }
