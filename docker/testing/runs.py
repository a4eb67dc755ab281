"""What the training image does: as a nameless user, on a read-only file system."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testing.contents import REPOSITORY, revision
from testing.engine import Container, Engine, sha256
from testing.report import check, say

PYTHON = REPOSITORY / ".venv/bin/python"
"""Of the environment outside, for comparison."""
QUICKSTART = ("train", "configs/quickstart.yaml", "--json")
USER = 4321


class Scene:
    """One image's containers: where they write, and that none is left behind."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.folder = folder
        self._number = 0
        self._started: list[Container] = []

    def volume(self, name: str) -> Path:
        """A folder that belongs to the containers' user."""
        place = self.folder / "volumes" / name
        place.mkdir(parents=True, exist_ok=True)
        os.chown(place, USER, USER)
        return place

    def start(self, *arguments: str, image: str = "dl2pa", **settings: Any) -> Container:
        self._number += 1
        name = f"container-{self._number}"
        container = Container(self.engine, image, arguments, hostname=name, **settings)
        self._started.append(container)
        return container.start(self.folder / "logs" / f"{name}.log")

    def run(self, *arguments: str, expect: int = 0, **settings: Any) -> Container:
        container = self.start(*arguments, **settings)
        code = container.wait()
        check(
            code == expect,
            f"{' '.join(arguments)}: exit code {code}, not {expect}:\n{container.error[-3000:]}",
        )
        return container

    def close(self) -> None:
        for container in self._started:
            container.close()


