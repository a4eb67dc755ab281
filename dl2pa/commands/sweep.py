"""`dl2pa sweep`: train many configurations, several at a time on this machine or as a SLURM array."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dl2pa import envvars
from dl2pa.commands.options import (
    add_grid,
    add_renamed,
    add_slurm_request,
    add_tables,
    check_not_varied,
    nonempty_path,
    nonempty_text,
)
from dl2pa.commands.output import note, say
from dl2pa.commands.published_runs import expand_results, select_results
from dl2pa.commands.setting_warnings import note_warnings
from dl2pa.commands.sweep_best import check_best, write_best
from dl2pa.commands.sweep_outcomes import Outcome, damaged, print_outcomes, run_pool
from dl2pa.config import Config, fingerprint
from dl2pa.config.identity import SEED
from dl2pa.config.paths import expand_path
from dl2pa.config.places import finder, place_in_sweep, placed
from dl2pa.config.published import load_published, published_file
from dl2pa.config.sweep import VARIANT_KEY, Sweep, common_keys, is_sweep, load_sweep
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, UserError
from dl2pa.finished import FinishedRuns
from dl2pa.gpus import visible_gpus
from dl2pa.osutil import usable_cores
from dl2pa.process import OVERRIDE, dl2pa_command
from dl2pa.records import DamagedFile
from dl2pa.runplan import (
    RunPlan,
    RunSpec,
    check_count,
    check_initial_weights,
    check_resume,
    check_trainings,
    expand,
    plan_runs,
)
from launcher.pool import Pool, Task

Variant = tuple[str, Path, tuple[str, ...]]
"""Name, configuration file and overrides."""


@dataclass(frozen=True)
class SweepRequest:
    """Sweep file and command line combined.

    Attributes:
        name: name of the sweep.
        config: configuration file; None if published results or variants replace it.
        published: names of published results.
        overrides: `key=value` for every run, those of the command line last.
        variants: variants with their overrides, which include those of the sweep file.
        file: the sweep file, if there is one.
    """

    name: str
    config: Path | None
    published: tuple[str, ...]
    overrides: tuple[str, ...]
    grid: tuple[str, ...]
    parallel: int | None
    variants: tuple[Variant, ...]
    file: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="CONFIG key=value",
        help="YAML configuration, or a file with the key `sweep`; then overrides for every run",
    )
    add_grid(parser, "--grid")
    add_renamed(parser, "--array", "--grid")
    parser.add_argument("--seeds", metavar="A..B", help="short for --grid train.seed=A..B")
    parser.add_argument(
        "--published",
        action="append",
        metavar="TABLE[:ROW[:COLUMN]]",
        help="run the configurations of these results of the published tables; replaces CONFIG",
    )
    add_renamed(parser, "--cells", "--published")
    parser.add_argument(
        "--variant",
        action="append",
        type=nonempty_text,
        metavar="NAME",
        help="run only this variant; can be repeated",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        metavar="K",
        help="maximum number of concurrent runs (default: 1 here, no maximum with --slurm)",
    )
    parser.add_argument(
        "--run-dir", type=nonempty_path, metavar="DIR", help="parent folder of the runs (default: runs)"
    )
    add_tables(parser)
    parser.add_argument(
        "--best",
        type=nonempty_path,
        metavar="FILE",
        help="when all runs have ended, write a sweep file with the best settings of each variant",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the commands")
    parser.add_argument("--slurm", action="store_true", help="submit the runs as a SLURM job array")
    add_slurm_request(parser)


def run(args: argparse.Namespace) -> int:
    request = _read_request(args)
    with placed(_finder(request)):
        return _run(request, args)


def _finder(request: SweepRequest) -> Callable[[str], str | None]:
    """Return a function that finds a key in the sweep file, then in the configurations."""

    def find(field: str) -> str | None:
        place = None if request.file is None else place_in_sweep(request.file, field)
        configs = [
            *([request.config] if request.config else []),
            *(config for _, config, _ in request.variants),
        ]
        return place or finder([(config, request.overrides) for config in configs])(field)

    return find


def _run(request: SweepRequest, args: argparse.Namespace) -> int:
    specs = _expand(request, args.tables)
    if args.slurm and args.best is not None:
        remedy = "When the jobs are finished, repeat the command without --slurm."
        raise UserError("--best", str(args.best), "cannot be combined with --slurm", remedy)
    if args.slurm:
        return _submit(specs, request, args)
    refuse_slurm_options(args)
    plans = plan_runs(specs, args.run_dir or Path("runs"), in_folder=True)
    if args.best is not None:
        read = {plan.config_file for plan in plans} | ({request.file} if request.file else set())
        check_best(args.best, read)
    tag = _tag(request.name, [plan.config for plan in plans])
    pending, outcomes = _sort(plans)
    for plan in pending:
        plan.directory.check_place()
    parallel = min(request.parallel or 1, max(1, len(pending)))
    environments = worker_environments([plan.config for plan in pending], parallel)
    if any(environments):  # each run gets one GPU
        pending = [replace(plan, nproc=1) for plan in pending]
    data = check_trainings([(plan.config, plan.nproc) for plan in pending])
    for plan in pending:
        check_resume(plan, data[plan.config.data.model_dump_json()])
    check_initial_weights(pending)
    note_warnings(pending, data)
    tagged = [f"tracking.tags.sweep={json.dumps(tag)}"]
    tasks = [train_task(plan, parallel, tagged) for plan in pending]
    if args.dry_run and args.json:
        say({"commands": [task.command for task in tasks]}, True, "")
        return EXIT_DONE
    if args.dry_run:
        print("\n".join(shlex.join(task.command) for task in tasks), flush=True)  # noqa: T201
        return EXIT_DONE
    pool, started = Pool(environments), time.time()
    outcomes.update(run_pool(pool, pending, tasks))
    code = print_outcomes([outcomes[plan.run_dir] for plan in plans], tag, pool.stopping, args.json)
    failed = {run_dir for run_dir, outcome in outcomes.items() if outcome.state == "failed"}
    if pending and not pool.stopping:
        _announce([outcomes[plan.run_dir] for plan in plans], tag, started)
    if args.best is not None and all(o.state in ("finished", "failed") for o in outcomes.values()):
        write_best(plans, args.best, failed)
    return code


def _announce(outcomes: Sequence[Outcome], tag: str, started: float) -> None:
    """Send the summary message of the sweep, by the settings of its first run that has any."""
    notify = next((o.plan.config.notify for o in outcomes if o.plan.config.notify.is_active), None)
    if notify is None:
        return
    from dl2pa.notify.sweep import announce_sweep

    for problem in announce_sweep(notify, tag, [outcome.record() for outcome in outcomes], started):
        note(f"the message about the sweep was not delivered: {problem}")


def _sort(plans: Sequence[RunPlan]) -> tuple[list[RunPlan], dict[Path, Outcome]]:
    """Return the runs to train, and the outcomes of the others: finished, or failed because a file is damaged."""
    finished, pending, outcomes = FinishedRuns(), list[RunPlan](), dict[Path, Outcome]()
    for plan in plans:
        try:
            if finished.contains(plan):
                plan.directory.read_result()
                outcomes[plan.run_dir] = Outcome(plan, "finished")
            else:
                check_resume(plan)
                pending.append(plan)
        except DamagedFile as error:
            outcomes[plan.run_dir] = damaged(plan, error)
    return pending, outcomes


def _read_request(args: argparse.Namespace) -> SweepRequest:
    words: list[str] = args.overrides
    files = [word for word in words if Path(word).is_file() or not OVERRIDE.match(word)]
    if len(files) > 1:
        remedy = "Give one, or vary the configuration with --grid config=A.yaml,B.yaml."
        raise UserError("config", files[1], "is a second configuration", remedy)
    file = Path(files[0]) if files else None
    sweep, config = Sweep(), file
    if file is not None and is_sweep(file):
        sweep = load_sweep(file)
        config = file.parent / expand_path("sweep.config", sweep.config) if sweep.config else None
    published = tuple(args.published or sweep.published)
    variants = _select_variants(_variants(sweep, file, config), args.variant, file)
    grid = _grid(sweep, args, [name for name, *_ in variants])
    own = [word for word in words if word not in files]
    check_not_varied(own, grid)
    if bool(config or variants) == bool(published):
        message = "cannot be combined with published results" if published else "is missing"
        remedy = "Give either a configuration or --published TABLE[:ROW[:COLUMN]]."
        raise UserError("config", config and str(config), message, remedy)
    if args.parallel is not None and args.parallel < 1:
        raise UserError("--parallel", args.parallel, "must be at least 1", "Give 1 or more.")
    if args.tables is not None and not published:
        raise UserError("--tables", str(args.tables), "requires --published", "Add --published, or omit it.")
    return SweepRequest(
        name=file.stem if file is not None else published[0].partition(":")[0],
        config=config,
        published=published,
        overrides=(*(() if variants else sweep.override_texts()), *own),
        grid=grid,
        parallel=args.parallel or sweep.parallel,
        variants=variants,
        file=file if file is not None and is_sweep(file) else None,
    )


def _grid(sweep: Sweep, args: argparse.Namespace, variants: Sequence[str]) -> tuple[str, ...]:
    """Grid of the command line, then that of the file without the keys that the command line gives.

    Args:
        variants: names of the selected variants.
    """
    texts: list[str] = args.grid or []
    keys = {text.partition("=")[0].strip() for text in texts}
    if args.seeds is not None:
        if SEED in keys:
            remedy = "Remove one of them."
            raise UserError("--seeds", args.seeds, f"the seeds are also given by --grid {SEED}", remedy)
        sweep = sweep.model_copy(update={"seeds": args.seeds})
    for name in variants:
        if same := common_keys(keys, sweep.variants[name]):
            remedy = "Leave the key out of the grid, or select other variants with --variant."
            raise UserError("--grid", same[0], f"is set by the variant {name}", remedy)
        if args.seeds is not None and common_keys([SEED], sweep.variants[name]):
            remedy = "Leave it out, or select other variants with --variant."
            raise UserError("--seeds", args.seeds, f"{SEED} is set by the variant {name}", remedy)
    return (*texts, *(text for text in sweep.grid_texts() if text.partition("=")[0] not in keys))


def _variants(sweep: Sweep, file: Path | None, config: Path | None) -> tuple[Variant, ...]:
    variants: list[Variant] = []
    for name, (variant_config, overrides) in sweep.variant_texts().items():
        assert file is not None, "only a sweep file has variants"
        field = f"sweep.variants.{name}"
        path = config
        if isinstance(variant_config, str):
            path = file.parent / expand_path(f"{field}.config", variant_config)
        if path is None:
            remedy = "Give sweep.config, or a config in each variant."
            raise UserError(field, variant_config, "has no configuration", remedy)
        if duplicates := common_keys(sweep.grid.keys(), sweep.variants[name]):
            remedy = "Remove the key from one of them."
            raise UserError(field, duplicates[0], "is set by the variant and by sweep.grid", remedy)
        if sweep.seeds is not None and common_keys([SEED], sweep.variants[name]):
            remedy = "Remove one of them."
            raise UserError(field, SEED, "is set by the variant and by sweep.seeds", remedy)
        variants.append((name, path, (*sweep.override_texts(), *overrides)))
    return tuple(variants)


def _select_variants(
    variants: tuple[Variant, ...], names: list[str] | None, file: Path | None
) -> tuple[Variant, ...]:
    """Return the variants that the command line names; all if it names none."""
    if names is None:
        return variants
    known = [name for name, *_ in variants]
    for name in names:
        if name not in known:
            remedy = f"Use one of {'; '.join(known)}." if known else "Give a sweep file that has variants."
            raise UserError("--variant", name, f"is not a variant of {file or 'published results'}", remedy)
    return tuple(variant for variant in variants if variant[0] in names)


def _expand(request: SweepRequest, tables: Path | None) -> list[RunSpec]:
    if request.variants:
        specs = [
            RunSpec(
                spec.config_file,
                (*spec.overrides, f"tracking.tags.{VARIANT_KEY}={json.dumps(name)}"),
                (name, *spec.varied),
            )
            for name, config, overrides in request.variants
            for spec in expand(config, (*overrides, *request.overrides), request.grid)
        ]
        check_count(len(specs))
        return specs
    if request.config is not None:
        return expand(request.config, request.overrides, request.grid)
    _, results = load_published(published_file(tables))
    return expand_results(select_results(results, request.published), request.overrides, request.grid)


def _tag(name: str, configs: Sequence[Config]) -> str:
    """Return the tag of all runs: the user's tag, else one that depends on the configurations only."""
    tags = {config.tracking.tags.get("sweep") for config in configs}
    if len(tags) == 1 and (tag := tags.pop()) is not None:
        return tag
    prints = "".join(sorted(fingerprint(config) for config in configs))
    return f"{name}-{hashlib.sha256(prints.encode()).hexdigest()[:8]}"


