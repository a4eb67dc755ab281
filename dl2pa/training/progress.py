"""Position and history of a run: the part of its state that is plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dl2pa.errors import UserError


@dataclass
class Progress:
    """Position and history of a run.

    Attributes:
        epoch, step: 0-based epoch, and steps done in it.
        global_step: steps done in the run.
        phase: `train`, or `evaluate` between the epoch's assignment update and the end of its validation.
        history: one entry per validation.
        labels_moved: one number per assignment update.
        best: highest top-1 accuracy so far and its global step.
        bad_images: unreadable training images found so far on any rank, sorted.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    phase: str = "train"
    history: list[dict[str, Any]] = field(default_factory=list)
    labels_moved: list[int] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    bad_images: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def record(self, entry: dict[str, Any]) -> bool:
        """Add a validation; True if it is the best so far. An entry of the same step is replaced."""
        self.history = [h for h in self.history if h["step"] != entry["step"]]
        self.history.append(entry)
        if not self.best or entry["top1"] > self.best["top1"]:
            self.best = {"top1": entry["top1"], "step": entry["step"]}
            return True
        return False

    def accuracies(self) -> dict[str, float]:
        """Top-1 accuracy of the last and the best validation, with their epochs; empty before the first one."""
        if not self.history:
            return {}
        last, best = self.history[-1], max(self.history, key=lambda entry: entry["top1"])
        return {
            "top1": last["top1"],
            "epoch_last": last["epoch"],
            "top1_best": best["top1"],
            "epoch_best": best["epoch"],
        }

    @property
    def validated(self) -> bool:
        """Whether a validation at the current step is recorded."""
        return bool(self.history) and self.history[-1]["step"] == self.global_step

    def is_exhausted(self, patience: int | None, first_epoch: int) -> bool:
        """Whether the validation at the current step shows `patience` epochs without a better top-1 accuracy.

        Args:
            patience: `train.patience`; None never ends a run.
            first_epoch: number of epochs after which the validations count.
        """
        counted = [entry for entry in self.history if entry["epoch"] >= first_epoch]
        if patience is None or not counted or not self.validated:
            return False
        best = max(counted, key=lambda entry: entry["top1"])  # the first of equal ones
        return counted[-1]["epoch"] - best["epoch"] >= patience

    def check_end(self, epochs: int, max_steps: int | None) -> None:
        """Check that the run is not beyond the configured end of training.

        Raises:
            UserError: for train.epochs or train.max_steps.
        """
        if self.epoch > epochs or (self.epoch == epochs and not self.validated):
            message, remedy = f"the run has done {self.epoch} epochs", f"Give at least {self.epoch + 1}."
            raise UserError("train.epochs", epochs, message, remedy)
        if max_steps is not None and self.global_step > max_steps:
            message, remedy = f"the run is at step {self.global_step}", f"Give at least {self.global_step}."
            raise UserError("train.max_steps", max_steps, message, remedy)

    def over(self, epochs: int, max_steps: int | None) -> bool:
        """Whether the run has ended, including its last validation."""
        if self.phase != "train":
            return False
        at_limit = max_steps is not None and self.global_step >= max_steps
        return self.epoch >= epochs or (at_limit and self.validated)
