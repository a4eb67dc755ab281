"""Outcomes of the runs of a sweep on this machine: training by a pool of processes, and the table of the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl2pa.commands.output import note, say, table
from dl2pa.commands.sweep_progress import SweepProgress, block_on_terminal
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR
from dl2pa.records import DamagedFile
from dl2pa.runplan import RunPlan
from launcher.pool import CANNOT_START, Pool, Task


@dataclass(frozen=True)
class Outcome:
    """Result of one run of the sweep; the state is finished, stopped, failed or waiting."""

    plan: RunPlan
    state: str
    exit_code: int | None = 0
    error: str | None = None

    def record(self) -> dict[str, Any]:
        run = self.plan.directory
        result = run.read_result() if self.state == "finished" else {}
        return {
            "config": str(self.plan.config_file),
            "swept": list(self.plan.varied),
            "outcome": self.state,
            "exit_code": self.exit_code,
            "error": self.error,
            "top1_last": result.get("top1_last"),
            "top1_best": result.get("top1_best"),
            "steps": result.get("steps", run.status().get("step")),
            "run_dir": str(self.plan.run_dir),
            "log": str(run.sweep_log),
        }


def run_pool(pool: Pool, pending: Sequence[RunPlan], tasks: Sequence[Task]) -> dict[Path, Outcome]:
    """Run the tasks; print each start and end, and the progress of those that run."""
    progress = SweepProgress(pending, block_on_terminal())
    log_sizes: dict[int, int] = {}
    outcomes: dict[int, Outcome] = {n: Outcome(plan, "waiting", None) for n, plan in enumerate(pending)}

    def on_start(number: int) -> None:
        log = tasks[number].log
        log_sizes[number] = log.stat().st_size if log.exists() else 0
        progress.started(number)

    def on_end(number: int, code: int) -> None:
        outcome = outcome_of(pending[number], code, pool.stopping, log_sizes[number])
        outcomes[number] = outcome
        top1 = outcome.record()["top1_last"]
        details = outcome.error or (f"top-1 {top1:.2f} %" if top1 else "")
        colon = ": " if details else ""
        progress.ended(number, f"{outcome.state}: {pending[number].title}{colon}{details}")

    try:
        pool.run(tasks, on_start, on_end, progress.poll)
    finally:
        progress.close()
    return {outcome.plan.run_dir: outcome for outcome in outcomes.values()}


def damaged(plan: RunPlan, error: DamagedFile) -> Outcome:
    return Outcome(plan, "failed", EXIT_USER_ERROR, str(error))


def outcome_of(plan: RunPlan, code: int, stopping: bool, log_start: int) -> Outcome:
    """Return the outcome of an attempt by its exit code.

    Args:
        stopping: whether the attempt was asked to stop.
        log_start: size of its log before the attempt.
    """
    if code == EXIT_DONE:
        return Outcome(plan, "finished", code)
    if code == EXIT_STOPPED or (stopping and code < 0):
        return Outcome(plan, "stopped", code)
    if code == CANNOT_START:
        return Outcome(plan, "failed", code, f"could not be started: {plan.run_dir} cannot be written")
    exit_text = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return Outcome(plan, "failed", code, _last_error(plan.directory.sweep_log, log_start) or exit_text)


def _last_error(log: Path, start: int) -> str | None:
    """Return the error that `dl2pa train --json` printed in its last line, if this attempt wrote one."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
        error = json.loads(lines[-1])["error"]
        location = error["field"] and f"{error['field']} = {error['value']!r}"
        text = ": ".join(part for part in (location, error["message"]) if part)
        more = len(error.get("problems", ())) - 1
        text += f". {error['remedy']}" if error["remedy"] else ""
        return text + (f" And {more} more problems." if more > 0 else "")
    except (OSError, ValueError, LookupError, TypeError):
        return None


def print_outcomes(outcomes: Sequence[Outcome], tag: str, stopped: bool, as_json: bool) -> int:
    """Print the outcome of each run; return the exit code."""
    records = [outcome.record() for outcome in outcomes]
    counts = {s: sum(o.state == s for o in outcomes) for s in ("finished", "failed", "stopped", "waiting")}
    outcome, code = "finished", EXIT_DONE
    if stopped or (counts["stopped"] and not counts["failed"]):
        outcome, code = "stopped", EXIT_STOPPED
    elif counts["failed"]:
        outcome, code = "failed", EXIT_FAILURE
    if counts["finished"] == len(outcomes):  # the stop signal arrived after the last run had finished
        outcome, code = "finished", EXIT_DONE
    if as_json:
        say({"sweep": tag, "outcome": outcome, **counts, "runs": records}, True, "")
    else:
        _print_table(outcomes, records)
    for failed in (o for o in outcomes if o.state == "failed"):
        log = failed.plan.directory.sweep_log
        note(f"failed: {failed.plan.title}: {failed.error}" + (f"; see {log}" if log.exists() else ""))
    summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    more = "; the same command resumes" if code != EXIT_DONE else ""
    note(f"sweep {tag}: {summary}{more}")
    return code


def _print_table(outcomes: Sequence[Outcome], records: Sequence[dict[str, Any]]) -> None:
    rows = [("run", "outcome", "top-1 last", "best", "steps", "directory")]
    for outcome, record in zip(outcomes, records, strict=True):
        values = [record[key] for key in ("top1_last", "top1_best")]
        last, best = ("-" if value is None else f"{value:.2f}" for value in values)
        steps = "-" if record["steps"] is None else str(record["steps"])
        rows.append((outcome.plan.title, outcome.state, last, best, steps, str(outcome.plan.run_dir)))
    table(rows)
