"""Run supervise.sh in bash, with SLURM's commands replaced by fakes."""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dl2pa.config import parse_config
from dl2pa.config.load import dump_config
from dl2pa.errors import TrainingFailure, UserError
from dl2pa.rundir import RunDirectory
from launcher.node import this_node
from support.webhooks import Receiver, receiver

ROOT = Path(__file__).resolve().parents[3]
SUPERVISE = ROOT / "launcher/supervise.sh"
JOB = 4242
ODD = 'a run; it\'s "odd" $HOME `id` [1]*'
DEADLINE_S = 240
DEATH_S = 30

SCONTROL = """#!/usr/bin/env bash
# `show` prints the file show-ID. Each file refuse-N makes one `requeue` fail and may replace show-ID.
cd "$(dirname "$0")/.."
if [[ $1 == show ]]; then
  cat "show-${!#}" 2>/dev/null || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
  exit
fi
echo "$*" >>scontrol.log
for refusal in refuse-*; do
  [[ -e $refusal ]] || break
  [[ -s $refusal ]] && cp "$refusal" "show-${!#}"
  rm "$refusal"
  exit 1
done
"""
SLEEP = """#!/usr/bin/env bash
echo "$*" >>"$(dirname "$0")/../sleep.log"
"""
# Records its environment, then copies the files prepared by the test to the run directory.
ATTEMPT = """
after=$1 run=$2 code=$3
env -0 >"$after/../env"
[[ -e $run/stop ]] && echo "the stop file exists"
cp -r "$after/." "$run/"
exit "$code"
"""
# Waits for the stop file, then for the test, then copies the prepared files to the run directory.
SAVING = """
after=$1 run=$2 gate=$3
echo "child $$ ready"
until [[ -e $run/stop ]]; do /bin/sleep 0.01; done
echo "child saves"
read -r <"$gate"
cp -r "$after/." "$run/"
echo "child ends"
"""


