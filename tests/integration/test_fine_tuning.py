"""Fine-tuning from another run: the record of its weights, and exact resume after a kill."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path

import yaml

from support.runs import Program, Training, assert_identical

TINY = {
    "data": {"dataset": "synthetic", "num_classes": 5, "synthetic_samples": [64, 10], "image_size": 32},
    "model": {"backbone": "mobilenet_v3_small", "embedding_dim": 3},
    "method": {"name": "psc"},
    "optim": {"lr": 0.01},
    "train": {"epochs": 2, "batch_size": 8, "log_every_steps": 1},
    "checkpoint": {"every_steps": 3},
    "tracking": {"uri": "none", "figures": False},
    "launch": {"device": "cpu", "threads": 1},
}


def test_a_killed_fine_tuning_resumes_exactly_without_its_source(tmp_path: Path) -> None:
    """Dropout and stochastic depth are on; the backbone is frozen in the first epoch."""
    program = Program(tmp_path)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    source, whole, cut = (Training(program, file, tmp_path / name, 1) for name in ("source", "whole", "cut"))
    try:
        source.finish("train.max_steps=2", "data.mean=[0.4,0.4,0.4]")
        tuned = (f"model.init={source.run}", "model.freeze_epochs=1", "optim.head_lr_scale=5")
        whole.finish(*tuned)
        started = cut.start(*tuned)
        cut.wait_for(started, lambda: any((cut.run / "checkpoints").glob("step-*/COMPLETE")), "a checkpoint")
        started.signal_group(signal.SIGKILL)
        started.wait()
        model = source.run / "model.safetensors"
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
        model.unlink()
        cut.finish(*tuned)
    finally:
        program.close()
    assert_identical(cut.run, whole.run)
    attempts = json.loads((cut.run / "environment.json").read_text())["attempts"]
    assert [attempt.get("init", {}).get("sha256") for attempt in attempts] == [digest, None]
    assert yaml.safe_load((cut.run / "config.yaml").read_text())["data"]["mean"] == [0.4, 0.4, 0.4]
    assert digest in (cut.run / "events/events.jsonl").read_text()
