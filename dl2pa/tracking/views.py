"""Description and saved views (columns, charts, groups) of an MLflow experiment.

MLflow 3.17 stores the layout of a page in the browser, except for saved views: those are tags of the experiment,
``mlflow.sharedViewState.<id>``, visible in every browser. The default page is not changed.
"""

from __future__ import annotations

import base64
import json
import logging
import zlib
from collections.abc import Mapping
from typing import Any

_log = logging.getLogger(__name__)

VERSION = "3"
"""Version of the description and views; an experiment with another version is updated."""
DEFAULT_VIEW = "dl2pa-runs"
_VERSION_TAG = "dl2pa.views"
_NOTE = "mlflow.note.content"
_VIEW = "mlflow.sharedViewState."
_CREATED = 1_700_000_000_000

_COLUMNS = [
    "metrics.`val/top1`",
    "metrics.`val/top5`",
    "metrics.`val/ece`",
    "metrics.`val/ece_calibrated`",
    "metrics.`train/loss`",
    "metrics.`match/moved`",
    "metrics.`time/images_per_second`",
    *(
        f"tags.`{name}`"
        for name in ("method", "assignment", "dim", "seed", "dataset", "backbone", "sweep", "dl2pa.attempt")
    ),
]
_CHARTS = {
    "val": [
        "val/top1",
        "val/top5",
        "val/ece",
        "val/ece_calibrated",
        "val/top1_head",
        "val/top1_medium",
        "val/top1_tail",
    ],
    "train": ["train/loss", "train/lr", "train/gradient_norm"],
    "match": ["match/moved", "match/own_cosine", "match/margin"],
    "time": ["time/images_per_second", "time/step_ms_p50", "time/data_wait_share", "time/match_s"],
}
"""Charts by section, the ones looked at most first."""
_VIEWS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "dl2pa-runs": ("Runs, newest first", {"orderByKey": "attributes.start_time", "orderByAsc": False}),
    "dl2pa-best": ("Runs, best first", {"orderByKey": "metrics.`val/top1`", "orderByAsc": False}),
    "dl2pa-seeds": ("Mean over seeds", {"groupBy": "tag.average.group"}),
    "dl2pa-lowest": ("Lowest over seeds", {"groupBy": "tag.min.group"}),
    "dl2pa-highest": ("Highest over seeds", {"groupBy": "tag.max.group"}),
    "dl2pa-sweeps": ("Sweeps", {"groupBy": "tag.average.sweep"}),
}


def set_up_experiment(client: Any, experiment: Any) -> None:
    """Set the description and views of an experiment, once; never raises.

    A description written by a user is kept. Without permission to change the experiment, nothing is changed.
    """
    if experiment.tags.get(_VERSION_TAG) == VERSION:
        return
    try:
        for name, value in experiment_tags(str(experiment.experiment_id), experiment.tags).items():
            client.set_experiment_tag(experiment.experiment_id, name, value)
    except Exception as error:  # any error of MLflow or its transport
        _log.debug("the experiment's views could not be saved: %s", type(error).__name__)


def experiment_tags(experiment_id: str, present: Mapping[str, str]) -> dict[str, str]:
    """Return the tags to set on an experiment with the existing tags `present`."""
    tags = {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": "val/top1",
        **{f"{_VIEW}{key}": _envelope(name, _state(changes)) for key, (name, changes) in _VIEWS.items()},
    }
    written = present.get(_NOTE)
    if not written or (_VERSION_TAG in present and written.startswith(_TITLE)):
        tags[_NOTE] = _description(experiment_id)
    return {**tags, _VERSION_TAG: VERSION}


_TITLE = "Runs of dl2pa."
_MODE = "workflowType=machine_learning"
"""Selects the training pages of MLflow, instead of those for generative AI."""


def view_link(experiment_id: str, view: str | None = DEFAULT_VIEW) -> str:
    """Address of the runs of an experiment, relative to that of the server; None: without a saved view."""
    key = "" if view is None else f"viewStateShareKey={view}&"
    return f"#/experiments/{experiment_id}/runs?{key}{_MODE}"


def experiment_links(client: Any, server: str) -> dict[str, str]:
    """Addresses of the runs of each experiment with runs by its name, the last changed first."""
    experiments = client.search_experiments(order_by=["last_update_time DESC"])
    links: dict[str, str] = {}
    for experiment in experiments:
        number = str(experiment.experiment_id)
        if client.search_runs([number], max_results=1):
            view = DEFAULT_VIEW if _VERSION_TAG in experiment.tags else None
            links[experiment.name] = f"{server}/{view_link(number, view)}"
    return links


def _description(experiment_id: str) -> str:
    links = [f"[{name}]({view_link(experiment_id, key)})" for key, (name, _) in _VIEWS.items()]
    return (
        f"{_TITLE} Views: {' · '.join(links)}\n\n"
        "`val/*` is measured on the full validation set, accuracies and calibration errors in percent: `val/ece` and "
        "`val/nll` of the raw probabilities, `val/ece_calibrated` and `val/nll_calibrated` of the calibrated ones at "
        "the end of the run; `match/*` describes the updates of the assignment of classes to prototypes; `time/*` "
        "depends on the machine. Search runs by tag: `tags.method = 'dl2pa' and tags.seed = '0'`. The description of "
        "each run contains its result, its command and links to related runs."
    )


def _state(changes: Mapping[str, Any]) -> dict[str, Any]:
    """State of a view in the format of MLflow's ExperimentPageUIState and ExperimentPageSearchFacetsState."""
    sections = [
        {"uuid": f"dl2pa-{name}", "name": name, "display": True, "isReordered": True, "deleted": False}
        | {"isGenerated": True}
        for name in _CHARTS
    ]
    return {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": _COLUMNS,
        "columnOrder": _COLUMNS,
        "columnWidths": dict.fromkeys(_COLUMNS, 110),
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "FIRST_10_RUNS",
        "compareRunCharts": [_chart(s, metric) for s, metrics in _CHARTS.items() for metric in metrics],
        "compareRunSections": sections,
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        **changes,
    }


def _chart(section: str, metric: str) -> dict[str, Any]:
    return {
        "uuid": f"dl2pa-{metric}",
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "metricSectionId": f"dl2pa-{section}",
        "deleted": False,
        "isGenerated": True,
        "runsCountToCompare": 10,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "log" if metric == "train/loss" else "linear",
        "lineSmoothness": 0,
        "selectedXAxisMetricKey": "",
        "selectedYAxisMetricKey": "Metric",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "useGlobalLineSmoothing": True,
        "useGlobalXaxisKey": True,
        "ignoreOutliers": False,
    }


def _envelope(name: str, state: Mapping[str, Any]) -> str:
    """Encode a saved view as MLflow stores it, with the state deflated; at most 5,000 characters."""
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    return json.dumps(
        {"name": name, "createdAt": _CREATED, "updatedAt": _CREATED, "state": f"deflate;{packed}"}
    )
