"""Requests and the sbatch script: its text, its quoting in bash, and a run with a fake srun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dl2pa.errors import UserError
from launcher import slurm
from launcher.request import Request, Setup, check_request, seconds_of, with_cores
from launcher.slurm import SUPERVISE, script

ODD = 'it\'s; a "run" $HOME `id` #1'

Fake = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an odd name, fake SLURM commands on PATH, and no variables of an outer job."""
    for name in [n for n in os.environ if n.startswith(("SLURM", "SBATCH", "DL2PA_"))]:
        monkeypatch.delenv(name)
    work = tmp_path / "the work; it's"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("srun", "sbatch", "scontrol"):
        make_fake(tmp_path, name, "")
    return work


def make_fake(tmp_path: Path, name: str, body: str) -> None:
    file = tmp_path / "bin" / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    file.chmod(0o755)


def directives(text: str) -> dict[str, str | None]:
    """Options of the #SBATCH lines, unquoted as sbatch reads them."""
    options: dict[str, str | None] = {}
    for option in re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE):
        name, equals, value = option.partition("=")
        assert name not in options, f"--{name} occurs twice"
        options[name] = value if equals else None
    return options


# ---- the request ----


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("1:00:00", 3600),
        ("1:2:3", 3723),
        ("100:00:00", 360000),
        ("2-0", 172800),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("1-02:03:04", 93784),
        ("", None),
        ("1h", None),
        ("-5", None),
        ("1:", None),
        ("1-", None),
        ("1:2:3:4", None),
        ("1.5", None),
        (" 5", None),
        ("tomorrow", None),
    ],
)
def test_seconds_of_slurm_time_limits(time: str, seconds: int | None) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    "request_",
    [
        Request(),
        Request(gpus_per_node=0),
        Request(nodes=64, gpus_per_node=8, time="2-00:00:00", cpus_per_gpu=12),
        Request(time="4"),
        Request(time="2", stop_before=60),
    ],
)
def test_valid_requests_are_accepted(request_: Request) -> None:
    check_request(request_)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(nodes=0), r"--nodes=0: must be at least 1"),
        (Request(gpus_per_node=-1), r"--gpus-per-node=-1: must be at least 0"),
        (Request(cpus_per_gpu=0), r"--cpus-per-gpu=0: must be at least 1"),
        (Request(stop_before=9), r"--stop-before=9: must be at least 10"),
        (Request(time="2h"), r"--time='2h': is not a valid time limit.*D-HH:MM:SS"),
        (Request(time="3:59"), r"--time='3:59': leaves no time to train: the run saves 180 s before"),
        (Request(time="5", stop_before=300), r"--time='5': leaves no time.*300 s.*shorter --stop-before"),
    ],
)
def test_invalid_requests_are_refused_with_their_option(request_: Request, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_request(request_)


def test_a_machine_without_slurm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"SLURM's commands are not on this machine.*dl2pa train"):
        check_request(Request())


def test_a_request_survives_its_record() -> None:
    request = Request(nodes=2, partition="gpu", time="5", sbatch=("nice",))
    assert Request.of(request.as_dict()) == Request(**request.as_dict()) == request


# ---- the script's options ----


def test_sbatch_options_of_a_default_request(place: Path) -> None:
    text = script(Request(nodes=2, gpus_per_node=4), [place / "run"], place / "run/slurm", "dl2pa-small")
    quoted = "'" + str(place).replace("'", "'\"'\"'") + "{}'"
    log = quoted.format("/run/slurm/job-%j.log")
    assert [line for line in text.splitlines() if line.startswith("#SBATCH")] == [
        f"#SBATCH --chdir={quoted.format('')}",
        "#SBATCH --comment=dl2pa",
        f"#SBATCH --error={log}",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --job-name=dl2pa-small",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={log}",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR2@180",
    ]
    assert text.startswith("#!/bin/bash\n")


