"""How a method trains and matches, once every choice is made."""

from __future__ import annotations

from dataclasses import dataclass, field

from dl2pa.assignment import MatchSchedule
from dl2pa.specs import MAX_LOGITS


@dataclass(frozen=True)
class MethodOptions:
    """The choices in force; a method's own ones come from the catalog, through `Entry.options`.

    Args:
        loss: squared_cosine, dot_regression or cross_entropy.
        dynamic: match labels to prototypes anew, by `schedule`.
        scale: factor of the scores in cross_entropy.
        label_smoothing: of cross_entropy.
        normalize: whether cross_entropy sees cosines or dot products with the raw features.
        sub_prototypes: vectors a class, where a method has several.
        centroid_momentum: weight of the old sub-centroid at an update.
        learn_scale: start from `scale` and learn it.
        margin: taken off the cosine to the own class in the training loss.
        logit_adjustment: τ of the τ log π_c that cross_entropy adds in training, π_c the class's share of its images.
        warmup_scale: of the learned classifier's cosines during the schedule's warm-up.
        momentum: weight of the previous statistic at a matching.
        refit_cosine: largest cosine between prototypes that follow their classes; None: they stay.
        max_logits: logits that exist at a time in cross_entropy.
    """

    loss: str
    dynamic: bool
    scale: float
    label_smoothing: float
    normalize: bool
    sub_prototypes: int
    centroid_momentum: float
    learn_scale: bool = False
    margin: float = 0.0
    logit_adjustment: float = 0.0
    warmup_scale: float = 14.0
    momentum: float = 0.0
    refit_cosine: float | None = None
    max_logits: int = MAX_LOGITS
    schedule: MatchSchedule = field(default_factory=MatchSchedule)
