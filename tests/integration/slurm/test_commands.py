"""Commands for a cluster: refused submissions, dry run, arrays, jobs, logs, cancel and resume."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.commands import Completed
from support.paths import CONFIGS, REPOSITORY, SHARED_DATA
from support.runs import IN_MEMORY, config_with, read_status
from support.secrets import FORMS, SECRET, environment, holders_of_secrets
from support.slurm import Cluster, Job

pytestmark = pytest.mark.xdist_group("slurm")
STEPS = 6
"""Of the ImageNet-1K jobs."""
Command = Callable[..., Completed]


def rows_of(dl2pa: Command, *jobs: object) -> list[dict[str, Any]]:
    done = dl2pa("jobs", *jobs, "--json")
    assert done.code == 0, done.error
    return done.result


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["optim.lrr=1"], "optim.lrr"),
        (["data.root=/nowhere"], "data.root"),
        (["--nodes", "12"], "resources"),
        (["--partition", "none"], "resources"),
        (["--gpus-per-node", "5"], "launch.nproc"),
        (["--gpus-per-node", "3"], "resources"),
        (["--time", "2"], "--time"),
        (["--time", "soon"], "--time"),
        (["--array", "train.seed"], "--array"),
        (["--array", "train.seed=1,1"], "--array"),
        (["launch.device=cuda", "--gpus-per-node", "0"], "launch.device"),
        (["--container", "image"], "--container"),
        (["--time", "2-0"], "--time"),
        (["--stop-before", "3600"], "--time"),
        (["--after", "999999"], "--after"),
        (["--after", ""], "command line"),
        (["--run-dir", "a%a"], "run-dir"),
        (["--sbatch", "reservatoin=x"], "--sbatch"),
        (["--sbatch", "array=0-3"], "--sbatch"),
        (["--sbatch", "gres=gpu:none:1"], "resources"),
        (["--profile", "long"], "--profile"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_invalid_submissions_are_refused_before_queueing(
    arguments: list[str], field: str, dl2pa: Command, cluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    before = cluster.queue()
    config = config_with(tmp_path, digits)
    done = dl2pa("submit", config, "--run-dir", tmp_path / "run", "--json", *arguments)
    assert done.code == 2, done.error
    assert done.result["error"]["field"] == field
    assert "Traceback" not in done.error
    assert cluster.queue() == before
    assert not (tmp_path / "run/slurm/job.json").exists()


def test_a_dry_run_shows_the_script_and_queues_nothing(
    dl2pa: Command, cluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    config, run = config_with(tmp_path, digits), tmp_path / "it's; a run"
    before = cluster.queue()
    done = dl2pa("submit", config, "--nodes=2", "--gpus-per-node=2", "--run-dir", run, "--dry-run")
    assert done.code == 0, done.error
    assert cluster.queue() == before and not run.exists()
    script = done.output
    assert script.startswith("#!/bin/bash") and "#SBATCH --signal=B:USR2@180" in script
    assert "#SBATCH --cpus-per-task=4" in script, "the nodes have 2 cores per GPU"
    checked = subprocess.run(
        ["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_sbatch_variables_of_the_user_do_not_change_the_request(
    dl2pa: Command, digits: Path, tmp_path: Path, cluster: Cluster
) -> None:
    config, run = config_with(tmp_path, digits), tmp_path / "run"
    habits = {
        "SBATCH_PARTITION": "hi",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_ARRAY_INX": "0-2",
    }
    done = dl2pa("submit", config, "--nodes=2", "--time=30", "--run-dir", run, "--json", **habits)
    assert done.code == 0, done.error
    job = done.result["job_id"]
    try:
        seen = {
            name: cluster.field(job, name) for name in ("Partition", "TimeLimit", "Requeue", "ArrayJobId")
        }
        assert seen == {"Partition": "gpu", "TimeLimit": "00:30:00", "Requeue": "1", "ArrayJobId": ""}
    finally:
        assert dl2pa("cancel", job, "--now").code == 0
    cluster.wait(lambda: cluster.is_over(job), "cancelled")
    assert rows_of(dl2pa, run)[0]["state"] == "CANCELLED"


SITE = """\
defaults:
  time: 30
  sbatch: {mail-type: END, mail-user: me@example.org}
  environment: {OF_SITE: "1"}
profiles:
  nights: {sbatch: {reservation: nights}}
