"""Interface between a method and the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch import distributed as dist

from dl2pa.assignment import Matching
from dl2pa.methods.losses import head_cross_entropy
from dl2pa.methods.negatives import sampled_cross_entropy
from dl2pa.methods.options import MethodOptions
from dl2pa.methods.targets import Targets
from dl2pa.model.head import ClassifierHead


class Method(nn.Module, ABC):
    """Classifier on embeddings [B, d]: loss, logits and state that is not trained by gradients.

    The state dict is complete: with the embedder's it determines every prediction, and with the data every later step.

    Buffers:
        adjustment: values added to the logits of the training cross-entropy, [C], or None.
        neighbors: nearest classes of each class, int64 [C, K]; None if the loss uses none. Recomputed by ``refresh``.
    """

    adjustment: Tensor | None
    neighbors: Tensor | None

    def __init__(self, num_classes: int, dim: int, options: MethodOptions) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dim = dim
        self.options = options
        self.register_buffer("adjustment", None, persistent=False)
        self.register_buffer("neighbors", None, persistent=False)

    @abstractmethod
    def loss(self, features: Tensor, targets: Targets) -> Tensor:
        """Return the training loss, a float32 scalar."""

    @abstractmethod
    def head(self) -> ClassifierHead:
        """Return the current classifier head."""

    @abstractmethod
    def class_vectors(self) -> Tensor:
        """Return the current unit class vectors [C, d], row c for class c."""

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [B, C]; their softmax is the predicted distribution."""
        return self.head().logits(features)

    def set_class_counts(self, counts_c: Tensor) -> None:
        """Set the number of training images per class, int64 [C]. Call once, before training.

        With τ = `options.logit_adjustment`, the training cross-entropy adds τ log π_c to the logits, π_c = n_c / N;
        predictions are not adjusted (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021). A class
        without images counts as having one.
        """
        strength = self.options.logit_adjustment
        if strength and self.options.loss == "cross_entropy":
            shares = counts_c.clamp(min=1).double() / counts_c.sum()
            self.adjustment = (strength * shares.log()).float()

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for an epoch. Called before its first step, after resuming within it, and before the validation
        that precedes it."""

    def count_batch(self, targets: Targets) -> Targets:
        """Add the counts of the global batch that the loss uses, before the batch is split into micro-batches. May be a
        collective."""
        return targets

    def cross_entropy(
        self, features: Tensor, targets: Targets, label_smoothing: float = 0.0, margin: float | Tensor = 0.0
    ) -> Tensor:
        """Return the cross-entropy of the head over all classes, or over those that the options select."""
        head, options = self.head(), self.options
        if not (options.neighbors or options.random_negatives):
            settings = label_smoothing, margin, self.adjustment, options.max_logits, options.gce_q
            return head_cross_entropy(head, features, targets, *settings)
        assert (targets.negatives is not None) == bool(options.random_negatives), "no classes were drawn"
        settings = self.neighbors, margin, self.adjustment, options.gce_q
        return sampled_cross_entropy(head, features, targets, *settings)

    @property
    def uses_pooled(self) -> bool:
        """Whether ``observe`` needs the features of the backbone, or the input if `options.statistic_of_input`."""
        return False

    def observe(self, features: Tensor, targets: Targets, pooled: Tensor | None = None) -> None:
        """Update state that is not trained by gradients, after each optimizer step. No host sync; may be a collective.

        Args:
            features: embeddings [B, d].
            pooled: features of the backbone or input vectors [B, F], if `uses_pooled`.
        """

    def due_after_step(self, epoch: int, global_step: int) -> bool:
        """Return whether to call ``rematch`` after this step."""
        return False

    def due_after_epoch(self, epoch: int) -> bool:
        """Return whether to call ``rematch`` after this epoch's last step."""
        return False

    def rematch(self, group: dist.ProcessGroup | None = None) -> Matching | None:
        """Update the assignment of labels to prototypes; a collective. None if the method has none."""
        return None

    def refresh(self) -> None:
        """Recompute buffers derived from the state, after loading it."""

    def hold_vectors(self) -> None:
        """Set class vectors that are trained from a later epoch on to those that hold until then."""

    def gather_state(self) -> None:
        """Sum statistics that are separate per rank, before a save; every rank gets the total. A collective."""

    def keep_on_rank_zero(self) -> None:
        """Reset gathered statistics on all ranks but 0, so that they count once."""

    def unsynced_buffers(self) -> set[str]:
        """Return the names of buffers that DDP must not broadcast."""
        return {name for name, _ in self.named_buffers()}
