"""Reading of sweep files."""

from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.config import load_config
from dl2pa.config.sweep import is_sweep, load_sweep
from dl2pa.errors import UserError

SWEEP = """
sweep:
  config: a.yaml
  seeds: 0..4
  parallel: 2
  overrides: {train.epochs: 3, optim.nesterov: true, tracking.run_name: "a: b"}
  grid:
    optim.lr: [0.1, 2]
    method.loss: [null, dot_regression]
    model.widths: [[4, 4, 8], [8, 8, 16]]
    method.name: dl2pa,hpn
    train.batch_size: 8
"""


def test_a_sweep_file_is_recognized_and_read(tmp_path: Path) -> None:
    sweep, config = tmp_path / "sweep.yaml", tmp_path / "config.yaml"
    sweep.write_text(SWEEP, encoding="utf-8")
    config.write_text("train: {epochs: 7}", encoding="utf-8")
    assert is_sweep(sweep) and not is_sweep(config)
    loaded = load_sweep(sweep)
    assert (loaded.config, loaded.published, loaded.parallel) == ("a.yaml", (), 2)
    assert loaded.grid_texts() == [
        "optim.lr=0.1,2",
        "method.loss=null,dot_regression",
        "model.widths=[4, 4, 8],[8, 8, 16]",
        "method.name=dl2pa,hpn",
        "train.batch_size=8",
        "train.seed=0..4",
    ]
    overridden = load_config(config, loaded.override_texts())
    assert (overridden.train.epochs, overridden.optim.nesterov) == (3, True)
    assert overridden.tracking.run_name == "a: b"


@pytest.mark.parametrize(("seeds", "text"), [("3", "3"), ("[1, 2]", "1,2"), ("0..2", "0..2")])
def test_seeds_are_an_axis_of_the_grid(seeds: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"sweep: {{config: a.yaml, seeds: {seeds}}}", encoding="utf-8")
    assert load_sweep(path).grid_texts() == [f"train.seed={text}"]


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        ("sweep: {seed: 3}", "sweep.seed", "Did you mean sweep.seeds"),
        ("sweep: {parallel: 0}", "sweep.parallel", "must be an integer ≥ 1 or null"),
        ("sweep: {grid: train.seed=1}", "sweep.grid", "must be a mapping"),
        ("sweep: {parallel: true}", "sweep.parallel", "true or false"),
        ("sweep: {}\ntrain: {}", "train", "cannot be combined"),
        ("sweep: 3", "sweep", "must be a section"),
        ("sweep: {overrides: {optim.lr: 1}, grid: {optim.lr: 2}}", "sweep.overrides", "sweep.grid varies"),
        ("sweep: {overrides: {optim: {lr: 1}}, grid: {optim.lr: 2}}", "sweep.overrides", "sets optim.lr"),
        ("sweep: {overrides: {train.seed: 1}, seeds: 0..2}", "sweep.overrides", "sweep.seeds varies"),
        ("sweep: {cells: [cifar100]}", "sweep.cells", "renamed. Use sweep.published"),
        ("sweep: {array: {train.seed: 1}}", "sweep.array", "renamed. Use sweep.grid"),
    ],
)
def test_an_invalid_file_is_refused(text: str, field: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_sweep(path)
    assert caught.value.field == field
