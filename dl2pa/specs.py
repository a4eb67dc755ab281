"""Registry of methods, backbones and data sets: one row each, with all that validation, help and builders need.

Imports no torch. Classes and functions are named as text, `module:name`, and resolved by the builders.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from dl2pa import zoo
from dl2pa.errors import UserError, install_command
from pipelines.names import (
    CIFAR100,
    DATASETS,
    FEATURES,
    IMAGE_FOLDER,
    OWN_PATTERN,
    SYNTHETIC,
    DatasetSpec,
    dataset_spec,
    is_own,
    is_remote,
)

__all__ = [
    "BACKBONES",
    "CIFAR100",
    "DATASETS",
    "DEFAULT_BACKBONE",
    "FEATURES",
    "IDENTITY",
    "IMAGE_FOLDER",
    "MAX_LOGITS",
    "METHODS",
    "MLP",
    "OWN_PATTERN",
    "SMALL_BACKBONE",
    "SYNTHETIC",
    "VECTOR_BACKBONES",
    "BackboneSpec",
    "DatasetSpec",
    "MethodSpec",
    "backbone_spec",
    "dataset_spec",
    "is_own",
    "is_remote",
]

_TEMPERATURE = 0.07
"""Temperature of EBV (Shen et al., CVPR 2023); a scale is its inverse."""

MAX_LOGITS = 2**27
"""Default of `method.max_logits`: 512 MiB in float32."""


@dataclass(frozen=True)
class MethodSpec:
    """Source and defaults of a method; `method.*` of the configuration overrides the defaults.

    Attributes:
        paper: title.
        venue: conference and year.
        loss: squared_cosine, dot_regression or cross_entropy.
        assignment: static or dynamic.
        construction: of the prototypes; `class_vectors`: the user's file, reduced to d; None: class vectors are
            learned and there are no prototypes.
        fallback_construction: used where `construction` does not exist for this C and d; None: an error.
        scale: factor of the scores in cross_entropy.
        label_smoothing: of cross_entropy.
        normalize: whether the scores of cross_entropy are cosines (true) or dot products with the raw features.
        sub_prototypes: vectors per class; more than 1 only for methods with sub-prototypes.
        orthonormal: whether the vectors of a class are orthonormal, which bounds their number by d.
        centroid_momentum: weight of the old sub-centroid at an update; 0: the method has no centroids.
        scaled: whether `method.scale` and `method.margin` apply.
        fixed_form: whether `method.normalize` has no effect.
        builder: class, `module:name`.
    """

    paper: str
    venue: str
    loss: Literal["squared_cosine", "dot_regression", "cross_entropy"]
    assignment: Literal["static", "dynamic"] = "static"
    construction: str | None = None
    fallback_construction: str | None = None
    scale: float = 1 / _TEMPERATURE
    label_smoothing: float = 0.0
    normalize: bool = True
    sub_prototypes: int = 1
    orthonormal: bool = False
    centroid_momentum: float = 0.0
    scaled: bool = True
    fixed_form: bool = False
    builder: str = "dl2pa.methods.prototypical:PrototypeMethod"

    @property
    def learned(self) -> bool:
        """Whether the class vectors are learned rather than fixed prototypes."""
        return self.construction is None


METHODS = {
    # Alternates gradient descent under fixed P [C, d] and σ with σ ← argmax_σ Σ_c q_c · P[σ(c)], where q_c is the
    # direction of class c's mean unit feature since the last update. Not in the paper: the exact, order-independent
    # statistic, updates by step and after a learned-classifier warm-up, the choice of loss, scale and margin.
    "dl2pa": MethodSpec(
        "Hyperspherical classification with dynamic label-to-prototype assignment",
        "CVPR 2024",
        "squared_cosine",
        assignment="dynamic",
        construction="auto",
    ),
    "psc": MethodSpec(
        "parametric softmax classifier",
        "baseline of the published tables",
        "cross_entropy",
        builder="dl2pa.methods.psc:Psc",
    ),
    # Class vectors of a file, centered, reduced to d by PCA, scaled to length 1, after Mikolov et al. (2013). Trained
    # like HPN. The source does not specify the PCA; here without weighting or whitening.
    "word2vec": MethodSpec(
        "word vectors, trained as hyperspherical prototype networks",
        "NeurIPS 2019",
        "squared_cosine",
        construction="class_vectors",
    ),
    # Mettes, van der Pol, Snoek. Minimizes the mean over classes of the largest cosine to another prototype.
    "hpn": MethodSpec(
        "Hyperspherical prototype networks", "NeurIPS 2019", "squared_cosine", construction="hpn"
    ),
    # Shen, Wang, Wei. Minimizes Σ_{i≠j} ReLU(|cos_ij| − threshold); CE(f̂ Pᵀ / 0.07), soft targets under mixup and
    # cutmix. Thresholds at shapes that were not published: `geometry.objectives.ebv_threshold`.
    "ebv": MethodSpec(
        "Equiangular basis vectors", "CVPR 2023", "cross_entropy", construction="ebv", label_smoothing=0.1
    ),
    # Yang et al. P = √(C/(C−1)) · U (I − 11ᵀ/C), U [d, C] with random orthonormal columns, d ≥ C; for d < C, where no
    # such frame exists, the best known prototypes. Evaluated with the unweighted class vectors.
    "etf": MethodSpec(
        "Inducing neural collapse in imbalanced learning",
        "NeurIPS 2022",
        "dot_regression",
        construction="etf",
        fallback_construction="auto",
    ),
    # Kasarla et al. Recursive simplex, d = C − 1; CE(0.1 · f P) with unnormalized f. Not in the paper: d > C − 1 by
    # zero coordinates, which change no logit, and d < C − 1 with other prototypes.
    "kasarla": MethodSpec(
        "Maximum class separation as inductive bias in one matrix",
        "NeurIPS 2022",
        "cross_entropy",
        construction="kasarla",
        scale=0.1,
        normalize=False,
    ),
    "dnc": MethodSpec(
        "Visual recognition with deep nearest centroids",
        "ICLR 2023",
        "cross_entropy",
        sub_prototypes=4,
        centroid_momentum=0.999,
        scaled=False,
        fixed_form=True,
        builder="dl2pa.methods.dnc:Dnc",
    ),
    "goto": MethodSpec(
        "Learning intra-class multimodal distributions with orthonormal matrices",
        "WACV 2024",
        "cross_entropy",
        sub_prototypes=4,
        orthonormal=True,
        fixed_form=True,
        builder="dl2pa.methods.goto:Goto",
    ),
}


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone.

    Attributes:
        family: `cifar` for ResNets on images of about 32 pixels, `torchvision` or `timm` for models of a library,
            `vector` for networks on feature vectors.
        builder: class or function, `module:name`; of timm, the name of the model.
        depth: of a CIFAR ResNet, 6n + 2; None for the others.
        features: width of the features; None: the last of `model.widths`, or found by a forward pass.
        classifier: attribute of a torchvision model that is replaced by the identity; None: the last layer.
        channels_last: default memory format; faster for convolutional networks, not for Swin (timm's benchmarks).
            None: decided by the layers of the network.
        min_image_size: smallest `data.image_size`, pixels.
    """

    family: Literal["cifar", "torchvision", "timm", "vector"]
    builder: str
    depth: int | None = None
    features: int | None = None
    classifier: str | None = "fc"
    channels_last: bool | None = True
    min_image_size: int = 1

    @property
    def small(self) -> bool:
        """Whether the backbone takes images of CIFAR's size."""
        return self.family == "cifar"

    @property
    def takes_features(self) -> bool:
        """Whether the input is a feature vector, of `data.dataset=features`, instead of an image."""
        return self.family == "vector"

    @property
    def bench_image_size(self) -> int:
        """Side of the images in benchmarks, pixels."""
        return 32 if self.small else 224


