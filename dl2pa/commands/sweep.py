"""`dl2pa sweep`: many trainings from one command, several at a time on this machine or as a SLURM array."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl2pa import envvars
from dl2pa.commands.cells import expand_cells, select
from dl2pa.commands.check import check_trainings
from dl2pa.commands.expand import Element, check_count, check_distinct, expand, run_name
from dl2pa.commands.output import note, say, table
from dl2pa.commands.train import already_finished
from dl2pa.config import Config, fingerprint, load_config
from dl2pa.config.published import load_published, published_file
from dl2pa.config.sweep import Sweep, is_sweep, load_sweep
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, UserError
from dl2pa.osutil import usable_cores
from launcher.pool import CANNOT_START, Pool, Task

Variant = tuple[str, Path, tuple[str, ...]]
"""Its name, configuration and overrides."""
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


@dataclass(frozen=True)
class Planned:
    """A run of the sweep: what sets it apart, under what configuration, where."""

    element: Element
    config: Config
    run_dir: Path

    @property
    def label(self) -> str:
        return " ".join(self.element.swept) or self.element.config.stem

    @property
    def log(self) -> Path:
        return self.run_dir / "logs/sweep.log"


@dataclass(frozen=True)
class Wanted:
    """What the file and the command line ask for together.

    Attributes:
        name: what the sweep is called.
        config: None where cells of the published tables, or the variants, stand for it.
        variants: (name, configuration, overrides) of each, the file's overrides among them; the command line's
            stand in `overrides` and come last.
    """

    name: str
    config: Path | None
    cells: tuple[str, ...]
    overrides: tuple[str, ...]
    sweeps: tuple[str, ...]
    parallel: int | None
    variants: tuple[Variant, ...]


def run(args: argparse.Namespace) -> int:
    from dl2pa.rundir import RunDirectory

    wanted = _wanted(args)
    elements = _elements(wanted, args.tables)
    if args.slurm:
        return _on_cluster(elements, wanted, args)
    _refuse_cluster_options(args)
    folder = (args.run_dir or Path("runs")).absolute()
    planned = [_plan(element, folder) for element in elements]
    check_distinct([p.run_dir for p in planned])
    tag = _tag(wanted.name, [p.config for p in planned])
    pending = [p for p in planned if not already_finished(p.config, p.run_dir)]
    for p in pending:
        RunDirectory(p.run_dir).check_place()
    check_trainings([(p.config, p.config.launch.nproc) for p in pending])
    at_once = min(wanted.parallel or 1, max(1, len(pending)))
    tasks = [_task(p, tag, at_once) for p in pending]
    if args.dry_run and args.json:
        say({"commands": [task.command for task in tasks]}, True, "")
        return EXIT_DONE
    if args.dry_run:
        print("\n".join(shlex.join(task.command) for task in tasks), flush=True)  # noqa: T201
        return EXIT_DONE
    outcomes = {p.run_dir: Outcome(p, "finished") for p in planned}
    pool = Pool(places([p.config for p in pending], at_once))
    outcomes.update(_run(pool, pending, tasks))
    return _tell([outcomes[p.run_dir] for p in planned], tag, pool.stopping, args.json)


def _wanted(args: argparse.Namespace) -> Wanted:
    words: list[str] = args.overrides
    files = [word for word in words if Path(word).is_file() or not _OVERRIDE.match(word)]
    if len(files) > 1:
        remedy = "Give one; --array config=A.yaml,B.yaml sweeps configurations."
        raise UserError("config", files[1], "is a second configuration", remedy)
    file = Path(files[0]) if files else None
    written, config = Sweep(), file
    if file is not None and is_sweep(file):
        written = load_sweep(file)
        config = file.parent / written.config if written.config else None
    cells = tuple(args.cells or written.cells)
    variants = _chosen(_variants(written, file, config), args.variant, file)
    if bool(config or variants) == bool(cells):
        message = "stands beside cells" if cells else "is missing"
        remedy = "Give either a configuration or --cells TABLE[:ROW[:COLUMN]]."
        raise UserError("config", config and str(config), message, remedy)
    if args.parallel is not None and args.parallel < 1:
        raise UserError("--parallel", args.parallel, "must be at least 1", "Give 1 or more.")
    if args.tables is not None and not cells:
        raise UserError("--tables", str(args.tables), "is for --cells", "Add --cells, or leave it out.")
    if args.seeds is not None:
        written = written.model_copy(update={"seeds": args.seeds})
    return Wanted(
        name=file.stem if file is not None else cells[0].partition(":")[0],
        config=config,
        cells=cells,
        overrides=(*(() if variants else written.override_texts()), *(w for w in words if w not in files)),
        sweeps=(*(args.array or ()), *written.array_texts()),
        parallel=args.parallel or written.parallel,
        variants=variants,
    )


def _variants(written: Sweep, file: Path | None, config: Path | None) -> tuple[Variant, ...]:
    found: list[Variant] = []
    for name, (own, overrides) in written.variant_texts().items():
        assert file is not None, "variants are written in a file"
        path = file.parent / own if isinstance(own, str) else config
        if path is None:
            remedy = "Give sweep.config, or a config in each variant."
            raise UserError(f"sweep.variants.{name}", own, "names no configuration", remedy)
        if twice := sorted(written.array.keys() & written.variants[name].keys()):
            remedy = "The array's values would stand. Take the key out of one of them."
            raise UserError(
                f"sweep.variants.{name}", twice[0], "is set by the variant and by sweep.array", remedy
            )
        found.append((name, path, (*written.override_texts(), *overrides)))
    return tuple(found)


def _chosen(variants: tuple[Variant, ...], names: list[str] | None, file: Path | None) -> tuple[Variant, ...]:
    """The variants that the command line names; all, where it names none."""
    if names is None:
        return variants
    known = [name for name, *_ in variants]
    for name in names:
        if name not in known:
            remedy = f"Use one of {'; '.join(known)}." if known else "Give a sweep's file that has variants."
            raise UserError("--variant", name, f"is no variant of {file or 'cells'}", remedy)
    return tuple(variant for variant in variants if variant[0] in names)


def _elements(wanted: Wanted, tables: Path | None) -> list[Element]:
    if wanted.variants:
        found = [
            Element(element.config, element.overrides, (name, *element.swept))
            for name, config, own in wanted.variants
            for element in expand(config, (*own, *wanted.overrides), wanted.sweeps)
        ]
        check_count(len(found))
        return found
    if wanted.config is not None:
        return expand(wanted.config, wanted.overrides, wanted.sweeps)
    _, cells = load_published(published_file(tables))
    return expand_cells(select(cells, wanted.cells), wanted.overrides, wanted.sweeps)


def _plan(element: Element, folder: Path) -> Planned:
    config = load_config(element.config, element.overrides)
    return Planned(element, config, folder / run_name(element.config, config))


def _tag(name: str, configs: Sequence[Config]) -> str:
    """The tag that all runs carry: the user's own, else one that the same command gives again."""
    own = {config.tracking.tags.get("sweep") for config in configs}
    if len(own) == 1 and (given := own.pop()) is not None:
        return given
    prints = "".join(sorted(fingerprint(config) for config in configs))
    return f"{name}-{hashlib.sha256(prints.encode()).hexdigest()[:8]}"


