"""Places of initial weights: files, runs, and the caches of torchvision's and timm's pretrained weights.

Nothing here downloads except `fetch`, which `dl2pa weights fetch` calls: compute nodes often have no network.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl2pa import zoo
from dl2pa.errors import UserError
from dl2pa.specs import backbone_spec

TORCHVISION = "torchvision:"
"""Prefix of torchvision's pretrained weights in `model.init`."""
FIELD = "model.init"
PREPROCESSING_KEYS = ("image_size", "eval_resize", "mean", "std", "interpolation")
Preprocessing = dict[str, Any]
"""Values of the keys of section `data` that the weights were trained or evaluated with."""


@dataclass(frozen=True)
class LibraryWeights:
    """Pretrained weights of a library.

    Attributes:
        name: full name, `library:MODEL.TAG`.
        model, tag: architecture and tag as the library spells them.
        preprocessing: image size, normalization and interpolation of the weights.
        locate: finds the file in the library's cache; None if it is not there.
        download: downloads the file into that cache.
    """

    name: str
    model: str
    tag: str
    preprocessing: Preprocessing
    locate: Callable[[], Path | None]
    download: Callable[[], Path]

    def file(self) -> Path:
        """Return the cached file.

        Raises:
            UserError: the weights were not fetched yet.
        """
        path = self.locate()
        if path is None:
            remedy = f"Run `dl2pa weights fetch {self.name}` on a host with a network and this cache."
            raise UserError(FIELD, self.name, "the weights are not on this machine", remedy)
        return path


def find_weights(init: str, backbone: str) -> LibraryWeights | Path:
    """Return the source that `model.init` names: weights of a library, or an existing file.

    Raises:
        UserError: unknown weights, weights of another network, or no such file.
    """
    if not is_library_name(init):
        return _existing_file(Path(init))
    model, tag = _model_and_tag(init, backbone)
    return (_timm_weights if init.startswith(zoo.TIMM) else _torchvision_weights)(model, tag)


def is_library_name(init: str) -> bool:
    """Whether `model.init` names pretrained weights of a library."""
    return init.startswith((TORCHVISION, zoo.TIMM))


def check_place(init: str, backbone: str) -> None:
    """Check what needs no torch: that the file exists, or that the library's weights are of the backbone.

    Raises:
        UserError: as for `find_weights`.
    """
    if is_library_name(init):
        _model_and_tag(init, backbone)
    else:
        _existing_file(Path(init))


def _model_and_tag(init: str, backbone: str) -> tuple[str, str]:
    library, _, rest = init.partition(":")
    if backbone_spec(backbone).family != library:
        remedy = f"Choose a backbone of {library}, or the path of a file."
        raise UserError(FIELD, init, f"is not made for model.backbone = {backbone}", remedy)
    expected = backbone.removeprefix(zoo.TIMM)
    model, _, tag = rest.partition(".") if "." in rest else (expected, "", rest)
    if model != expected:
        remedy = f"Set model.backbone={zoo.TIMM if library == 'timm' else ''}{model}."
        raise UserError(FIELD, init, f"is not made for model.backbone = {backbone}", remedy)
    return model, tag


def named_weights(name: str) -> LibraryWeights:
    """Return the weights of a full name, `torchvision:MODEL[.TAG]` or `timm:MODEL[.TAG]`.

    Raises:
        UserError: not such a name, or unknown weights.
    """
    library, _, rest = name.partition(":")
    model, _, tag = rest.partition(".")
    known = {"torchvision": zoo.torchvision_models, "timm": zoo.timm_models}.get(library)
    if known is None or model not in known():
        message = "is not the name of pretrained weights"
        remedy = (
            "Write torchvision:MODEL.TAG or timm:MODEL.TAG, for example torchvision:resnet50.IMAGENET1K_V2."
        )
        raise UserError("weights", name, message, remedy)
    try:
        return (_timm_weights if library == "timm" else _torchvision_weights)(model, tag)
    except UserError as error:
        raise UserError("weights", name, error.message, error.remedy) from None


def tags_of(library: str, model: str) -> list[str]:
    """Return the tags of the pretrained weights of a model."""
    if library == "timm":
        import timm

        names = timm.list_models(f"{model}.*", pretrained=True)
        return [name.partition(".")[2] for name in names if name.partition(".")[0] == model]
    from torchvision.models import get_model_weights

    return [weights.name for weights in get_model_weights(model)]


def fetch(weights: LibraryWeights) -> Path:
    """Download the weights into the library's cache, unless they are there; returns the file.

    Raises:
        UserError: the download failed.
    """
    path = weights.locate()
    if path is not None:
        return path
    try:
        return weights.download()
    except (OSError, RuntimeError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())
        remedy = "Check the network of this host, or copy the file into the cache from another one."
        raise UserError("weights", weights.name, f"cannot be downloaded ({reason})", remedy) from None


