"""What a person gets wrong about mounts, users and commands: one clear message and exit code 2."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from testing.report import check, say
from testing.runs import QUICKSTART, Scene, only_run, wait_for

IMAGENET = ("train", "configs/imagenet1k/resnet50_d512.yaml", "launch.device=cpu")


def check_refusals(scene: Scene) -> None:
    """Each mistake ends before anything was begun, and the message says what to mount or to type."""
    runs = {"/runs": (scene.volume("refused"), "rw")}
    cases: list[tuple[str, tuple[str, ...], dict[str, Any], tuple[str, ...]]] = [
        ("no /runs", QUICKSTART, {}, ("run-dir", "Read-only file system", "-v DIR:/runs")),
        (
            "a read-only /runs",
            QUICKSTART,
            {"volumes": {"/runs": (scene.volume("read-only"), "ro")}},
            ("run-dir", "Read-only file system", "-v DIR:/runs"),
        ),
        (
            "another's /runs",
            QUICKSTART,
            {"volumes": {"/runs": (_closed(scene, 0o755), "rw")}},
            ("run-dir", "Permission denied", "--user"),
        ),
        ("no /tmp", QUICKSTART, {"volumes": runs, "scratch": False}, ("TMPDIR", "--tmpfs /tmp")),
        ("an empty /data", IMAGENET, {"volumes": runs}, ("data.root = '/data'", "-v DIR:/data:ro")),
        (
            "another's /data",
            IMAGENET,
            {"volumes": {**runs, "/data": (_closed(scene, 0o700), "ro")}},
            ("data.root", "Permission denied"),
        ),
        (
            "DL2PA_DATA unset",
            IMAGENET,
            {"volumes": runs, "env": {"DL2PA_DATA": ""}},
            ("data.root", "DL2PA_DATA"),
        ),
        ("no such configuration", ("train", "my.yaml"), {"volumes": runs}, ("/my.yaml", "no such file")),
        ("submit", ("submit", "configs/quickstart.yaml"), {"volumes": runs}, ("SLURM", "--container")),
    ]
    for what, arguments, settings, words in cases:
        said = scene.run(*arguments, expect=2, **settings).error.strip().splitlines()
        check(len(said) == 1 and all(word in said[0] for word in words), f"{what}: {said[-10:]}")
    left = [path.name for path in runs["/runs"][0].iterdir()]
    check(not left, f"a refused training left {left}")
    say("mistakes", f"one message and exit code 2: {', '.join(what for what, *_ in cases)}")


def check_two_at_once(scene: Scene) -> None:
    """The second container on a run directory is refused; the first, under a shell that execs it, hears TERM."""
    volume = scene.volume("shared")
    command = " ".join(("exec dl2pa", *QUICKSTART, "train.epochs=1000", "--run-dir /runs/run"))
    shell = ("/usr/bin/tini", "-s", "--", "sh", "-c")
    first = scene.start(command, command=shell, volumes={"/runs": (volume, "rw")})
    wait_for(lambda: list(volume.glob("run/owner.json")), first, "the run has an owner")
    arguments = (*QUICKSTART, "train.epochs=1000", "--run-dir", "/runs/run")
    second = scene.run(*arguments, expect=2, volumes={"/runs": (volume, "rw")})
    check(f"on {first.hostname}" in second.error, f"two on one run directory: {second.error[-3000:]}")
    first.signal(signal.SIGTERM)
    code = first.wait(120)
    check(code == 75, f"TERM under a shell: exit code {code}, not 75:\n{first.error[-3000:]}")
    check((only_run(volume) / "status.json").exists(), "nothing was saved")
    say("two on one run directory", f"the second is refused: {second.error.strip().splitlines()[-1][-90:]}")


def _closed(scene: Scene, mode: int) -> Path:
    """A folder of root's."""
    place = scene.volume(f"root-{mode:o}")
    os.chown(place, 0, 0)
    place.chmod(mode)
    return place
