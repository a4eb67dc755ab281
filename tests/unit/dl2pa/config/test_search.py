"""Search files: their parameters, and the refusal of wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa.config.search import Parameter, load_search
from dl2pa.errors import UserError

GOOD: dict[str, Any] = {"config": "small.yaml", "parameters": {"optim.lr": {"log_uniform": [0.01, 1]}}}
PARAMETER = "search.parameters.optim.lr"


def written(folder: Path, tree: Any) -> Path:
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_the_forms_of_a_parameter(tmp_path: Path) -> None:
    parameters = {
        "optim.lr": {"log_uniform": [1e-3, 1]},
        "optim.weight_decay": {"uniform": [0, 0.1]},
        "model.embedding_dim": {"integer": [4, 9]},
        "optim.milestones": {"choice": [[10, 20], [15]]},
        "method.loss": {"choice": ["cross_entropy", "dot_regression"]},
    }
    search = load_search(written(tmp_path, {"search": {**GOOD, "parameters": parameters}}))
    assert search.space() == [
        Parameter("optim.lr", "log_uniform", 1e-3, 1),
        Parameter("optim.weight_decay", "uniform", 0, 0.1),
        Parameter("model.embedding_dim", "integer", 4, 9),
        Parameter("optim.milestones", "choice", choices=("[10, 20]", "[15]")),
        Parameter("method.loss", "choice", choices=("cross_entropy", "dot_regression")),
    ]
    texts = [parameter.override(parameter.ends[-1]) for parameter in search.space()]
    assert texts[0] == "optim.lr=1" and texts[3] == "optim.milestones=[15]"


def test_the_calibration_error_is_minimized_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    def maximizes(**keys: str) -> bool:
        return load_search(written(tmp_path, {"search": {**GOOD, **keys}})).maximizes

    assert (maximizes(), maximizes(metric="ece")) == (True, False)
    assert maximizes(metric="ece", direction="maximize")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"parameters": {"optim.lr": [0.1, 0.2]}}, PARAMETER),
        ({"parameters": {"optim.lr": {"loguniform": [0.1, 0.2]}}}, PARAMETER),
        ({"parameters": {"optim.lr": {"uniform": [0.1, 0.2], "choice": [1, 2]}}}, PARAMETER),
        ({"parameters": {"optim.lr": {"uniform": [0.2, 0.1]}}}, PARAMETER),
        ({"parameters": {"optim.lr": {"uniform": [0.1, 0.1]}}}, PARAMETER),
        ({"parameters": {"optim.lr": {"uniform": [0, float("inf")]}}}, PARAMETER),
        ({"parameters": {"optim.lr": {"uniform": [False, True]}}}, PARAMETER),
        ({"parameters": {"optim.lr": {"uniform": [0.1]}}}, PARAMETER),
        ({"parameters": {"optim.lr": {"uniform": None}}}, PARAMETER),
        ({"parameters": {"optim.lr": {"log_uniform": [0, 1]}}}, PARAMETER),
        ({"parameters": {"optim.lr": {"integer": [1, 2.5]}}}, PARAMETER),
        ({"parameters": {"optim.lr": {"choice": [0.1]}}}, PARAMETER),
        ({"parameters": {"optim.lr": {"choice": [0.1, 0.1]}}}, PARAMETER),
        ({"parameters": {}}, "search.parameters"),
        ({"parameters": [1]}, "search.parameters"),
        ({"sampler": "grid"}, PARAMETER),
        ({"sampler": "genetic"}, "search.sampler"),
        ({"overrides": {"optim.lr": 0.1}}, PARAMETER),
        ({"overrides": {"optim": {"lr": 0.1}}}, PARAMETER),
        ({"trials": 0}, "search.trials"),
        ({"metric": "loss"}, "search.metric"),
        ({"direction": "up"}, "search.direction"),
        ({"seed": -1}, "search.seed"),
        ({"prune": {"reduction_factor": 1}}, "search.prune.reduction_factor"),
        ({"prune": {"first": 1}}, "search.prune.first"),
        ({"budget": 3}, "search.budget"),
    ],
)
def test_a_wrong_search_file_is_refused_with_one_message(
    changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        load_search(written(tmp_path, {"search": {**GOOD, **changes}}))
    assert len(caught.value.problems) == 1
    assert caught.value.field == field and caught.value.remedy
    assert str(caught.value.place).startswith(str(tmp_path / "search.yaml:"))


@pytest.mark.parametrize(
    ("tree", "fields"),
    [
        ({"search": {}}, ["search.config", "search.parameters"]),
        ({"search": None}, ["search.config", "search.parameters"]),
        ({"search": GOOD, "optim": {"lr": 1}}, ["optim"]),
        ({"optim": {"lr": 1}}, ["file"]),
    ],
)
def test_a_file_that_is_not_a_search_is_refused(tree: Any, fields: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_search(written(tmp_path, tree))
    assert [problem.field for problem in caught.value.problems] == fields


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[4] / "configs/searches").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_example_searches_are_valid(path: Path) -> None:
    search = load_search(path)
    assert search.space() and (path.parent / search.config).is_file()