def test_all_options_are_passed_to_sbatch(place: Path) -> None:
    request = Request(
        time="1-00:00:00",
        partition="gpu,long",
        account="lab",
        qos="high",
        constraint="a100&nvlink",
        exclude="node[1-3]",
        mem="64G",
        gpus_per_node=4,
        cpus_per_gpu=6,
        after="123",
        stop_before=600,
    )
    options = directives(script(request, [place / "run"], place / "slurm", "x"))
    assert {name: options.get(name) for name in ("time", "partition", "account", "qos", "mem")} == {
        **{"time": "1-00:00:00", "partition": "gpu,long", "account": "lab", "qos": "high", "mem": "64G"},
    }
    assert options["constraint"] == "'a100&nvlink'"
    assert options["exclude"] == "'node[1-3]'"
    assert options["dependency"] == "afterok:123"
    assert options["signal"] == "B:USR2@600"
    assert options["cpus-per-task"] == "24"


def test_zero_gpus_request_none(place: Path) -> None:
    text = script(Request(gpus_per_node=0), [place / "run"], place / "slurm", "x")
    assert "gpu" not in "\n".join(directives(text))
    assert "--gpu-bind" not in text


@pytest.mark.parametrize(("gpus", "processes", "cores"), [(4, 4, 12), (0, 2, 6), (0, 1, 3)])
def test_srun_gets_the_cores_per_task_of_the_job(place: Path, gpus: int, processes: int, cores: int) -> None:
    request = Request(gpus_per_node=gpus, cpus_per_gpu=3)
    text = script(request, [place / "run"], place / "slurm", "x", nproc=processes)
    assert directives(text)["cpus-per-task"] == str(cores)
    assert re.findall(r"srun .*--cpus-per-task=(\d+)", text) == [str(cores)]


NODES = """\
NodeName=a CPUAlloc=0 CPUEfctv=62 CPUTot=64 Gres=gpu:a100:8(S:0-1),nvme:2 Partitions=gpu,long State=IDLE
NodeName=b CPUAlloc=0 CPUTot=96 Gres=gpu:h100:4,gpu:l4:4 Partitions=gpu State=IDLE
NodeName=c CPUTot=24 Gres=gpu Partitions=small,site State=IDLE
NodeName=d CPUTot=6 Gres=(null) Partitions=cpu State=IDLE"""
PARTITIONS = """\
PartitionName=gpu Default=YES JobDefaults=(null) MaxCPUsPerNode=UNLIMITED
PartitionName=long Default=NO JobDefaults=(null) MaxCPUsPerNode=40
PartitionName=small Default=NO JobDefaults=(null) MaxCPUsPerNode=UNLIMITED
PartitionName=site Default=NO JobDefaults=DefCpuPerGPU=11,DefMemPerGPU=100
PartitionName=cpu Default=NO JobDefaults=(null)"""


@pytest.mark.parametrize(
    ("partition", "gpus", "processes", "cores"),
    [
        (None, 8, 8, 7),
        ("gpu", 1, 1, 7),
        ("long", 8, 8, 5),
        ("long,small", 1, 1, 7),
        ("small", 1, 1, 24),
        ("site", 1, 1, 11),
        ("cpu", 0, 1, 3),
        ("cpu", 0, 3, 2),
        ("cpu", 0, 9, 1),
        ("cpu", 1, 1, 8),
        ("unknown", 2, 2, 8),
    ],
)
def test_a_job_requests_the_cores_that_its_gpus_have(
    partition: str | None, gpus: int, processes: int, cores: int, tmp_path: Path
) -> None:
    (tmp_path / "node").write_text(NODES)
    (tmp_path / "partition").write_text(PARTITIONS)
    make_fake(tmp_path, "scontrol", f'cat "{tmp_path}/$2"')
    request = Request(partition=partition, gpus_per_node=gpus)
    assert with_cores(request, processes, threads=3).cpus_per_gpu == cores
    assert with_cores(replace(request, cpus_per_gpu=5), processes, threads=3).cpus_per_gpu == 5


def test_a_job_requests_eight_cores_per_gpu_if_slurm_does_not_answer(tmp_path: Path) -> None:
    make_fake(tmp_path, "scontrol", "exit 1")
    assert with_cores(Request(), 1, threads=3).cpus_per_gpu == 8
    assert with_cores(Request(gpus_per_node=0), 2, threads=3).cpus_per_gpu == 3


