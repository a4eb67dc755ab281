"""`dl2pa sweep --slurm` with a fake sbatch. tests/integration/slurm uses a real SLURM."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa.cli import main
from dl2pa.config import fingerprint, load_config
from dl2pa.rundir import RunDirectory
from dl2pa.runplan import RunSpec, plan_runs

SBATCH = """#!/bin/sh
case "$1" in
  --help) ;;
  --test-only) cat > /dev/null;;
  *) cp "$1" "$FOLDER/submitted"; echo "Submitted batch job 77";;
esac
"""
COMMAND = ["sweep", "tiny.yaml", "--grid", "method.name=dl2pa,hpn", "--seeds", "0..1", "--slurm", "--json"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tree: dict[str, Any] = {
        "data": {"dataset": "synthetic", "num_classes": 5, "synthetic_samples": [64, 20], "image_size": 8},
        "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4]},
        "train": {"epochs": 2, "batch_size": 8},
        "launch": {"device": "cpu"},
    }
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "bin").mkdir()
    silent = "#!/bin/sh\n"
    for name, text in (("sbatch", SBATCH), ("squeue", silent), ("scontrol", silent), ("srun", silent)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FOLDER", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_runs_are_one_array_in_the_directories_of_a_local_sweep(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ["--gpus-per-node", "0", "--partition", "cpu", "--time", "30"]
    assert main([*COMMAND, *request]) == 0
    result = last_json(capsys)
    assert result["job_id"] == "77"
    assert [job["job_id"] for job in result["jobs"]] == [f"77_{k}" for k in range(4)]
    script = (folder / "submitted").read_text()
    assert "#SBATCH --array=0-3" in script and "#SBATCH --partition=cpu" in script
    job = RunDirectory(Path(result["jobs"][0]["run_dir"]))
    (plan,) = plan_runs([RunSpec(job.submitted_config, ())], job.root)
    assert plan.label == plan.config.tracking.tags["recipe"] == "tiny", "not the name of the snapshot"
    assert plan.config.tracking.run_name == "tiny dl2pa seed 0"
    tags: set[str] = set()
    for job, (method, seed) in zip(
        result["jobs"], [(m, s) for m in ("dl2pa", "hpn") for s in (0, 1)], strict=True
    ):
        overrides = [f"method.name={method}", f"train.seed={seed}"]
        name = f"tiny-{fingerprint(load_config('tiny.yaml', overrides))}"
        assert job["run_dir"] == str(folder / "runs" / name)
        assert job["run_dir"] in script
        snapshot = load_config(Path(job["run_dir"]) / "slurm/config.yaml")
        assert (snapshot.method.name, snapshot.train.seed) == (method, seed)
        tags.add(snapshot.tracking.tags["sweep"])
    assert tags == {result["sweep"]}
    assert re.fullmatch(r"tiny-[0-9a-f]{8}", result["sweep"])
    assert main([*COMMAND[:-2], "--dry-run"]) == 0
    assert f'tracking.tags.sweep="{result["sweep"]}"' in capsys.readouterr().out, (
        "same tag as the local sweep"
    )


def mark_finished(folder: Path, method: str, seed: int) -> None:
    config = load_config("tiny.yaml", [f"method.name={method}", f"train.seed={seed}"])
    run = folder / "runs" / f"tiny-{fingerprint(config)}"
    run.mkdir(parents=True, exist_ok=True)
    (run / "model.safetensors").touch()
    status = {"state": "finished", "fingerprint": fingerprint(config)}
    (run / "status.json").write_text(json.dumps(status), encoding="utf-8")


def test_finished_runs_are_not_submitted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark_finished(folder, "dl2pa", 0)
    assert main([*COMMAND, "--gpus-per-node", "0"]) == 0
    result = last_json(capsys)
    assert len(result["jobs"]) == 3
    assert "#SBATCH --array=0-2" in (folder / "submitted").read_text()
    (folder / "submitted").unlink()
    for method, seed in (("dl2pa", 1), ("hpn", 0), ("hpn", 1)):
        mark_finished(folder, method, seed)
    assert main([*COMMAND, "--gpus-per-node", "0"]) == 0
    assert last_json(capsys) == {"sweep": result["sweep"], "jobs": []}
    assert not (folder / "submitted").exists()


def test_parallel_limits_the_array(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--gpus-per-node", "0", "--parallel", "2"]) == 0
    assert "#SBATCH --array=0-3%2\n" in (folder / "submitted").read_text()
    assert last_json(capsys)["job_id"] == "77"


def test_a_script_for_use_by_hand_has_the_site_file_and_queues_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "site.yaml").write_text(
        "defaults: {sbatch: {reservation: a}, gpus_per_node: 0, cpus_per_gpu: site}"
    )
    monkeypatch.setenv("DL2PA_CLUSTER", str(folder / "site.yaml"))
    words = ["submit", "tiny.yaml", "train.epochs=3", "launch.nproc=2", "--run-dir", "run", "--json"]
    assert main([*words, "--write-script", "job.sh"]) == 0
    assert last_json(capsys) == {"script": "job.sh"}
    script = (folder / "job.sh").read_text()
    assert "#SBATCH --reservation=a" in script and "launch.nproc=2 --run-dir" in script
    assert not (folder / "submitted").exists() and not (folder / "run").exists()
    assert main([*words, "--write-script", "job.sh", "--array", "train.seed=0..1"]) == 2


def test_submit_tags_an_array_but_not_a_single_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "tiny.yaml", "--array", "train.seed=0..1", "--gpus-per-node", "0", "--json"]) == 0
    array = last_json(capsys)
    tags = [load_config(Path(job["run_dir"]) / "slurm/config.yaml").tracking.tags for job in array["jobs"]]
    assert tags == [{"recipe": "tiny", "sweep": array["sweep"]}] * 2
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", array["sweep"])
    assert main(["submit", "tiny.yaml", "--run-dir", "one", "--gpus-per-node", "0", "--json"]) == 0
    single = last_json(capsys)
    assert (single["run_dir"], "sweep" in single) == (str(folder / "one"), False)
    assert load_config("one/slurm/config.yaml").tracking.tags == {"recipe": "tiny"}


@pytest.mark.parametrize(
    ("words", "output"),
    [
        ((), "send them with `dl2pa sync --all {runs}`"),
        (("tracking.uri=none",), "send them with `dl2pa sync --all {runs} --uri SERVER`"),
        (("tracking.uri=none", "--array", "train.seed=3"), "send them with `dl2pa sync {runs}/tiny-"),
        (("tracking.enabled=false",), "not recorded: tracking.enabled is false"),
    ],
)
def test_submit_names_the_command_that_sends_the_events(
    words: tuple[str, ...],
    output: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    seeds = () if "--array" in words else ("--array", "train.seed=0..1")
    assert main(["submit", "tiny.yaml", "--gpus-per-node", "0", *seeds, *words]) == 0
    printed = capsys.readouterr().out
    assert output.format(runs=folder / "runs") in printed
    assert ("dl2pa sync" in printed) == ("tracking.enabled=false" not in words)


def test_a_dry_run_prints_the_script_or_one_json_object(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", "tiny.yaml", "--gpus-per-node", "0", "--run-dir", "run", "--dry-run"]
    assert main(words) == 0
    script = capsys.readouterr().out.strip()
    assert script.startswith("#!/bin/bash")
    assert main([*words, "--json"]) == 0
    result = last_json(capsys)
    assert result["run_dirs"] == [str(folder / "run")]
    assert result["script_text"].strip() == script
    assert not (folder / "run").exists()


@pytest.mark.parametrize(("command", "grid"), [("submit", "--array"), ("sweep", "--grid")])
def test_warnings_about_settings_are_printed_before_a_job_is_queued(
    command: str, grid: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--gpus-per-node", "0", *(["--slurm"] if command == "sweep" else [])]
    words = [grid, "method.name=psc,dl2pa", "method.loss=null", "method.scale=9", "--dry-run"]
    assert main([command, "tiny.yaml", *where, *words]) == 0
    assert "warning for 1 of 2 runs: method.scale is ignored: the loss is" in capsys.readouterr().err
