"""Planned runs of `train`, `submit` and `sweep`: configurations, run directories and checks."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dl2pa.config import Config, fingerprint, load_config, load_recorded_config, merge, parse_config
from dl2pa.config.gather import Problems
from dl2pa.config.identity import RECIPE_TAG, Identity, check_resumable, checkpoint_identity, data_identity
from dl2pa.config.paths import expand_path
from dl2pa.config.places import finder, placed
from dl2pa.config.prototypes import check_source, needs_content_check
from dl2pa.config.validate import validate
from dl2pa.errors import UserError
from dl2pa.gpus import resolve_nproc
from dl2pa.model.weight_sources import PREPROCESSING_KEYS, check_place, preprocessing_of
from dl2pa.rundir import RunDirectory, checkpoint_steps
from dl2pa.specs import backbone_spec

if TYPE_CHECKING:
    from dl2pa.training.data import DataSplits

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_MAX_RUNS = 1000


@dataclass(frozen=True)
class RunSpec:
    """Input of a planned run, before its configuration is loaded.

    Attributes:
        config_file: configuration file.
        overrides: `key=value` for it, grid values last.
        varied: what distinguishes the run from the others of the command: its variant or published result, and its
            `key=value` of each grid key.
    """

    config_file: Path
    overrides: tuple[str, ...]
    varied: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunPlan:
    """A planned run.

    Attributes:
        config_file, overrides: what the configuration was loaded from.
        config: configuration that the run uses.
        run_dir: absolute path of its run directory.
        nproc: number of processes per machine, with `launch.nproc=auto` resolved.
        label: name of the run: the stem of its configuration file, which a submitted run has in a tag.
        varied: see `RunSpec`.
        by_option: `key=value` of the keys that an option of the command has set, such as `--nproc`.
    """

    config_file: Path
    overrides: tuple[str, ...]
    config: Config
    run_dir: Path
    nproc: int
    label: str
    varied: tuple[str, ...] = ()
    by_option: tuple[str, ...] = ()

    @property
    def source(self) -> tuple[Path, tuple[str, ...]]:
        """Configuration file, and everything on the command line that replaces its values."""
        return self.config_file, (*self.overrides, *self.by_option)

    @property
    def title(self) -> str:
        """Text that distinguishes the run from the others of the command."""
        return " ".join(self.varied) or self.label

    @cached_property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.run_dir)


def plan_runs(
    specs: Sequence[RunSpec],
    run_dir: Path | None,
    *,
    in_folder: bool = False,
    nproc: int | Literal["auto"] | None = None,
    gpus: int | None = None,
    option: str = "--grid",
) -> list[RunPlan]:
    """Load the configuration of each run and choose its directory.

    Args:
        run_dir: the run directory, or with `in_folder` the parent of the run directories; None means `runs/`.
        nproc: replaces `launch.nproc`.
        gpus: GPUs per node of the SLURM job that trains, one process each; 0 keeps an explicit `launch.nproc`. None:
            the runs train on this machine.
        option: command-line option named if two runs have the same directory.

    Raises:
        UserError: the problems of all configurations, or two runs with the same directory.
    """
    plans: list[RunPlan] = []
    problems = Problems()
    by_option = () if nproc is None and not gpus else (f"launch.nproc={nproc or gpus}",)
    for spec in specs:
        with problems, placed(finder([(spec.config_file, (*spec.overrides, *by_option))])):
            plans.append(_plan(spec, run_dir, in_folder, nproc, gpus))
    problems.raise_any()
    directories = [plan.run_dir for plan in plans]
    for directory in directories:
        if directories.count(directory) > 1:
            remedy = "Vary a key that changes the run."
            raise UserError(option, str(directory), "two runs are identical", remedy)
    return plans


def _plan(
    spec: RunSpec,
    run_dir: Path | None,
    in_folder: bool,
    nproc: int | Literal["auto"] | None,
    gpus: int | None,
) -> RunPlan:
    """Plan one run; see `plan_runs`."""
    recorded = run_dir is not None and _is_recorded(spec.config_file.absolute(), run_dir.absolute())
    if recorded:
        config = load_recorded_config(spec.config_file, spec.overrides)
    else:
        config = load_config(spec.config_file, spec.overrides, _check_files)
    stem = spec.config_file.stem
    place = run_dir or Path("runs")
    if in_folder or run_dir is None:
        place /= f"{stem}-{fingerprint(config)}"
    place = place.absolute()
    try:
        place.exists()  # refuses names that are too long
    except OSError as error:
        raise RunDirectory(place).not_writable(error) from None
    config = _follow_valid_weights(config, place)
    if gpus is not None:
        nproc = gpus or (1 if config.launch.nproc == "auto" else None)
    by_option = () if nproc is None else (f"launch.nproc={nproc}",)
    if nproc is not None:
        config = parse_config(merge(config.model_dump(mode="json"), {"launch": {"nproc": nproc}}))
    label = config.tracking.tags.get(RECIPE_TAG) or stem
    processes = resolve_nproc(config.launch.nproc, config.launch.device)
    return RunPlan(spec.config_file, spec.overrides, config, place, processes, label, spec.varied, by_option)


def _follow_valid_weights(config: Config, run_dir: Path) -> Config:
    """Follow the initial weights; if there are none, report all problems of the configuration together."""
    try:
        return follow_weights(config, run_dir)
    except UserError as error:
        problems = Problems()
        problems.add(error)
        with problems:
            validate(config, 1)
        with problems:
            _check_files(config)
        raise problems.error() from None


def _check_files(config: Config) -> None:
    from dl2pa.training.data import check_files

    check_files(config)


def _is_recorded(file: Path, run_dir: Path) -> bool:
    """Whether a configuration was recorded in a run directory in `run_dir`, perhaps by an older version."""
    runs = [RunDirectory(folder) for folder in (file.parent, file.parent.parent)]
    return file.is_relative_to(run_dir) and any(
        file in (run.config, run.submitted_config, run.accepted_config)
        and (run.status_file.is_file() or run.job.is_file())
        for run in runs
    )


def follow_weights(config: Config, run_dir: Path | None = None) -> Config:
    """Take image size, normalization and interpolation from `model.init` where the configuration does not set them.

    Args:
        run_dir: a run that already has them in its record; its initial weights may be gone.

    Raises:
        UserError: `model.init` names no weights.
    """
    init, unset = config.model.init, {*PREPROCESSING_KEYS} - config.data.model_fields_set
    if init is None:
        return config
    record = None if run_dir is None else RunDirectory(run_dir).config
    recorded = load_recorded_config(record) if record is not None and record.is_file() else None
    if recorded is not None and recorded.model.init == init:
        known = recorded.data.model_dump(mode="json")
    elif unset:
        known = preprocessing_of(init, config.model.backbone)
    else:
        check_place(init, config.model.backbone)
        known = {}
    if not unset:
        return config
    values = {key: known[key] for key in sorted(unset) if key in known}
    if (
        "image_size" not in unset
        and {"image_size", "eval_resize"} <= known.keys()
        and "eval_resize" in values
    ):
        values["eval_resize"] = round(config.data.image_size * known["eval_resize"] / known["image_size"])
    return parse_config(merge(config.model_dump(mode="json", exclude_unset=True), {"data": values}))


@dataclass(frozen=True)
class DataFacts:
    """Facts of an open data set that decide whether a run may continue on it, and what its validation measures.

    Attributes:
        groups: groups of classes with an accuracy of their own: head, medium and tail of long-tailed data.
    """

    identity: Identity
    num_train: int
    num_classes: int
    groups: frozenset[str] = frozenset()


def facts_of(data: DataSplits) -> DataFacts:
    """Facts of an open data set."""
    from dl2pa.training.data import sizes_of

    identity = data_identity(data.fingerprint, data.classes)
    return DataFacts(identity, sizes_of(data).num_train, len(data.classes), frozenset(data.groups or ()))


def check_resume(plan: RunPlan, data: DataFacts | None = None) -> None:
    """Refuse a run directory whose checkpoints the planned run cannot resume from.

    The processes of the training check the same, against the checkpoint itself; here it costs them no attempt.

    Args:
        data: data set of the plan; None compares the configuration only.

    Raises:
        UserError: a change that is not allowed, or an end of training that the run has passed.
    """
    run, train = plan.directory, plan.config.train
    steps = checkpoint_steps(run.checkpoints)
    if not run.config.is_file() or not steps:
        return
    before = checkpoint_identity(load_recorded_config(run.config))
    now = checkpoint_identity(plan.config)
    attempt = run.last_attempt()
    for key, recorded in (("data.fingerprint", "data_fingerprint"), ("data.classes", "data_classes")):
        if data is not None and recorded in attempt:  # older versions did not record the classes
            before[key], now[key] = attempt[recorded], data.identity[key]
    check_resumable(before, now, quiet=True)
    if train.max_steps is not None and train.max_steps < steps[-1]:
        message, remedy = f"the run is already at step {steps[-1]}", f"Give at least {steps[-1]}."
        raise UserError("train.max_steps", train.max_steps, message, remedy)
    epochs = 0 if data is None else steps[-1] / (data.num_train // train.batch_size)
    if epochs > train.epochs:
        message, remedy = f"the run has done {epochs:.1f} epochs", f"Give at least {math.ceil(epochs)}."
        raise UserError("train.epochs", train.epochs, message, remedy)


def check_trainings(trainings: Iterable[tuple[Config, int]]) -> dict[str, DataFacts]:
    """Check each configuration against its data set. Configurations that share a data set open it once.

    Args:
        trainings: configurations, each with its world size.

    Returns:
        JSON text of each `data` section to the facts of its data set.

    Raises:
        UserError: naming all invalid fields.
    """
    from dl2pa.training.data import open_data, sizes_of

    problems = Problems()
    facts: dict[str, DataFacts] = {}
    seen: set[str] = set()
    contents: list[tuple[Config, int]] = []
    data, opened = None, ""
    for config, world_size in sorted(trainings, key=lambda pair: pair[0].data.model_dump_json()):
        tree = config.model_dump(mode="json")
        tree["tracking"], tree["train"]["seed"] = None, None
        key = json.dumps([tree, world_size], sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        with problems:
            if data is None or opened != config.data.model_dump_json():
                data, opened = None, config.data.model_dump_json()
                data = open_data(config, world_size)
                facts[opened] = facts_of(data)
            else:
                validate(config, world_size, sizes_of(data))
            check_source(config, len(data.classes))
            contents.append((config, len(data.classes)))
    problems.raise_any()
    for config, num_classes in contents:  # imports torch, so it comes last
        check_contents(config, num_classes)
    return facts


def check_contents(config: Config, num_classes: int) -> None:
    """Check the content of prototype files, `refit_cosine`, `model.freeze_before`, and the image size of a library's
    network.

    Imports torch only if there is something to check.

    Raises:
        UserError: naming the invalid field.
    """
    # Only the network knows its image sizes and its modules.
    if backbone_spec(config.model.backbone).classifier is None or config.model.freeze_before is not None:
        from dl2pa.model.model import build_embedder_shapes

        build_embedder_shapes(config)
    if needs_content_check(config, num_classes):
        from dl2pa.model.model import check_prototypes

        check_prototypes(config, num_classes)


def check_initial_weights(plans: Sequence[RunPlan]) -> None:
    """Check the content of each `model.init` once; imports torch only if the key is set.

    Raises:
        UserError: the weights do not fit the backbone, or are not on this machine.
    """
    seen: set[str] = set()
    for plan in plans:
        config = plan.config
        key = f"{config.model.model_dump_json()} {config.data.image_size}"
        if config.model.init is None or checkpoint_steps(plan.directory.checkpoints) or key in seen:
            continue
        from dl2pa.model.init import check_init

        seen.add(key)
        check_init(config, plan.directory)


def expand(
    config_file: Path, overrides: Sequence[str], grid: Sequence[str], option: str = "--grid"
) -> list[RunSpec]:
    """Return one run per combination of the grid values; the first key varies slowest.

    Args:
        grid: `key=a,b,c` or `key=0..4`; the key `config` takes configuration files.
        option: command-line option that the grid comes from, named in errors.

    Raises:
        UserError: invalid grid syntax, a key that is given twice, or too many runs.
    """
    axes = [_axis(text, option) for text in grid]
    for key, count in Counter(axis[0][0] for axis in axes).items():
        if count > 1:
            remedy = f"Give all values in one: {option} {key}=A,B."
            raise UserError(option, key, "is given more than once", remedy)
    check_count(math.prod(len(axis) for axis in axes), option)
    specs: list[RunSpec] = []
    for combination in itertools.product(*axes):
        files = [Path(expand_path("config", value)) for key, value in combination if key == "config"]
        keys = [f"{key}={value}" for key, value in combination if key != "config"]
        varied = tuple(f"{key}={value}" for key, value in combination)
        specs.append(RunSpec(files[-1] if files else config_file, (*overrides, *keys), varied))
    return specs


def check_count(runs: int, option: str = "--grid") -> None:
    """Refuse more than 1000 runs.

    Raises:
        UserError: too many runs.
    """
    if runs > _MAX_RUNS:
        raise UserError(option, runs, f"more than {_MAX_RUNS} runs", "Split it into several commands.")


def _axis(text: str, option: str) -> list[tuple[str, str]]:
    """Parse `key=values` into (key, value) pairs."""
    key, equals, values = text.partition("=")
    span = _RANGE.fullmatch(values)
    if span is not None:
        low, high = int(span[1]), int(span[2])
        if high < low:
            raise UserError(option, text, "the range ends before it begins", f"Write {key}={high}..{low}.")
        check_count(high - low + 1, option)
        listed = [str(n) for n in range(low, high + 1)]
    else:
        listed = [value for value in _split(values) if value]
    if not equals or not key or not listed:
        remedy = "Write key=0..4 or key=a,b,c, for example train.seed=0..4."
        raise UserError(option, text, "is not a key with values", remedy)
    return [(key, value) for value in listed]


_QUOTED = re.compile(r"\"(?:\\.|[^\"\\])*\"|'(?:''|[^'])*'")


def _split(values: str) -> Iterator[str]:
    """Split at commas outside brackets and quoted text."""
    depth, start, position = 0, 0, 0
    while position < len(values):
        character, before = values[position], values[start:position].rstrip()
        quoted = _QUOTED.match(values, position)
        if quoted and (not before or (depth and before[-1] in "[{,:")):
            position = quoted.end()
            continue
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            yield values[start:position]
            start = position + 1
        position += 1
    yield values[start:]
