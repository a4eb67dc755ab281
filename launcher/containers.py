"""Running a node's task in an image: Pyxis where srun has it, else Apptainer; requeueing stays outside."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dl2pa import envvars
from dl2pa.errors import UserError


class _Run(Protocol):
    @property
    def run_dir(self) -> Path: ...


@dataclass(frozen=True)
class Container:
    """An image and the engine that runs it; the host's folders appear in it under their own names."""

    image: str
    engine: str
    """`pyxis`, or the path of apptainer or singularity."""
    mounts: tuple[str, ...]

    @classmethod
    def find(cls, image: str, runs: Sequence[_Run], more: Iterable[str] = ()) -> Container:
        """Choose the engine this cluster has.

        Args:
            more: folders besides the working directory, the runs' and DL2PA_DATA.

        Raises:
            UserError: it has none.
        """
        data = os.environ.get(envvars.DATA)
        folders = [str(Path.cwd()), *(str(r.run_dir.parent) for r in runs), *more, *([data] if data else [])]
        mounts = tuple(_outermost(folders))
        for folder in mounts:
            bad = next((c for c in folder if c in ",:" or not c.isprintable()), None)
            if bad is not None:
                message = f"holds {bad!r}, which would divide it into several mounts"
                raise UserError(
                    "--container", folder, message, "Choose folders without , and : in their names."
                )
        if _srun_has_pyxis():
            return cls(image, "pyxis", mounts)
        for name in ("apptainer", "singularity"):
            found = shutil.which(name)
            if found:
                return cls(image, found, mounts)
        message = "neither srun --container-image (Pyxis) nor apptainer is on this machine"
        raise UserError("--container", image, message, "Submit without it, or ask the cluster.")

    def srun_options(self) -> list[str]:
        """What srun itself needs to know."""
        if self.engine != "pyxis":
            return []
        return [
            f"--container-image={self.image}",
            f"--container-mounts={','.join(f'{m}:{m}' for m in self.mounts)}",
            f"--container-workdir={Path.cwd()}",
            "--no-container-mount-home",
        ]

    def prefix(self) -> list[str]:
        """What stands before the program.

        Apptainer hands the environment on by itself, all of it: a PYTHONPATH of the host's would bring packages for
        another Python in. Pyxis gives the image's own variables precedence.
        """
        if self.engine == "pyxis":
            return []
        binds = [part for m in self.mounts for part in ("--bind", m)]
        where = ["--pwd", str(Path.cwd())]
        return [self.engine, "exec", "--nv", *binds, *where, self.image, "env", "--unset=PYTHONPATH"]


def _srun_has_pyxis() -> bool:
    try:
        done = subprocess.run(["srun", "--help"], capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return False
    return "--container-image" in done.stdout


def _outermost(folders: Iterable[str]) -> list[str]:
    """Without those inside another, in a fixed order."""
    kept: list[str] = []
    for folder in sorted({os.path.abspath(f) for f in folders}):  # noqa: PTH100
        if not any(folder == k or folder.startswith(k.rstrip("/") + "/") for k in kept):
            kept.append(folder)
    return kept
