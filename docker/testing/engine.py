"""What is needed of a docker engine, without one: buildah builds, chroot in namespaces of its own runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

BASE = "localhost/base"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

# Puts an image together as `docker run --read-only --tmpfs /tmp` would, and becomes its first process.
# Arguments: image, place, user, host name, tmpfs or none, mounts (SOURCE TARGET ro|rw each) up to --, environment
# up to --, working directory, command.
_ENTER = r"""
set -euo pipefail
image=$1 place=$2 user=$3 name=$4 scratch=$5
root=$place/root
shift 5
mount --make-rprivate /
mount --bind "$image" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
mount -t tmpfs -o mode=1777,size=2g tmpfs "$root/dev/shm"
[[ $scratch == none ]] || mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
while [[ $1 != -- ]]; do
  mkdir -p "$root$2" # for what lies below /tmp
  mount --bind "$1" "$root$2"
  [[ $3 == rw ]] || mount -o remount,bind,ro "$root$2"
  shift 3
done
shift
hostname "$name"
mount --bind "$place/hosts" "$root/etc/hosts"
variables=()
while [[ $1 != -- ]]; do
  variables+=("$1")
  shift
done
workdir=$2
shift 2
exec chroot --userspec="$user" --groups= "$root" /usr/bin/env -i --chdir="$workdir" "${variables[@]}" "$@"
"""


class BuildFailed(RuntimeError):
    """buildah or debootstrap failed; the message names the log."""


@dataclass(frozen=True)
class Step:
    """One instruction of a build, the name of its stage, and whether its result was there already."""

    stage: str
    text: str
    cached: bool


@dataclass(frozen=True)
class Built:
    """One build: what it did and how long that took."""

    steps: list[Step]
    seconds: float


class Engine:
    """Images in a folder of their own; nothing of the machine's other images is touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._storage = folder / "storage"
        self._mounted: dict[str, str] = {}

    def make_base(self, suite: str = "bookworm") -> None:
        """A Debian with Python, as the base image; made once."""
        if self._buildah("images", "--quiet", "--filter", f"reference={BASE}", check=False).strip():
            return
        rootfs = self.folder / "rootfs"
        shutil.rmtree(rootfs, ignore_errors=True)
        packages = "ca-certificates,python3,python3-venv"
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", suite, str(rootfs)]
        self._logged(command, "debootstrap.log")
        for archive in (rootfs / "var/cache/apt/archives").glob("*.deb"):
            archive.unlink()
        container = self._buildah("from", "scratch").strip()
        self._buildah("add", "--quiet", container, str(rootfs), "/")
        self._buildah("commit", "--quiet", "--rm", container, BASE)
        shutil.rmtree(rootfs)

    def build(self, context: Path, name: str, target: str, revision: str, cache: bool = True) -> Built:
        """Build one target of the Dockerfile in `context`."""
        command = [
            *self._command("bud"),
            *(
                "--isolation",
                "chroot",
                "--format",
                "docker",
                "--layers",
                f"--no-cache={str(not cache).lower()}",
            ),
            *("--target", target, "--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", f"REVISION={revision}"),
            # pip in the build trusts whom this machine trusts; the mount is on a file the base has.
            *(["--volume", f"{_CERTIFICATES}:{_CERTIFICATES}:ro"] if _CERTIFICATES.exists() else []),
            *("--tag", name, str(context)),
        ]
        began = time.monotonic()
        log = self._logged(command, f"{name}.log")
        return Built(_steps(log.read_text(encoding="utf-8")), time.monotonic() - began)

    def forget(self, *names: str) -> None:
        """Delete images and all that was kept to build them; the base stays."""
        for container in self._mounted.values():
            self._buildah("rm", container)
        self._mounted.clear()
        self._buildah("rmi", "--force", *names, check=False)
        self._buildah("rmi", "--prune", "--force", check=False)

    def mount(self, name: str) -> Path:
        """The image's files, unpacked."""
        if name not in self._mounted:
            self._mounted[name] = self._buildah("from", name).strip()
        return Path(self._buildah("mount", self._mounted[name]).strip())

    def close(self) -> None:
        for container in self._mounted.values():
            self._buildah("rm", container, check=False)
        self._mounted.clear()

    def config(self, name: str) -> dict[str, Any]:
        """The image's own settings: Env, Entrypoint, Cmd, User, WorkingDir, Labels, Healthcheck."""
        return json.loads(self._buildah("inspect", "--type", "image", name))["Docker"]["config"]

    def layers(self, name: str) -> list[tuple[int, str]]:
        """Bytes and instruction of each layer, the lowest first; empty ones left out."""
        image = json.loads(self._buildah("inspect", "--type", "image", name))
        known = json.loads((self._storage / "overlay-layers/layers.json").read_text(encoding="utf-8"))
        sizes = {layer.get("diff-digest"): layer.get("diff-size", 0) for layer in known}
        made = [h["created_by"] for h in image["OCIv1"]["history"] if not h.get("empty_layer")]
        digests = image["OCIv1"]["rootfs"]["diff_ids"]
        return [
            (sizes.get(d, 0), text) for d, text in zip(digests, made, strict=True) if sizes.get(d, 0) > 4096
        ]

    def _command(self, verb: str) -> list[str]:
        places = ["--root", str(self._storage), "--runroot", str(self.folder / "run")]
        return ["buildah", *places, "--storage-driver", "overlay", verb]

    def _buildah(self, verb: str, *arguments: str, check: bool = True) -> str:
        done = subprocess.run([*self._command(verb), *arguments], capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            raise BuildFailed(f"buildah {verb}: {done.stderr.strip()}")
        return done.stdout

    def _logged(self, command: Sequence[str], name: str) -> Path:
        log = self.folder / "logs" / name
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            done = subprocess.run(["nice", *command], stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            raise BuildFailed("\n".join([f"{command[0]} failed, see {log}:", *tail]))
        return log


def sha256(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _steps(log: str) -> list[Step]:
    """The instructions a build's log tells of; one that waits for another stage gets its result after that one's."""
    steps: list[Step] = []
    stages: dict[str, str] = {}
    open_ones: list[int] = []
    for line in log.splitlines():
        begun = re.match(r"(?:\[(\d+)/\d+\] )?STEP \d+/\d+: (.*)", line)
        if begun:
            number, text = begun[1] or "", begun[2]
            named = re.match(r"FROM .* AS (\S+)", text)
            if named:
                stages[number] = named[1]
            elif not text.startswith("FROM"):
                open_ones.append(len(steps))
                steps.append(Step(stages.get(number, ""), text, cached=False))
        elif line.startswith("--> Using cache") and open_ones:
            steps[open_ones[-1]] = replace(steps[open_ones[-1]], cached=True)
        elif re.fullmatch(r"--> [0-9a-f]+", line) and open_ones:
            open_ones.pop()
    return steps


@dataclass
class Container:
    """One run of an image: read-only, as a user that has no name in it, seeing no process but its own."""

    engine: Engine
    image: str
    arguments: Sequence[str]
    volumes: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    """Folder on this machine, and ro or rw, for each place in the image."""
    env: Mapping[str, str] = field(default_factory=dict)
    user: str = "4321:4321"
    hostname: str = "container"
    scratch: bool = True
    """Whether /tmp can be written."""
    command: Sequence[str] | None = None
    """In place of the image's entry point, which `srun` and `apptainer exec` pass by."""
    workdir: str | None = None

    def start(self, log: Path) -> Container:
        """Start it; what it writes goes to `log` and, standard output, to `log` with `.out` behind it."""
        settings = self.engine.config(self.image)
        place = self.engine.folder / "places" / self.hostname
        (place / "root").mkdir(parents=True, exist_ok=True)
        names = f"127.0.0.1 localhost\n127.0.0.1 {self.hostname}\n"
        (place / "hosts").write_text(names, encoding="utf-8")
        image = self.engine.mount(self.image)
        (image / "etc/hosts").touch()  # in the container's own layer, for the mounts
        for target in (t for t in self.volumes if not t.startswith("/tmp/")):
            (image / target.lstrip("/")).mkdir(parents=True, exist_ok=True)
        variables = dict(pair.split("=", 1) for pair in settings["Env"]) | dict(self.env)
        mounts = [
            part for target, (source, mode) in self.volumes.items() for part in (str(source), target, mode)
        ]
        self._out = log.with_suffix(".out")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as err, self._out.open("wb") as out:
            self._process = subprocess.Popen(
                [
                    *("nice", "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL"),
                    *(
                        "bash",
                        "-c",
                        _ENTER,
                        "enter",
                        str(self.engine.mount(self.image)),
                        str(place),
                        self.user,
                    ),
                    *(self.hostname, "tmpfs" if self.scratch else "none", *mounts, "--"),
                    *(f"{name}={value}" for name, value in variables.items()),
                    *("--", self.workdir or settings.get("WorkingDir") or "/"),
                    *(settings["Entrypoint"] if self.command is None else self.command),
                    *self.arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self._log = log
        return self

    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, seconds: float = 1800) -> int:
        return self._process.wait(seconds)

    def signal(self, number: int) -> None:
        """As `docker kill --signal`: to the container's first process."""
        os.kill(self._first(), number)

    def health(self, **env: str) -> tuple[int, str]:
        """Exit code and words of the image's health check, run beside what runs here as Docker does."""
        settings = self.engine.config(self.image)
        variables = [*settings["Env"], *(f"{name}={value}" for name, value in env.items())]
        uid, gid = self.user.split(":")
        enter = ["nsenter", "--target", str(self._first()), "--mount", "--pid", "--uts", "--root", "--wd"]
        check = ["/usr/bin/env", "-i", *variables, *settings["Healthcheck"]["Test"][1:]]
        command = [*enter, "--setuid", uid, "--setgid", gid, "--", *check]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, (done.stdout + done.stderr).strip()

    def _first(self) -> int:
        unshare = self._process.pid
        return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text(encoding="utf-8").split()[0])

    def close(self) -> None:
        """End it, if it still runs, with all its processes."""
        if self.running():
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def error(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output."""
        return json.loads(self._out.read_text(encoding="utf-8").splitlines()[-1])