def shown_job(state: str) -> str:
    return f"JobId=8 JobName=prepare Priority=1 JobState={state} Reason=None Dependency=(null) Requeue=1"


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ([shown_job("RUNNING")], None),
        ([shown_job("PENDING")], None),
        ([shown_job("COMPLETED")], None),
        ([shown_job("COMPLETED"), shown_job("RUNNING")], None),
        ([shown_job("FAILED")], r"has ended without success \(FAILED\), so the job would never start"),
        ([shown_job("RUNNING"), shown_job("CANCELLED")], r"\(CANCELLED\)"),
        ([shown_job("TIMEOUT")], r"\(TIMEOUT\)"),
        ([], "is not known to SLURM"),
    ],
)
def test_a_job_waits_only_for_one_that_can_succeed(
    shown: list[str], message: str | None, tmp_path: Path
) -> None:
    lines = "\n".join(shown)
    answer = f"cat <<'END'\n{lines}\nEND" if shown else "exit 1"
    make_fake(tmp_path, "scontrol", f"[[ $2 == partition ]] && exit\n{answer}")
    make_fake(tmp_path, "squeue", "")
    make_fake(tmp_path, "sacct", "")
    if message is None:
        return check_request(Request(after="8"))
    with pytest.raises(UserError, match=message) as caught:
        check_request(Request(after="8"))
    assert caught.value.field == "--after"


# ---- the script in bash ----


def test_the_script_contains_the_supervisor(place: Path) -> None:
    text = script(Request(), [place / "run"], place / "slurm", "x")
    assert SUPERVISE.read_text(encoding="utf-8") in text


@pytest.mark.parametrize("names", [["run"], [ODD], ["a b", ODD, "-n", "*"]], ids=["plain", "odd", "array"])
def test_the_script_quotes_run_directories(place: Path, names: list[str], tmp_path: Path) -> None:
    text = script(Request(), [place / name for name in names], place / ODD / "slurm", "x")
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    head, separator, _ = text.partition("\nrun=${runs[${SLURM_ARRAY_TASK_ID:-0}]}\n")
    file = tmp_path / "head.sh"
    file.write_text(f'{head}{separator}printf \'%s\\n\' "${{runs[@]}}" "chosen: $run"\n', encoding="utf-8")
    for element in range(len(names)):
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(element)} if len(names) > 1 else None
        done = subprocess.run(["bash", file], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == [
            *(f"{place}/{n}" for n in names),
            f"chosen: {place}/{names[element]}",
        ]


def test_an_array_has_one_task_and_one_log_per_run(place: Path) -> None:
    options = directives(script(Request(), [place / name for name in "abc"], place / "array", "x"))
    assert options["array"] == "0-2%3"
    assert options["output"] == options["error"]
    assert str(options["output"]).endswith("/array/job-%A_%a.log'")
    assert "array" not in directives(script(Request(), [place / "a"], place / "slurm", "x"))


def arguments_of_srun(text: str, tmp_path: Path) -> list[str]:
    """Run the script as SLURM does; return the arguments of srun."""
    make_fake(tmp_path, "srun", f"printf '%s\\n' \"$@\" >'{tmp_path}/srun.log'")
    make_fake(tmp_path, "scontrol", "")
    file = tmp_path / "script.sh"
    file.write_text(text, encoding="utf-8")
    env = {**os.environ, "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", file], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return (tmp_path / "srun.log").read_text(encoding="utf-8").splitlines()


SUBMITIT = ["-P", "-u", "-m", "submitit.core._submit"]


def test_a_script_for_use_by_hand_trains_under_the_supervisor(place: Path, tmp_path: Path) -> None:
    request = Request(nodes=2, sbatch=("reservation=a",), setup=Setup(environment={"A": "1"}))
    train = [ODD, "optim.lr=0.1", "--run-dir", str(place / ODD)]
    text = slurm.hand_script(request, place / ODD, place, "dl2pa-x", train)
    assert directives(text)["reservation"] == "a" and directives(text)["signal"] == "B:USR2@180"
    assert "export A=1" in text and SUPERVISE.read_text(encoding="utf-8") in text
    arguments = arguments_of_srun(text, tmp_path)
    assert arguments[arguments.index(sys.executable) + 1 :] == ["-P", "-u", "-m", "dl2pa", "train", *train]


def notifier_of(text: str) -> list[str]:
    """The words of the array `notifier`, as bash reads the script's assignment."""
    lines = [line for line in text.splitlines() if line.startswith("notifier=(")]
    code = "\n".join([*lines, "printf '%s\\n' \"${notifier[@]}\""])
    return subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_only_scripts_of_runs_with_messages_name_the_notifier(place: Path) -> None:
    runs, folder = [place / ODD], place / "slurm"
    assert notifier_of(script(Request(), runs, folder, "x")) == [""]
    command = [sys.executable, "-P", "-m", "dl2pa.notify"]
    assert notifier_of(slurm.script(Request(), runs, folder, "x", notify=True)) == command
    words = [f"{ODD}.yaml", "notify.url=https://host/a b"]
    text = slurm.hand_script(Request(), runs[0], folder, "x", [*words, "--run-dir", ODD], notify=words)
    assert notifier_of(text) == [*command, *words]


def test_options_of_the_site_run_before_the_training(place: Path, tmp_path: Path) -> None:
    lines = ('export FROM_SETUP="$OF_SITE and more"', "run=replaced")
    setup = Setup(lines=lines, environment={"OF_SITE": "it's a value"})
    text = script(Request(setup=setup), [place / ODD], place / "slurm", "x")
    make_fake(tmp_path, "scontrol", "")
    make_fake(tmp_path, "srun", f"printf '%s\\n' \"$FROM_SETUP\" >'{tmp_path}/srun.log'")
    file = tmp_path / "script.sh"
    file.write_text(text, encoding="utf-8")
    env = {**os.environ, "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", file], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "srun.log").read_text(encoding="utf-8") == "it's a value and more\n"
    assert (place / ODD / "slurm").is_dir(), "the set-up lines cannot replace the run directory"