def train_task(plan: RunPlan, parallel: int, overrides: Sequence[str] = ()) -> Task:
    """Return the `dl2pa train` command that starts or resumes the run; concurrent runs share the cores.

    Args:
        parallel: number of concurrent runs.
        overrides: in addition to those of the plan.
    """
    extra = list(overrides)
    if parallel > 1 and plan.config.launch.threads is None:
        threads = max(1, usable_cores() // (parallel * plan.nproc))
        extra.append(f"launch.threads={threads}")
    arguments = [str(plan.config_file), *plan.overrides, *extra, "--run-dir", str(plan.run_dir), "--json"]
    env = {envvars.AGENT_PID: str(os.getpid())}
    return Task(dl2pa_command(["train", *arguments]), plan.directory.sweep_log, env)


def worker_environments(configs: Sequence[Config], parallel: int) -> list[dict[str, str]]:
    """Return the extra environment per worker of the pool: concurrent runs are distributed over the GPUs.

    Runs with an explicit number of processes above 1 get all GPUs, and so does a single worker with `auto`.
    """
    counts = {config.launch.nproc for config in configs}
    gpus = visible_gpus()
    needs_all = parallel == 1 and "auto" in counts
    if len(gpus) < 2 or needs_all or not counts <= {1, "auto"}:
        return [{}] * parallel
    if all(config.launch.device == "cpu" for config in configs):
        return [{}] * parallel
    return [{"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} for worker in range(parallel)]


def refuse_slurm_options(args: argparse.Namespace) -> None:
    """Refuse the options of a SLURM job without --slurm."""
    from dl2pa.commands.submit import REQUEST_OPTIONS

    for key in REQUEST_OPTIONS:
        if getattr(args, key) is not None:
            option = f"--{key.replace('_', '-')}"
            raise UserError(option, getattr(args, key), "requires --slurm", "Add --slurm, or omit it.")


def _submit(specs: Sequence[RunSpec], request: SweepRequest, args: argparse.Namespace) -> int:
    """Submit the runs that are not finished as one job array."""
    from dl2pa.commands.submit import plan_jobs, submit

    plans = plan_jobs(specs, args, in_folder=True, option="--grid")
    pending, outcomes = _sort(plans)
    tag = _tag(request.name, [plan.config for plan in plans])
    finished = [outcome for outcome in outcomes.values() if outcome.state == "finished"]
    failed = [outcome for outcome in outcomes.values() if outcome.state == "failed"]
    if finished:
        note(f"{len(finished)} of {len(plans)} runs are already finished")
    if pending:
        submit(pending, args, request.name, tag, request.parallel)
    elif args.json:
        say({"sweep": tag, "jobs": []}, True, "")
    for outcome in failed:
        note(f"not submitted: {outcome.plan.title}: {outcome.error}")
    return EXIT_FAILURE if failed else EXIT_DONE
