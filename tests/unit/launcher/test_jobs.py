"""Parsing the output of SLURM commands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dl2pa.errors import UserError
from launcher import jobs
from launcher.jobs import UNKNOWN, JobState

Fake = Callable[..., Path]

# As `squeue --array --format=%i|%F|%K|%T|%r|%N|%k` prints it.
QUEUE = """\
100|100|N/A|RUNNING|None|node[1-2]|dl2pa
101|101|N/A|PENDING|Resources||dl2pa
103_0|103|0|RUNNING|None|node3|dl2pa
103_1|103|1|COMPLETING|None|node4|dl2pa
103_2|103|2|PENDING|JobArrayTaskLimit||dl2pa
106|106|N/A|COMPLETED|None|node1|dl2pa
107|107|N/A|RUNNING|None|node1|somebody else's | job
"""
# As `sacct -n -X -P -o JobID,State,NodeList,JobName` prints it.
ACCOUNTS = """\
100|FAILED|node9|dl2pa-small
90|COMPLETED|node[1-2]|dl2pa-small
91|CANCELLED by 0|None assigned|dl2pa-small
92_1|TIMEOUT|node1|dl2pa-a | b
93|COMPLETED|node1|other
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Create a command that prints a text and logs its arguments; PATH contains no other command."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def make(name: str, output: str = "", code: int = 0, error: str = "", then: str | None = None) -> Path:
        """Return the log, one line per call. If given, `then` is printed from the second call on."""
        log, file = tmp_path / f"{name}.log", tmp_path / "bin" / name
        (tmp_path / f"{name}.1").write_text(output, encoding="utf-8")
        (tmp_path / f"{name}.2").write_text(output if then is None else then, encoding="utf-8")
        file.write_text(
            f"""#!/bin/bash
            [[ -e '{log}' ]] && text=$(<'{tmp_path}/{name}.2') || text=$(<'{tmp_path}/{name}.1')
            echo "$*" >>'{log}'
            [[ -z $text ]] || echo "$text"
            echo '{error}' >&2
            exit {code}
            """,
            encoding="utf-8",
        )
        file.chmod(0o755)
        return log

    return make


# ---- states ----


@pytest.mark.parametrize(
    ("job", "state"),
    [
        ("100", JobState("RUNNING", "", "node[1-2]")),
        ("101", JobState("PENDING", "Resources", "")),
        ("103_0", JobState("RUNNING", "", "node3")),
        ("103_1", JobState("COMPLETING", "", "node4")),
        ("103_2", JobState("PENDING", "JobArrayTaskLimit", "")),
        ("106", JobState("COMPLETED", "", "node1")),
        ("90", JobState("COMPLETED", "", "node[1-2]")),
        ("91", JobState("CANCELLED", "", "")),
        ("92_1", JobState("TIMEOUT", "", "node1")),
        ("4", UNKNOWN),
        ("105", UNKNOWN),  # array tasks are named by array and task number only
    ],
)
def test_job_states_come_from_the_queue_then_accounting(fake: Fake, job: str, state: JobState) -> None:
    fake("squeue", QUEUE)
    fake("sacct", ACCOUNTS)
    assert jobs.states([job]) == {job: state}


def test_several_jobs_need_one_query(fake: Fake) -> None:
    queue, accounts = fake("squeue", QUEUE), fake("sacct", ACCOUNTS)
    states = jobs.states(["91", "100", "103_2", "90", "100"])
    assert {job: state.state for job, state in states.items()} == {
        **{"91": "CANCELLED", "100": "RUNNING"},
        **{"103_2": "PENDING", "90": "COMPLETED"},
    }
    assert len(queue.read_text(encoding="utf-8").splitlines()) == 1
    (query,) = accounts.read_text(encoding="utf-8").splitlines()
    assert query.endswith("-j 90,91"), "accounting is queried only for jobs that have left the queue"


@pytest.mark.parametrize(
    ("state", "is_live"),
    [
        *((state, True) for state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")),
        *((state, True) for state in ("SUSPENDED", "RESV_DEL_HOLD", "SPECIAL_EXIT", "SIGNALING")),
        *(
            (state, False)
            for state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "UNKNOWN")
        ),
    ],
)
def test_live_states(state: str, is_live: bool) -> None:
    assert JobState(state).is_live is is_live


def test_jobs_of_other_programs_are_ignored(fake: Fake) -> None:
    fake("squeue", QUEUE)
    fake("sacct", ACCOUNTS)
    assert jobs.states(["107", "93"]) == {"107": UNKNOWN, "93": UNKNOWN}


def test_without_accounting_an_ended_job_is_unknown(fake: Fake) -> None:
    fake("squeue", QUEUE)
    assert jobs.states(["90", "100"]) == {"90": UNKNOWN, "100": JobState("RUNNING", "", "node[1-2]")}
    assert not jobs.has_accounting()


def test_accounting_that_fails_counts_as_missing(fake: Fake) -> None:
    fake("squeue", "")
    fake("sacct", "", 1, "sacct: error: Problem talking to the database: Connection refused")
    assert jobs.states(["90"]) == {"90": UNKNOWN}
    assert not jobs.has_accounting()


def test_accounting_without_jobs_counts_as_available(fake: Fake) -> None:
    fake("sacct", "")
    assert jobs.has_accounting()


@pytest.mark.parametrize("installed", [True, False])
def test_a_failing_squeue_raises_an_error(fake: Fake, installed: bool) -> None:
    if installed:
        fake("squeue", QUEUE, 1, "slurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(ConnectionError, match="does not answer"):
        jobs.states(["100"])


def test_no_jobs_need_no_query(fake: Fake) -> None:
    log = fake("squeue", QUEUE)
    assert jobs.states([]) == {}
    assert not log.exists()


# ---- stopping ----


def test_cancelling_names_every_job(fake: Fake) -> None:
    log = fake("scancel")
    jobs.cancel(["7", "70_1"])
    assert log.read_text(encoding="utf-8") == "7 70_1\n"


def test_an_error_of_scancel_is_reported(fake: Fake) -> None:
    fake("scancel", "", 1, "scancel: error: Kill job error on job id 7: Access denied")
    with pytest.raises(UserError, match="'7, 8': scancel: error: Kill job error on job id 7: Access denied"):
        jobs.cancel(["7", "8"])


def test_killing_steps_waits_until_only_the_batch_step_is_left(fake: Fake) -> None:
    cancelled, queries = fake("scancel"), fake("squeue", "7.batch\n7.0\n", then="7.batch\n7.extern\n")
    jobs.kill_steps(["7"], wait_s=60)
    assert re.fullmatch(r"--signal=[A-Z0-9]+ 7\n", cancelled.read_text(encoding="utf-8"))
    assert len(queries.read_text(encoding="utf-8").splitlines()) == 2


def test_killing_steps_has_a_time_limit(fake: Fake) -> None:
    fake("scancel")
    fake("squeue", "7.0\n")
    jobs.kill_steps(["7"], wait_s=0.01)


def test_killing_steps_of_an_ended_job_is_allowed(fake: Fake) -> None:
    log = fake("scancel", "", 1, "scancel: error: Invalid job id")
    fake("squeue", "", 1, "slurm_load_jobs error: Invalid job id specified")
    jobs.kill_steps(["7", "8"], wait_s=60)
    assert re.fullmatch(r"--signal=[A-Z0-9]+ 7 8\n", log.read_text(encoding="utf-8"))
