"""The exact solve beside the training: in a process of its own, started again if it dies."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import IO

import numpy as np
from numpy.typing import NDArray

from dl2pa.assignment import solve
from dl2pa.assignment.solve import Floats
from dl2pa.errors import TrainingFailure

log = logging.getLogger(__name__)

_ATTEMPTS = 2
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}


class BackgroundSolve:
    """`solve_assignment` in a child process: one thread, low priority, killed with its parent.

    The child dies with the thread that starts it too, so let that be one that lives on.

    Args:
        rows_cd: statistic [C, d]; not to be changed until the result is there.
        prototypes_cd: P [C, d]; likewise.
    """

    def __init__(self, rows_cd: Floats, prototypes_cd: Floats) -> None:
        self._rows = np.ascontiguousarray(rows_cd, dtype=np.float64)
        self._prototypes = np.ascontiguousarray(prototypes_cd, dtype=np.float64)
        self._attempts = 0
        self._start()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def tend(self) -> None:
        """Replace a child that died, once: early, so that its successor has time left."""
        code = self._process.poll()
        if code and self._attempts < _ATTEMPTS:
            self._start_again(code)

    def ready(self, seconds: float = 0.0) -> bool:
        """Whether the result is there, waiting for at most `seconds`. A child that died is replaced, once.

        Raises:
            TrainingFailure: its successor died too.
        """
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        if code == 0:
            return True
        if self._attempts >= _ATTEMPTS:
            gib = 8 * len(self._rows) ** 2 / 2**30
            raise TrainingFailure(
                f"the matching of {len(self._rows)} classes could not be solved: twice its process "
                f"{self._why(code)}. It needs {gib:.1f} GiB beside the training; resume with more memory."
            )
        self._start_again(code)
        return False

    def result(self) -> NDArray[np.int64]:
        """σ, int64 [C]; waits for it.

        Raises:
            TrainingFailure: the child died, and its successor too.
        """
        while not self.ready(3600.0):
            pass
        self._target.seek(0)
        return np.frombuffer(self._target.read(), dtype=np.int64).copy()

    def close(self) -> None:
        """End the child if it still runs, and give back what it held."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._target.close()
        self._complaint.close()

    def _start_again(self, code: int) -> None:
        log.warning("the process that solves the matching %s: started again", self._why(code))
        self.close()
        self._start()

    def _start(self) -> None:
        self._attempts += 1
        self._target = _memory()
        self._complaint = _memory()
        with _memory() as source:
            for part in (self._rows, self._prototypes):
                source.write(part.data)
            source.flush()
            descriptors = source.fileno(), self._target.fileno()
            words = (os.getpid(), *descriptors, *self._rows.shape)
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(solve.__file__), *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._complaint,
                pass_fds=descriptors,
                # A group of its own: a stop signal to the training's group is not for it. The same session: with the
                # kernel's autogroups a lower priority holds only within one.
                process_group=0,
                env={**os.environ, **_ONE_THREAD},
            )

    def _why(self, code: int) -> str:
        if code < 0:
            return f"was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        self._complaint.seek(0)
        last = self._complaint.read().decode(errors="replace").strip().splitlines()[-1:]
        return f"ended with {code}: {' '.join(last) or 'no message'}"


def _memory() -> IO[bytes]:
    """A file that no disk holds and no name shows."""
    return os.fdopen(os.memfd_create("dl2pa-matching"), "w+b")
