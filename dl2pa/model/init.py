"""Initial weights of the embedder from `model.init`."""

from __future__ import annotations

import logging
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dl2pa.backbones import Embedder
from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.model.model import build_configured_embedder
from dl2pa.model.weight_sources import FIELD, LibraryWeights, find_weights
from dl2pa.osutil import sha256_of
from dl2pa.rundir import RunDirectory, checkpoint_steps

log = logging.getLogger(__name__)

_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
"""Keys under which training programs keep the state dict."""
_PREFIXES = (
    "",
    "module.",
    "_orig_mod.",
    "model.",
    "module.model.",
    "backbone.",
    "module.backbone.",
    "embedder.",
)
"""Prefixes that training programs put before the names of the network."""
_SHOWN = 10


@dataclass(frozen=True)
class InitRecord:
    """Initial weights of a run, for its record.

    Attributes:
        source: `model.init`, with the full name of a library's weights.
        sha256: of the file.
        loaded: number of tensors taken from the file.
        missing: tensors of the backbone that the file lacks; they keep their random values.
        unexpected: tensors of the file that the embedder does not have, such as a classifier.
        left_out: tensors of the head, if one of them has another size than in the embedder.
    """

    source: str
    sha256: str
    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    left_out: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def load_initial_weights(config: Config, embedder: Embedder) -> InitRecord:
    """Load the weights that `model.init` names into an embedder.

    Raises:
        UserError: the file is missing or damaged, or contains another network.
    """
    assert config.model.init is not None
    source = find_weights(config.model.init, config.model.backbone)
    path = source.file() if isinstance(source, LibraryWeights) else source
    if isinstance(source, LibraryWeights) and source.name.startswith("timm:"):
        state = _timm_state(source, path, config.data.image_size)
    else:
        state = read_state(path)
    name = source.name if isinstance(source, LibraryWeights) else config.model.init
    record = load_state(embedder, state, name, sha256_of(path))
    _log(record)
    return record


def check_init(config: Config, run: RunDirectory) -> None:
    """Check that the initial weights exist and fit the backbone, before a job is queued or processes start.

    A run that has a checkpoint does not read them again.

    Raises:
        UserError: as for `load_initial_weights`, or the weights of a library were not fetched.
    """
    if config.model.init is None or checkpoint_steps(run.checkpoints):
        return
    source = find_weights(config.model.init, config.model.backbone)
    if isinstance(source, LibraryWeights):
        source.file()
        return
    with torch.random.fork_rng(devices=[]):
        load_state(build_configured_embedder(config), read_state(source), config.model.init, "")


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or of a state dict that torch saved. Never executes code of the file.

    Raises:
        UserError: the file cannot be read, or contains more than tensors and plain values.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            tree: Any = load_file(path)
        else:
            tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        remedy = "Load it where you trust it and save its state dict with torch.save or safetensors."
        raise UserError(FIELD, str(path), "contains Python objects, not only weights", remedy) from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, LookupError) as error:
        reason = " ".join(str(error).split())
        message = f"cannot be read as weights ({reason})"
        raise UserError(FIELD, str(path), message, "Give a safetensors file or a state dict.") from None
    while isinstance(tree, Mapping) and (
        inner := next((k for k in _WRAPPERS if isinstance(tree.get(k), Mapping)), "")
    ):
        tree = tree[inner]
    tensors = (
        {str(k): v for k, v in tree.items() if isinstance(v, Tensor)} if isinstance(tree, Mapping) else {}
    )
    if not tensors:
        raise UserError(FIELD, str(path), "contains no weights", "Give a safetensors file or a state dict.")
    return tensors


def load_state(embedder: Embedder, state: Mapping[str, Tensor], source: str, sha256: str) -> InitRecord:
    """Copy the tensors of a state dict, of the whole embedder or of its backbone only, into an embedder.

    Raises:
        UserError: a tensor of the backbone has another shape, or the file lacks most of them.
    """
    target = embedder.state_dict()
    renamed = _rename(state, target)
    renamed = _fit_positions(embedder.backbone, renamed)
    known = {key: value for key, value in renamed.items() if key in target}
    other = [key for key, value in known.items() if value.shape != target[key].shape]
    head = [key for key in known if key.startswith("head.")]
    left_out = head if set(head) & set(other) else []  # a bias alone belongs to another projection
    if differing := [key for key in other if key not in left_out]:
        key = differing[0]
        shapes = f"{list(known[key].shape)} instead of {list(target[key].shape)}"
        message = f"{len(differing)} tensors have another shape, for example {key}: {shapes}"
        raise UserError(FIELD, source, message, "Choose the backbone and image size of these weights.")
    chosen = {key: value for key, value in known.items() if key not in left_out}
    backbone = [
        key for key in target if key.startswith("backbone.") and not key.endswith("num_batches_tracked")
    ]
    missing = [key for key in backbone if key not in chosen]
    if 2 * len(missing) > len(backbone):
        message = f"contains {len(backbone) - len(missing)} of the {len(backbone)} tensors of the backbone"
        remedy = f"Choose the backbone of these weights. The file has {_list(list(state))}."
        raise UserError(FIELD, source, message, remedy)
    embedder.load_state_dict(chosen, strict=False)
    unexpected = [key for key in renamed if key not in target]
    return InitRecord(source, sha256, len(chosen), tuple(missing), tuple(unexpected), tuple(left_out))


def _rename(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the prefix of the names in a file by that of the embedder which gives the most known names."""
    best: dict[str, Tensor] = {}
    most = -1
    for prefix in _PREFIXES:
        for added in ("backbone.", ""):
            renamed = {
                added + key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)
            }
            matches = sum(key in target for key in renamed)
            if matches > most:
                best, most = renamed, matches
    return best


def _fit_positions(backbone: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Interpolate the position embedding of torchvision's vision transformers for another image size."""
    key = "backbone.encoder.pos_embedding"
    size, patch = getattr(backbone, "image_size", None), getattr(backbone, "patch_size", None)
    if key not in state or size is None or patch is None:
        return state
    from torchvision.models.vision_transformer import interpolate_embeddings

    name = key.removeprefix("backbone.")
    return {**state, key: interpolate_embeddings(size, patch, OrderedDict({name: state[key]}))[name]}


def _timm_state(weights: LibraryWeights, path: Path, image_size: int) -> dict[str, Tensor]:
    """Weights of timm, converted from the format of their file to that of the network."""
    import timm

    arguments: dict[str, Any] = {"num_classes": 0, "pretrained": True}
    arguments["pretrained_cfg_overlay"] = {"file": str(path)}  # no download
    with torch.random.fork_rng(devices=[]):
        name = f"{weights.model}.{weights.tag}"
        try:
            try:
                network = timm.create_model(name, img_size=image_size, **arguments)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                network = timm.create_model(name, **arguments)
        except (OSError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())
            remedy = f"Remove {path} and run `dl2pa weights fetch {weights.name}`."
            raise UserError(FIELD, weights.name, f"cannot be loaded ({reason})", remedy) from None
    return network.state_dict()


def _log(record: InitRecord) -> None:
    log.info("%d tensors loaded from %s (sha256 %s…)", record.loaded, record.source, record.sha256[:12])
    if record.missing:
        log.warning("%s lacks %s, which stay random", record.source, _list(record.missing))
    if record.unexpected:
        log.info("not used of %s: %s", record.source, _list(record.unexpected))
    if record.left_out:
        log.info(
            "the head of %s has another size and was left out: %s", record.source, _list(record.left_out)
        )


def _list(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
