"""Source of the prototypes of a configuration, and the checks of it that need no torch."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dl2pa.config.gather import Problems
from dl2pa.config.schema import Config
from dl2pa.constructions import CONSTRUCTIONS, check_defined, check_prototype_file, condition_of
from dl2pa.errors import UserError

CLASS_VECTORS = "class_vectors"
"""Source of prototypes that are computed from `method.class_vectors`."""
_FIELDS = {"dim": "model.embedding_dim", "num_classes": "data.num_classes"}


def construction_of(config: Config, num_classes: int) -> str | None:
    """Source of the prototypes: a construction, a file or `class_vectors`; None for methods without prototypes."""
    defaults = config.method_defaults
    if defaults.construction in (None, CLASS_VECTORS):
        return defaults.construction
    if config.method.prototypes != "auto":
        return config.method.prototypes
    fallback = defaults.fallback_construction
    if fallback is not None:
        is_defined, _ = condition_of(defaults.construction, num_classes, config.model.embedding_dim)
        return defaults.construction if is_defined else fallback
    return defaults.construction


def check_source(config: Config, num_classes: int) -> None:
    """Check that the construction exists for C and d, and the files of prototypes and class vectors.

    Raises:
        UserError: names method.prototypes, method.class_vectors, model.embedding_dim or data.num_classes.
    """
    source = construction_of(config, num_classes)
    if source is None:
        return
    if source != CLASS_VECTORS:
        check_prototypes_key(source, num_classes, config.model.embedding_dim)
    if config.method.class_vectors is not None:
        read_class_vectors(config.method.class_vectors, num_classes)


def check_source_exists(config: Config) -> None:
    """Check what needs no number of classes: the name or file of `method.prototypes`, the file of class vectors.

    Raises:
        UserError: names method.prototypes or method.class_vectors.
    """
    problems, method = Problems(), config.method
    with problems:
        if config.method_defaults.construction not in (None, CLASS_VECTORS):
            _check_name(method.prototypes)
    with problems:
        if method.class_vectors is not None and not Path(method.class_vectors).is_file():
            raise UserError("method.class_vectors", method.class_vectors, "no such file", "Check the path.")
    problems.raise_any()


def _check_name(source: str) -> None:
    """Refuse a source that is neither a construction nor a file."""
    if source in CONSTRUCTIONS or Path(source).exists():
        return
    near = difflib.get_close_matches(source, CONSTRUCTIONS, n=1)
    remedy = f"Use one of {', '.join(CONSTRUCTIONS)}, or the path of a prototype file."
    raise UserError(
        "method.prototypes",
        source,
        "is neither a construction nor a file",
        f"Did you mean {near[0]}? {remedy}" if near else remedy,
    )


def needs_content_check(config: Config, num_classes: int) -> bool:
    """Whether checks with torch remain: of the content of files, or of `method.match.refit_cosine`."""
    source = construction_of(config, num_classes)
    refits = config.method.match.refit_cosine is not None and config.assignment == "dynamic"
    has_vectors = config.method.class_vectors is not None
    return source is not None and (source not in CONSTRUCTIONS or source == "known" or has_vectors or refits)


def check_prototypes_key(source: str, num_classes: int, dim: int) -> None:
    """Check a construction or the path of a prototype file.

    Raises:
        UserError: names method.prototypes, model.embedding_dim or data.num_classes.
    """
    if source in CONSTRUCTIONS:
        try:
            check_defined(source, num_classes, dim)
        except UserError as error:
            raise in_terms_of_keys(error) from None
        return
    _check_name(source)
    try:
        check_prototype_file(Path(source), num_classes, dim)
    except UserError as error:
        raise of_prototype_file(error, source) from None


def in_terms_of_keys(error: UserError) -> UserError:
    """Error of a construction, with configuration keys as fields."""
    return UserError(_FIELDS.get(error.field, error.field), error.value, error.message, error.remedy)


def of_prototype_file(error: UserError, source: str) -> UserError:
    """Error of a prototype file, with its configuration key as the field."""
    return UserError("method.prototypes", source, f"{error.message} ({error.value})", error.remedy)


def read_class_vectors(path: str, num_classes: int) -> NDArray[np.float32]:
    """Class vectors [C, k], float32, from a .npy file with one row per class in label order."""
    field = "method.class_vectors"
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        raise UserError(field, path, "cannot be read as .npy", "Give a float array [classes, k].") from None
    if vectors.ndim != 2 or len(vectors) != num_classes:
        message, remedy = f"has shape {list(vectors.shape)}", f"Give an array with {num_classes} rows."
        raise UserError(field, path, message, remedy)
    if vectors.dtype.kind not in "fiu" or not np.isfinite(vectors).all():
        raise UserError(
            field, path, f"has values that are no finite numbers ({vectors.dtype})", "Correct the file."
        )
    return vectors.astype(np.float32)
