"""What each method does unless told otherwise. A leaf without torch: the configuration reads it, the registry too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_TEMPERATURE = 0.07
"""EBV's published one (Shen et al., CVPR 2023); a scale is its inverse."""


MAX_LOGITS = 2**27
"""Default of `method.max_logits`: 512 MiB in float32."""


@dataclass(frozen=True)
class MethodDefaults:
    """A method's own choices; `method.*` of the configuration overrides each.

    Attributes:
        loss: squared_cosine, dot_regression or cross_entropy.
        assignment: static or dynamic.
        construction: of the prototypes; `class_vectors`: the user's file, reduced to d; None: class vectors are
            learned and there are no prototypes.
        otherwise: construction where the first does not exist for this C and d; None: refuse.
        scale: factor of the scores in cross_entropy.
        label_smoothing: of cross_entropy.
        normalize: whether cross_entropy sees cosines (true) or dot products with the raw features.
        sub_prototypes: vectors a class, where a method has several.
        centroid_momentum: weight of the old sub-centroid at an update, where a method has them.
    """

    loss: Literal["squared_cosine", "dot_regression", "cross_entropy"]
    assignment: Literal["static", "dynamic"] = "static"
    construction: str | None = None
    otherwise: str | None = None
    scale: float = 1 / _TEMPERATURE
    label_smoothing: float = 0.0
    normalize: bool = True
    sub_prototypes: int = 1
    centroid_momentum: float = 0.0

    @property
    def learned(self) -> bool:
        """Whether the class vectors are learned rather than fixed prototypes."""
        return self.construction is None


METHODS = {
    "dl2pa": MethodDefaults("squared_cosine", assignment="dynamic", construction="auto"),
    "psc": MethodDefaults("cross_entropy"),
    "word2vec": MethodDefaults("squared_cosine", construction="class_vectors"),
    "hpn": MethodDefaults("squared_cosine", construction="hpn"),
    "ebv": MethodDefaults("cross_entropy", construction="ebv", label_smoothing=0.1),
    "etf": MethodDefaults("dot_regression", construction="etf", otherwise="auto"),
    "kasarla": MethodDefaults("cross_entropy", construction="kasarla", scale=0.1, normalize=False),
    "dnc": MethodDefaults("cross_entropy", sub_prototypes=4, centroid_momentum=0.999),
    "goto": MethodDefaults("cross_entropy", sub_prototypes=4),
}
