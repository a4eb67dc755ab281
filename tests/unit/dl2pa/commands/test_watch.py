"""`dl2pa watch`, `jobs` and `logs` on runs of this machine, and the block of lines on a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dl2pa.cli import main
from dl2pa.commands.live import LiveBlock, cut
from dl2pa.commands.run_states import RunStates, find_runs
from dl2pa.commands.sweep_progress import SweepProgress
from dl2pa.osutil import process_start
from dl2pa.ownership import Ownership
from dl2pa.records import read_record
from dl2pa.rundir import RunDirectory
from launcher import jobs, submissions
from support.paths import REPOSITORY
from support.terminal import COLUMNS, LINES, Terminal, terminal

PROGRESS: dict[str, Any] = {
    **{"attempt": 1, "epoch": 2, "epochs": 10, "step": 50, "total_steps": 200, "loss": 0.25, "lr": 0.1},
    **{
        "images_per_second": 1500.0,
        "eta_seconds": 90.0,
        "top1": 61.5,
        "top1_best": 62.0,
        "gpu_percent": 87.0,
    },
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current folder of the test, without SLURM and without a list of submissions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", "")
    return tmp_path


def make_run(name: str, state: str = "finished", **fields: Any) -> RunDirectory:
    run = RunDirectory(Path("runs", name).absolute())
    run.root.mkdir(parents=True)
    run.write_status(**{**PROGRESS, "state": state, **fields})
    return run


def own(run: RunDirectory) -> None:
    """Make this process the owner of a run."""
    owner = Ownership(run)
    owner.acquire()
    try:
        owner.announce()
    finally:
        owner.release()


def killed(run: RunDirectory) -> None:
    """Leave the record of an owner that was killed: its process id now belongs to another process."""
    own(run)
    record = json.loads(run.owner_file.read_text())
    run.owner_file.write_text(json.dumps({**record, "start": (process_start(os.getpid()) or 0) + 1}))


def watch_json(*arguments: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["watch", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]


def test_watch_lists_every_run_with_state_progress_and_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("sweep/a")
    own(make_run("sweep/deep/b", "running"))
    killed(make_run("c", "running"))
    make_run("d", "failed", error="loss is nan")
    make_run("e", "stopped").cancelled_file.touch()
    Path("runs/mlartifacts/1/artifacts").mkdir(parents=True)
    rows = watch_json(capsys=capsys)
    names = [(str(Path(row["run_dir"]).relative_to(Path("runs").absolute())), row["state"]) for row in rows]
    assert names == [
        *[("sweep/deep/b", "running"), ("c", "killed"), ("d", "failed"), ("e", "cancelled")],
        ("sweep/a", "finished"),
    ]
    running = rows[0]
    assert (running["epoch"], running["epochs"], running["step"], running["total_steps"]) == (2, 10, 50, 200)
    assert (running["top1"], running["top1_best"], running["gpu_percent"]) == (61.5, 62.0, 87.0)
    assert 0 < running["eta_seconds"] <= 90.0 and rows[1]["eta_seconds"] is None
    assert rows[2]["error"] == "loss is nan"
    assert [row["run_dir"] for row in watch_json("runs/c", capsys=capsys)] == [str(Path("runs/c").absolute())]


def test_piped_watch_prints_the_table_once_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own(make_run("a", "running"))
    make_run("evil \x1b[2J\nname", "finished")
    assert main(["watch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "runs: 1 running, 1 finished"
    header = "state job epoch step loss images/s eta top1 best gpu run"
    assert lines[1].split() == header.split()
    assert lines[2].split()[:6] == ["running", "-", "2/10", "50/200", "0.2500", "1,500"]
    assert lines[2].split()[7:] == ["61.50", "62.00", "87", "%", "a"]
    assert lines[3].endswith("evil \\x1b[2J name") and len(lines) == 4
    assert all(line.isprintable() for line in lines)


def test_folders_that_cannot_be_watched_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    for arguments in (["gone"], ["file"], [".", "--every", "0"], [".", "--every", "x"]):
        assert main(["watch", *arguments]) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert main(["watch", "."]) == 0
    assert capsys.readouterr().out == ".: no runs\n"


def test_damaged_and_foreign_status_files_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("empty").status_file.write_text("")
    make_run("odd").status_file.write_text('{"state": "\\u001b[2J", "eta_seconds": Infinity, "top1": NaN}')
    rows = watch_json(capsys=capsys)
    assert [row["state"] for row in rows] == ["damaged", "damaged"]
    assert (rows[1]["top1"], rows[1]["eta_seconds"]) == (None, None)


def test_only_changed_status_files_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of runs stay fast: one small file per run, and no metrics."""
    runs = [make_run(f"{number:03}") for number in range(50)]
    read: list[Path] = []

    def recording(path: Path, *arguments: Any) -> Any:
        read.append(path)
        return read_record(path, *arguments)

    monkeypatch.setattr("dl2pa.rundir.read_record", recording)
    states = RunStates()
    states.describe(find_runs(Path("runs")))
    assert sorted(read) == [run.status_file for run in runs]
    read.clear()
    runs[7].write_status(step=60)
    read.clear()
    rows = states.describe(find_runs(Path("runs")))
    assert read == [runs[7].status_file] and rows[7]["step"] == 60


