"""`dl2pa search`: search for the best values of configuration keys, with early stopping of the worse trials."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dl2pa.commands.options import add_overrides, add_slurm_request, nonempty_path, nonempty_text
from dl2pa.commands.output import note, say, table
from dl2pa.commands.setting_warnings import note_warnings
from dl2pa.config import Config, fingerprint, flat_overrides
from dl2pa.config.gather import Problems
from dl2pa.config.paths import expand_path, literal_path
from dl2pa.config.places import finder, place_in_sweep, placed
from dl2pa.config.search import Parameter, Search, load_search
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, UserError
from dl2pa.redaction import redact
from dl2pa.rundir import RunDirectory
from dl2pa.runplan import DataFacts, RunPlan, RunSpec, check_initial_weights, check_trainings, plan_runs
from dl2pa.search.driver import Driver, Executor, PlannedTrial, Planner, SearchRefused, trial_folder
from dl2pa.search.journal import Header, Journal, State, Trial, is_search, read_state
from dl2pa.search.optimizer import check_installed, suggest
from dl2pa.search.results import command_of, overrides_of, results_of
from dl2pa.search.tracking import SearchTracker, recorded_keys
from dl2pa.tracking.server import choose_uri, local_uri


@dataclass(frozen=True)
class SearchPlan:
    """A search as the command line and its file describe it.

    Attributes:
        config_file, overrides: configuration of every trial.
        folder: absolute path of the folder with the journal and the trials.
        ends: checked plans of trials at the ends of the space, the lowest values first.
    """

    name: str
    search: Search
    space: list[Parameter]
    config_file: Path
    overrides: tuple[str, ...]
    folder: Path
    ends: tuple[RunPlan, ...] = ()

    @property
    def config(self) -> Config:
        return self.ends[0].config

    @property
    def parallel(self) -> int:
        return self.search.parallel or 1

    def spec(self, trial: Trial, extra: Sequence[str] = ()) -> RunSpec:
        """Return the run of a trial.

        Args:
            extra: overrides that do not change its result.
        """
        own = overrides_of(self.space, trial)
        return RunSpec(self.config_file, (*self.overrides, *own, *extra), tuple(own))

    def header(self) -> Header:
        search = self.search
        keys = {"parameters": search.parameters, "metric": search.metric, "maximize": search.maximizes}
        keys |= {"sampler": search.sampler, "seed": search.seed, "prune": search.prune.model_dump()}
        config = os.path.normpath(self.config_file.absolute())
        plain, shown = json.loads(json.dumps(keys)), tuple(redact(text) for text in self.overrides)
        return Header(uuid.uuid4().hex, self.name, config, shown, fingerprint(self.config), plain)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=nonempty_path, metavar="FILE", help="search file: YAML with the key `search`"
    )
    add_overrides(parser, "train.epochs=5")
    parser.add_argument(
        "--trials", type=int, metavar="N", help="number of trials (default: that of the file)"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        metavar="K",
        help="maximum number of concurrent trials or of jobs in the queue",
    )
    parser.add_argument(
        "--run-dir", type=nonempty_path, metavar="DIR", help="folder of the search (default: runs/<FILE>)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the first trial")
    parser.add_argument(
        "--slurm", action="store_true", help="train on SLURM: queue the search itself as a small job"
    )
    parser.add_argument(
        "--here", action="store_true", help="with --slurm: run the search in this process, not as a job"
    )
    parser.add_argument(
        "--controller",
        action="append",
        type=nonempty_text,
        metavar="KEY[=VALUE]",
        help="option of sbatch for the job of the search itself, for example partition=cpu; can be repeated",
    )
    add_slurm_request(parser)


def run(args: argparse.Namespace) -> int:
    plan = _read(args)
    check_installed()
    with placed(_finder(args.file, plan)):
        if args.slurm:
            from dl2pa.commands.search_slurm import run_on_slurm

            return run_on_slurm(plan, args)
        return _run_here(plan, args)


def _finder(file: Path, plan: SearchPlan) -> Callable[[str], str | None]:
    """Return a function that finds a key in the search file, then in the configuration."""

    def find(field: str) -> str | None:
        in_config = finder([(plan.config_file, plan.overrides)])
        return place_in_sweep(file, field) or in_config(field)

    return find


def _read(args: argparse.Namespace) -> SearchPlan:
    """Combine the search file and the command line."""
    search = load_search(args.file)
    for option in ("trials", "parallel"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option}", value, "must be at least 1", "Give 1 or more.")
        if value is not None:
            search = search.model_copy(update={option: value})
    if not args.slurm:
        for option in ("here", "controller"):
            if getattr(args, option):
                raise UserError(
                    f"--{option}", getattr(args, option), "requires --slurm", "Add --slurm, or omit it."
                )
    space = search.space()
    overrides: list[str] = args.overrides
    searched = {parameter.key for parameter in space}
    for text in overrides:
        if not searched.isdisjoint(flat_overrides([text])):
            raise UserError(
                "override", text, "is a parameter of the search", "Omit it, or change the search file."
            )
    return SearchPlan(
        name=args.file.stem,
        search=search,
        space=space,
        config_file=args.file.parent / expand_path("search.config", search.config),
        overrides=(*search.override_texts(), *overrides),
        folder=(args.run_dir or Path("runs") / args.file.stem).absolute(),
    )


def end_specs(plan: SearchPlan) -> list[RunSpec]:
    """Return trials at the ends of the space: all lowest values, all highest values, and each further choice."""
    lowest = {p.key: p.ends[0] for p in plan.space}
    values = [lowest, {p.key: p.ends[-1] for p in plan.space}]
    values += [{**lowest, p.key: end} for p in plan.space for end in p.ends[1:-1]]
    specs = [plan.spec(Trial(0, params, {})) for params in values]
    return list({spec.overrides: spec for spec in specs}.values())


def plan_ends(plan: SearchPlan, planned: Callable[[list[RunSpec]], list[RunPlan]]) -> tuple[RunPlan, ...]:
    """Plan trials at the ends of the space; a problem of the configuration itself is reported once.

    Args:
        planned: plans runs.
    """
    specs = end_specs(plan)
    planned(specs[:1])
    return tuple(planned(specs))


def check_search(plan: SearchPlan, facts: DataFacts) -> None:
    """Check a search against the configuration of its trials.

    Raises:
        UserError: all problems.
    """
    problems, config, prune = Problems(), plan.config, plan.search.prune
    if RunDirectory(plan.folder).status_file.exists():
        message, remedy = "is the directory of a run", "Give the folder of the search with --run-dir."
        problems.add(UserError("run-dir", str(plan.folder), message, remedy))
    if not config.tracking.enabled:
        message = "must be true in a search, which reads the validation curve from the events of the run"
        remedy = "Set it to true; `tracking.uri=none` sends nothing to a server."
        problems.add(UserError("tracking.enabled", False, message, remedy))
    metric = plan.search.metric
    if metric.startswith("top1_") and metric.removeprefix("top1_") not in facts.groups:
        message = "is not measured: the training data has no such group of classes"
        problems.add(UserError("search.metric", metric, message, "Use top1, or set data.imbalance."))
    last = PlannedTrial(plan.ends[0], facts).last_epoch
    if prune.enabled and prune.first_epoch >= last:
        message = f"is not before the last epoch ({last}), so no trial would be stopped"
        remedy = "Give a smaller epoch, or set search.prune.enabled to false."
        problems.add(UserError("search.prune.first_epoch", prune.first_epoch, message, remedy))
    problems.raise_any()
    plan.ends[0].directory.check_place()


def check_unchanged(plan: SearchPlan, state: State) -> None:
    """Refuse to continue a search whose file or configuration has changed; the budget of trials may change.

    Raises:
        UserError: all changed keys.
    """
    before = state.header
    if before is None:
        return
    now, problems = plan.header(), Problems()
    remedy = "Restore it, or start another search with another --run-dir."
    for key, value in now.keys.items():
        if value != before.keys.get(key):
            message = f"was {before.keys.get(key)} when this search began"
            name = "direction" if key == "maximize" else key
            problems.add(UserError(f"search.{name}", value, message, remedy))
    if not problems and now.fingerprint != before.fingerprint:
        message = "this configuration, with the overrides, has changed since the search began"
        problems.add(UserError("search.config", plan.search.config, message, remedy))
    problems.raise_any()


def _run_here(plan: SearchPlan, args: argparse.Namespace) -> int:
    """Run a search with trials on this machine."""
    from dataclasses import replace

    from dl2pa.commands.search_local import LocalExecutor
    from dl2pa.commands.sweep import refuse_slurm_options

    refuse_slurm_options(args)
    ends = plan_ends(
        plan, lambda specs: plan_runs(specs, plan.folder, in_folder=True, option="search.parameters")
    )
    parallel = min(plan.parallel, plan.search.trials)
    executor = LocalExecutor([end.config for end in ends], parallel)

    def place(run: RunPlan) -> RunPlan:
        return replace(run, nproc=1) if executor.one_gpu_each else run

    plan = replace(plan, ends=tuple(place(end) for end in ends))
    facts = check_trainings([(end.config, end.nproc) for end in plan.ends])
    check_initial_weights(plan.ends)
    check_search(plan, facts[plan.config.data.model_dump_json()])
    note_warnings(plan.ends, facts)
    if args.dry_run:
        return print_dry_run(plan, args.json)

    def planner(trial: Trial, tags: dict[str, str], uri: Sequence[str]) -> PlannedTrial:
        spec = plan.spec(trial, [*labels(plan, trial, tags), *uri])
        run = place(plan_runs([spec], trial_folder(plan.folder, trial.number))[0])
        data = check_trainings([(run.config, run.nproc)])
        return PlannedTrial(run, data[run.config.data.model_dump_json()])

    uri = choose_uri(plan.config.tracking.uri, plan.folder.parent)
    in_store = [f"tracking.uri={literal_path(uri)}"] if uri and uri == local_uri(plan.folder.parent) else []
    with executor.pool.handling_signals():
        return drive(plan, executor, uri, lambda trial, tags: planner(trial, tags, in_store), args.json)


def labels(plan: SearchPlan, trial: Trial, tags: dict[str, str]) -> list[str]:
    """Return the overrides that give a trial its name and tags in MLflow."""
    name = json.dumps(f"{plan.name}-{trial.number:03d}")
    return [f"tracking.run_name={name}", f"tracking.tags={json.dumps(tags)}"]


def drive(
    plan: SearchPlan,
    executor: Executor,
    uri: str | None,
    planner: Callable[[Trial, dict[str, str]], PlannedTrial],
    as_json: bool,
) -> int:
    """Run a search to its end, or until the command is stopped; print the results and return the exit code.

    Args:
        planner: plans a trial with its tags.
    """
    check_unchanged(plan, read_state(plan.folder))
    journal = Journal(plan.folder)
    try:
        check_unchanged(plan, journal.state)
        if journal.state.header is None:
            journal.begin(plan.header())
        tracker = SearchTracker(plan.folder, plan.name, plan.config, uri)
        tracker.start(recorded_keys(plan.header().keys, plan.search.trials))

        def record() -> None:
            tracker.ended(journal.state, maximize=plan.search.maximizes)

        record()
        by_trial: Planner = lambda trial: planner(trial, tracker.tags(trial.number))  # noqa: E731
        driver = Driver(journal, plan.search, plan.space, by_trial, executor, note, record)
        try:
            driver.run()
        except SearchRefused:
            tracker.finish(_description(plan.folder, journal.state), finished=False)
            raise
        is_complete = not journal.state.open() and (
            driver.exhausted or len(journal.state.trials) >= plan.search.trials
        )
        if driver.exhausted:
            note("every combination of the parameters has been tried")
        tracker.finish(_description(plan.folder, journal.state), finished=is_complete)
        return print_results(plan.folder, journal.state, is_complete, as_json)
    finally:
        journal.close()


def _description(folder: Path, state: State) -> str:
    from dl2pa.reporting.document import to_markdown
    from dl2pa.reporting.search_report import compose_search

    return to_markdown(compose_search(results_of(folder, state)))


def print_results(
    folder: Path, state: State, is_complete: bool, as_json: bool, *, is_queued: bool = False
) -> int:
    """Print the trials and the best one; return the exit code.

    Args:
        is_queued: the job of the search is in the queue, so it is not stopped.
    """
    from dl2pa.reporting.search_report import search_rows

    result = results_of(folder, state)
    best = result["best"]
    outcome, code = "finished", EXIT_DONE
    if is_queued:
        outcome = "running"
    elif not is_complete:
        outcome, code = "stopped", EXIT_STOPPED
    elif best is None:
        outcome, code = "failed", EXIT_FAILURE
    if as_json:
        say({**result, "outcome": outcome}, True, "")
    else:
        table(search_rows(result))
    counts = ", ".join(f"{count} {name}" for name, count in state.counts().items() if count)
    more = "; the same command continues" if code == EXIT_STOPPED else ""
    note(f"search {result['search']}: {counts or 'no trial started'}{more}")
    if best is not None:
        note(f"best: trial {best['trial']}, {result['metric']} {best['value']:.2f} %\n  {best['command']}")
    return code


def print_dry_run(plan: SearchPlan, as_json: bool) -> int:
    """Print the first trial of a search that has passed every check."""
    state = read_state(plan.folder) if is_search(plan.folder) else State()
    check_unchanged(plan, state)
    suggested = suggest(plan.search, plan.space, state.trials)
    if suggested is None:
        note("every combination of the parameters has been tried")
        return EXIT_DONE
    command = command_of(plan.header(), plan.space, Trial(0, *suggested))
    say({"command": shlex.split(command)}, True, "") if as_json else print(command, flush=True)  # noqa: T201
    return EXIT_DONE
