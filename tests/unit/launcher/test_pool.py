"""The pool with real processes, each a few lines that wait for files."""

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

# begin: leave a mark and wait for the file `go`; a TERM ends it with 75, as a training that has saved.
WORKER = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
place, name, code = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(place / f"{name}.pid").write_text(str(os.getpid()))
(place / f"{name}.begun").write_text(os.environ.get("PLACE", "") + os.environ.get("OWN", ""))
deadline = time.monotonic() + 60
while not (place / f"{name}.go").exists() and time.monotonic() < deadline:
    time.sleep(0.01)
print(name, "ends")
sys.exit(code)
"""


def task(place: Path, name: str, code: int = 0) -> Task:
    command = [sys.executable, "-c", WORKER, str(place), name, str(code)]
    return Task(command, place / "logs" / f"{name}.log", {"OWN": name})


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)


def in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_so_many_run_at_once_in_places_that_are_reused_and_a_failure_stops_nobody(tmp_path: Path) -> None:
    tasks = [task(tmp_path, "a", 3), task(tmp_path, "b"), task(tmp_path, "c")]
    together: list[bool] = []

    def release() -> None:
        eventually(lambda: (tmp_path / "b.begun").exists() and (tmp_path / "a.begun").exists(), "two run")
        together.append((tmp_path / "c.begun").exists())
        (tmp_path / "a.go").touch()
        eventually((tmp_path / "c.begun").exists, "the third takes the place of the first")
        for name in "bc":
            (tmp_path / f"{name}.go").touch()

    thread = in_background(release)
    said: list[tuple[str, int]] = []
    pool = Pool([{"PLACE": "0"}, {"PLACE": "1"}])
    codes = pool.run(
        tasks, lambda n: said.append(("starts", n)), lambda n, code: said.append((f"ends {code}", n))
    )
    thread.join()
    assert codes == [3, 0, 0]
    assert together == [False]
    assert not pool.stopping
    begun = {name: (tmp_path / f"{name}.begun").read_text() for name in "abc"}
    assert begun == {"a": "0a", "b": "1b", "c": "0c"}
    assert said[:3] == [("starts", 0), ("starts", 1), ("ends 3", 0)]
    assert sorted(said[3:]) == [("ends 0", 1), ("ends 0", 2), ("starts", 2)]
    assert (tmp_path / "logs/a.log").read_text() == "a ends\n"


def test_a_log_is_added_to(tmp_path: Path) -> None:
    (tmp_path / "a.go").touch()
    for _ in range(2):
        assert Pool([{}]).run([task(tmp_path, "a")]) == [0]
    assert (tmp_path / "logs/a.log").read_text() == "a ends\na ends\n"


def test_what_cannot_start_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "b.go").touch()
    gone = Task([str(tmp_path / "no program")], tmp_path / "logs/gone.log", {})
    (tmp_path / "file").touch()
    nowhere = Task([sys.executable], tmp_path / "file/logs/x.log", {})
    ended: list[tuple[int, int]] = []
    codes = Pool([{}]).run(
        [gone, nowhere, task(tmp_path, "b")], ended=lambda n, code: ended.append((n, code))
    )
    assert codes == [CANNOT_START, CANNOT_START, 0]
    assert ended == [(0, CANNOT_START), (1, CANNOT_START), (2, 0)]


def test_a_stop_signal_reaches_all_that_run_and_starts_no_more(tmp_path: Path) -> None:
    tasks = [task(tmp_path, name) for name in "abc"]
    before = signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        eventually(lambda: (tmp_path / "b.begun").exists() and (tmp_path / "a.begun").exists(), "two run")
        os.kill(os.getpid(), signal.SIGTERM)

    pool = Pool([{}, {}])
    thread = in_background(stop)
    assert pool.run(tasks) == [75, 75, None]
    thread.join()
    assert pool.stopping
    assert not (tmp_path / "c.begun").exists()
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


def test_the_third_interrupt_waits_for_nobody(tmp_path: Path) -> None:
    """A terminal's Ctrl-C goes to the whole group of the pool's process, but to none of its tasks."""
    stubborn = WORKER.replace("lambda number, frame: sys.exit(75)", "signal.SIG_IGN")
    (tmp_path / "worker.py").write_text(stubborn, encoding="utf-8")
    command = [sys.executable, "-c", DRIVER, str(ROOT), str(tmp_path)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        eventually(lambda: all((tmp_path / f"{name}.begun").exists() for name in "ab"), "two run")
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
