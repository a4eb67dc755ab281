"""What is in the images, how big it is, and what builds it again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from testing.engine import BASE, Engine, sha256
from testing.report import check, say

REPOSITORY = Path(__file__).resolve().parents[2]
_CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
_NOTHING_IN = (
    "root/.cache",
    "etc/pip.conf",
    "build",
    "tmp/*",
    "mnt/*",
    "var/lib/apt/lists/*",
    "run/secrets/*",
)


def sources(place: Path) -> Path:
    """A fresh copy of the working tree, as a clone elsewhere would be: other times, tighter rights."""
    shutil.rmtree(place, ignore_errors=True)
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if not (REPOSITORY / name).is_file():
            continue  # deleted, and not committed yet
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, target)
        target.chmod(0o700 if os.access(REPOSITORY / name, os.X_OK) else 0o600)
    return place


def revision() -> str:
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def packages(image: Path) -> dict[str, str]:
    """Every installed Python package and its version."""
    found: dict[str, str] = {}
    for folder in image.glob("opt/venv/lib/python3*/site-packages/*.dist-info"):
        name, _, version = folder.name.removesuffix(".dist-info").rpartition("-")
        found[name.lower().replace("_", "-").replace(".", "-")] = version
    return found


def hashes(image: Path, below: str) -> dict[str, str]:
    """SHA-256 of every file below a folder of the image, links by where they lead."""
    found: dict[str, str] = {}
    for path in sorted((image / below).rglob("*")):
        name = str(path.relative_to(image))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file():
            found[name] = sha256(path)
    return found


def pinned() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.lower().replace("_", "-").replace(".", "-"): version for name, version in pairs}


@dataclass(frozen=True)
class Contents:
    """The Python packages of an image and the hashes of its files: ours, and everybody else's."""

    packages: dict[str, str]
    ours: dict[str, str]
    others: dict[str, str]

    @classmethod
    def of(cls, image: Path) -> Contents:
        return cls(packages(image), hashes(image, "opt/dl2pa"), hashes(image, "opt/venv"))


def check_contents(engine: Engine, name: str) -> None:
    """Nothing but what is meant to be there."""
    image = engine.mount(name)
    installed = packages(image)
    loose = {n: v for n, v in installed.items() if pinned().get(n) != v}
    check(not loose, f"not as constraints.txt says: {loose}")
    check("pip" not in installed, "pip is in the image")
    left = [str(path) for pattern in _NOTHING_IN for path in image.glob(pattern)]
    check(not left, f"left behind: {left}")
    theirs = sha256(engine.mount(BASE) / _CERTIFICATES)
    check(sha256(image / _CERTIFICATES) == theirs, "the building machine's certificates are in the image")
    closed = [p for p in (image / "opt").rglob("*") if not p.is_symlink() and not p.stat().st_mode & 0o004]
    check(not closed, f"not readable by every user: {closed[:3]}")
    user = engine.config(name)["User"]
    check(user and not user.startswith(("0", "root")), f"runs as {user or 'root'}")
    say(
        f"{name}: contents",
        f"{len(installed)} packages, all as in constraints.txt; no pip, no caches; user {user}",
    )


def tell_size(engine: Engine, name: str) -> None:
    layers = engine.layers(name)
    say(f"{name}: size", f"{sum(size for size, _ in layers) / 1e6:.0f} MB")
    for size, text in layers:
        if size >= 100_000:
            print(
                f"          {size / 1e6:>8.1f} MB  {' '.join(text.removeprefix('/bin/sh -c').split())[:100]}"
            )


def check_code_change(engine: Engine, place: Path) -> None:
    """One changed line of code builds the code's layers anew and nothing else."""
    with (place / "dl2pa/errors.py").open("a", encoding="utf-8") as file:
        file.write(f"# one more line, never seen before: {time.time_ns()}\n")
    built = engine.build(place, "dl2pa-changed", "train", revision())
    again = [step for step in built.steps if not step.cached]
    check(again, "the change was not noticed")
    reached = [i for i, s in enumerate(built.steps) if s.text.startswith("COPY --from=code")]
    last = [step for step in built.steps[reached[0] :] if step.stage == "train"]
    other = [step.text for step in again if step.stage != "code" and step not in last]
    check(not other, f"built again for a line of code: {other}")
    say("one changed line", f"{built.seconds:.1f} s; {len(again)} of {len(built.steps)} steps again:")
    for step in again:
        print(f"          {step.stage:<8} {' '.join(step.text.split())[:100]}")


def check_reproducible(before: Contents, after: Contents) -> None:
    """The second build has the same packages and, file by file, the same code."""
    check(after.packages == before.packages, "the second build has other package versions")
    differ = _differing(before.ours, after.ours)
    check(not differ, f"the second build's code differs: {differ[:5]}")
    whole = hashlib.sha256(json.dumps(after.ours, sort_keys=True).encode()).hexdigest()[:16]
    say("the same twice", f"{len(after.packages)} package versions; our {len(after.ours)} files ({whole})")
    others = _differing(before.others, after.others)
    sources = [name for name in others if not name.endswith(".pyc")]
    check(not sources, f"the second build's packages differ: {sources[:5]}")
    shown = f", compiled Python all: {' '.join(others[:5])}" if others else ""
    say("", f"of {len(after.others)} files of packages {len(others)} differ{shown}")


def _differing(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