class Batch:
    """Batch shell of a job, with fake SLURM commands and a run directory."""

    def __init__(self, place: Path, name: str = ODD) -> None:
        self.place = place
        self.run = place / name
        self.after = place / "after"
        self.restarts = 0
        self.env = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": str(JOB)}
        for folder in (place / "bin", self.after, self.run):
            folder.mkdir()
        self.fake("scontrol", SCONTROL)
        self.fake("sleep", SLEEP)
        self.show()

    def fake(self, name: str, text: str) -> None:
        file = self.place / "bin" / name
        file.write_text(text, encoding="utf-8")
        file.chmod(0o755)

    def show(self, job: str = str(JOB), state: str = "RUNNING", restarts: int = 0) -> None:
        """Set the output of `scontrol show job`."""
        (self.place / f"show-{job}").write_text(job_line(job, state, restarts), encoding="utf-8")

    def refuse(self, times: int, then_state: str = "") -> None:
        """Make the next requeue requests fail."""
        for number in range(times):
            text = job_line(str(JOB), then_state, self.restarts) if then_state else ""
            (self.place / f"refuse-{number}").write_text(text, encoding="utf-8")

    def before(self, state: str = "running", attempt: int = 1, step: int | None = None) -> None:
        """Write the state of earlier attempts to the run directory."""
        leave(self.run, state, attempt, step)

    def command(self, script: str, *arguments: object) -> list[str]:
        words = ["bash", "-c", script, "job", self.after, self.run, *arguments]
        text = f"source {shlex.quote(str(SUPERVISE))}; supervise {shlex.join(map(str, [self.run, *words]))}"
        return ["bash", "-c", text]

    def environment(self) -> dict[str, str]:
        count = {"SLURM_RESTART_COUNT": str(self.restarts)} if self.restarts else {}
        return {**self.env, **count}

    def attempt(self, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        """Run one attempt that copies `after` to the run directory and exits with `code`."""
        return subprocess.run(
            self.command(ATTEMPT, code),
            env={**self.environment(), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
        )

    def requeues(self) -> list[str]:
        """The requeue requests so far."""
        log = self.place / "scontrol.log"
        return log.read_text(encoding="utf-8").splitlines() if log.exists() else []

    def seen(self) -> dict[str, str]:
        """The environment of the last attempt's command; raises if it did not run."""
        pairs = (self.place / "env").read_text(encoding="utf-8").split("\0")
        return dict(pair.split("=", 1) for pair in pairs if pair)


def job_line(job: str, state: str, restarts: int) -> str:
    return (
        f"JobId={job} JobName=dl2pa-x UserId=me(1) Priority=1 Nice=0 JobState={state} Reason=None Dependency=(null)"
        f" Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode=0:0 Comment=dl2pa\n"
    )


def leave(place: Path, state: str, attempt: int, step: int | None = None) -> None:
    """Write a status and a complete checkpoint, and a newer incomplete checkpoint."""
    RunDirectory(place).write_status(state=state, attempt=attempt, step=99, error=None, top1=1.5, pid=1)
    if step is not None:
        (place / f"checkpoints/step-{step:09}").mkdir(parents=True)
        (place / f"checkpoints/step-{step:09}/COMPLETE").touch()
    (place / f"checkpoints/step-{(step or 0) + 900:09}").mkdir(parents=True, exist_ok=True)


def report(place: Path, launch: str, final: bool, name: str = "rank-0") -> None:
    """Write the error report of a rank or node."""
    fields = {
        "rank": 0,
        "time": 1.0,
        "launch": launch,
        "exit_code": 1,
        "final": final,
        "message": 'it\'s "so"',
    }
    (place / "logs").mkdir(exist_ok=True)
    (place / f"logs/{name}.error.json").write_text(json.dumps(fields) + "\n", encoding="utf-8")


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


def a_finished_run(batch: Batch) -> None:
    leave(batch.after, "finished", 2, 12)


def a_stopped_run(batch: Batch) -> None:
    leave(batch.after, "stopped", 2, 12)


def a_stop_that_saved_nothing_new(batch: Batch) -> None:
    batch.before(step=12)
    leave(batch.after, "stopped", 2)


def a_killed_run(batch: Batch) -> None:
    leave(batch.after, "running", 2, 12)


def killed_before_the_first_save(batch: Batch) -> None:
    leave(batch.after, "running", 2)


def nothing_started(batch: Batch) -> None:
    """The status is from the attempt before."""
    batch.before("stopped", 1, 12)


def a_finished_run_that_did_not_start(batch: Batch) -> None:
    batch.before("finished", 1, 12)


def a_finished_run_stopped_before_it_started(batch: Batch) -> None:
    batch.before("finished", 1, 12)
    (batch.after / "stop").touch()


def a_cancelled_run(batch: Batch) -> None:
    leave(batch.after, "stopped", 2, 12)
    (batch.after / "cancelled").touch()


def a_final_error(batch: Batch) -> None:
    leave(batch.after, "failed", 2, 12)
    report(batch.after, f"{JOB}.0", True)


def a_final_error_of_a_node(batch: Batch) -> None:
    report(batch.after, f"{JOB}.0", True, "node-1")


def an_error_worth_a_retry(batch: Batch) -> None:
    leave(batch.after, "failed", 2, 12)
    report(batch.after, f"{JOB}.0", False)


def a_final_error_of_an_earlier_launch(batch: Batch) -> None:
    batch.restarts = 1
    batch.show(restarts=1)
    report(batch.run, f"{JOB}.0", True)
    report(batch.run, "77.1", True, "rank-1")
    leave(batch.after, "running", 2, 12)


def requeued_by_slurm_itself(batch: Batch) -> None:
    leave(batch.after, "running", 2, 12)
    batch.show(restarts=1)


def pending_after_a_requeue(batch: Batch) -> None:
    leave(batch.after, "running", 2, 12)
    batch.show(state="PENDING")


def cancelled_by_scancel(batch: Batch) -> None:
    leave(batch.after, "stopped", 2, 12)
    batch.show(state="CANCELLED")


def an_unavailable_controller(batch: Batch) -> None:
    leave(batch.after, "running", 2, 12)
    (batch.place / f"show-{JOB}").unlink()


def own(place: Path, launch: str) -> None:
    """Write the record of an owner."""
    (place / "owner.json").write_text(json.dumps({"host": "n1", "pid": 1, "launch": launch}) + "\n")


def taken_over_by_another_launch(batch: Batch) -> None:
    leave(batch.after, "running", 2, 12)
    own(batch.run, "7.0")
    own(batch.after, "8.0")


def taken_over_and_finished_by_another_launch(batch: Batch) -> None:
    leave(batch.after, "finished", 2, 12)
    own(batch.after, "8.0")


def killed_as_owner(batch: Batch) -> None:
    leave(batch.after, "running", 2, 12)
    own(batch.run, "7.0")
    own(batch.after, f"{JOB}.0")


def killed_before_it_became_owner(batch: Batch) -> None:
    leave(batch.after, "running", 2, 12)
    own(batch.run, "7.0")


def an_owner_of_an_older_version(batch: Batch) -> None:
    leave(batch.after, "running", 2, 12)
    (batch.after / "owner.json").write_text('{"host": "n1", "pid": 2}\n')


REQUEUE = [f"requeue {JOB}"]


@pytest.mark.parametrize(
    ("state", "code", "expected", "requeues", "text"),
    [
        (a_finished_run, 0, 0, [], "finished"),
        (a_finished_run, 1, 0, [], "finished"),
        (a_stopped_run, 0, 0, REQUEUE, "stopped on request, saved at step 12: requeueing"),
        (a_stop_that_saved_nothing_new, 0, 0, REQUEUE, "stopped on request, saved at step 12: requeueing"),
        (a_killed_run, 137, 0, REQUEUE, "exit code 137, run running, last checkpoint at step 12: requeueing"),
        (killed_before_the_first_save, 1, 0, REQUEUE, "run running, last checkpoint at step 0: requeueing"),
        (nothing_started, 1, 0, REQUEUE, "run never started, last checkpoint at step 12: requeueing"),
        (a_finished_run_that_did_not_start, 1, 0, REQUEUE, "run never started"),
        (a_finished_run_stopped_before_it_started, 0, 0, REQUEUE, "run never started"),
        (a_cancelled_run, 0, 75, [], "cancelled (stopped, last checkpoint at step 12); `dl2pa resume"),
        (a_final_error, 2, 2, [], "another attempt would repeat (exit code 2)"),
        (a_final_error, 0, 1, [], "another attempt would repeat"),
        (a_final_error_of_a_node, 2, 2, [], "another attempt would repeat"),
        (an_error_worth_a_retry, 1, 0, REQUEUE, "exit code 1, run failed"),
        (a_final_error_of_an_earlier_launch, 1, 0, REQUEUE, "exit code 1, run running"),
        (requeued_by_slurm_itself, 1, 0, [], "SLURM requeued the job itself"),
        (pending_after_a_requeue, 1, 0, [], "SLURM requeued the job itself"),
        (cancelled_by_scancel, 0, 0, [], "the job was cancelled: not requeued"),
        (an_unavailable_controller, 1, 0, REQUEUE, "exit code 1, run running"),
        (taken_over_by_another_launch, 1, 1, [], "another process has taken over the run: not requeued"),
        (taken_over_and_finished_by_another_launch, 0, 1, [], "another process has taken over the run"),
        (killed_as_owner, 1, 0, REQUEUE, "exit code 1, run running"),
        (killed_before_it_became_owner, 1, 0, REQUEUE, "exit code 1, run running"),
        (an_owner_of_an_older_version, 1, 0, REQUEUE, "exit code 1, run running"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_decision_after_an_attempt(
    batch: Batch,
    state: Callable[[Batch], None],
    code: int,
    expected: int,
    requeues: list[str],
    text: str,
) -> None:
    state(batch)
    done = batch.attempt(code)
    assert (done.returncode, batch.requeues()) == (expected, requeues), done.stdout
    assert text in done.stdout


def test_a_finished_run_ends_the_job_again(batch: Batch) -> None:
    """SLURM may requeue a job whose node failed after the run was finished; nothing is left to do."""
    batch.before("finished", 3, 12)
    done = batch.attempt(0)
    assert (done.returncode, batch.requeues()) == (0, [])
    assert "dl2pa: finished" in done.stdout


@pytest.mark.parametrize(
    "error", [UserError("data.root", "/x", "is gone", "Look."), TrainingFailure("loss is nan")]
)
def test_final_errors_written_by_a_node_end_the_job(
    batch: Batch, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dl2pa.training.run import report_node_error

    monkeypatch.setenv("DL2PA_LAUNCHED", f"{JOB}.0")
    report_node_error(RunDirectory(batch.after), "0", error)
    assert batch.attempt(1).returncode == 1
    assert batch.requeues() == []


def test_three_failures_without_progress_end_the_job(batch: Batch) -> None:
    batch.before(step=12)
    for attempt in (2, 3):
        leave(batch.after, "running", attempt)
        assert batch.attempt(1).returncode == 0
    assert len(batch.requeues()) == 2
    leave(batch.after, "running", 4)
    done = batch.attempt(1)
    assert done.returncode == 1
    assert len(batch.requeues()) == 2
    assert (
        "3 attempts in a row without a checkpoint after step 12: not requeued. `dl2pa resume" in done.stdout
    )


def test_a_new_checkpoint_resets_the_failure_count(batch: Batch) -> None:
    for attempt in range(2, 8):
        # Every third attempt saves something new.
        leave(batch.after, "running", attempt, attempt if attempt % 3 == 0 else None)
        assert batch.attempt(1).returncode == 0, f"gave up at attempt {attempt}"
    assert len(batch.requeues()) == 6


def test_requested_stops_have_a_separate_limit(batch: Batch) -> None:
    for attempt in range(2, 6):
        leave(batch.after, "stopped", attempt)
        assert batch.attempt(0, DL2PA_MAX_FAILURES="1", DL2PA_MAX_STOPS="5").returncode == 0
    leave(batch.after, "stopped", 6)
    done = batch.attempt(0, DL2PA_MAX_FAILURES="1", DL2PA_MAX_STOPS="5")
    assert done.returncode == 1
    assert "without a checkpoint" in done.stdout
    assert len(batch.requeues()) == 4


@pytest.mark.parametrize(
    "content", ["x[$(touch TRACE)]", "a[`touch TRACE`]=1", "1+$(touch TRACE)", "", "9" * 40]
)
@pytest.mark.parametrize("kind", ["failures", "stops"])
def test_commands_in_a_counter_file_are_not_run(batch: Batch, kind: str, content: str) -> None:
    """Bash arithmetic runs a command in a subscript."""
    trace = batch.place / "TRACE"
    (batch.run / "slurm").mkdir()
    counter = batch.run / f"slurm/without-progress.{kind}"
    counter.write_text(content.replace("TRACE", f"'{trace}'"), encoding="utf-8")
    leave(batch.after, "stopped" if kind == "stops" else "running", 2)
    assert batch.attempt(1 if kind == "failures" else 0).returncode == 0
    assert not trace.exists()
    assert counter.read_text(encoding="utf-8") == "1\n"


def test_a_cancelled_run_is_not_started(batch: Batch) -> None:
    (batch.run / "cancelled").touch()
    done = batch.attempt()
    assert (done.returncode, batch.requeues()) == (75, [])
    assert "the run was cancelled: not started" in done.stdout
    assert not (batch.place / "env").exists()


def test_a_stop_file_of_an_earlier_attempt_is_removed(batch: Batch) -> None:
    (batch.run / "stop").touch()
    a_finished_run(batch)
    done = batch.attempt()
    assert done.returncode == 0
    assert "the stop file exists" not in done.stdout
    assert not (batch.run / "stop").exists()


def test_failing_to_create_the_run_directory_ends_the_job(batch: Batch) -> None:
    batch.run.rmdir()
    batch.run.write_text("a file", encoding="utf-8")
    assert batch.attempt().returncode == 1
    assert not (batch.place / "env").exists()


@pytest.mark.parametrize("name", ["plain", "two words", "it's;true", '"quoted"', "$HOME", "*", "-n"])
def test_run_directories_of_any_name(tmp_path: Path, name: str) -> None:
    batch = Batch(tmp_path, name)
    leave(batch.after, "stopped", 1, 12)
    done = batch.attempt()
    assert (done.returncode, batch.requeues()) == (0, REQUEUE)
    assert "saved at step 12" in done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "set -euo pipefail",
        "set -eE; trap 'exit 9' ERR",
        "set -f",
        "set -C",
        "shopt -s failglob",
        "shopt -s nullglob",
    ],
)
def test_shell_options_of_the_site_file_change_no_decision(batch: Batch, line: str) -> None:
    (batch.run / "slurm").mkdir()
    for attempt in range(2, 6):  # more attempts than failures without progress are allowed
        leave(batch.after, "running", attempt, attempt)
        bash, option, text = batch.command(ATTEMPT, 1)
        done = subprocess.run(
            [bash, option, f"{line}\n{text}"],
            env=batch.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, done.stdout
        assert f"last checkpoint at step {attempt}: requeueing" in done.stdout
    assert batch.requeues() == REQUEUE * 4


# ---- requeueing ----


def test_an_array_task_is_requeued_as_array_and_task_number(batch: Batch) -> None:
    batch.env |= {"SLURM_JOB_ID": "73", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"}
    batch.show("70_2")
    a_stopped_run(batch)
    assert batch.attempt().returncode == 0
    assert batch.requeues() == ["requeue 70_2"]


def test_the_task_with_the_array_number_is_requeued_alone(batch: Batch) -> None:
    """`scontrol show job ARRAY` lists all tasks of the array."""
    batch.env |= {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"}
    others = [job_line("71", "PENDING", 3), job_line("72", "CANCELLED", 1), job_line("70", "RUNNING", 0)]
    (batch.place / "show-70").write_text("".join(others), encoding="utf-8")
    batch.show("70_2")
    a_stopped_run(batch)
    done = batch.attempt()
    assert (done.returncode, batch.requeues()) == (0, ["requeue 70_2"]), done.stdout


def test_a_failed_requeue_is_retried_after_growing_waits(batch: Batch) -> None:
    batch.refuse(3)
    a_stopped_run(batch)
    assert batch.attempt().returncode == 0
    assert batch.requeues() == REQUEUE * 4
    waits = [float(w) for w in (batch.place / "sleep.log").read_text(encoding="utf-8").split()]
    assert len(waits) == 3
    assert waits == sorted(set(waits))


def test_a_requeue_that_keeps_failing_leaves_a_resumable_run(batch: Batch) -> None:
    batch.refuse(99)
    a_stopped_run(batch)
    done = batch.attempt()
    assert done.returncode == 75
    assert f"SLURM did not requeue the job; `dl2pa resume {batch.run}`" in done.stdout


@pytest.mark.parametrize("state", ["PENDING", "CANCELLED"])
def test_a_job_requeued_or_cancelled_meanwhile_is_not_retried(batch: Batch, state: str) -> None:
    batch.refuse(1, then_state=state)
    a_stopped_run(batch)
    assert batch.attempt().returncode == 0
    assert batch.requeues() == REQUEUE


# ---- environment of the command ----


def test_the_command_gets_launch_id_head_and_port(batch: Batch) -> None:
    batch.restarts = 3
    a_finished_run(batch)
    batch.attempt(SLURMD_NODENAME="node7")
    seen = batch.seen()
    assert seen["DL2PA_HEAD"] == "node7"
    assert seen["DL2PA_LAUNCHED"] == f"{JOB}.3"
    assert seen["DL2PA_SUPERVISED"] == "1"
    assert 10000 <= int(seen["DL2PA_PORT"]) < 30000


def test_a_head_set_by_the_user_is_kept(batch: Batch) -> None:
    a_finished_run(batch)
    batch.attempt(SLURMD_NODENAME="node7", DL2PA_HEAD="10.1.2.3")
    assert batch.seen()["DL2PA_HEAD"] == "10.1.2.3"


def test_the_head_defaults_to_the_host_name(batch: Batch) -> None:
    batch.fake("hostname", "#!/bin/sh\necho host-of-the-shell\n")
    batch.attempt()
    assert batch.seen()["DL2PA_HEAD"] == "host-of-the-shell"


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def derived_port(job: int, restarts: int) -> int:
    """The port that a node derives without DL2PA_PORT."""
    env = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_JOB_ID": str(job),
        "DL2PA_HEAD": "127.0.0.1",
    }
    return this_node({**env, "SLURM_RESTART_COUNT": str(restarts)}).port


def test_the_port_is_derived_from_the_job_and_its_restarts(batch: Batch) -> None:
    batch.restarts = 2
    job = next(job for job in range(os.getpid(), os.getpid() + 99) if is_free(derived_port(job, 2)))
    batch.attempt(SLURM_JOB_ID=str(job))
    assert int(batch.seen()["DL2PA_PORT"]) == derived_port(job, 2)
    assert derived_port(job, 2) != derived_port(job, 1) != derived_port(job + 1, 1)


@pytest.mark.parametrize("port", [None, 29999], ids=["within the range", "the last of the range"])
def test_a_port_in_use_is_skipped(batch: Batch, port: int | None) -> None:
    last = pow(13, -1, 20000) * 19999 % 20000
    job = JOB if port is None else last
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        derived = derived_port(job, 0)
        assert port in (None, derived)
        if is_free(derived):
            taken.bind(("127.0.0.1", derived))
            taken.listen()
        batch.attempt(SLURM_JOB_ID=str(job))
    chosen = int(batch.seen()["DL2PA_PORT"])
    assert chosen != derived
    assert 10000 <= chosen < 30000


# ---- signals and deaths ----


@pytest.fixture
def start(batch: Batch) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start commands in new process groups, killed at the end of the test or at a deadline."""
    os.mkfifo(batch.place / "gate")
    started: list[subprocess.Popen[str]] = []
    watchdogs: list[threading.Timer] = []

    def end(process: subprocess.Popen[str]) -> None:
        with suppress(ProcessLookupError):  # the leader may have ended before its group
            os.killpg(process.pid, signal.SIGKILL)

    def begin(command: list[str], **env: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            env={**batch.environment(), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        watchdogs.append(threading.Timer(DEADLINE_S, end, [process]))
        watchdogs[-1].start()
        return process

    yield begin
    for process, watchdog in zip(started, watchdogs, strict=True):
        watchdog.cancel()
        end(process)
        process.communicate()


def until(process: subprocess.Popen[str], word: str) -> str:
    """The next output line that contains `word`."""
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return line
    raise AssertionError(f"the output ended before {word!r}")


def assert_ends(pid_file: int) -> None:
    assert select.select([pid_file], [], [], DEATH_S)[0], "the process still runs"
    os.close(pid_file)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
@pytest.mark.parametrize("to_all", [False, True], ids=["the shell", "its process group"])
def test_a_stop_signal_requests_a_save_and_waits_for_it(
    batch: Batch, start: Callable[..., subprocess.Popen[str]], number: int, to_all: bool
) -> None:
    gate = batch.place / "gate"
    process = start(batch.command(SAVING, gate))
    until(process, "child")
    (os.killpg if to_all else os.kill)(process.pid, number)
    until(process, "child saves")
    os.kill(process.pid, number)  # a second one, while it saves, changes nothing
    until(process, "stop requested")
    leave(batch.after, "stopped", 1, 12)
    gate.write_text("go\n", encoding="utf-8")
    until(process, "child ends")
    until(process, "stopped on request, saved at step 12: requeueing")
    assert process.wait(DEADLINE_S) == 0
    assert batch.requeues() == REQUEUE


def test_a_stop_signal_after_a_takeover_does_not_stop_the_new_owner(
    batch: Batch, start: Callable[..., subprocess.Popen[str]]
) -> None:
    gate = batch.place / "gate"
    process = start(batch.command(SAVING, gate))
    until(process, "child")
    own(batch.run, "8.0")
    process.terminate()
    until(process, "stop requested, but another process owns the run now")
    assert not (batch.run / "stop").exists()
    leave(batch.after, "running", 2, 12)
    (batch.run / "stop").touch()  # the new owner is asked to stop; here this also ends the child
    gate.write_text("go\n", encoding="utf-8")
    until(process, "another process has taken over the run: not requeued")
    assert process.wait(DEADLINE_S) == 1
    assert batch.requeues() == []


needs_setpriv = pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not on this machine")


@needs_setpriv
def test_the_command_ends_with_the_batch_shell(
    batch: Batch, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(batch.command(SAVING, batch.place / "gate"))
    child = os.pidfd_open(int(until(process, "child").split()[1]))
    process.kill()
    assert_ends(child)


GUARDED = f"""
source {shlex.quote(str(SUPERVISE))}
guard "$@"
printf '%s\\n' "$$" "${{DL2PA_GUARDED-unset}}" "$@"
read -r <"$GATE"
"""


@needs_setpriv
def test_the_batch_shell_ends_with_slurms_daemon(
    batch: Batch, start: Callable[..., subprocess.Popen[str]]
) -> None:
    script = batch.place / "the script.sh"
    script.write_text(GUARDED, encoding="utf-8")
    daemon = ["bash", "-c", 'bash "$@" & wait', "daemon", str(script), "a b", "it's", ""]
    process = start(daemon, GATE=str(batch.place / "gate"))
    assert process.stdout is not None
    shell, *lines = (process.stdout.readline().rstrip("\n") for _ in range(5))
    assert lines == ["unset", "a b", "it's", ""]
    alive = os.pidfd_open(int(shell))
    process.kill()
    assert_ends(alive)


def test_supervision_works_without_setpriv(batch: Batch) -> None:
    tools = batch.place / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cp", "dirname", "env", "grep", "hostname", "mkdir", "rm", "sed", "touch"):
        (tools / name).symlink_to(str(shutil.which(name)))
    a_stopped_run(batch)
    done = batch.attempt(PATH=f"{batch.place / 'bin'}:{tools}")
    assert (done.returncode, batch.requeues()) == (0, REQUEUE), done.stdout
    script = batch.place / "the script.sh"
    script.write_text(
        f'source {shlex.quote(str(SUPERVISE))}\nguard "$@"\necho "here: $1"\n', encoding="utf-8"
    )
    done = subprocess.run(
        ["bash", script, "a b"], env={"PATH": str(tools)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "here: a b\n"


# ---- messages ----


@pytest.fixture
def hook(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A webhook that the configuration of the job names."""
    batch.env |= {"PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1"}
    with receiver() as received:
        (batch.run / "slurm").mkdir()
        config = parse_config({"notify": {"url": received.url}, "tracking": {"run_name": "mine"}})
        (batch.run / "slurm/config.yaml").write_text(dump_config(config), encoding="utf-8")
        yield received


def announced(batch: Batch, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """An attempt under a script that names the notifier."""
    notifier = f"notifier=({shlex.join([sys.executable, '-P', '-m', 'dl2pa.notify'])})"
    bash, option, text = batch.command(ATTEMPT, code)
    return subprocess.run(
        [bash, option, f"{notifier}; {text}"],
        env={**batch.environment(), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
    )


def test_a_finished_job_sends_one_message_across_requeues(batch: Batch, hook: Receiver) -> None:
    a_stopped_run(batch)
    done = announced(batch)
    assert (done.returncode, batch.requeues(), hook.messages) == (0, REQUEUE, []), done.stdout
    batch.restarts = 1
    batch.show(restarts=1)
    leave(batch.after, "finished", 3)
    for _ in range(2):  # the second time after SLURM has requeued the job of a failed node
        done = announced(batch)
        assert done.returncode == 0 and "dl2pa: finished" in done.stdout
    assert hook.events() == ["finished"], done.stdout
    (message,) = hook.messages
    assert (message["run"], message["job_id"], message["progress"]["attempt"]) == ("mine", str(JOB), 3)


def test_a_job_that_gives_up_or_fails_sends_its_reason(batch: Batch, hook: Receiver) -> None:
    leave(batch.after, "running", 2)
    assert announced(batch, 1, DL2PA_MAX_FAILURES="1").returncode == 1
    report(batch.after, f"{JOB}.0", True)
    leave(batch.after, "failed", 3)
    done = announced(batch, 2)
    assert done.returncode == 2
    assert hook.events() == ["gave_up", "failed"], done.stdout
    assert "1 attempts in a row without a checkpoint after step 0" in hook.messages[0]["message"]
    assert hook.messages[1]["message"] == 'exit code 2: it\'s "so"'


@pytest.mark.parametrize("notifier", ["/no/such/python", "false"])
def test_a_notifier_that_does_not_work_changes_nothing(batch: Batch, notifier: str) -> None:
    a_finished_run(batch)
    bash, option, text = batch.command(ATTEMPT, 0)
    done = subprocess.run(
        [bash, option, f"notifier=({notifier}); {text}"],
        env=batch.environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, batch.requeues()) == (0, []), done.stderr
    assert "dl2pa: finished" in done.stdout


NOTIFIER = """
echo "notifier ready"
while read -r event message; do echo "notifier got $event"; done
echo "notifier sends"
read -r <"$1"
echo "notifier ends"
"""


def test_stop_signals_during_the_delivery_do_not_end_the_job(
    batch: Batch, start: Callable[..., subprocess.Popen[str]]
) -> None:
    a_finished_run(batch)
    gate = batch.place / "gate"
    bash, option, text = batch.command(ATTEMPT, 0)
    notifier = f"notifier=({shlex.join(['bash', '-c', NOTIFIER, 'notifier', str(gate)])})"
    process = start([bash, option, f"{notifier}; {text}; code=$?; echo 'shell ends'; exit $code"])
    until(process, "notifier got finished")
    until(process, "notifier sends")
    assert process.stdout is not None
    for number in (signal.SIGUSR2, signal.SIGTERM):
        os.killpg(process.pid, number)  # as SLURM does when a job is cancelled
        # The signal has interrupted the wait for the notifier.
        assert "stop requested" in process.stdout.readline()
    gate.write_text("go\n", encoding="utf-8")
    assert process.stdout.read() == "notifier ends\nshell ends\n"
    assert process.wait(DEADLINE_S) == 0
    assert batch.requeues() == []


@pytest.mark.parametrize("end", ["exit 3", "kill -KILL $$"])
def test_a_notifier_that_ends_early_ends_the_job_normally(batch: Batch, end: str) -> None:
    a_finished_run(batch)
    bash, option, text = batch.command(ATTEMPT, 0)
    notifier = f"notifier=({shlex.join(['bash', '-c', f'read -r line; echo {chr(36)}line; {end}'])})"
    done = subprocess.run(
        [bash, option, f"{notifier}; {text}"],
        env=batch.environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, batch.requeues()) == (0, []), done.stderr
    assert "finished" in done.stdout.splitlines()[-1]


# ---- slurm/train.sbatch ----

SRUN = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
place = Path(__file__).parents[1]
(place / "srun.json").write_text(json.dumps(sys.argv[1:]))
assert ("SLURM_CPUS_PER_GPU" in os.environ) == ("SLURM_GPUS_ON_NODE" in os.environ)
run = Path(sys.argv[-1])
(run / "status.json").write_text(json.dumps({{"state": "finished", "attempt": 1}}, indent=1))
"""


def by_hand(batch: Batch, *arguments: str, **env: str) -> tuple[int, str, Any]:
    """Exit code and output of slurm/train.sbatch, and the arguments of srun."""
    batch.fake("srun", SRUN)
    batch.fake("python3", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    done = subprocess.run(
        ["bash", ROOT / "slurm/train.sbatch", *arguments],
        env={**batch.env, "SLURM_SUBMIT_DIR": str(ROOT), "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
    )
    log = batch.place / "srun.json"
    return done.returncode, done.stdout, json.loads(log.read_text(encoding="utf-8")) if log.exists() else None


def test_train_sbatch_passes_its_arguments_to_every_node(batch: Batch) -> None:
    arguments = ["my config.yaml", str(batch.run), "optim.lr=1", "tracking.run_name=it's; so"]
    code, output, srun = by_hand(batch, *arguments, SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_GPU="8")
    assert code == 0, output
    assert "--kill-on-bad-exit=1" in srun
    assert "--ntasks-per-node=1" in srun
    assert srun[srun.index("dl2pa") :] == [
        *("dl2pa", "train", "my config.yaml", "launch.nproc=8", "optim.lr=1", "tracking.run_name=it's; so"),
        *("--run-dir", str(batch.run)),
    ]


def test_train_sbatch_sends_the_messages_that_a_base_file_asks_for(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: team.yaml\n", encoding="utf-8")
    with receiver() as hook:
        (tmp_path / "team.yaml").write_text(f"notify: {{url: '{hook.url}'}}\n", encoding="utf-8")
        code, output, _ = by_hand(batch, str(tmp_path / "mine.yaml"), str(batch.run), no_proxy="127.0.0.1")
        assert (code, hook.events()) == (0, ["finished"]), output


def test_train_sbatch_keeps_nproc_of_the_config_without_gpus(batch: Batch) -> None:
    code, output, srun = by_hand(batch, "c.yaml", str(batch.run), SLURM_CPUS_PER_GPU="8")
    assert code == 0, output
    assert srun[srun.index("dl2pa") :] == ["dl2pa", "train", "c.yaml", "--run-dir", str(batch.run)]


def test_train_sbatch_without_a_run_directory_prints_usage(batch: Batch) -> None:
    code, output, srun = by_hand(batch, "only-a-config.yaml")
    assert code == 2
    assert "usage: sbatch" in output
    assert srun is None


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not on this machine")
def test_shellcheck_passes() -> None:
    files = ["launcher/supervise.sh", "slurm/train.sbatch"]
    done = subprocess.run(["shellcheck", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