"""


def test_a_throttled_sweep_has_the_options_of_the_site_file(
    dl2pa: Command, digits: Path, tmp_path: Path, cluster: Cluster, cancelled_afterward: list[str]
) -> None:
    """GPU type, reservation and mail from three sources; one run at a time."""
    config = config_with(tmp_path, digits, {"train": {"epochs": 200}, "data": IN_MEMORY})
    site = tmp_path / "cluster.yaml"
    site.write_text(SITE)
    who = [f"Users={getpass.getuser()}", "Nodes=node1", "Flags=IGNORE_JOBS"]
    scontrol("create", "reservation", "ReservationName=nights", "StartTime=now", "Duration=60", *who)
    try:
        limits = ["--parallel", "1", "--profile", "nights", "--sbatch", "gres=gpu:sim:1", "--cpus-per-gpu=1"]
        places = ["--run-dir", tmp_path / "runs"]
        sweep = ["sweep", config, "--seeds", "0..2", "--slurm", *limits, *places]
        shown = dl2pa(*sweep, "--dry-run", DL2PA_CLUSTER=str(site))
        expected = ["array=0-2%1", "gres=gpu:sim:1", "mail-type=END", "mail-user=me@example.org"]
        lines = [line for line in shown.output.splitlines() if line.startswith("#SBATCH")]
        assert {*lines} >= {f"#SBATCH --{line}" for line in [*expected, "reservation=nights", "time=30"]}
        assert "gpus" not in "".join(lines)
        done = dl2pa(*sweep, "--json", DL2PA_CLUSTER=str(site))
        assert done.code == 0, done.error
        array = done.result["job_id"]
        cancelled_afterward.append(array)
        first, *others = [f"{array}_{task}" for task in range(3)]
        cluster.wait(lambda: cluster.state(first) == "RUNNING", "the first run starts")
        assert cluster.field(first, "Reservation") == "nights"
        assert cluster.field(first, "TresPerNode") == "gres:gpu:sim:1"
        waiting = [f"{job} PENDING (JobArrayTaskLimit)" for job in others]
        cluster.wait(lambda: {*waiting} <= {*queue_of(array)}, "the others wait for the first one")
        assert dl2pa("cancel", array, "--now").code == 0
        cluster.wait(lambda: cluster.is_over(first), "the first run ends")
    finally:
        scontrol("delete", "ReservationName=nights")


def scontrol(*words: str) -> None:
    subprocess.run(["scontrol", *words], check=True, capture_output=True)


def queue_of(array: str) -> list[str]:
    command = ["squeue", "--noheader", "--array", "--format=%F_%K %T %R", f"--jobs={array}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_a_cancelled_run_resumes_with_fewer_nodes(
    submit: Callable[..., Job], dl2pa: Command, cluster: Cluster
) -> None:
    job = submit(
        {
            "train": {"epochs": 8},
            "checkpoint": {"every_steps": 7},
            "tracking": {"uri": None},
            "data": IN_MEMORY,
        },
        name="it's one; run",
    )
    job.wait_for_step(20)
    again = dl2pa("submit", job.run.parents[1] / "config-it's one; run/small.yaml", "--run-dir", job.run)
    assert again.code == 2 and f"job {job.job} uses it" in again.error, again.error
    (row,) = rows_of(dl2pa, job.job)
    assert (row["state"], row["attempt"], row["run_dir"]) == ("RUNNING", 1, str(job.run))
    assert row["nodes"] == "node[1-2]" and row["step"] >= 20 and row["total_steps"] == 232

    assert dl2pa("cancel", job.job).code == 0
    state = job.finish()
    assert state == "FAILED", "a job that stops short is not done, for jobs that wait for it"
    assert job.status["state"] == "stopped" and "cancelled (stopped" in job.log
    assert rows_of(dl2pa, job.run)[0]["state"] == "CANCELLED"
    saved = job.status["step"]
    assert (job.run / f"checkpoints/step-{saved:09d}/COMPLETE").exists()

    resumed = dl2pa("resume", job.run, "--nodes=1", "--json")
    assert resumed.code == 0, resumed.error
    submission = resumed.result
    assert cluster.finish(submission["job_id"]) == "COMPLETED", Path(submission["log"]).read_text()
    result = json.loads((job.run / "result.json").read_text())
    assert (result["steps"], result["world_size"]) == (232, 1)
    log = dl2pa("logs", submission["job_id"])
    assert f"from step {saved}" in log.output and "finished" in log.output
    assert "Traceback" not in dl2pa("logs", job.run, "--rank", "1").output
    (row,) = rows_of(dl2pa, job.run)
    assert (row["state"], row["step"], row["run_state"]) == ("COMPLETED", 232, "finished")

    synced = dl2pa("sync", job.run, "--json")
    assert synced.code == 0, synced.error
    assert synced.result["left"] == 0


def test_an_array_is_one_sweep_listed_and_cancelled_together(
    dl2pa: Command,
    digits: Path,
    tmp_path: Path,
    cluster: Cluster,
    cancelled_afterward: list[str],
) -> None:
    config = config_with(tmp_path, digits, {"train": {"epochs": 200}, "data": IN_MEMORY})
    places = ["--gpus-per-node=1", "--run-dir", tmp_path / "runs", "--json"]
    done = dl2pa("submit", config, "--array", "train.seed=0..1", *places)
    assert done.code == 0, done.error
    result = done.result
    array, ids = result["job_id"], [f"{result['job_id']}_{k}" for k in range(2)]
    cancelled_afterward.append(array)
    assert [entry["job_id"] for entry in result["jobs"]] == ids
    runs = [Path(entry["run_dir"]) for entry in result["jobs"]]

    def started() -> bool:
        states = [row for row in rows_of(dl2pa, array) if row["attempt"] == 1 and row["step"] > 0]
        return len(states) == 2

    cluster.wait(started, "two runs train")
    assert [row["job_id"] for row in rows_of(dl2pa, array)] == ids
    assert dl2pa("cancel", array, "--now").code == 0
    for job_id in ids:
        cluster.wait(lambda job_id=job_id: cluster.is_over(job_id), f"{job_id} ends")
    assert {row["run_state"] for row in rows_of(dl2pa, array)} == {"running"}, "nothing was saved"
    cluster.assert_tidy(array)

    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for run in runs:
        synced = dl2pa("sync", run, "--uri", uri)
        assert synced.code == 0, synced.error
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    mlflow_runs = client.search_runs(experiments)
    sweeps = {run.data.tags["sweep"] for run in mlflow_runs if "sweep" in run.data.tags}
    assert len(mlflow_runs) == 2 and len(sweeps) == 1
    assert {run.data.params["train.seed"] for run in mlflow_runs} == {"0", "1"}


def test_final_error_ends_the_job_and_is_first_in_the_log(submit: Callable[..., Job], dl2pa: Command) -> None:
    job = submit({"optim": {"lr": 1e30}, "data": IN_MEMORY}, name="diverges", nodes=1)
    assert job.finish() == "FAILED"
    assert job.starts() == 1, job.log
    log = dl2pa("logs", job.job)
    assert log.output.startswith("=== rank ") and "finite" in log.output.splitlines()[1]
    job.cluster.assert_tidy(job.job)


def test_stop_signals_bypass_the_container(
    submit: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake Apptainer that forwards no signals; the batch shell writes the stop file instead."""
    engine = tmp_path / "bin/apptainer"
    engine.parent.mkdir()
    engine.write_text(
        f"#!{sys.executable}\n"
        "import ctypes, signal, subprocess, sys\n"
        "ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"
        "signal.signal(signal.SIGUSR2, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "inside = sys.argv[sys.argv.index('python') + 1:]\n"
        f"sys.exit(subprocess.call([{sys.executable!r}, *inside]))\n"
    )
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{engine.parent}{os.pathsep}{os.environ['PATH']}")
    changes = {"train": {"epochs": 6}, "data": IN_MEMORY}
    job = submit(changes, "--time=5", "--container", "the image", name="contained", nodes=1)
    job.wait_for_step(20)
    # As SLURM does before the time limit; test_survival waits for the real limit, which takes 30 seconds.
    subprocess.run(["scancel", "--batch", "--signal=USR2", job.job], check=True)
    assert job.finish() == "COMPLETED", job.log
    assert "stopped on request" in job.log and job.status["attempt"] == 2
    job.cluster.assert_tidy(job.job)


