from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dl2pa.config import Config
from dl2pa.reporting.class_metrics import class_rows, confuse
from dl2pa.reporting.pages import classes_page, confusion_page
from dl2pa.reporting.run_data import RunData
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
JPEG = b"\xff\xd8\xff"


class Page(HTMLParser):
    """Tags, attribute names and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

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
    pictures = {"curves": b"\x89PNG", "assignment_flow": b"\x89PNG"}
    text = summary_page(run_data, [], pictures, selection, dict.fromkeys(selection.all, JPEG))
    page = Page(text)
    assert "script" not in page.tags and not page.attributes & {"onerror", "onload"}
    assert all(name in page.text for name in NAMES[:2])
    assert len(page.sources) > 2 and all(source.startswith("data:image/") for source in page.sources)
    assert page.text.index("The training loss did not fall") < page.text.index("the assignment had converged")
    assert "at epoch 10." in page.text and "best, at" in page.text


def test_the_class_table_shows_names_as_text() -> None:
    rows = class_rows(PREDICTIONS, NAMES)
    page = Page(classes_page(rows, NAMES[0]))
    assert page.tags.count("script") == 1 and not page.attributes & {"onerror", "onload"}
    assert page.tags.count("tr") == 5 and page.tags.count("th") == 9, "without group and training images"
    assert all(name in page.text for name in NAMES)


def test_the_confusion_page_shows_names_as_text() -> None:
    confusion = confuse(TARGETS, PREDICTED, 4)
    text = confusion_page(confusion, np.arange(4), NAMES, NAMES[0])
    assert Page(text).tags.count("script") == 2
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text)
    assert data is not None
    content = json.loads(data[1])
    assert content["names"] == list(NAMES)
    assert sum(content["count"]) == 40
