"""Examination of a GPU in groups of a few minutes, in order of information; run_all.sh starts and describes it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REHEARSE = bool(os.environ.get("REHEARSE"))
IMAGES = os.environ.get("IMAGES") and Path(os.environ["IMAGES"]).absolute()
EXIT_NOT_DONE = 75
EXIT_NO_TESTS = 5
SLICE_S = float(os.environ.get("SLICE", "540"))
SAVE_S = 45
"""Seconds that a group has to save and end after TERM."""
LEAST_S = 30
"""A group is not started with less time left."""

DL2PA = ["-m", "dl2pa"]
BENCH = [*DL2PA, "bench"]
INTERNAL = ["-m", "benchmarks"]
SMALL = ["--models=resnet8", "--batch-size=8", "--steps=1", "--rounds=1"]
SMALL_TRAIN = [*SMALL, "--precision=fp32", "--compile=off", "--image-size=16"]


@dataclass(frozen=True)
class Group:
    """A part of the examination with an output file.

    Attributes:
        arguments: of Python.
        limit_s: seconds until it is stopped and counts as not done.
        rehearsal: arguments added for the CPU, where later options replace earlier ones; None: needs a GPU.
        wrapper: a command that starts Python.
    """

    name: str
    arguments: list[str]
    limit_s: float = 300
    rehearsal: list[str] | None = None
    wrapper: tuple[str, ...] = ()


def tests(name: str, limit_s: float = 300) -> Group:
    """All tests of a file, without an end at the first failure; each result is written when it is known."""
    options = ["-v", "-s", "-n", "0", "-p", "no:cacheprovider", "--timeout", str(int(limit_s))]
    options = options if _installed("xdist", "pytest_timeout") else ["-v", "-s", "-p", "no:cacheprovider"]
    return Group(name, ["-m", "pytest", *options, f"tests/gpu/test_{name}.py"], limit_s, [])


def bench(name: str, *arguments: str, rehearsal: list[str] | None = None) -> Group:
    program = INTERNAL if arguments[0] in ("concurrent", "checkpoint") else BENCH
    return Group(name, [*program, arguments[0], "--json", *arguments[1:]], rehearsal=rehearsal)


def groups(out: Path, cifar: str | None) -> list[Group]:
    """All groups, those with the most information first."""
    found = [
        tests("environment", 120),
        tests("fp16_overflow"),
        tests("resume_matrix", 480),
        tests("world_of_one"),
        tests("two_ranks"),
        tests("dali_mixed"),
        tests("numerics"),
        tests("sync_debug", 480),
        tests("compile", 480),
        *_speed(),
        *_trainings(out, cifar),
        tests("several_gpus", 480),
    ]
    if REHEARSE or len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1:
        scaling = ("scaling", "--models=resnet32", "--processes=1,2", "--steps=50")
        found.append(bench("scaling", *scaling, rehearsal=SMALL))
    return found if not REHEARSE else [group for group in found if group.rehearsal is not None]


def _speed() -> list[Group]:
    """Speed of a step against the plain loop (`speed/reference`), then of other parts."""
    step = ["--batch-size=128", "--steps=10"]
    resident = ["--models=resnet32", "--loaders=resident", "--compile=off,on,graphs", "--batch-size=128"]
    networks = ["--models=resnet50,swin_t", "--loaders=synthetic"]
    files = [
        bench(
            "step-files",
            *("train", "--models=resnet50", "--loaders=synthetic,dali,torchvision", f"--data={IMAGES}"),
            *("--batch-size=256", "--steps=10"),
        ),
        bench("pipeline", "pipeline", f"--data={IMAGES}"),
    ]
    concurrent = ["concurrent", "--models=resnet32", "--processes=3,6", "--batch-size=128", "--steps=100"]
    mps = bench("concurrent-mps", *concurrent)
    found = [
        bench("step-cifar", "train", *resident, "--steps=50", rehearsal=SMALL_TRAIN),
        bench("step-resnet50", "train", "--models=resnet50", "--loaders=synthetic", *step),
        *(files if IMAGES else []),
        bench("step-swin_t", "train", "--models=swin_t", "--loaders=synthetic", *step),
        bench("step-compiled", "train", *networks, "--compile=on", "--batch-size=256", "--steps=10"),
        bench("step-layout", "train", *networks, "--channels-last=off", *step),
        bench("step-resnet101", "train", "--models=resnet101", "--loaders=synthetic", *step),
        bench("matching", "matching", "--classes=1000,21841", "--rounds=2"),
        bench("classes", "classes", "--classes=1000,100000,1000000", "--batch-size=128", "--steps=50"),
        bench(
            "checkpoint", "checkpoint", "--models=resnet50", "--batch-size=128", "--steps=40", rehearsal=SMALL
        ),
        bench("concurrent", *concurrent, rehearsal=[*SMALL, "--processes=2"]),
    ]
    if shutil.which("nvidia-cuda-mps-control"):
        # Runs side by side on the device, not in slices of time, where a user may start NVIDIA's server.
        found.append(Group(mps.name, mps.arguments, wrapper=("bash", "-c", _MPS, "mps")))
    return found


_MPS = """
CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
nvidia-cuda-mps-control -d || exit 1
trap 'echo quit | nvidia-cuda-mps-control' EXIT
"$@" & wait $!
"""


def _trainings(out: Path, cifar: str | None) -> list[Group]:
    """CIFAR-100 at d = 10, 25, 50 and 100, several runs at once, one seed after the other."""
    more = os.environ.get("SWEEP", "").split()
    common = ["tracking.uri=none", f"--run-dir={out / 'runs'}", *more]
    if REHEARSE:
        small = ["--grid=model.embedding_dim=5,6", "--parallel=2", "train.max_steps=2", "launch.nproc=1"]
        small += ["data.loader=torchvision", f"data.root={out / 'digits'}", "launch.device=cpu"]
        return [Group("cifar100", [*DL2PA, "sweep", "configs/quickstart.yaml", *small, *common], 300, [])]
    if not cifar:
        return []
    root, sweep = f"data.root={cifar}", [*DL2PA, "sweep"]
    found: list[Group] = []
    for seed in os.environ.get("SEEDS", "0 1 2").split():
        seeded = [root, f"--seeds={seed}", *common]
        published = ["configs/sweeps/cifar100.yaml", "--variant=dl2pa"]
        found.append(Group(f"cifar100-seed{seed}", [*sweep, *published, *seeded], SLICE_S))
    for name in ("cifar100", "cifar100_lt"):
        for seed in os.environ.get("SEEDS", "0 1 2").split():
            seeded = [root, f"--seeds={seed}", *common]
            found.append(
                Group(f"{name}-all-seed{seed}", [*sweep, f"configs/sweeps/{name}.yaml", *seeded], SLICE_S)
            )
    report = [*DL2PA, "report", "--all", str(out / "runs"), "--published", "--out", str(out / "report")]
    return [*found, Group("report", report)]


class Examination:
    """Runs groups until the slice of time is used up or a signal arrives."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._end = time.monotonic() + SLICE_S
        self._child: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self.failed: list[str] = []
        self.not_done: list[str] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_: Any) -> None:
        self.stopped = True
        if self._child is not None:
            _signal(self._child, signal.SIGTERM)

    def run(self, group: Group) -> None:
        """Run a group that has no complete output; its result is a line of `summary.txt`."""
        done, partial = self._out / f"{group.name}.txt", self._out / f"{group.name}.partial.txt"
        if done.exists():
            self._report(group.name, "skipped: done before")
            return
        left = self._end - time.monotonic() - SAVE_S
        if self.stopped or left < LEAST_S:
            self.not_done.append(group.name)
            return
        began = time.monotonic()
        code = self._execute(group, partial, min(left, group.limit_s))
        seconds = f"{time.monotonic() - began:.0f} s"
        if code is None or self.stopped or code == EXIT_NOT_DONE:
            self.not_done.append(group.name)
            self._report(group.name, f"NOT DONE after {seconds}")
            return
        partial.replace(done)
        if code == EXIT_NO_TESTS and "pytest" in group.arguments:
            self._report(group.name, "skipped: what it needs is not installed")
            return
        if code:
            self.failed.append(group.name)
        self._report(group.name, f"{f'FAILED, exit code {code}' if code else 'passed'} in {seconds}")

    def _execute(self, group: Group, output: Path, limit_s: float) -> int | None:
        """Exit code of the group's command; None after a timeout."""
        command = [*group.wrapper, sys.executable, *group.arguments, *(group.rehearsal or []) * REHEARSE]
        with output.open("ab") as file:  # keeps the rows of an attempt that was stopped
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            streams: dict[str, Any] = {
                "stdin": subprocess.DEVNULL,
                "stdout": file,
                "stderr": subprocess.STDOUT,
            }
            self._child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
            try:
                return self._child.wait(limit_s)
            except subprocess.TimeoutExpired:
                _signal(self._child, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(SAVE_S - 10)
                return None
            finally:
                _signal(self._child, signal.SIGKILL)
                self._child.wait()
                self._child = None

    def _report(self, name: str, result: str) -> None:
        line = f"{time.strftime('%H:%M:%S')}  {name:<22} {result}"
        print(line, flush=True)
        with (self._out / "summary.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a group's command, KILL also to its descendants that are left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number) if number == signal.SIGKILL else child.send_signal(number)


def _installed(*modules: str) -> bool:
    from importlib.util import find_spec

    return all(find_spec(module) is not None for module in modules)


def install_wheels(folder: Path) -> None:
    """Install the wheels of a folder whose packages are missing; torch and what is installed stay as they are."""
    missing: list[Path] = []
    for wheel in sorted(folder.glob("*.whl")):
        try:
            metadata.version(wheel.name.split("-")[0])
        except metadata.PackageNotFoundError:
            missing.append(wheel)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    env = {**os.environ, "PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if not missing or subprocess.run([*pip, *map(str, missing)], env=env, check=False).returncode == 0:
        return
    for wheel in missing:  # one of them is for another Python or platform
        if subprocess.run([*pip, str(wheel)], env=env, check=False).returncode:
            print(f"{wheel.name} is not installed", flush=True)


def main() -> int:
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        print("usage: tests/gpu/run_all.sh OUT [CIFAR_ROOT]", file=sys.stderr)
        return 2
    out = Path(sys.argv[1]).absolute()
    out.mkdir(parents=True, exist_ok=True)
    cifar = str(Path(sys.argv[2]).absolute()) if len(sys.argv) == 3 else None
    if wheels := os.environ.get("WHEELS"):
        install_wheels(Path(wheels))
    wanted = os.environ.get("ONLY", "").split()
    found = groups(out, cifar)
    if unknown := set(wanted) - {group.name for group in found}:
        print(f"ONLY: unknown or impossible here: {' '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    examination = Examination(out)
    for group in found:
        if not wanted or group.name in wanted:
            examination.run(group)
    if examination.not_done:
        print(f"not done: {' '.join(examination.not_done)}; the same call continues", flush=True)
        return EXIT_NOT_DONE
    return 1 if examination.failed else 0


if __name__ == "__main__":
    sys.exit(main())
