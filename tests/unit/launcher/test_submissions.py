"""Submission records: in the run directory and in the list of the user."""

from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.errors import UserError
from dl2pa.rundir import RunDirectory
from launcher import submissions
from launcher.request import Request
from launcher.submissions import Submission


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/dl2pa/jobs.jsonl"


def submitted(run_dir: Path, job_id: str) -> Path:
    submissions.write(Submission(job_id, run_dir, run_dir / "log", {"nodes": 2}, "a name", Path("/here")))
    return run_dir


def runs_of(job: str) -> list[Path]:
    return [submission.run_dir for submission in submissions.find(job)]


def known_runs() -> list[Path]:
    return [submission.run_dir for submission in submissions.known()]


def test_a_submission_is_recorded_in_the_run_directory(tmp_path: Path) -> None:
    run = submitted(tmp_path / "a run; it's", "7")
    expected = Submission("7", run, run / "log", {"nodes": 2}, "a name", Path("/here"))
    assert submissions.read(run) == expected
    submitted(run, "8_1")
    assert submissions.find_one(str(run)).job_id == "8_1"
    assert [p.name for p in (run / "slurm").iterdir()] == ["job.json"], "no temporary file is left"


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "null", "{}", '{"job_id": 7}', "[" * 100_000, "\x00\x01"]
)
def test_a_missing_or_damaged_record_reads_as_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "slurm").mkdir()
        RunDirectory(tmp_path).job.write_text(text, encoding="utf-8")
    assert submissions.read(tmp_path) is None
    with pytest.raises(UserError, match=r"has no readable slurm/job\.json"):
        submissions.find(str(tmp_path))


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ('"log": 3', "log is an integer, not text"),
        ('"request": []', "request is a list, not an object"),
        ('"request": {"nodes": "4"}', "request: nodes is text, not an integer"),
        ('"request": {"gpus_per_node": true}', "request: gpus_per_node is true or false, not an integer"),
    ],
)
def test_a_damaged_record_is_not_read_and_the_reason_is_known(
    more: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "slurm").mkdir()
    RunDirectory(tmp_path).job.write_text(f'{{"job_id": "7", {more}}}')
    assert submissions.read(tmp_path) is None
    assert submissions.damage(tmp_path) == f"job.json is damaged ({problem})"
    with pytest.raises(UserError, match=problem.partition(",")[0]):
        submissions.find(str(tmp_path))


def test_last_job_of_a_damaged_record_is_known_from_the_list(tmp_path: Path) -> None:
    """Otherwise `submit` would queue a second job while the first one is live."""
    run = submitted(tmp_path / "a", "7")
    assert submissions.last(run) == submissions.read(run)
    RunDirectory(run).job.write_text("")
    assert submissions.last(run) == Submission("7", run)
    RunDirectory(run).job.unlink()
    assert submissions.last(run) is None


def test_missing_and_unknown_fields_of_a_record_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    request = '"request": {"nodes": 4, "later": [], "mem": null}'
    RunDirectory(tmp_path).job.write_text(f'{{"job_id": "7", "cwd": null, "later": [], {request}}}')
    submission = submissions.read(tmp_path)
    assert submission is not None and submission.name == tmp_path.name
    assert Request.of(submission.request) == Request(nodes=4)


def test_known_runs_are_ordered_by_their_last_submission(tmp_path: Path) -> None:
    a, _, c = (submitted(tmp_path / name, number) for name, number in (("a", "1"), ("b", "2"), ("c", "3")))
    submitted(a, "4")
    assert known_runs() == [tmp_path / "b", c, a]
    assert submissions.known()[-1].job_id == "4"


def test_a_run_with_a_deleted_directory_is_found_by_its_job(tmp_path: Path) -> None:
    run = submitted(tmp_path / "a", "7")
    RunDirectory(run).job.unlink()
    assert submissions.find("7") == [Submission("7", run)]
    assert submissions.known() == [Submission("7", run)]


@pytest.mark.parametrize(
    "junk",
    [
        b'{"job_id": "2", "run_d',
        b"\xff\xfe\x00",
        b"[]",
        b'{"job_id": "2"}',
        b'{"job_id": 2, "run_dir": "x"}',
        b'{"job_id": "2", "run_dir": ""}',
        b"[" * 100_000,
    ],
)
def test_damaged_lines_of_the_list_are_skipped(tmp_path: Path, home: Path, junk: bytes) -> None:
    a = submitted(tmp_path / "a", "1")
    with home.open("ab") as file:
        file.write(junk)
    b = submitted(tmp_path / "b", "3")
    assert known_runs() == [a, b]


def test_a_read_only_home_does_not_prevent_a_submission(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file", encoding="utf-8")
    run = submitted(tmp_path / "a", "1")
    assert runs_of(str(run)) == [run]
    assert submissions.known() == []


def test_runs_are_found_by_job_array_task_and_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = submitted(tmp_path / "one", "7")
    first, second = (submitted(tmp_path / f"seed {k}", f"70_{k}") for k in (0, 1))
    other = submitted(tmp_path / "other", "700_1")
    assert runs_of("7") == [one]
    assert runs_of("70") == [first, second]
    assert runs_of("70_1") == [second]
    assert runs_of("700") == [other]
    assert runs_of(str(first)) == [first]
    monkeypatch.chdir(tmp_path)
    assert runs_of("seed 1") == [second]
    with pytest.raises(UserError, match=r"names 2 runs.*70_0"):
        submissions.find_one("70")


def test_a_replaced_job_is_refused(tmp_path: Path) -> None:
    submitted(submitted(tmp_path / "a", "7"), "8")
    assert runs_of("8") == [tmp_path / "a"]
    with pytest.raises(UserError, match=r"was replaced: .*a is now job 8"):
        submissions.find("7")


@pytest.mark.parametrize("job", ["9", "7_0", "9_1", "nonsense", "7;8", "no/such/folder", "x" * 5000])
def test_an_unknown_job_is_refused(job: str, tmp_path: Path) -> None:
    submitted(tmp_path / "a", "7")
    with pytest.raises(UserError, match="is not a dl2pa job that this user submitted") as caught:
        submissions.find(job)
    assert caught.value.value == job


def test_an_empty_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(submitted(tmp_path / "a", "7"))
    with pytest.raises(UserError, match="is empty"):
        submissions.find("")


def test_a_run_that_was_not_submitted_is_named_as_such(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.write_status(state="running")
    with pytest.raises(UserError, match=r"was started without `dl2pa submit`\. Stop its `dl2pa train`"):
        submissions.find(str(run.root))
