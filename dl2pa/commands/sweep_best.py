"""Sweep file with the best settings of each variant, written by `dl2pa sweep --best`."""

from __future__ import annotations

import os
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl2pa.commands.options import check_output_file
from dl2pa.commands.output import note
from dl2pa.config import flat_overrides
from dl2pa.config.paths import literal_path
from dl2pa.config.sweep import KEY, VARIANT_KEY
from dl2pa.config.yaml_core import dump_yaml
from dl2pa.errors import UserError
from dl2pa.osutil import write_atomically
from dl2pa.redaction import redact
from dl2pa.runplan import RunPlan
from dl2pa.specs import IMAGE_FOLDER

_SEED, _SPLIT = "train.seed", "data.val_fraction"
_SEEDS = "0..4"
_TITLE = "# Best settings of each variant"


@dataclass(frozen=True)
class _Setting:
    """One combination of grid values of a variant.

    Attributes:
        plan: one of its runs.
        values: settings of the run by key, without the seed.
        scores: top-1 accuracy at the last epoch of each finished seed.
        failures: directories of the failed runs.
    """

    plan: RunPlan
    values: dict[str, Any]
    scores: list[float]
    failures: list[Path]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    def text(self) -> str:
        """The grid values of the setting."""
        varied = (text for text in self.plan.varied if "=" in text and not text.startswith(f"{_SEED}="))
        return ", ".join(varied) or "as in the sweep"


def check_best(path: Path, inputs: Collection[Path]) -> None:
    """Check before the runs that the file can be written, and that only an earlier result is replaced.

    Args:
        inputs: files that the sweep reads.

    Raises:
        UserError: names ``--best``.
    """
    check_output_file("--best", path)
    if any(path.exists() and path.samefile(file) for file in inputs):
        raise UserError("--best", str(path), "is a file that the sweep reads", "Give another file.")
    if path.exists() and not path.read_bytes().startswith(_TITLE.encode()):
        message = "exists and was not written by --best"
        raise UserError("--best", str(path), message, "Give another file, or remove this one.")


def write_best(plans: Sequence[RunPlan], path: Path, failed: Collection[Path] = ()) -> None:
    """Write the settings of each variant with the highest mean top-1 accuracy at the last epoch.

    The runs of the new sweep have the validation split of the data set, which `data.val_fraction` replaced.

    Args:
        plans: runs of the sweep that have ended.
        failed: directories of those that failed; their settings, which may have diverged, are left out.

    Raises:
        UserError: the file cannot be written, or a variant has no setting without a failed run (``--best``).
    """
    variants: dict[str, dict[str, _Setting]] = {}
    for plan in plans:
        name = plan.config.tracking.tags.get(VARIANT_KEY) or plan.label
        values = _values(plan)
        values.pop(_SEED, None)
        settings = variants.setdefault(name, {})
        key = f"{plan.config_file} {sorted((k, repr(v)) for k, v in values.items())}"
        setting = settings.setdefault(key, _Setting(plan, values, [], []))
        if plan.run_dir in failed:
            setting.failures.append(plan.run_dir)
        else:
            setting.scores.append(float(plan.directory.read_result()["top1_last"]))
    best: dict[str, _Setting] = {}
    for name, settings in variants.items():
        complete = [setting for setting in settings.values() if not setting.failures]
        if not complete:
            message = f"every setting of {name!r} has a failed run"
            raise UserError(
                "--best", str(path), message, "Add settings to the grid, or leave the variant out."
            )
        best[name] = max(complete, key=lambda s: s.mean)
    lines = [
        f"{_TITLE} by the mean top-1 accuracy at the last epoch, over {len(plans)} runs.",
        *(
            f"# {name}: {s.text()}: {s.mean:.2f} % (n = {len(s.scores)}, {len(variants[name])} settings)"
            for name, s in best.items()
        ),
    ]
    for line in lines[1:]:
        note(line.removeprefix("# "))
    text = "\n".join(lines) + "\n" + dump_yaml({KEY: _content(best, path)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text, private=redact(text) != text)
    except OSError as error:
        message = f"cannot be written ({error.strerror or error})"
        raise UserError("--best", str(path), message, "Give another file.") from None
    note(f"written: {path}; dl2pa sweep {path} --run-dir DIR trains them with the seeds {_SEEDS}")


def _content(best: Mapping[str, _Setting], path: Path) -> dict[str, Any]:
    """Content of the key `sweep`: settings that all variants share are its overrides."""
    folder = path.absolute().parent
    variants = {
        name: {"config": literal_path(os.path.relpath(s.plan.config_file.absolute(), folder)), **s.values}
        for name, s in best.items()
    }
    first, *others = variants.values()
    shared = {
        key: value
        for key, value in first.items()
        if key != "config" and all(key in other and other[key] == value for other in others)
    }
    rest = {name: {k: v for k, v in values.items() if k not in shared} for name, values in variants.items()}
    return {"overrides": shared, "variants": rest, "seeds": _SEEDS}


def _values(plan: RunPlan) -> dict[str, Any]:
    """Settings of a run by key; later ones win.

    A `data.val_fraction` of the configuration file is kept with class folders, which may have no other split.
    """
    result = {k: v for k, v in flat_overrides(plan.overrides).items() if not k.startswith("tracking.tags")}
    data = plan.config.data
    in_file = data.val_fraction is not None and data.dataset != IMAGE_FOLDER
    if in_file or result.get(_SPLIT) is not None:
        result[_SPLIT] = None
    return result