def test_train_sbatch_is_supervised_in_the_same_way(
    cluster: Cluster, digits: Path, tmp_path: Path, cancelled_afterward: list[str]
) -> None:
    """slurm/train.sbatch gets a signal once, saves, requeues and finishes."""
    changes = {"train": {"epochs": 8}, "data": IN_MEMORY}
    config, run = config_with(tmp_path, digits, changes), tmp_path / "by hand"
    log = tmp_path / "by-hand.log"
    wanted = ["--parsable", "--nodes=1", "--gpus-per-node=1", "--cpus-per-gpu=2", f"--output={log}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sbatch", *wanted, "slurm/train.sbatch", str(config), str(run)],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)},
    )
    job = done.stdout.strip()
    cancelled_afterward.append(job)
    cluster.wait(lambda: read_status(run).get("step", 0) >= 20, "20 steps")
    subprocess.run(["scancel", "--batch", "--signal=USR2", job], check=True)
    assert cluster.finish(job) == "COMPLETED", log.read_text()
    assert log.read_text().count("dl2pa: job ") == 2 and "stopped on request" in log.read_text()
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["world_size"]) == (232, 1)
    cluster.assert_tidy(job)


def test_doctor_checks_the_cluster_here_and_on_a_node(dl2pa: Command) -> None:
    done = dl2pa("doctor", "--cluster", "--json")
    assert done.code == 0, done.error
    checks = done.result["checks"]
    assert "preempt_send_user_signal on; grace gpu 30 s" in checks["preemption"]["seen"]
    assert "gpu* up: 2 node(s), gpu:sim:2" in checks["partitions"]["seen"]
    assert "KillWait 10 s" in checks["time to save"]["seen"]
    for name in ("node names", "accounting", "clock", "shared folder"):
        assert checks[name]["ok"], checks[name]
    assert "node" in checks["clock"]["seen"]

    lost = dl2pa("doctor", "--cluster", "--json", "--partition=none")
    assert lost.code == 1
    assert "partition" in lost.result["checks"]["from a node"]["seen"]