def wait_for(condition: Callable[[], Any], container: Container, what: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        check(container.running(), f"ended before {what}:\n{container.error[-3000:]}")
        check(time.monotonic() < deadline, f"waited in vain for {what}")
        time.sleep(0.05)


def check_doctor(scene: Scene) -> None:
    """Everything is found with the mounts, and what is missing is named without."""
    data = scene.volume("data")
    (data / "something").touch()
    volumes = {"/runs": (scene.volume("runs"), "rw"), "/data": (data, "ro")}
    seen = scene.run("doctor", "--json", volumes=volumes).result["checks"]
    for name in ("dali runs", "/dev/shm", "scratch", "write access", "run volume", "DL2PA_DATA"):
        check(seen[name]["ok"], f"doctor: {name}: {seen[name]['seen']}")
    told = ("python", "gpu", "/dev/shm", "run volume", "DL2PA_DATA")
    say("doctor", "; ".join(f"{name}: {seen[name]['seen']}" for name in told))
    seen = scene.run("doctor", "--json", expect=1, scratch=False, user="1000:1000").result["checks"]
    for name in ("scratch", "write access", "run volume", "DL2PA_DATA"):
        check(not seen[name]["ok"] and seen[name]["remedy"], f"doctor without mounts: {name}: {seen[name]}")
    say("doctor without mounts", f"exit code 1; {seen['write access']['seen']}; {seen['DL2PA_DATA']['seen']}")


def only_run(volume: Path) -> Path:
    (run,) = (path.parent for path in volume.glob("*/status.json"))
    return run


def digest(run: Path) -> str:
    return sha256(run / "model.safetensors")[:16]


def points(run: Path) -> dict[tuple[str, int], float]:
    """Every value recorded, but for what depends on the clock."""
    found: dict[tuple[str, int], float] = {}
    for line in (run / "events/events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        points = event.get("v", {}).items()
        clock = ("time/", "memory/", "system/")
        found.update({(k, event["step"]): v for k, v in points if not k.startswith(clock)})
    return found


def check_quickstart(scene: Scene) -> Path:
    """The README's first command, inside and outside; returns the run inside."""
    began = time.monotonic()
    inside = scene.run(*QUICKSTART, volumes={"/runs": (scene.volume("runs"), "rw")}).result
    seconds = time.monotonic() - began
    run = only_run(scene.volume("runs"))
    attempts = json.loads((run / "environment.json").read_text(encoding="utf-8"))["attempts"]
    code = attempts[-1]["git_commit"]
    check(code == revision(), f"the run does not know its code: {code}")
    check((scene.volume("runs") / "mlflow.db").exists(), "the run was not recorded in MLflow")
    top1 = f"top-1 {inside['top1_last']:.2f} % of {inside['num_validated']}"
    say("quickstart inside", f"{top1}, {seconds:.0f} s, model {digest(run)}")
    place = scene.folder / "outside"
    arguments = [*QUICKSTART, "--run-dir", str(place / "run"), f"data.root={place}/digits"]
    outside = json.loads(outside_run("-m", "dl2pa", *arguments).splitlines()[-1])
    both = f"{inside['top1_last']} inside, {outside['top1_last']} outside"
    check(inside["top1_last"] == outside["top1_last"], f"top-1 {both}")
    same = "bit-identical" if digest(run) == digest(place / "run") else "not bit-identical"
    say("quickstart outside", f"top-1 {outside['top1_last']:.2f} %, models {same}")
    return run


def outside_run(*arguments: str) -> str:
    """Standard output of this machine's Python, in the repository."""
    command = ["nice", str(PYTHON), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    check(done.returncode == 0, f"outside, {' '.join(arguments)[:60]}: {done.stderr[-3000:]}")
    return done.stdout


_SUBMIT = """
import sys
from submitit.core.utils import DelayedSubmission
from launcher.node import run_task
DelayedSubmission(run_task, sys.argv[2:]).dump(sys.argv[1])
"""


_PREFIX = """
from launcher.containers import Container
print(*Container("IMAGE", "apptainer", ({!r},)).prefix(), sep="\\0", end="")
"""


def check_as_a_job(scene: Scene) -> None:
    """A node's task as `dl2pa submit --container` has Apptainer start it: by folders' own names, without entry point.

    The working directory holds a `launcher` of another version, the environment names it too, and neither is taken.
    """
    folder = scene.volume("job")
    cwd, run = folder / "checkout", folder / "run"
    (cwd / "launcher").mkdir(parents=True)
    (cwd / "launcher/__init__.py").write_text("raise ImportError('the code of the working directory')\n")
    config = folder / "config.yaml"
    config.write_bytes((REPOSITORY / "configs/quickstart.yaml").read_bytes())
    arguments = [
        "train",
        str(config),
        "--run-dir",
        str(run),
        "train.max_steps=20",
        f"data.root={folder}/digits",
    ]
    outside_run("-c", _SUBMIT, str(folder / "7_submitted.pkl"), *arguments)
    prefix = outside_run("-c", _PREFIX.format(str(folder))).split("\0")
    slurm = ("JOB_NUM_NODES", "NTASKS", "STEP_NUM_NODES", "STEP_NUM_TASKS")
    environment = {
        **{f"SLURM_{name}": "1" for name in slurm},
        **{f"SLURM_{name}": "0" for name in ("STEP_ID", "LOCALID", "PROCID", "NODEID")},
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SUBMITIT_EXECUTOR": "slurm"},
        **{"DL2PA_SUPERVISED": "1", "DL2PA_LAUNCHED": "7.0", "PYTHONPATH": str(cwd)},
    }
    task = [*prefix[prefix.index("IMAGE") + 1 :], "python", "-u", "-m", "submitit.core._submit", str(folder)]
    volumes = {str(folder): (folder, "rw")}
    scene.run(*task, command=(), env=environment, volumes=volumes, workdir=str(cwd))
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    check(result["steps"] == 20, f"the job did {result['steps']} steps, not 20")
    say(
        "as a job in a container",
        f"{result['steps']} steps by the image's code, in {folder.name}/ under its own name",
    )


def check_stop_and_resume(scene: Scene, undisturbed: Path) -> None:
    """TERM and USR2 save and end with 75; each time another container goes on, to the same bits in the end."""
    volume = scene.volume("stopped")
    volumes = {"/runs": (volume, "rw")}

    def step() -> int:
        try:
            return int(
                json.loads((only_run(volume) / "status.json").read_text(encoding="utf-8")).get("step", 0)
            )
        except (OSError, ValueError):
            return 0

    for number in (signal.SIGTERM, signal.SIGUSR2):
        before = step()
        container = scene.start(*QUICKSTART, volumes=volumes)
        wait_for(lambda before=before: step() >= before + 60, container, f"step {before + 60}")
        well, said = container.health()
        check(well == 0 and said.startswith(only_run(volume).name), f"health: {well}, {said}")
        check(container.health(DL2PA_HEALTH_S="-1")[0] == 1, "a training that stands still is taken for well")
        began = time.monotonic()
        container.signal(number)
        code = container.wait(120)
        check(code == 75, f"{number.name}: exit code {code}, not 75:\n{container.error[-3000:]}")
        saved = container.result
        check(saved["stopped"] and saved["step"] == step() > before, f"{number.name}: {saved}")
        say(
            number.name, f"exit code 75 after {time.monotonic() - began:.1f} s, saved at step {saved['step']}"
        )
    scene.run(*QUICKSTART, volumes=volumes)
    run = only_run(volume)
    check(
        digest(run) == digest(undisturbed), f"resumed: model {digest(run)}, undisturbed {digest(undisturbed)}"
    )
    check(points(run) == points(undisturbed), "resumed: other values were recorded")
    say(
        "resumed in new containers",
        f"model {digest(run)} and {len(points(run))} recorded values as undisturbed",
    )