def _cifar(depth: int) -> BackboneSpec:
    return BackboneSpec("cifar", "dl2pa.backbones.cifar:CifarResNet", depth)


def _resnet(name: str) -> BackboneSpec:
    return BackboneSpec("torchvision", f"torchvision.models:{name}", features=2048)


DEFAULT_BACKBONE = "resnet50"
SMALL_BACKBONE = "resnet32"
"""Default of the benchmarks that are not about ImageNet."""

BACKBONES = {
    "resnet8": _cifar(8),
    "resnet14": _cifar(14),
    "resnet20": _cifar(20),
    SMALL_BACKBONE: _cifar(32),
    "resnet44": _cifar(44),
    "resnet56": _cifar(56),
    DEFAULT_BACKBONE: _resnet(DEFAULT_BACKBONE),
    "resnet101": _resnet("resnet101"),
    "resnet152": _resnet("resnet152"),
    "swin_t": BackboneSpec(
        "torchvision",
        "torchvision.models:swin_t",
        features=768,
        classifier="head",
        channels_last=False,
        min_image_size=32,
    ),
}

IDENTITY, MLP = "identity", "mlp"
VECTOR_BACKBONES = {
    name: BackboneSpec("vector", "dl2pa.backbones.vectors:build_mlp", classifier=None, channels_last=False)
    for name in (IDENTITY, MLP)
}
"""Networks on the cached features of a frozen backbone."""


