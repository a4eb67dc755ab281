"""Next parameters and early stopping, by Optuna.

Both are functions of the journal: each call builds a study in memory from the trials so far. A search that was killed
therefore continues with the same decisions, and Optuna needs no storage.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dl2pa.config.search import CHOICE, Parameter, Search
from dl2pa.errors import UserError, install_command
from dl2pa.search.journal import FAILED, FINISHED, PRUNED, Trial

_DIGITS = 4
"""Significant digits of a sampled number."""
_TRIES = 20
"""Samples that may be equal to an earlier trial before the space is considered exhausted."""


def check_installed() -> None:
    """Check that Optuna is installed.

    Raises:
        UserError: it is not; names the extra.
    """
    if importlib.util.find_spec("optuna") is None:
        remedy = f"Install it: {install_command('search')}."
        raise UserError("search", "optuna", "is not installed", remedy)


def grid_size(space: Sequence[Parameter]) -> int:
    """Return the number of combinations of choices."""
    return math.prod(len(parameter.choices) for parameter in space)


def suggest(
    search: Search, space: Sequence[Parameter], trials: Sequence[Trial]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the parameters of the next trial and the attributes that Optuna keeps with it.

    Numbers are rounded to four significant digits. The result depends only on the arguments.

    Returns:
        None if every combination that the sampler finds has been tried.
    """
    number = len(trials)
    tried = {_key(trial.params) for trial in trials}
    distributions = {parameter.key: _distribution(parameter) for parameter in space}
    if search.sampler == "grid" and number >= grid_size(space):
        return None
    for attempt in range(_TRIES):
        study = _study(search, space, trials)
        study.sampler = _sampler(search, space, number, attempt)
        asked = study.ask(distributions)
        params = {parameter.key: _rounded(parameter, asked.params[parameter.key]) for parameter in space}
        if _key(params) not in tried:
            return params, dict(study.get_trials(deepcopy=False)[number].system_attrs)
    return None


def decide(
    search: Search,
    space: Sequence[Parameter],
    trials: Sequence[Trial],
    trial: Trial,
    epoch: int,
    value: float,
) -> tuple[bool, dict[str, Any]]:
    """Return whether to stop a trial at a rung (ASHA; Li et al., MLSys 2020), and Optuna's new attributes of it.

    Args:
        trial: one of the trials.
        epoch, value: validation at which it reached the rung.
    """
    study = _study(search, space, trials, {trial.number: (epoch, value)})
    prune = study.pruner.prune(study, study.get_trials(deepcopy=False)[trial.number])
    attrs = study.get_trials(deepcopy=False)[trial.number].system_attrs
    return bool(prune), {name: attrs[name] for name in attrs if name not in trial.attrs}


def next_rung(search: Search, reports: Sequence[tuple[int, float]]) -> int | None:
    """Return the epoch from which a trial is compared next; None without pruning."""
    if not search.prune.enabled:
        return None
    rung, factor = search.prune.first_epoch, search.prune.reduction_factor
    last = reports[-1][0] if reports else 0
    while rung <= last:
        rung *= factor
    return rung


def _study(
    search: Search,
    space: Sequence[Parameter],
    trials: Sequence[Trial],
    reports: Mapping[int, tuple[int, float]] | None = None,
) -> Any:
    """Build a study of the trials; `reports` adds a value to trials, by number."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    states = {
        FINISHED: optuna.trial.TrialState.COMPLETE,
        PRUNED: optuna.trial.TrialState.PRUNED,
        FAILED: optuna.trial.TrialState.FAIL,
    }
    study = optuna.create_study(
        direction="maximize" if search.maximizes else "minimize",
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=optuna.pruners.SuccessiveHalvingPruner(
            min_resource=search.prune.first_epoch, reduction_factor=search.prune.reduction_factor
        ),
    )
    distributions = {parameter.key: _distribution(parameter) for parameter in space}
    for trial in trials:
        values = dict(trial.reports)
        if reports and trial.number in reports:
            epoch, value = reports[trial.number]
            values[epoch] = value
        study.add_trial(
            optuna.trial.create_trial(
                state=states.get(trial.state, optuna.trial.TrialState.RUNNING),
                value=trial.value if trial.state == FINISHED else None,
                params=trial.params,
                distributions=distributions,
                intermediate_values=values,
                system_attrs=dict(trial.attrs),
            )
        )
    return study


def _sampler(search: Search, space: Sequence[Parameter], number: int, attempt: int) -> Any:
    """Sampler of one trial; its seed depends on the trial, so that it does not depend on restarts."""
    import optuna

    if search.sampler == "grid":
        return optuna.samplers.GridSampler({p.key: list(p.choices) for p in space}, seed=search.seed)
    digest = hashlib.sha256(f"{search.seed} {number} {attempt}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _distribution(parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.form == CHOICE:
        return CategoricalDistribution(parameter.choices)
    if parameter.form == "integer":
        return IntDistribution(int(parameter.low), int(parameter.high))
    return FloatDistribution(parameter.low, parameter.high, log=parameter.form == "log_uniform")


def _rounded(parameter: Parameter, value: Any) -> Any:
    """Round a number to four significant digits, within the range."""
    if parameter.form in (CHOICE, "integer"):
        return value
    return min(max(float(f"{value:.{_DIGITS}g}"), float(parameter.low)), float(parameter.high))


def _key(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)
