"""Schedule of assignment updates: a pure function of epoch and step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MatchSchedule:
    """Schedule of assignment updates; 0 disables a rule.

    Args:
        every_epochs: update after every N epochs.
        every_steps: update after every N global steps.
        early_steps, early_epochs: update after every `early_steps` global steps in the first `early_epochs` epochs
            after the warm-up.
        warmup_epochs: the first update is at the end of the last of these epochs.
        last_epoch: no update after this number of epochs.
    """

    every_epochs: int = 1
    every_steps: int = 0
    early_steps: int = 0
    early_epochs: int = 0
    warmup_epochs: int = 0
    last_epoch: int | None = None

    def after_step(self, epoch: int, global_step: int) -> bool:
        """Whether to update after `global_step` steps, in `epoch` (0-based)."""
        if epoch < self.warmup_epochs or self._over(epoch):
            return False
        early = self.early_steps and epoch < self.warmup_epochs + self.early_epochs
        return bool(
            (self.every_steps and global_step % self.every_steps == 0)
            or (early and global_step % self.early_steps == 0)
        )

    def after_epoch(self, epoch: int) -> bool:
        """Whether to update at the end of `epoch` (0-based), before its validation."""
        if epoch < self.warmup_epochs - 1 or self._over(epoch):
            return False
        if self.warmup_epochs and epoch == self.warmup_epochs - 1:
            return True
        return bool(self.every_epochs and (epoch + 1) % self.every_epochs == 0)

    def _over(self, epoch: int) -> bool:
        return self.last_epoch is not None and epoch >= self.last_epoch
