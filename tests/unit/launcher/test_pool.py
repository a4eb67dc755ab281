"""The pool with real processes, which wait for files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from launcher.pool import CANNOT_START, Pool, Task

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_S = 240.0

# Writes NAME.started and waits for NAME.go; exits with 75 on TERM, as a training that has saved a checkpoint.
WORKER = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
folder, name, code = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(folder / f"{name}.pid").write_text(str(os.getpid()))
(folder / f"{name}.started").write_text(os.environ.get("WORKER", "") + os.environ.get("TASK", ""))
deadline = time.monotonic() + 60
while not (folder / f"{name}.go").exists() and time.monotonic() < deadline:
    time.sleep(0.01)
print(name, "ends")
sys.exit(code)
"""


def task(folder: Path, name: str, code: int = 0) -> Task:
    command = [sys.executable, "-c", WORKER, str(folder), name, str(code)]
    return Task(command, folder / "logs" / f"{name}.log", {"TASK": name})


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.01)


def in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_workers_are_reused_and_a_failed_task_stops_no_other(tmp_path: Path) -> None:
    tasks = [task(tmp_path, "a", 3), task(tmp_path, "b"), task(tmp_path, "c")]
    third_started: list[bool] = []

    def release() -> None:
        wait_until(
            lambda: (tmp_path / "b.started").exists() and (tmp_path / "a.started").exists(), "two tasks run"
        )
        third_started.append((tmp_path / "c.started").exists())
        (tmp_path / "a.go").touch()
        wait_until((tmp_path / "c.started").exists, "the third task uses the worker of the first")
        for name in "bc":
            (tmp_path / f"{name}.go").touch()

    thread = in_background(release)
    calls: list[tuple[str, int]] = []
    pool = Pool([{"WORKER": "0"}, {"WORKER": "1"}])
    codes = pool.run(
        tasks, lambda n: calls.append(("starts", n)), lambda n, code: calls.append((f"ends {code}", n))
    )
    thread.join()
    assert codes == [3, 0, 0]
    assert third_started == [False]
    assert not pool.stopping
    workers = {name: (tmp_path / f"{name}.started").read_text() for name in "abc"}
    assert workers == {"a": "0a", "b": "1b", "c": "0c"}
    assert calls[:3] == [("starts", 0), ("starts", 1), ("ends 3", 0)]
    assert sorted(calls[3:]) == [("ends 0", 1), ("ends 0", 2), ("starts", 2)]
    assert (tmp_path / "logs/a.log").read_text() == "a ends\n"


def test_output_is_appended_to_the_log(tmp_path: Path) -> None:
    (tmp_path / "a.go").touch()
    for _ in range(2):
        assert Pool([{}]).run([task(tmp_path, "a")]) == [0]
    assert (tmp_path / "logs/a.log").read_text() == "a ends\na ends\n"


def test_a_task_that_cannot_start_does_not_affect_others(tmp_path: Path) -> None:
    (tmp_path / "b.go").touch()
    no_program = Task([str(tmp_path / "no program")], tmp_path / "logs/no-program.log", {})
    (tmp_path / "file").touch()
    no_log = Task([sys.executable], tmp_path / "file/logs/x.log", {})
    ended: list[tuple[int, int]] = []
    codes = Pool([{}]).run(
        [no_program, no_log, task(tmp_path, "b")], on_end=lambda n, code: ended.append((n, code))
    )
    assert codes == [CANNOT_START, CANNOT_START, 0]
    assert ended == [(0, CANNOT_START), (1, CANNOT_START), (2, 0)]


def test_a_stop_signal_is_forwarded_and_prevents_further_starts(tmp_path: Path) -> None:
    tasks = [task(tmp_path, name) for name in "abc"]
    before = signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        wait_until(
            lambda: (tmp_path / "b.started").exists() and (tmp_path / "a.started").exists(), "two tasks run"
        )
        os.kill(os.getpid(), signal.SIGTERM)

    pool = Pool([{}, {}])
    thread = in_background(stop)
    assert pool.run(tasks) == [75, 75, None]
    thread.join()
    assert pool.stopping
    assert not (tmp_path / "c.started").exists()
    assert signal.getsignal(signal.SIGTERM) is before


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from launcher.pool import Pool, Task
worker = Path(sys.argv[2]) / "worker.py"
tasks = [Task([sys.executable, str(worker), sys.argv[2], n, "0"], Path(sys.argv[2]) / f"{n}.log", {}) for n in "ab"]
print(Pool([{}, {}]).run(tasks), flush=True)
"""


def test_the_third_interrupt_kills_the_tasks(tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the process group of the pool, but not its tasks."""
    ignores_term = WORKER.replace("lambda number, frame: sys.exit(75)", "signal.SIG_IGN")
    (tmp_path / "worker.py").write_text(ignores_term, encoding="utf-8")
    command = [sys.executable, "-c", DRIVER, str(ROOT), str(tmp_path)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_until(lambda: all((tmp_path / f"{name}.started").exists() for name in "ab"), "two tasks run")
        for _ in range(3):
            os.killpg(driver.pid, signal.SIGINT)
            time.sleep(0.3)
        out, _ = driver.communicate(timeout=DEADLINE_S)
        assert out == "[-9, -9]\n"
    finally:
        driver.kill()
        for name in "ab":
            pid = int((tmp_path / f"{name}.pid").read_text())
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
