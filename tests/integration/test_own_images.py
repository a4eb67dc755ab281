"""A configuration of `dl2pa init` trains as written; its validation split survives resume, index and evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.datasets.holdout import SPLIT_SEED
from support.commands import run_here
from support.runs import Program, Training

pytestmark = pytest.mark.xdist_group("runs")
QUICK = ("launch.device=cpu", "launch.threads=1", "tracking.uri=none", "tracking.figures=false")


def test_a_run_on_a_drawn_split_resumes_exactly_with_an_index(digits: Path, tmp_path: Path) -> None:
    file, index = tmp_path / "own.yaml", tmp_path / "digits.index"
    written = run_here("init", digits / "val", "--init", "none", "--out", file, "--json")
    assert (written.result["train_images"], written.result["val_images"]) == (289, 70)
    short = (*QUICK, "train.max_steps=4", "checkpoint.every_steps=2")
    program = Program(tmp_path)
    whole, cut = (Training(program, file, tmp_path / name, 1) for name in ("whole", "cut"))
    try:
        whole.finish(*short)
        cut.finish(*short, "train.max_steps=2")
        assert run_here("data", "index", digits / "val", "--out", index, "--workers", "1").code == 0
        other = run_here(*cut.command(*short, "data.val_fraction=0.3"))
        assert (other.code, other.result["error"]["field"]) == (2, "data.val_fraction")
        result = cut.finish(*short, f"data.index={index}").result
    finally:
        program.close()
    assert result["num_validated"] == 70
    weights = [(run / "model.safetensors").read_bytes() for run in (cut.run, whole.run)]
    assert weights[0] == weights[1]
    recorded = {
        key: [attempt[key] for attempt in json.loads((cut.run / "environment.json").read_text())["attempts"]]
        for key in ("val_split", "data_fingerprint")
    }
    split = {"val_fraction": 0.2, "seed": SPLIT_SEED, "num_train": 289, "num_val": 70}
    assert recorded["val_split"] == [split, split]
    assert len(set(recorded["data_fingerprint"])) == 1
    evaluated = run_here("evaluate", whole.run, "--json").result
    assert evaluated["top1"] == pytest.approx(result["top1_last"])
    elsewhere = run_here(
        "evaluate", whole.run, "data.val_fraction=null", f"data.val_root={digits / 'val'}", "--json"
    )
    assert elsewhere.result["num_validated"] == 359