def backbone_spec(name: str) -> BackboneSpec:
    """Return the row of a backbone; any classification model of torchvision, and `timm:NAME`, has one.

    Raises:
        UserError: unknown name, with the nearest ones, or timm is not installed.
    """
    if name in BACKBONES or name in VECTOR_BACKBONES:
        return BACKBONES.get(name) or VECTOR_BACKBONES[name]
    if name.startswith(zoo.TIMM):
        return _timm_spec(name)
    if name in zoo.torchvision_models():
        return BackboneSpec("torchvision", f"torchvision.models:{name}", classifier=None, channels_last=None)
    known = (
        *BACKBONES,
        *VECTOR_BACKBONES,
        *zoo.torchvision_models(),
        *(f"{zoo.TIMM}{model}" for model in zoo.timm_models()),
    )
    raise _unknown_backbone(name, known)


def check_timm(field: str, value: str, alternative: str) -> None:
    """Check that the optional package timm is installed; `alternative` completes the remedy.

    Raises:
        UserError: it is not.
    """
    if not zoo.is_installed("timm"):
        message = "needs the package timm, which is not installed"
        raise UserError(field, value, message, f"Install it: {install_command('timm')}; or {alternative}.")


def _timm_spec(name: str) -> BackboneSpec:
    model, _, tag = name.removeprefix(zoo.TIMM).partition(".")
    check_timm("model.backbone", name, "choose another backbone")
    if model not in zoo.timm_models():
        raise _unknown_backbone(name, tuple(f"{zoo.TIMM}{known}" for known in zoo.timm_models()))
    if tag:
        remedy = f"Set model.backbone={zoo.TIMM}{model} and model.init={zoo.TIMM}{tag}."
        raise UserError("model.backbone", name, "names pretrained weights after the architecture", remedy)
    return BackboneSpec("timm", model, classifier=None, channels_last=None)


def _unknown_backbone(name: str, known: tuple[str, ...]) -> UserError:
    near = list(dict.fromkeys(difflib.get_close_matches(name, known, n=3, cutoff=0.5)))
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"For example {DEFAULT_BACKBONE}."
    if not near or zoo.TIMM not in name:
        remedy += " Known: the CIFAR ResNets, every torchvision classification model, and timm:NAME."
    return UserError("model.backbone", name, "is not a known backbone", remedy)
