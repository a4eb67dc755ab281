from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl2pa.config import Config
from dl2pa.config.published import PublishedMatch, load_published, published_file
from dl2pa.reporting.class_metrics import class_rows, confuse
from dl2pa.reporting.pages import classes_csv, classes_page, confusion_page, page_links
from dl2pa.reporting.run_data import RunData, check_run
from dl2pa.reporting.run_plots import curve_panels
from dl2pa.reporting.samples import select_samples
from dl2pa.reporting.summary import summary_page
from dl2pa.rundir import RunDirectory
from dl2pa.training.data import DataSplits
from dl2pa.training.evaluate import Predictions
from pipelines.build import SyntheticDataset

NAMES = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", '" onload="alert(1)', "cat")
TARGETS, PREDICTED = np.arange(40) % 4, (np.arange(40) // 3) % 4
PREDICTIONS = Predictions(
    np.arange(40), TARGETS, PREDICTED, confidence=np.linspace(0.3, 1.0, 40), in_top5=TARGETS == PREDICTED
)
CELL = load_published(published_file())[1][0]
JPEG = b"\xff\xd8\xff"


class Page(HTMLParser):
    """Tags, attribute names and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value or "" for name, value in attrs if name == "src"]
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run_data(config_with: Callable[..., Config], tmp_path: Path) -> RunData:
    figures = {
        "top1_last": 25.0,
        "top1_best": 50.0,
        "top5_last": 100.0,
        "ece_last": 12.0,
        "labels_moved": [3, 0],
    }
    counts = {"num_validated": 40, "num_classes": 4, "epochs": 20, "steps": 2000, "world_size": 2}
    return RunData(
        run=RunDirectory(tmp_path / "it's <here>"),
        config=config_with(),
        data=DataSplits(SyntheticDataset(800, NAMES), SyntheticDataset(40, NAMES), NAMES),
        name=NAMES[0],
        result={**figures, **counts},
        method=None,  # type: ignore[arg-type]
        assignment_updates=[],
        steps_per_epoch=100,
        run_uuid="uuid",
        mlflow_run_id=None,
        predictions=PREDICTIONS,
        attempts=[{"command": f"dl2pa train '{NAMES[1]}'", "git_commit": "abc", "git_dirty": True}],
        points={"val/top1": [(1000, 50.0), (2000, 25.0)], "train/loss": [(1, 2.0), (2, 3.0)]},
        started=0.0,
        ended=4000.0,
        changed=(),
    )


def test_the_summary_shows_names_as_text_and_embeds_its_images(run_data: RunData) -> None:
    selection = select_samples(PREDICTIONS)
    pictures, panels = {"assignment_flow": b"\x89PNG"}, [("Accuracy", b"\x89PNG")]
    text = summary_page(run_data, [], pictures, panels, selection, dict.fromkeys(selection.all, JPEG))
    page = Page(text)
    assert "script" not in page.tags and not page.attributes & {"onerror", "onload"}
    assert all(name in page.text for name in NAMES[:2])
    assert len(page.sources) > 2 and all(source.startswith("data:image/") for source in page.sources)
    assert page.text.index("The training loss did not fall") < page.text.index("the assignment had converged")
    assert "at epoch 10." in page.text and "best, at" in page.text
    assert set(page.links) == {"per_class.html", "confusion.html"}
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    caption = re.search(r'class="bad">predicted (.*?) \((\d+)&nbsp;%\)<br><small>true (.*?)</small>', text)
    assert caption is not None and caption[1] != caption[3]


@pytest.mark.parametrize(("length", "expected"), [("full", "+10.00"), ("short", "–"), ("other", "–")])
def test_only_a_run_of_full_length_is_compared_with_the_publication(
    run_data: RunData, length: Any, expected: str
) -> None:
    match = PublishedMatch(replace(CELL, top1=40.0), "title", length)
    text = summary_page(run_data, [match], {}, [], select_samples(PREDICTIONS), {})
    assert re.findall(r"<td>40</td><td>50.00</td><td>25.00</td><td>(.*?)</td>", text) == [expected]
    assert ("best epoch of this run: +10.00 points" in text) == (length == "full")


def test_the_calibrated_error_comes_first_and_both_are_named(run_data: RunData) -> None:
    def text_of(run_data: RunData) -> str:
        page = Page(
            summary_page(run_data, [], {"reliability": b"\x89PNG"}, [], select_samples(PREDICTIONS), {})
        )
        return " ".join(page.text.split())

    raw = text_of(run_data)
    assert "ECE, raw12.00 %15 bins; not calibrated" in raw and "raw confidence" not in raw
    fitted = {"temperature": 0.25, "ece_calibrated": 2.5, "nll": 1.5, "nll_calibrated": 0.5}
    fitted |= {"calibrated_on": "training", "num_calibration": 30}
    calibrated = text_of(replace(run_data, result={**run_data.result, **fitted}))
    assert "ECE, calibrated2.50 %raw 12.00 %" in calibrated
    assert (
        "(ECE): raw 12.00 %, calibrated 2.50 %. Mean negative log-likelihood (NLL): raw 1.500" in calibrated
    )


@pytest.mark.parametrize(
    ("classes", "top1", "is_close"),
    [(2, 97.0, False), (2, 55.0, True), (3, 60.0, False), (20, 9.0, True), (20, 11.0, False)],
)
def test_only_an_accuracy_close_to_chance_level_is_a_bad_sign(
    run_data: RunData, classes: int, top1: float, is_close: bool
) -> None:
    names = tuple(map(str, range(classes)))
    data = DataSplits(SyntheticDataset(80, names), SyntheticDataset(40, names), names)
    predictions = replace(PREDICTIONS, targets=TARGETS % classes, predicted=PREDICTED % classes)
    result = {**run_data.result, "top1_last": top1}
    checks = check_run(replace(run_data, data=data, predictions=predictions, result=result))
    assert any("chance level" in check.text for check in checks) == is_close


def test_the_loss_of_the_warm_up_is_not_compared(
    run_data: RunData, config_with: Callable[..., Config]
) -> None:
    points = {"train/loss": [(100, 4.0), (200, 3.0), (225, 2.0), (250, 0.2), (300, 0.3)]}
    config = config_with({"method.match": {"warmup_epochs": 2}, "train.log_every_steps": 50})
    texts = {
        check.text
        for settings in (run_data.config, config)
        for check in check_run(replace(run_data, config=settings, points=points))
        if "training loss" in check.text
    }
    assert texts == {
        "The training loss fell: 4 first, 0.3 last.",
        "The training loss did not fall: 0.2 first, 0.3 last.",
    }


def test_the_best_epoch_is_an_integer_also_in_a_cut_run(run_data: RunData) -> None:
    cut = replace(run_data, points={"val/top1": [(1000, 20.0), (1040, 30.0)]})
    assert (cut.best_epoch, run_data.best_epoch) == (11, 10)


def test_the_best_epoch_is_that_of_the_result(run_data: RunData) -> None:
    """The points keep the value of a validation that was repeated, with another result, after a kill."""
    repeated = replace(run_data, result={**run_data.result, "epoch_best": 3})
    assert (repeated.best_epoch, run_data.best_epoch) == (3, 10)


def test_each_curve_has_axes_of_its_own(run_data: RunData) -> None:
    points = {**run_data.points, "val/ece": [(1000, 60.0)], "train/lr": [(1, 0.1)]}
    titles = [title for title, _ in curve_panels(points, 100, 60.0)]
    assert titles == ["Training loss", "Accuracy", "Calibration error (ECE), raw", "Learning rate"]


def test_the_class_table_shows_names_as_text() -> None:
    rows = class_rows(PREDICTIONS, NAMES)
    links = page_links(RunDirectory(Path("run")), Path("run/per_class.html"))
    page = Page(classes_page(rows, NAMES[0], links))
    assert page.links == ["summary.html", "confusion.html"]
    assert page.tags.count("script") == 1 and not page.attributes & {"onerror", "onload"}
    assert page.tags.count("tr") == 5 and page.tags.count("th") == 9, "without group and training images"
    assert all(name in page.text for name in NAMES)


def test_confidences_before_and_after_calibration_have_columns_of_their_own() -> None:
    rows = class_rows(replace(PREDICTIONS, calibrated=PREDICTIONS.confidence / 2), NAMES)
    assert rows[0].confidence == pytest.approx(2 * (rows[0].confidence_calibrated or 0))
    page = Page(classes_page(rows, NAMES[0]))
    assert "confidence, raw %" in page.text and "confidence, calibrated %" in page.text
    assert "confidence,confidence_calibrated,taken_for" in classes_csv(rows).splitlines()[0]


def test_the_page_of_nearest_images_is_linked_if_there_is_one(run_data: RunData) -> None:
    selection = select_samples(PREDICTIONS)
    thumbnails = dict.fromkeys(selection.all, JPEG)
    page = Page(summary_page(run_data, [], {}, [], selection, thumbnails, has_nearest=True))
    assert page.links.count("nearest.html") == 2


def test_the_confusion_page_shows_names_as_text() -> None:
    confusion = confuse(TARGETS, PREDICTED, 4)
    text = confusion_page(confusion, np.arange(4), NAMES, NAMES[0])
    assert Page(text).tags.count("script") == 2
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text)
    assert data is not None
    content = json.loads(data[1])
    assert content["names"] == list(NAMES)
    assert sum(content["count"]) == 40
