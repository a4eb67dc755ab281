"""Mean training loss, summed on the device in fixed point so that resumed runs are bit-identical."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from dl2pa.errors import TrainingFailure
from dl2pa.training.distributed import World

_ONE = 2.0**24
_NEVER = 2**62
_MAX_LOSS = 2.0**24  # larger finite losses are clamped, so that 2^14 of them do not overflow


class TrainMeter:
    """Mean loss since the last reading, and the first step with a non-finite loss."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums = torch.zeros(2, dtype=torch.int64, device=world.device)
        self._first_bad = torch.full((1,), _NEVER, dtype=torch.int64, device=world.device)

    @torch.no_grad()
    def add(self, loss: Tensor, step: int) -> None:
        """Add one step's loss; no host sync."""
        finite = torch.isfinite(loss)
        fixed = (torch.where(finite, loss, 0.0).double().clamp(-_MAX_LOSS, _MAX_LOSS) * _ONE).round().long()
        self._sums += torch.stack([fixed, torch.ones_like(fixed)])
        bad = torch.where(finite, _NEVER, step)
        self._first_bad = torch.minimum(self._first_bad, bad)

    @torch.no_grad()
    def add_bad(self, bad: Tensor, step: int) -> None:
        """Record whether something other than the loss was not finite at a step; no host sync."""
        self._first_bad = torch.minimum(self._first_bad, torch.where(bad, step, _NEVER))

    def check(self, last_good: str, figures: Sequence[int] = ()) -> list[int]:
        """Check that no rank had a non-finite loss; a collective and a host sync.

        Args:
            figures: integers of this rank, equally many on each, gathered in the same collective.

        Returns:
            The maximum of each figure over the ranks.

        Raises:
            TrainingFailure: names the step, the rank and the last good checkpoint.
        """
        local = torch.cat(
            [self._first_bad, torch.tensor(figures, dtype=torch.int64).to(self._first_bad.device)]
        )
        gathered = [local]
        if self._world.size > 1:
            gathered = [torch.empty_like(local) for _ in range(self._world.size)]
            dist.all_gather(gathered, local)
        rows = torch.stack(gathered).tolist()
        steps = [row[0] for row in rows]
        if min(steps) < _NEVER:
            rank = steps.index(min(steps))
            raise TrainingFailure(
                f"the loss or a weight became NaN or infinite at step {min(steps)} on rank {rank}; "
                f"last good checkpoint: {last_good}. "
                "Lower optim.lr, set optim.clip_norm, or use another train.precision, then resume."
            )
        return [max(column) for column in zip(*(row[1:] for row in rows), strict=True)]

    def gather(self) -> None:
        """All-reduce the sums over the ranks; a collective."""
        if self._world.size > 1:
            dist.all_reduce(self._sums)

    def keep_on_rank_zero(self) -> None:
        """Set the sums to zero on the other ranks, after ``gather``."""
        if not self._world.is_main:
            self._sums.zero_()

    def read(self) -> float:
        """Mean loss over ranks and steps since the last reading; resets the sums; a collective."""
        self.gather()
        total, count = self._sums.tolist()
        self._sums.zero_()
        return total / _ONE / max(1, count)

    def state(self) -> list[int]:
        """The reduced sums, after ``gather``."""
        return self._sums.tolist()

    def load(self, sums: list[int]) -> None:
        """Restore the sums on rank 0; the other ranks start from zero."""
        self._sums.copy_(torch.tensor(sums if self._world.is_main else [0, 0]))
