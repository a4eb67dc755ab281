"""`dl2pa sweep`: planned runs and refused input, without training."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa import gpus
from dl2pa.cli import main
from dl2pa.commands.sweep import worker_environments
from dl2pa.config import fingerprint, load_config

TINY: dict[str, Any] = {
    "data": {"dataset": "synthetic", "num_classes": 5, "synthetic_samples": [64, 20], "image_size": 8},
    "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4]},
    "train": {"epochs": 2, "batch_size": 8},
    "launch": {"device": "cpu"},
}
Planned = list[tuple[Path, dict[str, str], Path]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DL2PA_DATA", raising=False)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., Planned]:
    """Return configuration, overrides and run directory of each run in a dry run."""

    def dry_run(*arguments: str) -> Planned:
        assert main(["sweep", *arguments, "--dry-run"]) == 0, capsys.readouterr().err
        runs: Planned = []
        for line in capsys.readouterr().out.splitlines():
            python, safe, module, program, command, config, *rest = shlex.split(line)
            assert (python, safe, module, program) == (sys.executable, "-P", "-m", "dl2pa")
            assert command == "train"
            *overrides, option, run_dir, as_json = rest
            assert (option, as_json) == ("--run-dir", "--json")
            runs.append((Path(config), dict(text.split("=", 1) for text in overrides), Path(run_dir)))
        return runs

    return dry_run


def test_each_run_is_the_train_command_that_resumes_it(plan: Callable[..., Planned], folder: Path) -> None:
    runs = plan("tiny.yaml", "--grid", "method.name=dl2pa,hpn", "--seeds", "0..1", "train.epochs=3")
    swept = [(overrides["method.name"], overrides["train.seed"]) for _, overrides, _ in runs]
    assert swept == [("dl2pa", "0"), ("dl2pa", "1"), ("hpn", "0"), ("hpn", "1")]
    for config, overrides, run_dir in runs:
        assert (config, overrides["train.epochs"]) == (Path("tiny.yaml"), "3")
        texts = [f"{key}={value}" for key, value in overrides.items()]
        name = f"tiny-{fingerprint(load_config('tiny.yaml', texts))}"
        assert run_dir == folder / "runs" / name, "the default directory of dl2pa train"
        assert "launch.threads" not in overrides
    assert len({overrides["tracking.tags.sweep"] for _, overrides, _ in runs}) == 1
    assert not (folder / "runs").exists()


def test_the_tag_depends_only_on_the_configurations(plan: Callable[..., Planned]) -> None:
    def tag(*arguments: str) -> str:
        ((_, overrides, _), *_) = plan("tiny.yaml", *arguments)
        return json.loads(overrides["tracking.tags.sweep"])

    assert tag("--seeds", "0..1") == tag("--seeds", "0,1", "launch.nproc=1", "--parallel", "2")
    assert tag("--seeds", "0..1") != tag("--seeds", "0..2")
    assert tag("--seeds", "0..1").startswith("tiny-")
    assert tag("--seeds", "0..1", "tracking.tags={sweep: mine}") == "mine"


def test_concurrent_runs_share_the_cores(
    plan: Callable[..., Planned], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    threads = [
        overrides["launch.threads"]
        for _, overrides, _ in plan("tiny.yaml", "--seeds", "0..3", "--parallel", "3")
    ]
    assert threads == ["4"] * 4
    few = plan("tiny.yaml", "--seeds", "0..1", "--parallel", "9", "launch.nproc=2")
    assert [overrides["launch.threads"] for _, overrides, _ in few] == ["3", "3"]
    explicit = plan("tiny.yaml", "--seeds", "0..1", "--parallel", "2", "launch.threads=5")
    assert [overrides["launch.threads"] for _, overrides, _ in explicit] == ["5", "5"]


@pytest.fixture
def eight_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev").mkdir()
    for index in range(8):
        (tmp_path / f"dev/nvidia{index}").touch()
    monkeypatch.setattr(gpus, "DEVICE_FILES", tmp_path / "dev")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "overrides", "expected"),
    [
        ("4,5,7", [], ["4", "5", "7", "4"]),
        ("4,5,7", ["launch.nproc=1"], ["4", "5", "7", "4"]),
        ("GPU-aa,GPU-bb", ["launch.device=cuda"], ["GPU-aa", "GPU-bb", "GPU-aa", "GPU-bb"]),
        ("4", [], [None] * 4),
        ("", [], [None] * 4),
        ("4,5", ["launch.device=cpu"], [None] * 4),
        ("4,5", ["launch.nproc=2"], [None] * 4),
    ],
)
def test_single_process_runs_are_distributed_over_the_gpus(
    visible: str,
    overrides: list[str],
    expected: list[str | None],
    eight_gpus: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    configs = [load_config("tiny.yaml", ["launch.device=auto", *overrides])] * 6
    assert [env.get("CUDA_VISIBLE_DEVICES") for env in worker_environments(configs, 4)] == expected


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(("nproc", "expected"), [("auto", [{}]), ("1", [{"CUDA_VISIBLE_DEVICES": "0"}])])
def test_one_run_at_a_time_uses_all_gpus_with_auto(nproc: str, expected: list[dict[str, str]]) -> None:
    configs = [load_config("tiny.yaml", ["launch.device=auto", f"launch.nproc={nproc}"])] * 6
    assert worker_environments(configs, 1) == expected


SWEEP: dict[str, Any] = {
    "config": "tiny.yaml",
    "grid": {"optim.lr": [0.1, 0.2]},
    "seeds": "0..1",
    "variants": {"a": {"method.name": "psc"}, "b": {"method.margin": 0.2}},
}


def test_a_grid_on_the_command_line_replaces_that_of_the_file(plan: Callable[..., Planned]) -> None:
    Path("sweep.yaml").write_text(yaml.safe_dump({"sweep": SWEEP}))
    runs = plan("sweep.yaml", "--grid", "optim.lr=0.3", "--grid", "train.seed=7", "--variant", "a")
    assert [(o["optim.lr"], o["train.seed"]) for _, o, _ in runs] == [("0.3", "7")]
    runs = plan("sweep.yaml", "--grid", "optim.lr=0.3", "--seeds", "5", "--variant", "a")
    assert [(o["optim.lr"], o["train.seed"]) for _, o, _ in runs] == [("0.3", "5")]
    assert len(plan("sweep.yaml")) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep.yaml", "train.seed=3"], "has no effect, because the grid varies this key"),
        (["sweep.yaml", "optim.lr=1"], r"Leave it out, or replace the values of the grid: --grid optim.lr=1"),
        (
            ["sweep.yaml", "optim={lr: 1}"],
            r"Leave it out, or replace the values of the grid: --grid optim.lr=1",
        ),
        (["tiny.yaml", "optim.lr=1", "--grid", "optim.lr=1,2"], "has no effect"),
        (["section.yaml"], "is set by the variant and by sweep.grid"),
        (["margin.yaml", "--grid", "method.margin=0,0.1"], "is set by the variant d"),
        (["sweep.yaml", "--grid", "train.seed=1", "--seeds", "0..1"], "are also given by --grid train.seed"),
        (["sweep.yaml", "--grid", "method.margin=0,0.1"], "is set by the variant b"),
        (["seed.yaml", "--seeds", "0..1"], r"train.seed is set by the variant c\. Leave it out"),
        (["both.yaml"], "is set by the variant and by sweep.seeds"),
    ],
)
def test_settings_that_a_grid_would_hide_are_refused(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = {"config": "tiny.yaml", "variants": {"c": {"train.seed": 7}}}
    margin, section = (
        {**SWEEP, "variants": {"d": v}} for v in ({"method": {"margin": 0.2}}, {"optim": {"lr": 0.3}})
    )
    files = {"sweep": SWEEP, "seed": seed, "both": {**seed, "seeds": "0..1"}}
    files |= {"margin": margin, "section": section}
    for name, sweep in files.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"sweep": sweep}))
    assert main(["sweep", *arguments, "--dry-run"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_override_that_an_array_would_hide_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "tiny.yaml", "train.seed=3", "--array", "train.seed=0..1", "--dry-run"]) == 2
    assert "replace the values of the grid: --array train.seed=3" in capsys.readouterr().err


def test_the_command_line_overrides_a_sweep_file(plan: Callable[..., Planned], folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "tiny.yaml").rename(folder / "deep/tiny.yaml")
    tree = {
        "config": "tiny.yaml",
        "seeds": "0..2",
        "grid": {"optim.lr": [0.1, 0.2]},
        "overrides": {"train.epochs": 3},
    }
    (folder / "deep/all.yaml").write_text(yaml.safe_dump({"sweep": tree}))
    runs = plan("deep/all.yaml", "--seeds", "7", "train.epochs=4", "--grid", "method.name=dl2pa,hpn")
    assert [config for config, _, _ in runs] == [Path("deep/tiny.yaml")] * 4
    values = [
        [o[key] for key in ("method.name", "optim.lr", "train.seed", "train.epochs")] for _, o, _ in runs
    ]
    assert values == [[m, lr, "7", "4"] for m in ("dl2pa", "hpn") for lr in ("0.1", "0.2")]
    assert json.loads(runs[0][1]["tracking.tags.sweep"]).startswith("all-")


def test_variants_of_a_sweep_file(plan: Callable[..., Planned], folder: Path) -> None:
    (folder / "wide.yaml").write_text(
        yaml.safe_dump({**TINY, "model": {**TINY["model"], "widths": [8, 8, 8]}})
    )
    variants = {
        "plain": {},
        "margin": {"method.loss": "cross_entropy", "method.margin": 0.2, "optim.lr": 0.5},
        "wide": {"config": "wide.yaml", "method.match": {"every_steps": 7}},
    }
    tree = {"config": "tiny.yaml", "seeds": "0..1", "overrides": {"optim.lr": 0.1}, "variants": variants}
    (folder / "v.yaml").write_text(yaml.safe_dump({"sweep": tree}, sort_keys=False))
    runs = plan("v.yaml", "train.epochs=4")
    values = [(c.name, o["optim.lr"], o.get("method.margin"), o["train.epochs"]) for c, o, _ in runs[::2]]
    assert values == [
        ("tiny.yaml", "0.1", None, "4"),
        ("tiny.yaml", "0.5", "0.2", "4"),
        ("wide.yaml", "0.1", None, "4"),
    ]
    assert [o["train.seed"] for _, o, _ in runs] == ["0", "1"] * 3
    assert [o["optim.lr"] for _, o, _ in plan("v.yaml", "optim.lr=3")] == ["3"] * 6, (
        "the command line overrides variants"
    )
    chosen = plan("v.yaml", "train.epochs=4", "--variant", "wide", "--variant", "plain")
    assert [run for _, _, run in chosen] == [run for _, _, run in (*runs[:2], *runs[4:])], (
        "in the order of the file"
    )
    texts = [f"{key}={value}" for key, value in runs[4][1].items()]
    assert load_config(runs[4][0], texts).method.match.every_steps == 7


def test_each_warning_is_printed_once_with_the_variants_that_it_concerns(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = {"method.name": "dl2pa", "method.loss": "squared_cosine"}
    variants: dict[str, Any] = {"learned": {"method.name": "psc"}}
    for i in range(7):
        variants[f"fixed {i}"] = {**fixed, "optim.lr": 0.1 + i}
    tree = {"config": "tiny.yaml", "overrides": {"method.scale": 9, "optim.milestones": [1]}, "seeds": "0..1"}
    (folder / "v.yaml").write_text(yaml.safe_dump({"sweep": {**tree, "variants": variants}}, sort_keys=False))
    assert main(["sweep", "v.yaml", "--dry-run"]) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [
        "warning: optim.milestones is ignored: optim.schedule is cosine.",
        "warning for 14 of 16 runs (fixed 0; fixed 1; fixed 2; fixed 3; fixed 4; 2 more): "
        "method.scale is ignored: the loss is squared_cosine.",
    ]
    assert (
        main(["sweep", "tiny.yaml", "--grid", "method.loss=squared_cosine,cross_entropy", "--dry-run"]) == 0
    )
    assert "warning" not in capsys.readouterr().err
    words = ["--grid", "method.loss=squared_cosine,cross_entropy", "method.scale=9", "--dry-run"]
    assert main(["sweep", "tiny.yaml", *words]) == 0
    assert "warning for 1 of 2 runs: method.scale is ignored" in capsys.readouterr().err


def test_published_results_are_run(plan: Callable[..., Planned], folder: Path) -> None:
    row = {"top1": [1.0, 2.0], "config": "tiny.yaml", "overrides": ["model.embedding_dim={column}"]}
    rows = {"dl2pa": row, "hpn": {**row, "overrides": [*row["overrides"], "method.name=hpn"]}}
    table = {"title": "Small", "column": "d", "columns": [2, 3], "rows": rows}
    (folder / "p.yaml").write_text(yaml.safe_dump({"source": "test", "tables": {"small": table}}))
    runs = plan(
        "--tables", "p.yaml", "--published", "small:hpn", "--published", "small:dl2pa:3", "--seeds", "4"
    )
    values = [(o["model.embedding_dim"], o.get("method.name"), o["train.seed"]) for _, o, _ in runs]
    assert values == [("3", None, "4"), ("2", "hpn", "4"), ("3", "hpn", "4")]
    assert json.loads(runs[0][1]["tracking.tags.sweep"]).startswith("small-")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ([], "config"),
        (["tiny.yaml", "other.yaml"], "config"),
        (["gone.yaml"], "config"),
        (["tiny.yaml", "--published", "cifar100"], "config"),
        (["train.epochs=3"], "config"),
        (["--published", "cifar"], "--published"),
        (["--published", "cifar100:hpn"], "data.root"),
        (["--published", "cifar100:word2vec"], "method.class_vectors"),
        (["tiny.yaml", "--tables", "x.yaml"], "--tables"),
        (["--published", "small", "--tables", "gone.yaml"], "config"),
        (["tiny.yaml", "--parallel", "0"], "--parallel"),
        (["tiny.yaml", "--seeds", "x"], "train.seed"),
        (["tiny.yaml", "--seeds", ""], "--grid"),
        (["tiny.yaml", "--seeds", "1,1"], "--grid"),
        (["tiny.yaml", "--grid", "optim.lr"], "--grid"),
        (["tiny.yaml", "--grid", "optim.lr=1", "--grid", "optim.lr=2"], "--grid"),
        (["tiny.yaml", "--grid", "optim.lrr=1,2"], "optim.lrr"),
        (["tiny.yaml", "--grid", "train.batch_size=8,100"], "train.batch_size"),
        (["tiny.yaml", "--grid", "data.dataset=synthetic,imagefolder"], "data.root"),
        (["tiny.yaml", "--nodes", "2"], "--nodes"),
        (["tiny.yaml", "--cpus-per-gpu", "2"], "--cpus-per-gpu"),
        (["tiny.yaml", "--run-dir", "tiny.yaml/runs"], "run-dir"),
        (["tiny.yaml", "--best", "tiny.yaml"], "--best"),
        (["tiny.yaml", "--best", "."], "--best"),
        (["tiny.yaml", "--best", "tiny.yaml/best.yaml"], "--best"),
        (["tiny.yaml", "--frobnicate"], "command line"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_invalid_input_is_refused_before_any_run_starts(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert main(["sweep", *arguments, "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["field"] == field
    assert error["message"] and error["remedy"]
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("variants", "field"),
    [
        ({"a": {"method.scale": 2}}, "sweep.variants.a"),
        ({"a": {"config": 5}}, "sweep.variants.a"),
        ({"a": {"config": "none.yaml"}}, "config"),
        ({"a": {"config": "tiny.yaml", "method.scael": 2}}, "method.scael"),
        ({"a": {"config": "tiny.yaml"}, "b": {"config": "tiny.yaml"}}, "--grid"),
        ({"a": [1]}, "sweep.variants.a"),
    ],
)
def test_invalid_variants_are_refused(
    variants: dict[str, Any], field: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "v.yaml").write_text(yaml.safe_dump({"sweep": {"variants": variants}}))
    assert main(["sweep", "v.yaml", "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["field"] == field
    assert error["message"] and error["remedy"]
