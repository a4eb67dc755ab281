"""Temperature of the probabilities, fitted at the end of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from dl2pa.config import merge, parse_config
from dl2pa.errors import EXIT_DONE, EXIT_STOPPED, UserError
from dl2pa.model.inference import load_classifier
from dl2pa.rundir import RunDirectory
from dl2pa.training import calibrate as module
from dl2pa.training.calibrate import ScoredImages, fit_calibration, fit_temperature
from dl2pa.training.data import open_data
from dl2pa.training.evaluate import BINS, Predictions
from dl2pa.training.run import train
from dl2pa.training.trainer import Trainer
from pipelines.dataset import SyntheticDataset
from pipelines.datasets import write_digits
from support.commands import process_state_restored

CONFIG: dict[str, Any] = {
    "data": {"dataset": "digits", "image_size": 16, "eval_resize": 16, "loader": "resident", "crop": "pad"},
    "model": {"backbone": "resnet8", "embedding_dim": 6, "widths": [4, 4, 4]},
    "train": {"epochs": 1, "batch_size": 64, "max_steps": 6},
    "tracking": {"enabled": False},
    "launch": {"device": "cpu", "threads": 1},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", size=16)


def config(digits: Path, **changes: dict[str, Any]) -> Any:
    return parse_config(merge(merge(CONFIG, {"data": {"root": str(digits)}}), changes))


def draw(samples: int, classes: int, sharpness: float) -> ScoredImages:
    """Logits whose true temperature is 1 / `sharpness`: targets are drawn from the sharpened softmax."""
    generator = np.random.default_rng(0)
    logits = generator.uniform(-1, 1, (samples, classes)).astype(np.float32)
    scores = sharpness * logits.astype(np.float64) + generator.gumbel(size=logits.shape)
    return ScoredImages(np.arange(samples), scores.argmax(axis=1), logits)


def smoothed_nll(images: ScoredImages, temperature: float) -> float:
    """The objective from its definition."""
    z = images.logits.astype(np.float64) / temperature
    log_p = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
    n = len(z)
    true = log_p[np.arange(n), images.targets]
    return float(-(n * true + log_p.mean(axis=1)).mean() / (n + 1))


@pytest.mark.parametrize(
    ("samples", "classes", "sharpness"), [(5000, 10, 14.0), (900, 3, 0.4), (40, 200, 3.0)]
)
def test_the_temperature_minimizes_the_nll(samples: int, classes: int, sharpness: float) -> None:
    images = draw(samples, classes, sharpness)
    best: Any = minimize_scalar(
        lambda u: smoothed_nll(images, float(np.exp(u))),
        bounds=(-9, 9),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert fit_temperature(images) == pytest.approx(np.exp(best.x), rel=1e-4)
    if samples == 5000:
        assert fit_temperature(images) == pytest.approx(1 / sharpness, rel=0.05)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    images = draw(500, 7, 5.0)
    whole = fit_calibration(images, None)
    monkeypatch.setattr(module, "_BLOCK", 64)
    parts = fit_calibration(images, None)
    assert whole.metrics() == parts.metrics()
    assert np.array_equal(whole.confidence, parts.confidence)


def test_perfect_and_constant_predictions_have_a_finite_temperature() -> None:
    logits = 3 * np.eye(4, dtype=np.float32)[np.arange(40) % 4]
    perfect = ScoredImages(np.arange(40), np.arange(40) % 4, logits)
    result = fit_calibration(perfect, None)
    assert 0.1 < result.temperature < 10
    assert 0.9 < result.confidence.min() <= result.confidence.max() < 1
    assert fit_temperature(replace(perfect, logits=np.zeros_like(logits))) == 1.0
    wrong = replace(perfect, targets=(perfect.targets + 1) % 4)
    assert fit_temperature(wrong) == pytest.approx(1e4)


def test_each_half_is_calibrated_with_the_temperature_of_the_other() -> None:
    images = draw(400, 5, 6.0)
    images.logits[::2] *= 2
    result = fit_calibration(images, None)
    even, odd = (
        fit_temperature(images.part(slice(0, None, 2))),
        fit_temperature(images.part(slice(1, None, 2))),
    )
    assert odd < result.temperature < even
    z = images.logits.astype(np.float64)
    for rows, temperature in ((slice(0, None, 2), odd), (slice(1, None, 2), even)):
        p = np.exp(z[rows] / temperature)
        assert result.confidence[rows] == pytest.approx((p / p.sum(1, keepdims=True)).max(1))


@pytest.mark.parametrize("held_out", [False, True])
def test_a_temperature_that_does_not_help_other_images_is_not_used(held_out: bool) -> None:
    """Few images without an error: their smoothed targets ask for less confidence than is right."""
    labels = np.arange(40) % 4
    images = ScoredImages(np.arange(40), labels, 8 * np.eye(4, dtype=np.float32)[labels])
    assert fit_temperature(images) > 1.5
    result = fit_calibration(images, images if held_out else None)
    assert result.temperature == 1.0
    assert result.nll_calibrated == result.nll < 0.01


def test_held_out_images_give_the_temperature_of_all_validation_images() -> None:
    val, held = draw(300, 5, 6.0), draw(200, 5, 3.0)
    result = fit_calibration(val, held)
    assert (result.temperature, result.num_calibration) == (fit_temperature(held), 200)
    assert result.calibrated_on == "training"
    assert result.nll_calibrated < result.nll


def test_calibration_images_are_a_fixed_stratified_part_of_the_training_images(digits: Path) -> None:
    for changes in ({}, {"imbalance": 0.1}, {"loader": "torchvision", "crop": "none"}):
        whole = open_data(config(digits, data=changes), 1)
        splits = [
            open_data(config(digits, data={**changes, "calibration_fraction": 0.1}, train={"seed": seed}), 1)
            for seed in (0, 1)
        ]
        part = splits[0]
        assert part.calibration is not None and not isinstance(part.calibration, SyntheticDataset)
        assert not isinstance(part.train, SyntheticDataset) and not isinstance(whole.train, SyntheticDataset)
        counts, held = (np.bincount(s.labels, minlength=10) for s in (whole.train, part.calibration))
        assert held.tolist() == np.floor(counts * 0.1 + 0.5).astype(int).tolist()
        assert (np.bincount(part.train.labels, minlength=10) + held).tolist() == counts.tolist()
        assert part.calibration.fingerprint == splits[1].calibration.fingerprint  # type: ignore[union-attr]
        assert part.val.fingerprint == whole.val.fingerprint
        files = [{s.path(i) for i in range(len(s))} for s in (part.train, part.calibration)]  # type: ignore[union-attr]
        assert not files[0] & files[1]


def test_images_that_cannot_be_held_out_are_refused(digits: Path) -> None:
    synthetic = {
        "dataset": "synthetic",
        "loader": "synthetic",
        "num_classes": 10,
        "calibration_fraction": 0.1,
    }
    with pytest.raises(UserError, match="no images to hold out"):
        open_data(config(digits, data=synthetic), 1)
    with pytest.raises(UserError, match="holds out no image") as caught:
        open_data(config(digits, data={"calibration_fraction": 0.001}), 1)
    assert caught.value.field == "data.calibration_fraction"


def run_once(settings: Any, folder: Path) -> RunDirectory:
    with process_state_restored():
        assert train(settings, folder, "test") == EXIT_DONE
    return RunDirectory(folder)


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_a_run_ends_with_a_temperature(fraction: float, digits: Path, tmp_path: Path) -> None:
    settings = config(digits, data={"calibration_fraction": fraction})
    run = run_once(settings, tmp_path / "run")
    result, classifier = run.read_result(), load_classifier(run.model)
    assert result["calibrated_on"] == ("training" if fraction else "validation")
    assert classifier.temperature == result["temperature"] != 1.0
    assert result["nll_calibrated"] != result["nll"]
    predictions = Predictions.load(run.predictions)
    assert predictions.calibrated is not None
    hits = predictions.predicted == predictions.targets
    bins = np.minimum((predictions.calibrated * BINS).astype(int), BINS - 1)
    gaps = [abs(float((hits - predictions.calibrated)[bins == b].sum())) for b in range(BINS)]
    assert result["ece_calibrated"] == pytest.approx(100 * sum(gaps) / len(hits), abs=1e-4)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_repeated_end_gives_the_same_bits(
    how: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt ends after the calibration, or is stopped in it, before the model is written."""
    settings, folder = config(digits), tmp_path / "run"
    expected = run_once(settings, tmp_path / "undisturbed")
    with monkeypatch.context() as patch, process_state_restored():
        if how == "killed":
            patch.setattr("dl2pa.training.run.finish_run", kill)
            with pytest.raises(RuntimeError, match="killed"):
                train(settings, folder, "test")
        else:
            patch.setattr(Trainer, "run", stop_after(Trainer.run))
            assert train(settings, folder, "test") == EXIT_STOPPED
            assert RunDirectory(folder).status()["state"] == "stopped"
    assert not RunDirectory(folder).model.exists()
    run = run_once(settings, folder)
    assert run.model.read_bytes() == expected.model.read_bytes()
    assert run.predictions.read_bytes() == expected.predictions.read_bytes()
    results = [r.read_result() for r in (expected, run)]
    for key in ("temperature", "nll", "nll_calibrated", "ece_last", "ece_calibrated"):
        assert results[0][key] == results[1][key], key