def test_jobs_in_slurm_decide_the_state_of_submitted_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def states(ids: Any) -> dict[str, jobs.JobState]:
        asked.append(sorted(ids))
        return {"1": jobs.JobState("PENDING"), "2": jobs.JobState("RUNNING"), "3": jobs.JobState("RUNNING")}

    monkeypatch.setattr(jobs, "states", states)
    for number, state in ((1, "stopped"), (2, "stopped"), (3, "running"), (4, "running"), (5, "finished")):
        run = make_run(f"{number}", state)
        submissions.write(submissions.Submission(str(number), run.root, run.root / "log"))
        if number == 3:
            own(run)
    new = RunDirectory(Path("runs/6").absolute())
    submissions.write(submissions.Submission("6", new.root, new.root / "log"))
    seen = RunStates()
    rows = {Path(row["run_dir"]).name: row for row in seen.describe(find_runs(Path("runs")))}
    expected = {
        "1": "queued",
        "2": "starting",
        "3": "running",
        "4": "killed",
        "5": "finished",
        "6": "submitted",
    }
    assert {name: row["state"] for name, row in rows.items()} == expected
    assert rows["3"]["job_id"] == "3"
    seen.describe(find_runs(Path("runs")))
    assert asked == [["1", "2", "3", "4", "6"]], "one query for the runs that are not finished, then a pause"


def test_a_heartbeat_from_another_machine_keeps_a_run_alive() -> None:
    run = make_run("a", "running")
    own(run)
    record = json.loads(run.owner_file.read_text())
    run.owner_file.write_text(json.dumps({**record, "machine": "another", "host": "node7"}))
    states = RunStates()
    assert states.describe([run.root])[0]["state"] == "running"
    os.utime(run.owner_file, (1.0, 1.0))
    assert states.describe([run.root])[0]["state"] == "running", "the file has changed since"
    assert states.describe([run.root])[0]["state"] == "killed"
    os.utime(run.owner_file, (2.0, 2.0))
    assert states.describe([run.root])[0]["state"] == "running", "a clock that is late does not matter"