def preprocessing_of(init: str, backbone: str) -> Preprocessing:
    """Preprocessing of the weights that `model.init` names; empty if they record none.

    Raises:
        UserError: as for `find_weights`.
    """
    source = find_weights(init, backbone)
    known = source.preprocessing if isinstance(source, LibraryWeights) else _preprocessing_of_file(source)
    if known.get("interpolation") not in ("bilinear", "bicubic"):
        known = {key: value for key, value in known.items() if key != "interpolation"}
    return known


def recorded_model(path: Path) -> dict[str, Any]:
    """Section `model` recorded in a model file of dl2pa, as far as it describes the network; empty for other files."""
    recorded = _description(_existing_file(path)).get("model")
    return recorded if isinstance(recorded, dict) else {}


def _preprocessing_of_file(path: Path) -> Preprocessing:
    """Preprocessing recorded in a model file of dl2pa; empty for other files."""
    recorded = _description(path).get("preprocessing")
    if not isinstance(recorded, dict):
        return {}
    return {"eval_resize" if key == "resize_shorter_side" else key: value for key, value in recorded.items()}


def _description(path: Path) -> dict[str, Any]:
    """Description in a model file of dl2pa; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as stored:  # "pt" would import torch
            description = json.loads((stored.metadata() or {})["dl2pa"])
    except (SafetensorError, OSError, LookupError, ValueError, TypeError):
        return {}
    return description if isinstance(description, dict) else {}


def _existing_file(path: Path) -> Path:
    file = path / "model.safetensors" if path.is_dir() else path
    if file.is_file():
        return file
    if (path / "checkpoints").is_dir():
        message, remedy = (
            "is a run that is not finished",
            "Finish it with `dl2pa train`, or name a state.pt in it.",
        )
    elif path.is_dir():
        message, remedy = "contains no model.safetensors", "Give a finished run, an export or a file."
    else:
        message, remedy = "no such file", "Give a file, a run, torchvision:WEIGHTS or timm:TAG."
    raise UserError(FIELD, str(path), message, remedy)


def _unknown_tag(library: str, model: str, tag: str) -> UserError:
    tags = tags_of(library, model)
    remedy = f"Use one of {', '.join(tags)}." if tags else "Choose another model, or a file."
    return UserError(FIELD, f"{library}:{model}.{tag}", "is not the name of pretrained weights", remedy)


def _torchvision_weights(model: str, tag: str) -> LibraryWeights:
    from torchvision.models import get_model_weights

    choices: Any = get_model_weights(model)
    member = choices.__members__.get(tag or "DEFAULT")
    if member is None:
        raise _unknown_tag("torchvision", model, tag)
    preset = member.transforms()
    prepared: Preprocessing = {
        "image_size": preset.crop_size[0],
        "eval_resize": preset.resize_size[0],
        "mean": list(preset.mean),
        "std": list(preset.std),
        "interpolation": preset.interpolation.value,
    }
    if model in (
        "googlenet",
        "inception_v3",
    ):  # torchvision converts ImageNet's normalization inside the network
        prepared |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    cached, download = _url_file(member.url)
    name = f"torchvision:{model}.{member.name}"
    return LibraryWeights(name, model, member.name, prepared, cached, download)


def _timm_weights(model: str, tag: str) -> LibraryWeights:
    from timm.models import get_pretrained_cfg

    tags = tags_of("timm", model)
    if tag not in ("", "default", *tags):
        raise _unknown_tag("timm", model, tag)
    cfg: Any = get_pretrained_cfg(f"{model}.{tag}" if tag not in ("", "default") else model)
    if cfg is None or cfg.tag not in tags:
        raise _unknown_tag("timm", model, tag)
    size = cfg.input_size[-1]
    prepared: Preprocessing = {
        "image_size": size,
        "eval_resize": int(size / cfg.crop_pct),
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "interpolation": cfg.interpolation,
    }
    cached, download = _hub_file(cfg) if cfg.hf_hub_id else _url_file(cfg.url)
    return LibraryWeights(f"timm:{model}.{cfg.tag}", model, cfg.tag, prepared, cached, download)


def _url_file(url: str) -> tuple[Callable[[], Path | None], Callable[[], Path]]:
    """Cache lookup and download of a file in the folder of torch.hub."""
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]

    def download() -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = torch.hub.HASH_REGEX.search(path.name)
        torch.hub.download_url_to_file(url, str(path), prefix[1] if prefix else None)
        return path

    return lambda: path if path.is_file() else None, download


def _hub_file(cfg: Any) -> tuple[Callable[[], Path | None], Callable[[], Path]]:
    """Cache lookup and download of a file in the cache of the Hugging Face hub."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    repository, _, revision = cfg.hf_hub_id.partition("@")

    def locate() -> Path | None:
        found = [try_to_load_from_cache(repository, name, revision=revision or None) for name in names]
        return next((Path(path) for path in found if isinstance(path, str)), None)

    def download() -> Path:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries take half a minute
        for name in names[:-1]:
            try:
                return Path(hf_hub_download(repository, name, revision=revision or None))
            except LocalEntryNotFoundError:  # no network
                raise
            except EntryNotFoundError:
                continue
        return Path(hf_hub_download(repository, names[-1], revision=revision or None))

    return locate, download
