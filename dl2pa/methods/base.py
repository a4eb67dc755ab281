"""The contract between a method and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch import distributed as dist

from dl2pa.assignment import Matching
from dl2pa.methods.options import MethodOptions
from dl2pa.methods.targets import Targets
from dl2pa.model.head import ClassifierHead


class Method(nn.Module, ABC):
    """A classifier over embeddings [B, d]: its loss, its logits and what it learns between gradient steps.

    A method's state dict is complete: with the embedder's it determines every prediction, and with the data every later
    step.

    Args:
        options: the choices in force.

    Buffers:
        adjustment: added to the logits of training's cross-entropy, [C]; None: nothing is.
    """

    adjustment: Tensor | None

    def __init__(self, num_classes: int, dim: int, options: MethodOptions) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dim = dim
        self.options = options
        self.register_buffer("adjustment", None, persistent=False)

    @abstractmethod
    def loss(self, features: Tensor, targets: Targets) -> Tensor:
        """Scalar training loss, float32."""

    @abstractmethod
    def head(self) -> ClassifierHead:
        """What predicts at present."""

    @abstractmethod
    def class_vectors(self) -> Tensor:
        """Unit class vectors [C, d] in force, row c for class c."""

    def logits(self, features: Tensor) -> Tensor:
        """Scores [B, C] in the order of the labels; a softmax of them is the predicted distribution."""
        return self.head().logits(features)

    def set_class_counts(self, counts_c: Tensor) -> None:
        """Told once, before training: the images of each class in the training half, int64 [C].

        With `options.logit_adjustment` τ, training's cross-entropy adds τ log π_c to the logits, π_c = n_c / N, and
        prediction does not (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021). A class without images
        counts as having one.
        """
        strength = self.options.logit_adjustment
        if strength and self.options.loss == "cross_entropy":
            shares = counts_c.clamp(min=1).double() / counts_c.sum()
            self.adjustment = (strength * shares.log()).float()

    def begin_epoch(self, epoch: int) -> None:
        """Told before the first step of an epoch, when a run resumes inside it, and before the validation that
        precedes it."""

    def observe(self, features: Tensor, targets: Targets) -> None:
        """After each optimizer step: learn from its features what no gradient teaches. No host sync; may be a
        collective."""

    def due_after_step(self, epoch: int, global_step: int) -> bool:
        """Whether ``rematch`` is due after this step."""
        return False

    def due_after_epoch(self, epoch: int) -> bool:
        """Whether ``rematch`` is due after this epoch's last step."""
        return False

    def rematch(self, group: dist.ProcessGroup | None = None) -> Matching | None:
        """Assign labels to prototypes anew; a collective."""
        return None

    def refresh(self) -> None:
        """Recompute what is derived from the state, after a load."""

    def gather_state(self) -> None:
        """Bring parts that the ranks hold separately together on every rank (before a save); a collective."""

    def keep_on_rank_zero(self) -> None:
        """Undo the doubling of gathered parts: rank 0 keeps them, the others start from nothing."""

    def unsynced_buffers(self) -> set[str]:
        """Names of buffers that DDP must leave alone."""
        return {name for name, _ in self.named_buffers()}