def test_a_job_uses_the_engine_and_mounts_of_the_site(place: Path, tmp_path: Path) -> None:
    make_fake(tmp_path, "srun", "echo --container-image")
    make_fake(tmp_path, "apptainer", "")
    setup = Setup(container_engine="apptainer", container_mounts=("/opt/data",))
    text = script(Request(container="image.sif", setup=setup), [place / "run"], place / "slurm", "x")
    assert "--container-image" not in text and "apptainer exec --nv --bind /opt/data" in text
    setup = Setup(container_engine="singularity")
    with pytest.raises(UserError, match="the engine of the site file, singularity, is not available"):
        script(Request(container="image.sif", setup=setup), [place / "run"], place / "slurm", "x")


@pytest.mark.parametrize(
    ("request_", "lines"),
    [
        (Request(gpus_per_node=8, gpu_type="h100"), {"gpus-per-node": "h100:8", "gres": None}),
        (
            Request(gpus_per_node=8, sbatch=("gres=gpu:h100:8",)),
            {"gpus-per-node": None, "gres": "gpu:h100:8"},
        ),
        (Request(gpus_per_node=2, sbatch=("gres=nvme:1",)), {"gpus-per-node": "2", "gres": "nvme:1"}),
        (
            Request(sbatch=("licenses=a@b:2,c", "nodelist=n[1-2]")),
            {"licenses": "a@b:2,c", "nodelist": "'n[1-2]'"},
        ),
        (Request(cpus_per_gpu="site"), {"cpus-per-task": None}),
    ],
)
def test_gpu_types_and_passed_options(place: Path, request_: Request, lines: dict[str, str | None]) -> None:
    options = directives(script(request_, [place / "run"], place / "slurm", "x"))
    assert {name: options.get(name) for name in lines} == lines


def test_an_option_without_a_value_is_passed_without_one(place: Path) -> None:
    text = script(Request(sbatch=("exclusive",)), [place / "run"], place / "slurm", "x")
    assert "\n#SBATCH --exclusive\n" in text


def test_an_array_is_limited_only_on_request(place: Path) -> None:
    runs = [place / f"run{number}" for number in range(300)]
    assert directives(script(Request(), runs, place / "array", "x"))["array"] == "0-299%300"
    assert directives(script(Request(), runs, place / "array", "x", parallel=8))["array"] == "0-299%8"


