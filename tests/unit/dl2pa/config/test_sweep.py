from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.config import load_config
from dl2pa.config.sweep import is_sweep, load_sweep
from dl2pa.errors import UserError

WRITTEN = """
sweep:
  config: a.yaml
  seeds: 0..4
  parallel: 2
  overrides: {train.epochs: 3, optim.nesterov: true, tracking.run_name: "a: b"}
  array:
    optim.lr: [0.1, 2]
    method.loss: [null, dot_regression]
    model.widths: [[4, 4, 8], [8, 8, 16]]
    method.name: dl2pa,hpn
    train.batch_size: 8
"""


def test_a_sweep_is_told_from_a_configuration_and_read(tmp_path: Path) -> None:
    sweep, config = tmp_path / "sweep.yaml", tmp_path / "config.yaml"
    sweep.write_text(WRITTEN, encoding="utf-8")
    config.write_text("train: {epochs: 7}", encoding="utf-8")
    assert is_sweep(sweep) and not is_sweep(config)
    found = load_sweep(sweep)
    assert (found.config, found.cells, found.parallel) == ("a.yaml", (), 2)
    assert found.array_texts() == [
        "optim.lr=0.1,2",
        "method.loss=null,dot_regression",
        "model.widths=[4, 4, 8],[8, 8, 16]",
        "method.name=dl2pa,hpn",
        "train.batch_size=8",
        "train.seed=0..4",
    ]
    overridden = load_config(config, found.override_texts())
    assert (overridden.train.epochs, overridden.optim.nesterov) == (3, True)
    assert overridden.tracking.run_name == "a: b"


@pytest.mark.parametrize(("written", "text"), [("3", "3"), ("[1, 2]", "1,2"), ("0..2", "0..2")])
def test_seeds(written: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"sweep: {{config: a.yaml, seeds: {written}}}", encoding="utf-8")
    assert load_sweep(path).array_texts() == [f"train.seed={text}"]


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("sweep: {seed: 3}", "sweep.seed", "Known: config, cells"),
        ("sweep: {parallel: 0}", "sweep.parallel", "greater than or equal to 1"),
        ("sweep: {array: train.seed=1}", "sweep.array", "dictionary"),
        ("sweep: {parallel: yes}", "sweep.parallel", "true or false"),
        ("sweep: {}\ntrain: {}", "train", "stands beside"),
        ("sweep: 3", "sweep", "Sweep"),
    ],
)
def test_a_wrong_file_is_refused(text: str, field: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        load_sweep(path)
    assert caught.value.field == field