def _task(planned: Planned, tag: str, at_once: int) -> Task:
    """The same `dl2pa train` that resumes the run; the machine's cores are shared out."""
    extra = [f"tracking.tags.sweep={json.dumps(tag)}"]
    if at_once > 1 and planned.config.launch.threads is None:
        cores = usable_cores()
        extra.append(f"launch.threads={max(1, cores // (at_once * planned.config.launch.nproc))}")
    arguments = [str(planned.element.config), *planned.element.overrides, *extra]
    command = [
        sys.executable,
        "-m",
        "dl2pa",
        "train",
        *arguments,
        "--run-dir",
        str(planned.run_dir),
        "--json",
    ]
    return Task(command, planned.log, {envvars.AGENT_PID: str(os.getpid())})


def places(configs: Sequence[Config], at_once: int) -> list[dict[str, str]]:
    """The environment of each place that a run can take: runs of one process are dealt out over the GPUs."""
    if any(config.launch.nproc > 1 for config in configs) or all(c.launch.device == "cpu" for c in configs):
        return [{}] * at_once
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        gpus = [str(index) for index in range(torch.cuda.device_count())]
    else:
        gpus = [name for name in visible.split(",") if name]
    if len(gpus) < 2:
        return [{}] * at_once
    return [{"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} for place in range(at_once)]


@dataclass(frozen=True)
class Outcome:
    """How a run of the sweep stands at its end: finished, stopped, failed or waiting."""

    planned: Planned
    state: str
    exit_code: int | None = 0
    error: str | None = None

    def record(self) -> dict[str, Any]:
        from dl2pa.osutil import read_json
        from dl2pa.rundir import RunDirectory

        run = RunDirectory(self.planned.run_dir)
        result = read_json(run.result) if self.state == "finished" else {}
        return {
            "config": str(self.planned.element.config),
            "swept": list(self.planned.element.swept),
            "outcome": self.state,
            "exit_code": self.exit_code,
            "error": self.error,
            "top1_last": result.get("top1_last"),
            "top1_best": result.get("top1_best"),
            "steps": result.get("steps", run.status().get("step")),
            "run_dir": str(self.planned.run_dir),
            "log": str(self.planned.log),
        }


def _run(pool: Pool, pending: Sequence[Planned], tasks: Sequence[Task]) -> dict[Path, Outcome]:
    """Run what is not finished yet, telling of each start and end."""
    before: dict[int, int] = {}
    outcomes: dict[int, Outcome] = {n: Outcome(p, "waiting", None) for n, p in enumerate(pending)}

    def started(number: int) -> None:
        log = pending[number].log
        before[number] = log.stat().st_size if log.exists() else 0
        note(f"[{number + 1}/{len(pending)}] starts: {pending[number].label}, {pending[number].run_dir}")

    def ended(number: int, code: int) -> None:
        outcome = _outcome(pending[number], code, pool.stopping, before[number])
        outcomes[number] = outcome
        record = outcome.record()
        said = outcome.error or (f"top-1 {record['top1_last']:.2f} %" if record["top1_last"] else "")
        colon = ": " if said else ""
        note(f"[{number + 1}/{len(pending)}] {outcome.state}: {pending[number].label}{colon}{said}")

    pool.run(tasks, started, ended)
    return {outcome.planned.run_dir: outcome for outcome in outcomes.values()}


def _outcome(planned: Planned, code: int, stopping: bool, log_from: int) -> Outcome:
    if code == EXIT_DONE:
        return Outcome(planned, "finished", code)
    if code == EXIT_STOPPED or (stopping and code < 0):
        return Outcome(planned, "stopped", code)
    if code == CANNOT_START:
        return Outcome(planned, "failed", code, f"could not be started: {planned.run_dir} cannot be written")
    ending = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return Outcome(planned, "failed", code, _last_error(planned.log, log_from) or ending)


def _last_error(log: Path, start: int) -> str | None:
    """What `dl2pa train --json` said on its last line, in what this attempt wrote."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
        error = json.loads(lines[-1])["error"]
        parts = [
            error["field"] and f"{error['field']} = {error['value']!r}",
            error["message"],
            error["remedy"],
        ]
        return ": ".join(part for part in parts[:2] if part) + (f". {parts[2]}" if parts[2] else "")
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _tell(outcomes: Sequence[Outcome], tag: str, stopped: bool, as_json: bool) -> int:
    """Print how each run stands; returns the exit code."""
    records = [outcome.record() for outcome in outcomes]
    counts = {s: sum(o.state == s for o in outcomes) for s in ("finished", "failed", "stopped", "waiting")}
    outcome, code = "finished", EXIT_DONE
    if stopped or (counts["stopped"] and not counts["failed"]):
        outcome, code = "stopped", EXIT_STOPPED
    elif counts["failed"]:
        outcome, code = "failed", EXIT_FAILURE
    if counts["finished"] == len(outcomes):  # a stop that came too late
        outcome, code = "finished", EXIT_DONE
    if as_json:
        say({"sweep": tag, "outcome": outcome, **counts, "runs": records}, True, "")
    else:
        _print_table(outcomes, records)
    for failed in (o for o in outcomes if o.state == "failed"):
        note(f"failed: {failed.planned.label}: {failed.error}; see {failed.planned.log}")
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    more = "; the same command goes on from there" if code != EXIT_DONE else ""
    note(f"sweep {tag}: {told}{more}")
    return code


def _print_table(outcomes: Sequence[Outcome], records: Sequence[dict[str, Any]]) -> None:
    rows = [("run", "outcome", "top-1 last", "best", "steps", "directory")]
    for outcome, record in zip(outcomes, records, strict=True):
        figures = [record[key] for key in ("top1_last", "top1_best")]
        last, best = ("-" if value is None else f"{value:.2f}" for value in figures)
        steps = "-" if record["steps"] is None else str(record["steps"])
        rows.append((outcome.planned.label, outcome.state, last, best, steps, str(outcome.planned.run_dir)))
    table(rows)


def _refuse_cluster_options(args: argparse.Namespace) -> None:
    from dl2pa.commands.submit import OPTIONS

    for key in OPTIONS:
        if getattr(args, key) is not None:
            option = f"--{key.replace('_', '-')}"
            raise UserError(option, getattr(args, key), "is for a cluster", "Add --slurm, or leave it out.")


def _on_cluster(elements: Sequence[Element], wanted: Wanted, args: argparse.Namespace) -> int:
    """Hand the runs that are not finished to `dl2pa submit`, as one array."""
    from dl2pa.commands.submit import plan, submit

    if wanted.parallel is not None:
        remedy = "Leave it out: SLURM decides how many run at a time."
        raise UserError("--parallel", wanted.parallel, "is for this machine", remedy)
    planned = plan(elements, args, True)
    pending = [job for job in planned if not already_finished(job.config, job.run_dir)]
    tag = _tag(wanted.name, [job.config for job in planned])
    if len(pending) < len(planned):
        note(f"{len(planned) - len(pending)} of {len(planned)} runs are finished already")
    if pending:
        submit(pending, args, wanted.name, tag)
    elif args.json:
        say({"sweep": tag, "jobs": []}, True, "")
    return EXIT_DONE
