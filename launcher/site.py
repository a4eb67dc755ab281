"""Site file: defaults and profiles of the jobs on one cluster, as YAML.

The value of an option is that of the command line, otherwise of the profile, of the defaults, of dl2pa. `sbatch` and
`environment` are merged by name; any other key replaces the former value, and null restores that of dl2pa.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from dl2pa import envvars
from dl2pa.config.gather import Problems
from dl2pa.config.load import read_yaml
from dl2pa.config.paths import expand_path
from dl2pa.config.places import finder, placed
from dl2pa.config.schema_errors import explain_errors
from dl2pa.config.section import NonNegativeInt, PositiveInt, Section
from dl2pa.errors import UserError
from dl2pa.redaction import is_secret_name, redact
from launcher.request import Request, Setup, check_form
from launcher.sbatch import as_words, gpus_of_gres, parse_options, without_gpus

Layer = dict[str, Any]
"""Fields of `Request` and `Setup` that one source sets, for example the defaults; null means the value of dl2pa."""
NO_PROFILE = "none"
_SETUP = {
    "setup": "lines",
    **{name: name for name in ("environment", "container_engine", "container_mounts")},
}
"""Keys of the site file to fields of `Setup`."""
_OWN_VARIABLES = ("SLURM_", "SBATCH_", "SUBMITIT_")
_OWN_NAMES = (envvars.SUPERVISED, envvars.LAUNCH, envvars.PORT, envvars.AGENT_PID, *envvars.RANKS)


class Profile(Section):
    """Defaults, or a named profile, of the jobs of a cluster. Most keys are options of `dl2pa submit`."""

    nodes: PositiveInt | None = None
    gpus_per_node: NonNegativeInt | str | None = None
    """GPUs per node, with a type if the cluster has several: h100:8."""
    time: PositiveInt | str | None = None
    stop_before: PositiveInt | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    mem: int | str | None = None
    cpus_per_gpu: PositiveInt | Literal["auto", "site"] | None = None
    """CPU cores per process; auto: the cores per GPU of the partition; site: request none."""
    container: str | None = None
    """Image to run in."""
    container_engine: Literal["pyxis", "apptainer", "singularity"] | None = None
    container_mounts: tuple[str, ...] = ()
    """Folders that the container sees in addition."""
    sbatch: dict[str, Any] = {}
    """Further options of sbatch: `mail-type: END`; true for an option without a value, null removes a default."""
    setup: tuple[str, ...] = ()
    """Lines of bash that run before the training: `module load cuda`."""
    environment: dict[str, Any] = {}
    """Variables of the job."""


@dataclass(frozen=True)
class Site:
    """Content of the site file; empty if there is none."""

    file: Path | None = None
    defaults: Layer = field(default_factory=Layer)
    profiles: Mapping[str, Layer] = field(default_factory=dict[str, Layer])

    def profile(self, name: str | None) -> Layer:
        """Return a profile; empty for `none`.

        Raises:
            UserError: there is no such profile.
        """
        if name is None or name == NO_PROFILE:
            return {}
        if name in self.profiles:
            return self.profiles[name]
        near = difflib.get_close_matches(name, self.profiles, n=1)
        known = f"Known: {', '.join(self.profiles)}." if self.profiles else f"Use --profile {NO_PROFILE}."
        remedy = f"Did you mean {near[0]}?" if near else known
        raise UserError("--profile", name, f"is not a profile of {self.file or 'a site file'}", remedy)


def site_file() -> Path | None:
    """Path of the site file: `DL2PA_CLUSTER`, otherwise `dl2pa/cluster.yaml` in the user's configuration folder.

    Raises:
        UserError: `DL2PA_CLUSTER` names no file.
    """
    named = os.environ.get(envvars.CLUSTER)
    if named is not None:
        if named and not Path(named).is_file():
            remedy = "Correct it; empty, no site file is read."
            raise UserError(envvars.CLUSTER, named, "no such file", remedy)
        return Path(named) if named else None
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    file = Path(base).expanduser() / "dl2pa/cluster.yaml"
    return file if file.is_file() else None


def load_site(file: Path | None) -> Site:
    """Read a site file.

    Raises:
        UserError: all unknown keys and invalid values, each with its line.
    """
    if file is None:
        return Site()
    tree = read_yaml(file)
    with placed(finder([(file, ())])):
        return _site_of(file, tree)


def _site_of(file: Path, tree: Mapping[str, Any]) -> Site:
    problems = Problems()
    for key in tree.keys() - {"defaults", "profiles"}:
        remedy = "A site file has the keys defaults and profiles."
        problems.add(UserError(str(key), tree[key], "unknown key", remedy))
    profiles = tree.get("profiles") or {}
    if not isinstance(profiles, dict):
        remedy = "Write `profiles:` with one indented section per name."
        problems.add(UserError("profiles", profiles, "must map names to sections", remedy))
        profiles = {}
    layers: dict[str, Layer] = {}
    for name, content in {"": tree.get("defaults"), **profiles}.items():
        prefix = f"profiles.{name}" if name != "" else "defaults"
        with problems:
            if name == NO_PROFILE or not isinstance(name, str) or not re.fullmatch(r"[\w.-]{0,64}", name):
                message = "is not a valid name of a profile"
                raise UserError(prefix, name, message, f"Use letters, digits and . _ -, not {NO_PROFILE}.")
            layers[name] = _layer(prefix, content or {})
    problems.raise_any()
    return Site(file, layers.pop(""), layers)


def _layer(prefix: str, content: Any) -> Layer:
    """Validate one section of a site file."""
    problems = Problems()
    profile = _valid_keys(prefix, content, problems)
    layer = _plain(prefix, profile, problems)
    for each in _parts(layer):
        with problems, _named(prefix):
            check_form(Request(**each))
    with problems:
        _check_setup(prefix, layer)
    with problems:
        layer = _with_gres(layer)
    problems.raise_any()
    return layer


def _valid_keys(prefix: str, content: Any, problems: Problems) -> Profile:
    """Parse a section; add its unknown keys and invalid values to the problems and return the other keys."""
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        tree = content if isinstance(content, dict) else {}
        for problem in explain_errors(error, tree, Profile, {}, {}, f"{prefix}."):
            problems.add(problem)
        invalid = {str(each["loc"][0]) for each in error.errors() if each["loc"]}
    try:
        return Profile.model_validate({key: value for key, value in tree.items() if str(key) not in invalid})
    except ValidationError:
        raise problems.error() from None


def _parts(layer: Layer) -> list[Layer]:
    """Arguments of `Request` with one value or one option of sbatch each, so that all problems are found."""
    names = {f.name for f in fields(Request)} - {"setup", "sbatch"}
    parts = [{key: value} for key, value in layer.items() if key in names and value is not None]
    options = [{key: value} for key, value in layer.get("sbatch", {}).items() if value is not None]
    return [*parts, *({"sbatch": as_words(option)} for option in options)]


@contextmanager
def _named(prefix: str) -> Generator[None]:
    """Name the key of the site file in errors that name an option."""
    try:
        yield
    except UserError as error:
        key = error.field.removeprefix("--").replace("-", "_")
        name = f"{key}.{str(error.value).partition('=')[0]}" if key == "sbatch" else key
        raise UserError(f"{prefix}.{name}", error.value, error.message, error.remedy) from None


def _plain(prefix: str, profile: Profile, problems: Problems) -> Layer:
    """Return the keys that a section sets, in the types of `Request` and `Setup`; invalid values are left out."""
    layer: Layer = {name: getattr(profile, name) for name in profile.model_fields_set}
    for name in ("time", "mem"):
        if layer.get(name) is not None:
            layer[name] = str(layer[name])
    if layer.get("container") is not None:
        with problems:
            layer["container"] = expand_path(f"{prefix}.container", layer["container"])
    if layer.get("container_mounts"):
        with problems:
            mounts = (expand_path(f"{prefix}.container_mounts", m) for m in layer["container_mounts"])
            layer["container_mounts"] = tuple(mounts)
    if "gpus_per_node" in layer:
        gpus = layer.pop("gpus_per_node")
        with problems:
            is_text = isinstance(gpus, str)
            layer |= gpus_layer(f"{prefix}.gpus_per_node", gpus) if is_text else _number_of_gpus(gpus)
    if "environment" in layer:
        layer["environment"] = _texts(f"{prefix}.environment", layer["environment"], _value, problems)
    if "sbatch" in layer:
        options = _texts(f"{prefix}.sbatch", layer["sbatch"], _text, problems)
        layer["sbatch"] = {key.removeprefix("--").replace("_", "-"): v for key, v in options.items()}
    return layer


def _number_of_gpus(gpus: int | None) -> Layer:
    return {"gpus_per_node": gpus, "gpu_type": None}


def _texts(
    prefix: str,
    values: Mapping[Any, Any],
    text_of: Callable[[str, Any], str | None],
    problems: Problems,
) -> dict[str, str | None]:
    """Texts of the valid values of a mapping."""
    texts: dict[str, str | None] = {}
    for key, value in values.items():
        with problems:
            texts[str(key)] = text_of(f"{prefix}.{key}", value)
    return texts


def _value(field_name: str, value: Any) -> str | None:
    """Text of the value of a variable."""
    if isinstance(value, bool):
        remedy = f'Put it in quotes, as in "{str(value).lower()}", or write 1 or 0.'
        raise UserError(field_name, value, "must be text, a number or null", remedy)
    return _text(field_name, value)


def _text(field_name: str, value: Any) -> str | None:
    """Text of a value of a mapping; true is an option without a value."""
    if value is True:
        return ""
    if value is None or (isinstance(value, str | int | float) and value is not False):
        return None if value is None else str(value)
    raise UserError(field_name, value, "must be text, a number, true or null", "Give another value.")


def gpus_layer(option: str, text: str) -> Layer:
    """Parse `N` or `TYPE:N`.

    Raises:
        UserError: other text.
    """
    kind, _, count = text.rpartition(":")
    if not re.fullmatch(r"-?\d{1,6}", count) or (not kind and ":" in text):
        raise UserError(option, text, "is not a number of GPUs", "Write N or TYPE:N, for example h100:8.")
    return {"gpus_per_node": int(count), "gpu_type": kind or None}


def _with_gres(layer: Layer) -> Layer:
    """Take the number of processes from the GPUs in `gres`.

    Raises:
        UserError: both `gres` and `--gpus-per-node` are given, with different numbers.
    """
    options: dict[str, str] = {k: v for k, v in layer.get("sbatch", {}).items() if v is not None}
    gpus = gpus_of_gres(options)
    if gpus is None:
        return layer
    given = layer.get("gpus_per_node")
    if given is not None and given != gpus:
        message = f"requests {gpus} GPUs per node, and --gpus-per-node {given}"
        raise UserError("--sbatch", f"gres={options['gres']}", message, "Give one of them.")
    return {**layer, "gpus_per_node": gpus, "gpu_type": None}


def _check_setup(prefix: str, layer: Layer) -> None:
    problems = Problems()
    for name, value in layer.get("environment", {}).items():
        key = f"{prefix}.environment.{name}"
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            problems.add(UserError(key, value, "is not the name of a variable", "Use letters, digits and _."))
        elif name.startswith(_OWN_VARIABLES) or name in _OWN_NAMES:
            problems.add(UserError(key, value, "is set by SLURM or dl2pa", "Remove it."))
        elif is_secret_name(name) or (value is not None and redact(value) != value):
            remedy = "Export it in your shell: sbatch passes your environment to the job."
            problems.add(
                UserError(key, "***", "is a secret, and others can read the script of a job", remedy)
            )
    lines = "\n".join(layer.get("setup", ()))
    done = subprocess.run(["bash", "-n"], input=lines, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1].removeprefix("bash: ")
        problems.add(UserError(f"{prefix}.setup", lines, f"is not valid bash: {reason}", "Correct it."))
    problems.raise_any()


def overlay(lower: Layer, upper: Layer) -> Layer:
    """Return two layers combined; values of `upper` replace those of `lower`."""
    options = dict(lower.get("sbatch", {}))
    if "gpus_per_node" in upper:
        options = without_gpus({k: v for k, v in options.items() if v is not None})
    merged = {**lower, **upper}
    merged["sbatch"] = {**options, **upper.get("sbatch", {})}
    merged["environment"] = {**lower.get("environment", {}), **upper.get("environment", {})}
    return merged


def command_line_layer(options: Mapping[str, Any]) -> Layer:
    """Layer of the options of a command; None means not given.

    Raises:
        UserError: `--sbatch` or `--gpus-per-node` cannot be read.
    """
    layer: Layer = {key: value for key, value in options.items() if value is not None}
    if isinstance(layer.get("gpus_per_node"), str):
        layer |= gpus_layer("--gpus-per-node", layer["gpus_per_node"])
    if layer.get("container") == NO_PROFILE:
        layer["container"] = None
    if "sbatch" in layer:
        layer["sbatch"] = parse_options(layer["sbatch"])
    return _with_gres(layer)


def resolve(options: Mapping[str, Any], last: Request | None = None) -> Request:
    """Return the request of a command: command line, profile, defaults of the site file, defaults of dl2pa.

    Args:
        options: fields of `Request` that the command line gives; None means not given.
        last: request of the last submission of the run; it comes before the profile and the defaults, unless the
            command line names a profile.

    Raises:
        UserError: an invalid site file, an unknown profile or an invalid option.
    """
    site, given = load_site(site_file()), options.get("profile")
    name = given or (last.profile if last is not None else None)
    layer = overlay(site.defaults, site.profile(name))
    if last is not None:
        stored = {**last.as_dict(), "sbatch": last.sbatch_options}
        layer = {**{key: value for key, value in layer.items() if key in _SETUP}, **stored}
        layer = overlay(layer, site.profile(given))
    return _request(overlay(layer, command_line_layer(options)), name)


def _request(layer: Layer, profile: str | None) -> Request:
    known = {f.name for f in fields(Request)} - {"setup", "sbatch", "profile"}
    values = {key: value for key, value in layer.items() if key in known and value is not None}
    setup: dict[str, Any] = {name: layer[key] for key, name in _SETUP.items() if layer.get(key)}
    if "environment" in setup:
        setup["environment"] = {k: v for k, v in setup["environment"].items() if v is not None}
    words = as_words({key: value for key, value in layer["sbatch"].items() if value is not None})
    return Request(**values, sbatch=words, profile=profile, setup=Setup(**setup))
