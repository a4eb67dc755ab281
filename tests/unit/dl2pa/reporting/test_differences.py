"""Comparison of two runs: listed differences and the noise of seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from dl2pa.errors import UserError
from dl2pa.reporting.differences import compare_runs, compose_differences
from dl2pa.reporting.document import to_markdown

MakeRun = Callable[..., Path]


def test_differences_are_listed_with_both_values(make_run: MakeRun) -> None:
    a = make_run({"data.root": "/here"})
    b = make_run(
        {"optim.lr": 0.2, "method.name": "hpn", "train.seed": 3, "launch.nproc": 2, "data.root": "/there"}
    )
    environment = {"device": "cpu", "git_commit": "fedcba", "git_dirty": True, "torch": "9.9"}
    (b / "environment.json").write_text(json.dumps({"attempts": [{}, environment]}))
    record = asdict(compare_runs(a, b))
    assert record["config"] == {
        "method.name": ["dl2pa", "hpn"],
        "method.assignment": ["dynamic", "static"],
        "optim.lr": [0.1, 0.2],
        "train.seed": [0, 3],
    }
    assert record["code"] == {
        "git_commit": ["0123456789abcdef", "fedcba"],
        "git_dirty": [False, True],
        "torch": [None, "9.9"],
    }
    assert record["data"] == {"data.root": ["/here", "/there"]}
    assert record["neutral"] == {"launch.nproc": ["auto", 2]}
    assert (record["same_recipe"], record["machine"]) == (False, {})


@pytest.mark.parametrize(
    ("seeds_of_a", "seeds_of_b", "verdict", "conclusion"),
    [
        ([50.0], [60.0], "undecided: one seed each", "B is better by 10.00 points .* seeds may explain it"),
        (
            [60.0, 60.2, 59.8],
            [50.0],
            "exceeds seed noise",
            "A is better by 10.00 points .* do not explain it",
        ),
        (
            [50.0, 58.0, 42.0],
            [60.0, 55.0],
            "within seed noise",
            "B is better by 7.50 points .* may explain it",
        ),
        (
            [50.0, 50.2, 49.8],
            [60.0, 60.4, 59.9],
            "exceeds seed noise",
            "B is better by 10.10 .* do not explain",
        ),
        ([50.0], [50.0], "equal", "the same top-1 accuracy, 50.00 %"),
    ],
)
def test_a_difference_is_compared_with_the_noise_of_seeds(
    make_run: MakeRun, seeds_of_a: list[float], seeds_of_b: list[float], verdict: str, conclusion: str
) -> None:
    a = [make_run({"train.seed": s}, last=v) for s, v in enumerate(seeds_of_a)]
    b = [make_run({"train.seed": s, "optim.lr": 0.2}, last=v) for s, v in enumerate(seeds_of_b)]
    differences = compare_runs(a[0], b[0])
    result = differences.results["top1_last"]
    assert result.verdict == verdict
    assert re.search(conclusion, to_markdown(compose_differences(differences)).splitlines()[0])
    assert result.n == [len(a), len(b)]
    assert result.mean == pytest.approx([sum(v) / len(v) for v in (seeds_of_a, seeds_of_b)])


def test_the_interval_equals_that_of_scipy(make_run: MakeRun) -> None:
    from scipy.stats import ttest_ind

    values = [50.0, 51.0, 49.5], [52.0, 50.5]
    a = [make_run({"train.seed": s}, last=v) for s, v in enumerate(values[0])]
    b = [make_run({"train.seed": s, "optim.lr": 0.2}, last=v) for s, v in enumerate(values[1])]
    result = compare_runs(a[0], b[0]).results["top1_last"]
    expected = ttest_ind(values[1], values[0]).confidence_interval(0.95)
    assert result.interval == pytest.approx([expected.low, expected.high])


def test_two_seeds_of_a_recipe_are_compared_with_its_noise(make_run: MakeRun) -> None:
    runs = [make_run({"train.seed": s}, last=v) for s, v in enumerate([50.0, 50.5, 49.5, 50.2])]
    record = asdict(compare_runs(runs[0], runs[1]))
    assert record["same_recipe"]
    assert record["config"] == {"train.seed": [0, 1]}
    assert record["results"]["top1_last"]["verdict"] == "within seed noise"
    assert record["results"]["top1_last"]["n"] == [4, 4]


def test_a_repeated_seed_does_not_count(make_run: MakeRun) -> None:
    a, b = make_run(last=50.0), make_run(last=51.0)
    result = compare_runs(a, b).results["top1_last"]
    assert (result.n, result.noise, result.verdict) == ([1, 1], None, "undecided: one seed each")


def test_seeds_in_another_folder_count_if_it_is_given(
    make_run: MakeRun, make_runs_in: Callable[..., MakeRun]
) -> None:
    a, b = make_run(last=50.0), make_run({"optim.lr": 0.2}, last=60.0)
    elsewhere = make_runs_in(a.parent.parent / "elsewhere")
    others = [elsewhere({"train.seed": s}, last=50.0 + s / 10) for s in (1, 2)]
    assert compare_runs(a, b).results["top1_last"].n == [1, 1]
    result = compare_runs(a, b, others[0].parent).results["top1_last"]
    assert (result.n, result.verdict) == ([3, 1], "exceeds seed noise")


def test_an_unfinished_run_is_compared_except_for_results(make_run: MakeRun) -> None:
    a, b = make_run(), make_run({"optim.lr": 0.2}, state="stopped")
    result = compare_runs(a, b)
    assert "stopped" in str(result.unknown)
    text = to_markdown(compose_differences(result))
    assert "`optim.lr` | 0.1 | 0.2" in text
    assert "The results cannot be compared" in text


def test_a_run_is_not_compared_with_itself(make_run: MakeRun) -> None:
    run = make_run()
    with pytest.raises(UserError, match="the same run"):
        compare_runs(run, run)


def test_raw_and_calibrated_errors_are_compared_under_their_names(make_run: MakeRun) -> None:
    fitted = {"nll": 1.5, "nll_calibrated": 0.5, "temperature": 0.2}
    runs = [make_run({"train.seed": s}, ece_last=50.0 + s, ece_calibrated=2.0 + s, **fitted) for s in (0, 1)]
    content = compare_runs(*runs)
    text = to_markdown(compose_differences(content))
    names = (
        "ECE, raw | 50.00 | 51.00",
        "ECE, calibrated | 2.00 | 3.00",
        "NLL, raw | 1.50",
        "NLL, calibrated | 0.50",
    )
    assert all(f"| {name} " in text for name in names)
    assert {"ece_last", "ece_calibrated", "nll", "nll_calibrated"} < asdict(content)["results"].keys()
    raw = make_run({"train.seed": 2})  # without a temperature
    assert "calibrated |" not in to_markdown(compose_differences(compare_runs(runs[0], raw)))


def test_runs_on_other_images_have_another_recipe(make_run: MakeRun) -> None:
    a = [make_run({"train.seed": s}, last=50.0 + s, fingerprint="one") for s in (0, 1)]
    b = [make_run({"train.seed": s}, last=60.0 + s, fingerprint="other") for s in (0, 1)]
    differences = compare_runs(a[0], b[1])
    assert not differences.same_recipe
    assert differences.data == {"dl2pa.data": ["one", "other"]}
    result = differences.results["top1_last"]
    assert (result.mean, result.n, result.gap) == ([50.5, 60.5], [2, 2], 10.0)