def test_srun_starts_one_task_per_node_and_kills_all_on_failure(place: Path, tmp_path: Path) -> None:
    folder = place / ODD / "slurm"
    text = script(Request(nodes=3, gpus_per_node=2), [place / ODD], folder, "x")
    arguments = arguments_of_srun(text, tmp_path)
    at = arguments.index(sys.executable)
    assert arguments[at:] == [sys.executable, *SUBMITIT, str(folder)]
    assert set(arguments[:at]) >= {"--kill-on-bad-exit=1", "--nodes=3", "--ntasks=3", "--ntasks-per-node=1"}
    assert "--gpu-bind=none" in arguments[:at]


def test_with_pyxis_srun_starts_the_container(place: Path, tmp_path: Path) -> None:
    make_fake(tmp_path, "srun", "echo --container-image")
    text = script(Request(container="team/dl2pa:1"), [place / ODD], place / "slurm", "x")
    arguments = arguments_of_srun(text, tmp_path)
    at = arguments.index("python")
    assert arguments[at:] == ["python", *SUBMITIT, str(place / "slurm")]
    assert set(arguments[:at]) >= {
        "--container-image=team/dl2pa:1",
        f"--container-mounts={place}:{place}",
        f"--container-workdir={place}",
    }


def test_with_apptainer_srun_starts_the_engine(place: Path, tmp_path: Path) -> None:
    make_fake(tmp_path, "apptainer", "")
    text = script(Request(container="the image.sif"), [place / ODD], place / "slurm", "x")
    arguments = arguments_of_srun(text, tmp_path)
    at = arguments.index(str(tmp_path / "bin/apptainer"))
    assert all(option.startswith("--") for option in arguments[:at])
    assert arguments[at + 1 :] == [
        *("exec", "--nv", "--bind", str(place), "--pwd", str(place), "the image.sif"),
        *("env", "--unset=PYTHONPATH", "python", *SUBMITIT, str(place / "slurm")),
    ]


# ---- sbatch ----


@pytest.mark.parametrize("names", [["run"], [ODD, "b"]], ids=["one run", "an array"])
def test_sbatch_gets_the_script_of_the_dry_run(place: Path, names: list[str], tmp_path: Path) -> None:
    make_fake(tmp_path, "sbatch", f"cp \"$1\" '{tmp_path}/script.sh'; echo Submitted batch job 123")
    runs, request = [place / name for name in names], Request(nodes=2, time="10", cpus_per_gpu=2)
    ids = slurm.submit(request, runs, place / "slurm", "dl2pa-x")
    assert ids == (["123"] if len(names) == 1 else ["123_0", "123_1"])
    submitted = (tmp_path / "script.sh").read_text(encoding="utf-8")
    assert submitted == script(request, runs, place / "slurm", "dl2pa-x")