def kill(*_: Any) -> None:
    raise RuntimeError("killed")


def stop_after(run: Callable[[Trainer], bool]) -> Callable[[Trainer], bool]:
    """The training loop, followed by a request to stop."""

    def run_and_stop(trainer: Trainer) -> bool:
        finished = run(trainer)
        trainer.stop._requested.set()
        return finished

    return run_and_stop


def test_too_many_logits_are_skipped(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STORED", 100)
    run = run_once(config(digits), tmp_path / "run")
    assert json.loads(run.result.read_text())["temperature"] is None
    assert load_classifier(run.model).temperature == 1.0


def test_a_repeated_end_without_a_temperature_keeps_the_trained_class_vectors(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No image is scored after the resume, so that nothing but its start can select the trained class vectors."""
    monkeypatch.setattr(module, "MAX_STORED", 100)
    settings = config(digits, method={"assignment": "static", "loss": "cross_entropy", "release_epoch": 0})
    with monkeypatch.context() as patch:
        patch.setattr("dl2pa.training.finish.write_json", kill)  # after the model was written
        with pytest.raises(RuntimeError, match="killed"), process_state_restored():
            train(settings, tmp_path / "run", "test")
    run = RunDirectory(tmp_path / "run")
    expected = run.model.read_bytes()
    assert run_once(settings, run.root).model.read_bytes() == expected
