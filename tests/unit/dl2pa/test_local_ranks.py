"""Work in several processes of this machine, with a real process in place of torchrun's agent and its ranks."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from dl2pa import local_ranks
from dl2pa.cli import main
from dl2pa.commands import evaluate
from dl2pa.evaluation.ranks import Job, evaluate_on_ranks
from launcher import local

AGENT = """
import os, signal, sys
from dl2pa.process import die_with_parent
os.environ["DL2PA_AGENT_PID"] = str(os.getpid())
if os.fork() == 0:
    die_with_parent()
    pipe = open(sys.argv[1], "wb", buffering=0)
    pipe.write(b"working")
signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_evaluation_ends_its_processes_and_leaves_no_file(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe, scratch = tmp_path / "pipe", tmp_path / "scratch"
    os.mkfifo(pipe)
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(local, "agent_command", lambda *_: [sys.executable, "-c", AGENT, str(pipe)])
    job = Job(str(tmp_path), [], "model", [], only_present=False)
    monkeypatch.setattr(evaluate, "run", lambda args: evaluate_on_ranks(job, 2))
    ended = threading.Event()

    def interrupt() -> None:
        with pipe.open("rb", buffering=0) as reader:
            assert reader.read(7) == b"working"
            os.kill(os.getpid(), number)
            ended.set() if reader.read() == b"" else None  # at the end of the last process

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert main(["evaluate", str(tmp_path), "--nproc", "2"]) == 130
    assert ended.wait(30), "the processes end"
    assert list(scratch.iterdir()) == []
    assert capfd.readouterr().err == "dl2pa: interrupted: `dl2pa evaluate` did not finish\n"


def test_a_rank_ends_when_another_one_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent ignores TERM, which ranks inherit, and sends it to the ranks that are left."""
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "job.json").write_text("{}")
    handlers: list[object] = []
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        work = lambda job: handlers.append(signal.getsignal(signal.SIGTERM))  # noqa: E731
        assert local_ranks.work_as_rank(tmp_path, work) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handlers == [signal.SIG_DFL]
