"""`dl2pa sweep --best`: the sweep file with the best settings of each variant."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa.cli import main
from dl2pa.commands.sweep_best import check_best, write_best
from dl2pa.config import load_config, parse_config
from dl2pa.config.sweep import load_sweep
from dl2pa.errors import UserError
from dl2pa.runplan import RunPlan, RunSpec, plan_runs

TINY: dict[str, Any] = {
    "data": {"dataset": "synthetic", "num_classes": 5, "synthetic_samples": [64, 20], "image_size": 8},
    "model": {"backbone": "resnet8", "embedding_dim": 3},
    "train": {"epochs": 2, "batch_size": 8},
    "launch": {"device": "cpu"},
}

RESULT = {"top1_best": 60.0, "num_validated": 20, "num_classes": 5, "epochs": 3, "steps": 24}


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunPlan]:
    """Two variants, two rates, two seeds; `a` is best at 0.2 on average, `b` at 0.1."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    scores = {("a", "0.1"): [50, 60], ("a", "0.2"): [58, 59], ("b", "0.1"): [30, 31], ("b", "0.2"): [10, 40]}
    specs = [
        RunSpec(
            Path("tiny.yaml"),
            (
                *("train.epochs=3", f"method.name={'psc' if name == 'a' else 'hpn'}"),
                *("tracking.enabled=false", f'tracking.tags.variant="{name}"'),
                *(f"optim.lr={lr}", f"train.seed={seed}"),
            ),
            (name, f"optim.lr={lr}", f"train.seed={seed}"),
        )
        for name, lr in scores
        for seed in (100, 101)
    ]
    plans = plan_runs(specs, Path("runs"), in_folder=True)
    for plan, top1 in zip(plans, [value for pair in scores.values() for value in pair], strict=True):
        plan.run_dir.mkdir(parents=True)
        (plan.run_dir / "result.json").write_text(json.dumps({**RESULT, "top1_last": float(top1)}))
    return plans


