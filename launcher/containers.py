"""Run the task of a node in a container image, with Pyxis if srun supports it, otherwise with Apptainer."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dl2pa import envvars
from dl2pa.errors import UserError


@dataclass(frozen=True)
class Container:
    """An image, its engine and the host folders that are mounted under the same paths."""

    image: str
    engine: str
    """`pyxis`, or the path of apptainer or singularity."""
    mounts: tuple[str, ...]

    @classmethod
    def find(
        cls, image: str, run_dirs: Sequence[Path], more: Iterable[str] = (), engine: str | None = None
    ) -> Container:
        """Select the engine that is available on this cluster.

        Args:
            more: folders to mount in addition to the working directory, the run directories and DL2PA_DATA.
            engine: `pyxis`, `apptainer` or `singularity`; None takes the one that is available.

        Raises:
            UserError: no engine is available, or a folder name cannot be mounted.
        """
        data = os.environ.get(envvars.DATA)
        folders = [
            str(Path.cwd()),
            *(str(run_dir.parent) for run_dir in run_dirs),
            *more,
            *([data] if data and "://" not in data else []),  # object storage needs no mount
        ]
        mounts = tuple(_outermost(folders))
        for folder in mounts:
            bad = next((c for c in folder if c in ",:" or not c.isprintable()), None)
            if bad is not None:
                message = f"contains {bad!r}, which would split it into several mounts"
                raise UserError("--container", folder, message, "Use folders without , and : in their names.")
        if engine in (None, "pyxis") and _srun_has_pyxis():
            return cls(image, "pyxis", mounts)
        for name in ("apptainer", "singularity"):
            if engine in (None, name) and (program := shutil.which(name)):
                return cls(image, program, mounts)
        message = "neither srun --container-image (Pyxis) nor apptainer is available"
        if engine is not None:
            message = f"the engine of the site file, {engine}, is not available"
        remedy = "Submit without --container, or ask your administrator."
        raise UserError("--container", image, message, remedy)

    def srun_options(self) -> list[str]:
        """Container options of srun."""
        if self.engine != "pyxis":
            return []
        return [
            f"--container-image={self.image}",
            f"--container-mounts={','.join(f'{m}:{m}' for m in self.mounts)}",
            f"--container-workdir={Path.cwd()}",
            "--no-container-mount-home",
        ]

    def prefix(self) -> list[str]:
        """Command prefix that runs the program in the container.

        Apptainer passes the whole host environment, so PYTHONPATH is unset: it could name packages for another Python
        version. With Pyxis, variables of the image take precedence.
        """
        if self.engine == "pyxis":
            return []
        binds = [part for m in self.mounts for part in ("--bind", m)]
        where = ["--pwd", str(Path.cwd())]
        return [self.engine, "exec", "--nv", *binds, *where, self.image, "env", "--unset=PYTHONPATH"]


def _srun_has_pyxis() -> bool:
    try:
        done = subprocess.run(["srun", "--help"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "--container-image" in done.stdout


def _outermost(folders: Iterable[str]) -> list[str]:
    """Sort the folders and remove those inside another one."""
    kept: list[str] = []
    for folder in sorted({os.path.abspath(f) for f in folders}):  # noqa: PTH100
        if not any(folder == k or folder.startswith(k.rstrip("/") + "/") for k in kept):
            kept.append(folder)
    return kept
