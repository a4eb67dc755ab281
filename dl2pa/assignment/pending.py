"""A matching that is solved while training goes on."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from dl2pa.assignment.background import BackgroundSolve
from dl2pa.assignment.insight import Insight, with_margin
from dl2pa.assignment.match import Matching, is_main, settle, take
from dl2pa.assignment.solve import centred_cost
from dl2pa.assignment.statistic import ClassStatistic
from dl2pa.errors import TrainingFailure

_WAITING, _SOLVED, _FAILED = range(3)


class PendingMatching:
    """A matching begun at one step and applied at a later one, the same σ whenever and wherever it is solved.

    The rows Q it is solved from stay in the statistic until the next one begins, so with ``state`` a checkpoint has
    all of it. Made by ``begin`` or ``resume``; then ``ready`` until it says so, and ``finish``.

    Attributes:
        began, due: steps of the statistic and of the assignment.
    """

    def __init__(
        self,
        statistic: ClassStatistic,
        prototypes_cd: Tensor,
        assignment_c: Tensor,
        group: dist.ProcessGroup | None,
        state: dict[str, Any],
    ) -> None:
        self.began, self.due = int(state["began"]), int(state["due"])
        self._rows = statistic.rows
        self._prototypes = prototypes_cd
        self._assignment = assignment_c
        self._group = group
        self._state = state
        self._seconds = 0.0
        self._solve: BackgroundSolve | None = None
        if is_main(group):
            points = prototypes_cd.double().cpu().numpy()
            self._solve = BackgroundSolve(statistic.rows.cpu().numpy(), points)

    @classmethod
    def begin(
        cls,
        statistic: ClassStatistic,
        prototypes_cd: Tensor,
        assignment_c: Tensor,
        step: int,
        lag: int,
        momentum: float = 0.0,
        group: dist.ProcessGroup | None = None,
    ) -> PendingMatching:
        """Reduce the statistic now, begin it anew, and let rank 0 solve in the background; a collective.

        Args:
            step: at which this is.
            lag: steps after which the assignment is to be applied.
        """
        taken = take(statistic, prototypes_cd, assignment_c, momentum, group)
        state: dict[str, Any] = {"began": step, "due": step + lag, "insight": None}
        state.update(own_cosine=taken.own_cosine, classes_seen=taken.classes_seen)
        pending = cls(statistic, prototypes_cd, assignment_c, group, state)
        if is_main(group):
            state["insight"] = asdict(taken.look())
        pending._seconds = taken.seconds
        return pending

    @classmethod
    def resume(
        cls,
        state: dict[str, Any],
        statistic: ClassStatistic,
        prototypes_cd: Tensor,
        assignment_c: Tensor,
        group: dist.ProcessGroup | None = None,
    ) -> PendingMatching:
        """Solve again what ``state`` was saved of, from the restored statistic, prototypes and assignment."""
        return cls(statistic, prototypes_cd, assignment_c, group, state)

    @property
    def pid(self) -> int | None:
        """The solving process, on rank 0."""
        return None if self._solve is None else self._solve.pid

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the statistic; rank 0's is the one to keep."""
        return self._state

    def tend(self) -> None:
        """See after the solving process; cheap, for every step."""
        if self._solve is not None:
            self._solve.tend()

    def ready(self, seconds: float = 0.0) -> bool:
        """Whether rank 0 has the assignment, waiting for at most `seconds`; a collective.

        Raises:
            TrainingFailure: on every rank, the solving process died and its successor too.
        """
        began = time.perf_counter()
        found, failure = torch.tensor([_WAITING]), None
        if self._solve is not None:
            try:
                found.fill_(_SOLVED if self._solve.ready(seconds) else _WAITING)
            except TrainingFailure as error:
                found.fill_(_FAILED)
                failure = error
        if dist.is_initialized():
            found = found.to(self._assignment.device)
            dist.broadcast(found, group=self._group, group_src=0)
        answer = int(found)
        if answer == _FAILED:
            raise failure or TrainingFailure("rank 0 could not solve the matching")
        self._seconds += time.perf_counter() - began
        return answer == _SOLVED

    def finish(self, step: int) -> Matching:
        """Apply the assignment at `step`, waiting for it where it is not ready yet; a collective.

        Raises:
            TrainingFailure: as ``ready``; or the ranks hold different assignments afterwards.
        """
        while not self.ready(1.0):
            pass
        solved = None if self._solve is None else self._solve.result()
        self.close()
        facts = float(self._state["own_cosine"]), int(self._state["classes_seen"])
        result = settle(self._rows, self._prototypes, self._assignment, solved, *facts, self._group)
        insight = None
        if solved is not None and self._state["insight"] is not None:
            rows, points = self._rows.cpu().numpy(), self._prototypes.double().cpu().numpy()
            insight = Insight(**self._state["insight"])
            insight = with_margin(insight, lambda: centred_cost(rows, points), solved)
        seconds, lag = self._seconds + result.seconds, step - self.began
        return replace(result, seconds=seconds, insight=insight, lag=lag)

    def close(self) -> None:
        """Give up the solving process."""
        if self._solve is not None:
            self._solve.close()