def test_the_best_mean_decides(plans: list[RunPlan], capsys: pytest.CaptureFixture[str]) -> None:
    write_best(plans, Path("out/final.yaml"))
    sweep = load_sweep(Path("out/final.yaml"))
    assert sweep.overrides == {"train.epochs": 3, "tracking.enabled": False}
    assert sweep.variants["a"] == {"config": "../tiny.yaml", "method.name": "psc", "optim.lr": 0.2}
    assert sweep.variants["b"] == {"config": "../tiny.yaml", "method.name": "hpn", "optim.lr": 0.1}
    assert "a: optim.lr=0.2: 58.50 % (n = 2, 2 settings)" in Path("out/final.yaml").read_text()
    capsys.readouterr()
    assert main(["sweep", "out/final.yaml", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert all("tracking.tags.variant" in line for line in lines)


def test_sections_given_as_a_whole_keep_their_meaning(
    plans: list[RunPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    """`optim={…}` changes some keys of a section, and a later override wins."""
    spec = RunSpec(
        Path("tiny.yaml"),
        (
            *('optim={"momentum": 0.5, "weight_decay": 0.1}', 'method={"name": "psc", "scale": 3}'),
            *('tracking.tags.variant="c"', 'optim={"lr": 0.3}', "method.scale=5", "tracking.enabled=false"),
            *('data={"val_fraction": 0.2}', "train.epochs=3", "train.seed=100"),
        ),
        ("c",),
    )
    (third,) = plan_runs([spec], Path("runs"), in_folder=True)
    third.run_dir.mkdir(parents=True)
    (third.run_dir / "result.json").write_text(json.dumps({**RESULT, "top1_last": 50.0}))
    write_best([*plans, third], Path("final.yaml"))
    capsys.readouterr()
    assert main(["sweep", "final.yaml", "--dry-run", "--seeds", "100", "--run-dir", "final"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if 'variant="c"' in line]
    words = shlex.split(line)
    first = words.index("train") + 1
    config = load_config(words[first], words[first + 1 : words.index("--run-dir")])
    left, found = third.config, config
    assert found.optim == left.optim and found.method == left.method
    assert (found.optim.momentum, found.optim.lr, found.method.scale) == (0.5, 0.3, 5.0)
    assert found.data.val_fraction is None


def test_the_final_runs_use_the_validation_split_of_the_data(plans: list[RunPlan]) -> None:
    drawn = [
        RunPlan(
            p.config_file, (*p.overrides, "data.val_fraction=0.2"), p.config, p.run_dir, 1, "tiny", p.varied
        )
        for p in plans
    ]
    write_best(drawn, Path("final.yaml"))
    assert load_sweep(Path("final.yaml")).overrides["data.val_fraction"] is None


@pytest.mark.parametrize(
    ("dataset", "in_file", "expected"),
    [
        *(("digits", True, {"data.val_fraction": None}), ("digits", False, {"data.val_fraction": None})),
        *(("imagefolder", True, {}), ("imagefolder", False, {"data.val_fraction": None})),
    ],
)
def test_a_drawn_validation_split_is_reset_unless_the_file_of_class_folders_has_it(
    dataset: str, in_file: bool, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"dataset": dataset, "root": str(tmp_path), **({"val_fraction": 0.2} if in_file else {})}
    Path("own.yaml").write_text(yaml.safe_dump({"data": data}))
    spec = RunSpec(Path("own.yaml"), () if in_file else ("data.val_fraction=0.2",))
    (plan,) = plan_runs([spec], Path("runs"), in_folder=True)
    plan.run_dir.mkdir(parents=True)
    (plan.run_dir / "result.json").write_text(json.dumps({**RESULT, "top1_last": 50.0}))
    write_best([plan], Path("final.yaml"))
    assert load_sweep(Path("final.yaml")).overrides == expected


@pytest.mark.parametrize("name", ["$HOME", "~root", "a ${X} $$"])
def test_a_configuration_in_a_folder_of_any_name_is_found(plans: list[RunPlan], name: str) -> None:
    Path(name).mkdir()
    Path("tiny.yaml").rename(Path(name) / "tiny.yaml")
    write_best([replace(plan, config_file=Path(name) / "tiny.yaml") for plan in plans], Path("final.yaml"))
    assert main(["sweep", "final.yaml", "--dry-run"]) == 0


def test_only_the_owner_can_read_a_file_with_a_secret(plans: list[RunPlan]) -> None:
    write_best(plans, Path("plain.yaml"))
    url = "https://hooks.example.org/T0/secret"
    secret = [replace(plan, overrides=(*plan.overrides, f"notify.url={url}")) for plan in plans]
    parse_config({"notify": {"url": url}})  # as planning such a run does
    write_best(secret, Path("secret.yaml"))
    assert load_sweep(Path("secret.yaml")).overrides["notify.url"] == url
    modes = [Path(name).stat().st_mode & 0o777 for name in ("plain.yaml", "secret.yaml")]
    assert modes[0] & 0o400 and modes[1] == 0o600 != modes[0]


def test_settings_with_a_failed_run_are_left_out(plans: list[RunPlan]) -> None:
    write_best(plans, Path("final.yaml"), {plans[3].run_dir})  # of `a` at 0.2
    assert load_sweep(Path("final.yaml")).overrides["optim.lr"] == 0.1, "the same for both"
    with pytest.raises(UserError) as caught:
        write_best(plans, Path("none.yaml"), {plans[1].run_dir, plans[3].run_dir})
    assert (caught.value.field, Path("none.yaml").exists()) == ("--best", False)


def test_best_needs_the_results_here(plans: list[RunPlan], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "tiny.yaml", "--slurm", "--best", "final.yaml", "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["field"] == "--best"


def test_a_file_that_was_not_written_by_best_is_kept(
    plans: list[RunPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes.yaml").write_text("mine")
    before = sorted(Path("runs").rglob("*"))
    assert main(["sweep", "tiny.yaml", "--best", "notes.yaml", "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert (error["field"], error["message"]) == ("--best", "exists and was not written by --best")
    assert (Path("notes.yaml").read_text(), sorted(Path("runs").rglob("*"))) == ("mine", before)
    write_best(plans, Path("final.yaml"))
    check_best(Path("final.yaml"), {Path("tiny.yaml")})  # an earlier result is replaced
    with pytest.raises(UserError, match="the sweep reads"):
        check_best(Path("final.yaml"), {Path("final.yaml")})
