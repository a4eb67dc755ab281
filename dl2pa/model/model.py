"""Build the model of a configuration: prototypes, method and embedder in one module."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dl2pa.assignment import MatchSchedule
from dl2pa.backbones import Embedder, build_embedder
from dl2pa.config import Config
from dl2pa.config.prototypes import (
    CLASS_VECTORS,
    check_prototypes_key,
    construction_of,
    in_terms_of_keys,
    of_prototype_file,
    read_class_vectors,
)
from dl2pa.config.schema import NegativesConfig
from dl2pa.constructions import CONSTRUCTIONS
from dl2pa.errors import UserError
from dl2pa.geometry import (
    build_prototypes,
    load_prototypes,
    max_cosine_bound,
    nearest_cosines,
    prototypes_from_vectors,
)
from dl2pa.geometry.prototypes import check_construction
from dl2pa.methods import METHODS, LearnedEntry, Method, MethodOptions, Targets, assignment_from_vectors
from dl2pa.specs import FEATURES
from dl2pa.step_parts import part
from pipelines.datasets.features import feature_dim


class Model(nn.Module):
    """Embedder and method: maps images and labels to loss and features. DDP wraps this module."""

    def __init__(self, embedder: Embedder, method: Method) -> None:
        super().__init__()
        self.embedder = embedder
        self.method = method

    def forward(
        self,
        images: Tensor,
        first: Tensor,
        second: Tensor | None,
        share: Tensor | None,
        first_counts: Tensor | None = None,
        second_counts: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return the loss and what `Method.observe` gets: embeddings and, if it uses them, features of the backbone or
        the input."""
        pooled = self.embedder.backbone(images)
        features = self.embedder.head(pooled)
        # In a compiled pass the range would be a graph break.
        with nullcontext() if torch.compiler.is_compiling() else part("dl2pa.loss"):
            targets = Targets(first, second, share, first_counts, second_counts, negatives)
            loss = self.method.loss(features, targets)
        if not self.method.uses_pooled:
            return loss, features
        return loss, features, images if self.method.options.statistic_of_input else pooled

    @torch.no_grad()
    def score(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.method.logits(self.embedder(images))


@dataclass(frozen=True)
class PrototypeInit:
    """Initial unit prototypes [C, d] and assignment σ [C]; None is the identity."""

    prototypes: Tensor
    assignment: Tensor | None


def init_prototypes(config: Config, num_classes: int) -> PrototypeInit | None:
    """Construct or load the prototypes; None for a method that learns its class vectors.

    Optimized constructions take seconds to minutes, so only rank 0 calls this and broadcasts the result.

    Raises:
        UserError: prototypes or class vectors do not match the configuration.
    """
    method, dim = config.method, config.model.embedding_dim
    source = construction_of(config, num_classes)
    if source is None:
        return None
    vectors = None
    if method.class_vectors is not None:
        vectors = load_class_vectors(method.class_vectors, num_classes)
    if source == CLASS_VECTORS:
        assert vectors is not None, "checked with the configuration"
        points, vectors = prototypes_from_vectors(vectors, dim), None
    else:
        points = find_prototypes(source, num_classes, dim, method.prototype_seed)
    if method.match.refit_cosine is not None:
        largest = float(nearest_cosines(points).max())
        _check_room(config, largest, f"the prototypes are already closer, at a cosine of {largest:.4f}")
    quadratic = method.match.solver == "quadratic"
    return PrototypeInit(
        points, None if vectors is None else assignment_from_vectors(points, vectors, quadratic)
    )


def _check_room(config: Config, largest: float, why: str) -> None:
    """Check that `refit_cosine` lets prototypes move: it must be at least `largest`."""
    bound = config.method.match.refit_cosine
    if bound is not None and config.assignment == "dynamic" and bound < largest:
        remedy = "Set a larger value; 1 permits every prototype to move to its class mean direction."
        raise UserError("method.match.refit_cosine", bound, why, remedy)


def prototypes_of_checkpoint(state: dict[str, Any]) -> PrototypeInit | None:
    """Prototypes and assignment of a checkpoint's state; None for methods without prototypes."""
    prototypes = state["model"].get("method.prototypes")
    if prototypes is None:
        return None
    return PrototypeInit(prototypes, state["model"]["method.assignment"])


def build_model(config: Config, num_classes: int, prototype_init: PrototypeInit | None = None) -> Model:
    """Build the model on the host, with weights drawn from `train.seed`.

    Args:
        prototype_init: initial prototypes; default: constructed here.
    """
    prototype_init = prototype_init or init_prototypes(config, num_classes)
    torch.manual_seed(config.train.seed)
    embedder = build_configured_embedder(config)
    return Model(
        embedder, build_method(config, num_classes, prototype_init, _statistic_dim(config, embedder))
    )


def _statistic_dim(config: Config, embedder: Embedder) -> int:
    """Dimension of the vectors whose class means `method.match.statistic` selects, if not those of the embedding."""
    return embedder.input_shape[0] if config.method.match.statistic == "input" else embedder.pooled_dim


def build_configured_embedder(config: Config) -> Embedder:
    """Build the embedder with random weights from torch's global generator.

    Raises:
        UserError: the backbone does not accept the image size, or has no layers before `model.freeze_before`.
    """
    model = config.model
    embedder = build_embedder(
        model.backbone,
        model.embedding_dim,
        head=model.head,
        shortcut=model.shortcut,
        widths=model.widths,
        image_size=config.data.image_size,
        hidden=model.hidden,
        hidden_norm=model.hidden_norm,
        dropout=model.dropout,
        feature_dim=_feature_dim(config),
    )
    if model.freeze_before is not None:
        embedder.freeze_before(model.freeze_before)
    return embedder


def _feature_dim(config: Config) -> int:
    """Dimension of the features of `data.dataset=features`; 0 for images."""
    return feature_dim(Path(config.data.root or "")) if config.data.dataset == FEATURES else 0


def build_method(
    config: Config, num_classes: int, prototype_init: PrototypeInit | None, pooled_dim: int = 0
) -> Method:
    """Build the configured method.

    Args:
        pooled_dim: dimension of the features of the backbone, or of the input vectors.
    """
    entry, options = METHODS[config.method.name], method_options(config, pooled_dim)
    if isinstance(entry, LearnedEntry):
        return entry.build(num_classes, config.model.embedding_dim, options)
    assert prototype_init is not None, "a prototype method needs prototypes"
    return entry.build(prototype_init.prototypes, options, prototype_init.assignment)


def method_options(config: Config, pooled_dim: int = 0) -> MethodOptions:
    """Options of the configured method; values that are not configured are the method's defaults."""
    method, match = config.method, config.method.match
    uses_softmax = config.loss == "cross_entropy"
    negatives = method.negatives if uses_softmax else NegativesConfig()
    return METHODS[method.name].options(
        loss=method.loss,
        dynamic=config.assignment == "dynamic",
        scale=method.scale,
        learn_scale=method.learn_scale,
        margin=method.margin,
        logit_adjustment=method.logit_adjustment,
        release_epoch=method.release_epoch,
        neighbors=negatives.neighbors,
        random_negatives=negatives.random,
        gce_q=method.gce_q if uses_softmax else 0.0,
        label_smoothing=method.label_smoothing,
        max_logits=method.max_logits,
        normalize=method.normalize,
        sub_prototypes=method.sub_prototypes,
        centroid_momentum=method.centroid_momentum,
        warmup_scale=match.warmup_scale,
        momentum=match.momentum,
        refit_cosine=match.refit_cosine,
        pooled_dim=None if match.statistic == "embedding" else pooled_dim,
        statistic_of_input=match.statistic == "input",
        quadratic=match.solver == "quadratic",
        rotate=match.rotate,
        schedule=MatchSchedule(
            every_epochs=match.every_epochs,
            every_steps=match.every_steps,
            early_steps=match.early_steps,
            early_epochs=match.early_epochs,
            warmup_epochs=match.warmup_epochs,
            last_epoch=match.last_epoch,
        ),
    )


def find_prototypes(source: str, num_classes: int, dim: int, seed: int) -> Tensor:
    """Unit prototypes [C, d] from a construction or a file."""
    check_prototypes_key(source, num_classes, dim)
    if source in CONSTRUCTIONS:
        try:
            small = num_classes * dim <= _MAX_KEPT
            return (_kept if small else _construct)(
                source, num_classes, dim, seed, torch.get_num_threads()
            ).clone()
        except UserError as error:
            raise in_terms_of_keys(error) from None
    try:
        return load_prototypes(Path(source), num_classes, dim).points
    except UserError as error:
        raise of_prototype_file(error, source) from None


def _construct(source: str, num_classes: int, dim: int, seed: int, _threads: int) -> Tensor:
    """Construct prototypes; those of many classes depend on the number of threads."""
    return build_prototypes(num_classes, dim, source, seed).points


_MAX_KEPT = 2**20
"""Largest C·d of prototypes that are kept: 4 MiB."""
_kept = functools.lru_cache(maxsize=16)(_construct)
"""Several trainings in one process, as in a notebook, construct the same prototypes."""


def load_class_vectors(path: str, num_classes: int) -> Tensor:
    """Class vectors [C, k] from a .npy file with one row per class in label order."""
    return torch.from_numpy(read_class_vectors(path, num_classes))


def embedder_buffers(module: Model) -> list[Tensor]:
    """BatchNorm running statistics of the embedder."""
    return [b for b in module.embedder.buffers() if b is not None]


def build_embedder_shapes(config: Config) -> Embedder:
    """Build the embedder without weights where the network allows it; the generators do not change.

    Raises:
        UserError: the backbone does not accept the image size.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build_configured_embedder(config)
        except UserError:  # perhaps a network that cannot be built without weights
            return build_configured_embedder(config)


def check_prototypes(config: Config, num_classes: int) -> None:
    """Check the content of prototype and class vector files, and `refit_cosine`, before any process starts.

    Raises:
        UserError: names method.prototypes, method.class_vectors or method.match.refit_cosine.
    """
    source, dim = construction_of(config, num_classes), config.model.embedding_dim
    if source is None:
        return
    bound = max_cosine_bound(num_classes, dim)
    _check_room(
        config,
        bound,
        f"{num_classes} points in {dim} dimensions cannot have a largest cosine below {bound:.4f}",
    )
    if source == "known":
        check_construction(source, num_classes, dim)
    elif source not in (*CONSTRUCTIONS, CLASS_VECTORS):
        find_prototypes(source, num_classes, dim, config.method.prototype_seed)
    if config.method.class_vectors is not None:
        vectors = load_class_vectors(config.method.class_vectors, num_classes)
        if source == CLASS_VECTORS:
            prototypes_from_vectors(vectors, dim)
