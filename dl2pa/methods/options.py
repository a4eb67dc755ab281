"""Resolved options of a method."""

from __future__ import annotations

from dataclasses import dataclass, field

from dl2pa.assignment import MatchSchedule
from dl2pa.specs import MAX_LOGITS


@dataclass(frozen=True)
class MethodOptions:
    """Options of a method; `Entry.options` supplies the method's defaults.

    Args:
        loss: squared_cosine, dot_regression, cross_entropy or ntce.
        dynamic: update the assignment of labels to prototypes by `schedule`.
        scale: factor between scores and logits in cross_entropy.
        label_smoothing: label smoothing of cross_entropy.
        normalize: use cosines in cross_entropy, otherwise dot products with the raw features.
        sub_prototypes: vectors per class, for methods with several.
        centroid_momentum: weight of the old sub-centroid in an update.
        learn_scale: train the scale, starting at `scale`.
        margin: subtracted from the cosine to the label's class vector in the training loss.
        logit_adjustment: τ; cross_entropy adds τ log π_c in training, π_c the fraction of images in class c.
        warmup_scale: scale of the learned classifier during the warm-up.
        momentum: weight of the previous statistic in an assignment update.
        refit_cosine: largest cosine between prototypes that follow their classes; None: prototypes are fixed.
        pooled_dim: dimension of the backbone features whose class means decide the assignment; None: those of the
            embedding do.
        quadratic: compare similarities of classes with those of prototypes in an assignment update.
        rotate: rotate the prototypes to the class means at an assignment update.
        statistic_of_input: `pooled_dim` is the dimension of the input vectors, whose class means decide instead.
        release_epoch: number of epochs after which gradients train the class vectors from their position; None: never.
        neighbors, random_negatives: numbers of nearest and of random classes in the denominator of cross_entropy; both
            0: all classes.
        gce_q: exponent of the generalized cross-entropy; 0: cross-entropy.
        max_logits: largest number of logits that exist at a time in cross_entropy.
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
    pooled_dim: int | None = None
    quadratic: bool = False
    rotate: bool = False
    statistic_of_input: bool = False
    release_epoch: int | None = None
    neighbors: int = 0
    random_negatives: int = 0
    gce_q: float = 0.0
    max_logits: int = MAX_LOGITS
    schedule: MatchSchedule = field(default_factory=MatchSchedule)