@pytest.mark.thorough
@pytest.mark.parametrize("config", ["resnet50_d512", "swin_t_d512"])
def test_an_imagenet_job_is_preempted_and_finishes(
    config: str,
    dl2pa: Command,
    cluster: Cluster,
    tmp_path: Path,
    cancelled_afterward: list[str],
) -> None:
    """The ImageNet-1K configurations with 1,000 classes, d = 512, real photographs and two nodes."""
    photographs, synsets = SHARED_DATA / "imagenet-samples", SHARED_DATA / "semantic/imagenet_synsets.txt"
    if not photographs.is_dir():
        pytest.skip(f"{photographs} is not on this machine")
    run = tmp_path / config
    path = CONFIGS / f"imagenet1k/{config}.yaml"
    data = [f"data.root={photographs}", f"data.val_root={photographs}", f"data.classes={synsets}"]
    size = [
        f"train.max_steps={STEPS}",
        "train.batch_size=16",
        "train.log_every_steps=1",
        "train.eval_batch_size=64",
        "tracking.figures=false",
        "launch.device=cpu",
    ]
    done = dl2pa("submit", path, *data, *size, "--nodes=2", "--gpus-per-node=1", "--run-dir", run, "--json")
    assert done.code == 0, done.error
    job_id = done.result["job_id"]
    cancelled_afterward.append(job_id)
    log = run / f"slurm/job-{job_id}.log"

    def at_step_two() -> bool:
        status = run / "status.json"
        return status.exists() and json.loads(status.read_text()).get("step", 0) >= 2

    cluster.wait(at_step_two, "two steps")
    urgent = ["sbatch", "--parsable", "--partition=hi", "--nodes=2", "--exclusive", "--wrap=true"]
    subprocess.run([*urgent, f"--output={tmp_path}/hi.log"], check=True, capture_output=True)
    assert cluster.finish(job_id) == "COMPLETED", log.read_text()
    result = json.loads((run / "result.json").read_text())
    assert (result["num_classes"], result["dim"], result["steps"], result["world_size"]) == (
        1000,
        512,
        STEPS,
        2,
    )
    assert result["num_validated"] == 256 and len(result["labels_moved"]) == 1
    assert json.loads((run / "status.json").read_text())["attempt"] == 2

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert dl2pa("sync", run, "--uri", uri).code == 0
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("imagenet1k-d512")
    assert experiment is not None
    (only,) = client.search_runs([experiment.experiment_id])
    assert only.info.status == "FINISHED" and only.data.tags["dl2pa.attempt"] == "2"


def test_no_secret_reaches_the_files_of_a_submission(
    submit: Callable[..., Job], dl2pa: Command, monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> None:
    """Secrets in the environment, in tags and in an uncommitted change; the job needs the server URI."""
    changes = "\n".join(FORMS.values())
    monkeypatch.setattr("dl2pa.training.environment._git", lambda *w: changes if w[0] == "diff" else "")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    tags = {f"form {number}": text for number, text in enumerate(FORMS.values())}
    address = f"http://me:{SECRET}@127.0.0.1:9"
    job = submit({"train": {"epochs": 200}, "data": IN_MEMORY, "tracking": {"uri": address, "tags": tags}})
    snapshot = job.run / "slurm/config.yaml"
    assert holders_of_secrets(job.run / "slurm") == [snapshot]
    assert snapshot.read_text().count(SECRET) == 1, "the address, and nothing else"
    assert "***" in (job.run / "slurm/code.diff").read_text()
    for path in (snapshot, job.run / "slurm/code.diff"):
        assert path.stat().st_mode & 0o777 == 0o600, path
    job.wait_for_step(1)
    assert dl2pa("cancel", job.job).code == 0
    cluster.wait(lambda: cluster.is_over(job.job), "the job ends")
    assert [path for path in holders_of_secrets(job.run) if path != snapshot] == []
