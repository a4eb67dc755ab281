"""Description and views of an experiment, in MLflow's format."""

from __future__ import annotations

import base64
import json
import zlib
from types import SimpleNamespace
from typing import Any

import pytest

from dl2pa.tracking.views import VERSION, experiment_tags, set_up_experiment

VIEW = "mlflow.sharedViewState."
LONGEST_TAG = 5000


def state_of(envelope: str) -> dict[str, Any]:
    packed = json.loads(envelope)["state"].removeprefix("deflate;")
    return json.loads(zlib.decompress(base64.b64decode(packed)))


class Client:
    def __init__(self, failure: Exception | None = None) -> None:
        self.tags: dict[str, str] = {}
        self._failure = failure

    def set_experiment_tag(self, _experiment: str, name: str, value: str) -> None:
        if self._failure is not None:
            raise self._failure
        self.tags[name] = value


def test_every_view_fits_a_tag_and_is_linked_in_the_description() -> None:
    tags = experiment_tags("7", {})
    views = {name.removeprefix(VIEW): value for name, value in tags.items() if name.startswith(VIEW)}
    assert len(views) == 4
    for key, value in views.items():
        assert len(value) <= LONGEST_TAG
        assert (
            f"[{json.loads(value)['name']}](#/experiments/7/runs?viewStateShareKey={key}&"
            in tags["mlflow.note.content"]
        )
        state = state_of(value)
        assert state["selectedColumns"][0] == "metrics.`val/top1`"
        sections = {section["uuid"] for section in state["compareRunSections"]}
        assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections
    assert state_of(views["dl2pa-seeds"])["groupBy"] == "tag.average.group"


def test_an_experiment_is_set_up_once() -> None:
    client = Client()
    set_up_experiment(client, SimpleNamespace(experiment_id="1", tags={}))
    assert client.tags["dl2pa.views"] == VERSION
    again = Client()
    set_up_experiment(again, SimpleNamespace(experiment_id="1", tags=client.tags))
    assert again.tags == {}


@pytest.mark.parametrize("version", [{}, {"dl2pa.views": "0"}])
def test_a_description_of_a_user_is_kept(version: dict[str, str]) -> None:
    assert "mlflow.note.content" not in experiment_tags("1", {"mlflow.note.content": "Ours.", **version})
    default = experiment_tags("1", {})["mlflow.note.content"]
    assert (
        "mlflow.note.content" in experiment_tags("1", {"mlflow.note.content": default, **version})
    ) == bool(version)


def test_missing_permission_to_change_the_experiment_is_ignored() -> None:
    refusing = Client(PermissionError("403"))
    set_up_experiment(refusing, SimpleNamespace(experiment_id="1", tags={}))
    assert refusing.tags == {}
