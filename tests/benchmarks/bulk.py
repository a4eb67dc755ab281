"""Speed of `embed` and `predict --out` relative to `evaluate`: `python -P tests/benchmarks/bulk.py RUN DIR [ROUNDS]`.

DIR contains the class folders of the run's classes. Each round calls the three commands one after another in this
process: imports of torch are not counted; loading the model and listing the images are. The first round only
warms up.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from dl2pa.cli import main


def seconds(*words: object) -> tuple[float, float, dict[str, float]]:
    """Duration of a command, CPU time of all threads, and its result."""
    output, began, cpu = io.StringIO(), time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(output):
        code = main([*map(str, words), "--json"])
    assert code == 0, output.getvalue()
    duration, spent = time.perf_counter() - began, time.process_time() - cpu
    return duration, spent, json.loads(output.getvalue().splitlines()[-1])


def measure(run: Path, folder: Path, rounds: int) -> dict[str, object]:
    """Images/s of each command, its ratio to `evaluate`, and CPU time per image, per round."""
    speeds: dict[str, list[float]] = {"evaluate": [], "embed": [], "predict": []}
    cpu: dict[str, list[float]] = {name: [] for name in speeds}
    with tempfile.TemporaryDirectory() as out:
        commands = {
            "evaluate": ("evaluate", run, f"data.val_root={folder}"),
            "embed": ("embed", run, folder, "--out", f"{out}/e.npz"),
            "predict": ("predict", run, folder, "--out", f"{out}/p.csv"),
        }
        images = 0
        for number in range(rounds + 1):
            for name, words in commands.items():
                duration, spent, result = seconds(*words)
                images = int(result.get("num_validated", images))
                if number:
                    speeds[name].append(images / duration)
                    cpu[name].append(1000 * spent / images)
    ratios = {
        name: [a / b for a, b in zip(values, speeds["evaluate"], strict=True)]
        for name, values in speeds.items()
    }
    return {
        "images": images,
        "images_per_second": {name: [round(value) for value in values] for name, values in speeds.items()},
        "ratio": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
        "ratios": {name: [round(value, 2) for value in values] for name, values in ratios.items()},
        "cpu_ms_per_image": {name: [round(value, 3) for value in values] for name, values in cpu.items()},
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), Path(sys.argv[2]), int((*sys.argv, 3)[3]))))
