"""Description and views of an experiment, in MLflow's format."""

from __future__ import annotations

import base64
import json
import zlib
from types import SimpleNamespace
from typing import Any

import pytest

from dl2pa.redaction import redact
from dl2pa.tracking.views import VERSION, experiment_links, experiment_tags, set_up_experiment

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
    assert len(views) == 6
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
        names = [section["name"] for section in state["compareRunSections"]]
        assert names == ["val", "train", "match", "time"] and state["isAccordionReordered"], "kept in order"
        assert all(
            chart["metricKey"].startswith(("val/", "train/", "match/", "time/"))
            for chart in state["compareRunCharts"]
        )
    groups = [state_of(views[f"dl2pa-{name}"])["groupBy"] for name in ("seeds", "lowest", "highest")]
    assert groups == ["tag.average.group", "tag.min.group", "tag.max.group"], "mean and spread over seeds"


def test_the_links_open_the_runs_of_each_experiment_in_the_training_mode() -> None:
    experiments = [
        SimpleNamespace(experiment_id="3", name="digits", tags={"dl2pa.views": VERSION}),
        SimpleNamespace(experiment_id="2", name="another program's", tags={}),
        SimpleNamespace(experiment_id="0", name="Default", tags={}),
    ]
    client = SimpleNamespace(
        search_experiments=lambda order_by: experiments,
        search_runs=lambda ids, max_results: [] if ids == ["0"] else ["run"],
    )
    links = experiment_links(client, "http://here:1")
    mode = "workflowType=machine_learning"
    assert links == {
        "digits": f"http://here:1/#/experiments/3/runs?viewStateShareKey=dl2pa-runs&{mode}",
        "another program's": f"http://here:1/#/experiments/2/runs?{mode}",
    }
    assert redact(links["digits"]) == links["digits"], "printed and recorded as it is"


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
