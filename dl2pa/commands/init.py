"""`dl2pa init`: write a commented configuration for a folder of images."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dl2pa.commands.options import check_output_file, nonempty_path, nonempty_text
from dl2pa.commands.output import note, progress_bar, say
from dl2pa.errors import UserError

if TYPE_CHECKING:
    from dl2pa.starter.network import Network
    from dl2pa.starter.survey import Survey

_MAX_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "folder", type=nonempty_path, metavar="DIR", help="one folder per class, or train/ and val/ with them"
    )
    add(
        "--out", type=nonempty_path, metavar="FILE", help="configuration file (default: DIR's name.yaml here)"
    )
    add("--force", action="store_true", help="replace an existing file")
    add(
        "--init",
        type=nonempty_text,
        metavar="SOURCE",
        help="initial weights: none, a file, a run, or torchvision:MODEL.TAG or timm:MODEL.TAG "
        "(default: pretrained weights that suit this machine)",
    )
    add(
        "--backbone",
        type=nonempty_text,
        metavar="NAME",
        help="model.backbone (default: by --init and machine)",
    )
    add(
        "--val-fraction",
        type=float,
        metavar="F",
        help="fraction of each class for validation, without a validation folder (default: by the number of images)",
    )


def run(args: argparse.Namespace) -> int:
    from dl2pa.starter.network import choose_network
    from dl2pa.starter.recipe import Machine, choose_recipe
    from dl2pa.starter.render import render
    from dl2pa.starter.survey import survey

    out = _output(args)
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise UserError("--val-fraction", args.val_fraction, "is not between 0 and 1", "Set for example 0.1.")
    with progress_bar("inspecting") as progress:
        data = survey(args.folder, args.val_fraction, progress)
    machine = Machine(*_hardware())
    with _naming_options():
        network = choose_network(args.init, args.backbone, machine.gpus > 0)
    recipe = choose_recipe(data, network, machine)
    text = render(recipe, _header(args, data, str(machine)))
    with _naming_options():
        _check(text, data, network, max(1, machine.gpus))
    _write(out, text)
    _report(args, out, data, network, recipe.tree)
    return 0


def _output(args: argparse.Namespace) -> Path:
    """The file to write, checked before the images are inspected."""
    out: Path = args.out or Path(f"{args.folder.absolute().resolve().name or 'images'}.yaml")
    check_output_file("--out", out)
    if out.exists() and not args.force:
        remedy = "Give --force to replace it, or another file with --out."
        raise UserError("--out", str(out), "already exists", remedy)
    try:
        str(args.folder.absolute()).encode()
    except UnicodeEncodeError:
        remedy = "Rename the folder, or give a link to it."
        raise UserError("DIR", str(args.folder), "its path is not UTF-8", remedy) from None
    return out


def _hardware() -> tuple[int, int]:
    from dl2pa.gpus import visible_gpus
    from dl2pa.osutil import usable_cores

    return len(visible_gpus()), usable_cores()


@contextmanager
def _naming_options() -> Generator[None]:
    """Name the options of this command in errors about the configuration keys that they set."""
    options = {"model.init": "--init", "weights": "--init", "model.backbone": "--backbone"}
    try:
        yield
    except UserError as error:
        field = options.get(error.field, error.field)
        raise UserError(field, error.value, error.message, error.remedy) from None


def _header(args: argparse.Namespace, data: Survey, machine: str) -> str:
    counts = data.counts
    per_class = f"{int(counts.min()):,}" + (
        f" to {int(counts.max()):,}" if counts.min() < counts.max() else ""
    )
    return (
        f"Written by `dl2pa init` for {data.folder} on a machine with {machine}.\n"
        f"{len(data.classes):,} classes, {data.num_train:,} training images ({per_class} per class), "
        f"{data.num_val:,} validation images.\n"
        "Accuracy and time are not measured; `dl2pa estimate` with this file predicts the time from a short probe.\n"
        "`dl2pa config --explain KEY` describes a key."
    )


def _check(text: str, data: Survey, network: Network | None, processes: int) -> None:
    """Check the file as training would, including the content of a file of weights."""
    from dl2pa.config import parse_config
    from dl2pa.config.paths import expand_paths
    from dl2pa.config.validate import DataSizes, validate
    from dl2pa.config.yaml_core import parse_yaml

    config = parse_config(expand_paths(parse_yaml(text)))
    if config.launch.nproc != "auto":
        processes = config.launch.nproc
    if network is not None:
        from dl2pa.runplan import check_contents, follow_weights

        config = follow_weights(config)
        check_contents(config, len(data.classes))
    validate(config, processes, DataSizes(data.num_train, data.num_val, len(data.classes)))
    if network is not None and network.file is not None:
        from dl2pa.model.init import check_init
        from dl2pa.rundir import RunDirectory

        check_init(config, RunDirectory(Path("a new run")))


def _write(out: Path, text: str) -> None:
    from dl2pa.osutil import write_atomically

    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text)


def _report(
    args: argparse.Namespace, out: Path, data: Survey, network: Network | None, tree: dict[str, Any]
) -> None:
    fetch = None if network is None else network.fetch
    file = shlex.quote(str(out))
    steps = [*([f"dl2pa weights fetch {fetch}"] if fetch else []), f"dl2pa train {file}"]
    result: dict[str, Any] = {
        "config": str(out),
        "classes": len(data.classes),
        "train_images": data.num_train,
        "val_images": data.num_val,
        "val_fraction": data.val_fraction,
        "median_short_side": data.short_side,
        "inspected": data.num_inspected,
        "unreadable": [{"path": str(path), "reason": reason} for path, reason in data.unreadable],
        "backbone": tree["model"]["backbone"],
        "init": tree["model"].get("init"),
        "image_size": tree["data"]["image_size"],
        "embedding_dim": tree["model"]["embedding_dim"],
        "batch_size": tree["train"]["batch_size"],
        "epochs": tree["train"]["epochs"],
        "warnings": _warnings(data),
        "next": steps,
    }
    if args.json:
        say(result, True, "")
        return
    hidden = ("unreadable", "warnings", "next")
    say(
        {key: "none" if v is None else v for key, v in result.items() if key not in hidden},
        False,
        f"{args.folder}:",
    )
    for path, reason in data.unreadable[:_MAX_SHOWN]:
        note(f"  {path}: {reason}")
    for warning in result["warnings"]:
        note(f"  {warning}")
    print("\n".join(["next:", *(f"  {step}" for step in steps)]))  # noqa: T201
    if fetch:
        print("  (without a network: dl2pa init … --init none, or --init FILE)")  # noqa: T201


def _warnings(data: Survey) -> list[str]:
    """What the user should know about the images, one text each."""
    texts: list[str] = []
    if data.unreadable:
        texts.append(
            f"{len(data.unreadable):,} of {data.num_inspected:,} inspected images cannot be read; "
            f"`dl2pa data index {shlex.quote(str(data.layout.root))}` checks all"
        )
    if data.num_rotated:
        texts.append(
            f"{data.num_rotated:,} of {data.num_inspected:,} inspected images have a camera orientation, which "
            "training ignores; rotate their pixels if they must be upright"
        )
    if data.skipped:
        texts.append(f"skipped {data.skipped}")
    return texts