@pytest.mark.parametrize("inside", [True, False], ids=["inside a dl2pa job", "elsewhere"])
def test_a_job_that_submits_does_not_pass_its_variables(
    inside: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head of this job is not passed on; a head set by the user is."""
    make_fake(tmp_path, "sbatch", f"env >'{tmp_path}/env'; echo Submitted batch job 123")
    variables = {"DL2PA_HEAD": "node7", "DL2PA_PORT": "29500", "DL2PA_LAUNCHED": "9.0", "DL2PA_DATA": "/data"}
    for name, value in {**variables, **({"DL2PA_SUPERVISED": "1"} if inside else {})}.items():
        monkeypatch.setenv(name, value)
    slurm.submit(Request(), [place / "run"], place / "slurm", "dl2pa-x")
    seen = (tmp_path / "env").read_text(encoding="utf-8").splitlines()
    passed = {line.partition("=")[0] for line in seen if line.startswith("DL2PA_")}
    assert passed == ({"DL2PA_DATA"} if inside else variables.keys())
    assert os.environ["DL2PA_HEAD"] == "node7"


def test_an_error_of_sbatch_is_reported(place: Path, tmp_path: Path) -> None:
    make_fake(tmp_path, "sbatch", "echo 'sbatch: error: Batch job submission failed: quota' >&2; exit 1")
    with pytest.raises(UserError, match=r"sbatch='dl2pa-x': failed: .*quota"):
        slurm.submit(Request(), [place / "run"], place / "slurm", "dl2pa-x")


def test_a_job_that_sbatch_queued_although_it_failed_lacks_its_files(place: Path, tmp_path: Path) -> None:
    make_fake(tmp_path, "sbatch", "echo Submitted batch job 123")
    slurm.submit(Request(), [place / "run"], place / "slurm", "x")
    assert slurm.is_submitted("123", place / "slurm") and not slurm.is_submitted("124", place / "slurm")


def test_an_outage_is_not_an_error_of_the_request(place: Path, tmp_path: Path) -> None:
    text = "allocation failure: Socket timed out on send/recv operation"
    make_fake(tmp_path, "sbatch", f"cat >/dev/null; echo 'sbatch: error: {text}' >&2; exit 1")
    with pytest.raises(ConnectionError, match="nothing was queued"):
        slurm.check_with_cluster(script(Request(), [place / "run"], place / "slurm", "x"))


def test_the_script_is_tested_with_sbatch_test_only(place: Path, tmp_path: Path) -> None:
    make_fake(tmp_path, "sbatch", f"echo \"$*\" >'{tmp_path}/options'; cat >'{tmp_path}/script.sh'")
    text = script(Request(), [place / "run"], place / "slurm", "x")
    slurm.check_with_cluster(text)
    assert (tmp_path / "options").read_text(encoding="utf-8") == "--test-only\n"
    assert (tmp_path / "script.sh").read_text(encoding="utf-8") == text


def test_a_rejected_script_is_refused_with_slurms_reason(place: Path, tmp_path: Path) -> None:
    reason = "allocation failure: Requested node configuration is not available"
    make_fake(tmp_path, "sbatch", f"cat >/dev/null; echo 'sbatch: error: {reason}' >&2; exit 1")
    text = script(Request(nodes=9, partition="gpu"), [place / "run"], place / "slurm", "x")
    with pytest.raises(
        UserError, match=r"SLURM rejects the request: Requested node configuration is not"
    ) as caught:
        slurm.check_with_cluster(text)
    assert caught.value.value == "--gpus-per-node=1 --nodes=9 --partition=gpu"


@pytest.mark.parametrize(
    "stored",
    [
        {"partition": "gpu\n#SBATCH --wrap=id"},
        {"account": "a b"},
        {"qos": "$(id)"},
        {"constraint": "`id`"},
        {"exclude": "n1;id"},
        {"mem": "4G\nid"},
        {"time": "10\n"},
        {"container": "image\nid"},
        {"container": "--nv"},
        {"sbatch": ["reservation=a\n#SBATCH --wrap=id"]},
        {"sbatch": ["wrap=id"]},
        {"sbatch": ["export=PATH=/tmp"]},
    ],
    ids=str,
)
def test_a_stored_request_cannot_add_script_lines(stored: dict[str, str]) -> None:
    """`dl2pa resume` reads the request from RUN/slurm/job.json, which may come from another user."""
    with pytest.raises(UserError) as caught:
        check_request(Request.of(stored))
    assert caught.value.field == f"--{next(iter(stored))}"


def test_a_stored_request_cannot_bring_its_own_setup() -> None:
    stored = {"sbatch": ["reservation=a"], "cpus_per_gpu": "site", "setup": {"lines": ["id"]}}
    assert Request.of(stored) == Request(sbatch=("reservation=a",), cpus_per_gpu="site")
    request = Request(gpu_type="h100", sbatch=("nice",), setup=Setup(lines=("id",)))
    assert Request.of(request.as_dict()) == replace(request, setup=Setup())


@pytest.mark.parametrize("folder", ["a,b", "a:b"])
def test_a_folder_name_that_splits_into_mounts_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    make_fake(tmp_path, "apptainer", "")
    (place / folder).mkdir()
    monkeypatch.chdir(place / folder)
    with pytest.raises(UserError, match="would split it into several mounts"):
        script(Request(container="image.sif"), [place / folder / "run"], place, "name")