def test_jobs_lists_runs_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    own(make_run("a", "running"))
    make_run("b")
    assert main(["jobs", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["job_id"], row["state"], row["live"]) for row in rows] == [(None, "RUNNING", True)]
    assert rows[0]["nodes"] and rows[0]["step"] == 50 and rows[0]["top1"] == 61.5
    assert main(["jobs", "--all"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["local", "RUNNING"],
        ["local", "FINISHED"],
    ]
    assert main(["jobs", "runs/b"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("runs/b")


def test_logs_shows_a_run_of_this_machine_and_each_attempt(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("a", "failed")
    run.logs.mkdir()
    head = "2026-01-01 10:00:00,000 INFO dl2pa.training.rank_log: attempt"
    lines = [
        f"{head} 1: rank 0, process 5 on n",
        "first",
        "ERROR: disk \x1b[2J",
        f"{head} 2: rank 0",
        "second",
    ]
    run.rank_log(0).write_text("\n".join(lines) + "\n")
    assert main(["logs", "runs/a"]) == 0
    assert capsys.readouterr().out.count("\n") == 5
    assert main(["logs", "runs/a", "--attempt", "1"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [lines[0], "first", "ERROR: disk \\x1b[2J"]
    for text in ("\n".join(lines), "\n".join(lines) + "\n"):
        run.rank_log(0).write_text(text)
        assert main(["logs", "runs/a", "--json"]) == 0
        shown = capsys.readouterr().out.splitlines()
        paths = {"run_dir": str(run.root.absolute()), "log": str(run.rank_log(0).absolute())}
        assert (len(shown), json.loads(shown[-1])) == (6, {**paths, "job_id": None})
    assert main(["logs", "runs/a", "--attempt", "3"]) == 2
    assert "which has the attempts 1, 2" in capsys.readouterr().err
    assert main(["logs", "runs/a", "--follow"]) == 0, "the run has ended"
    run.rank_log(0).write_bytes(b"\xff\x80\n")
    assert main(["logs", "runs/a", "--attempt", "1"]) == 2
    assert "which has the attempts none" in capsys.readouterr().err
    run.rank_log(0).unlink()
    run.rank_log(0).mkdir()
    assert main(["logs", "runs/a"]) == 2
    assert "is not a file" in capsys.readouterr().err


def test_watch_on_a_terminal_refreshes_in_place_until_interrupted(tmp_path: Path) -> None:
    """A real process on a real pseudo-terminal."""
    run = make_run("a", "finished")
    with terminal() as screen:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
        command = [sys.executable, "-m", "dl2pa", "watch", "--every", "0.1"]
        process = subprocess.Popen(command, stdout=screen.stream, stderr=screen.stream, env=environment)
        try:
            _wait_for(screen, lambda lines: len(lines) == 3 and "50/200" in lines[2])
            run.write_status(step=77)
            _wait_for(screen, lambda lines: len(lines) == 3 and "77/200" in lines[2])
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
        lines = screen.screen()
    assert "77/200" in lines[2] and lines[3] == "stopped watching; the runs continue", lines


def _wait_for(screen: Terminal, condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition(lines := screen.screen()):
        assert time.monotonic() < deadline, lines
        time.sleep(0.02)


def test_a_block_fits_the_terminal_and_shows_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((COLUMNS, LINES)))
    with terminal() as screen:
        block = LiveBlock(screen.stream)
        block.show(["a", "b" * 500, "c \x1b[2J\nd", *map(str, range(LINES))])
        lines = screen.screen()
        assert (lines[0], lines[1], lines[2]) == ("a", "b" * (COLUMNS - 2) + "…", "c \\x1b[2J d")
        assert len(lines) == block.height < LINES
        block.show(["e"])
        assert screen.screen() == ["e"]
        block.show([])
        assert screen.screen() == []
    assert cut("日本語", 5) == "日本…" and cut("日本語", 6) == "日本語"


class _Plan:
    """A planned run, of which the progress needs name and directory."""

    def __init__(self, run: RunDirectory) -> None:
        self.title, self.run_dir, self.directory = run.root.name, run.root, run


def test_a_sweep_shows_a_line_per_running_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((COLUMNS, LINES)))
    plans: Any = [_Plan(make_run(name, "running")) for name in "abc"]
    now = [0.0]
    line = "{}: epoch 3/10, step {}/200, loss 0.2500, 1,500 images/s, ETA 0:01:30, top-1 61.50 %"
    with terminal() as screen:
        monkeypatch.setattr(
            "dl2pa.commands.sweep_progress.note", lambda text: screen.stream.write(f"{text}\n")
        )
        progress = SweepProgress(plans, LiveBlock(screen.stream), lambda: now[0])
        progress.started(0)
        progress.started(1)
        plans[1].directory.write_status(step=60)
        progress.poll()
        assert screen.screen()[-1].endswith("50/200, loss 0.2500, 1,500 images/s, ETA 0:01:30, top-1 61.50 %")
        now[0] += 5.0
        progress.poll()
        assert screen.screen()[2:] == [line.format("[1/3] a", 50), line.format("[2/3] b", 60)]
        progress.ended(0, "finished: a: top-1 61.50 %")
        assert screen.screen()[2:] == ["[1/3] finished: a: top-1 61.50 %", line.format("[2/3] b", 60)]
        progress.close()
        assert len(screen.screen()) == 3


def test_a_piped_sweep_logs_the_progress_of_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: Any = [_Plan(make_run(name, "running")) for name in "ab"]
    now, noted = [0.0], list[str]()
    monkeypatch.setattr("dl2pa.commands.sweep_progress.note", noted.append)
    progress = SweepProgress(plans, None, lambda: now[0])
    progress.started(0)
    progress.started(1)
    plans[0].directory.write_status(step=60)
    progress.poll()
    assert len(noted) == 2, "the starts"
    now[0] += 100.0
    progress.poll()
    assert len(noted) == 3 and noted[2].startswith("[1/2] a: epoch 3/10, step 60/200")
    plans[0].directory.write_status(state="stopped")
    plans[1].directory.write_status(step=70, loss=None)
    now[0] += 100.0
    progress.poll()
    assert noted[3:] == ["[2/2] b: starting"]


def test_links_that_cannot_be_followed_are_skipped(folder: Path) -> None:
    run = make_run("one")
    (folder / "runs" / "self").symlink_to("self")
    assert find_runs(folder / "runs") == [run.root]
