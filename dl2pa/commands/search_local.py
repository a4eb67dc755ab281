"""Trials of a search as processes of this machine."""

from __future__ import annotations

from collections.abc import Sequence

from dl2pa.commands.sweep import train_task, worker_environments
from dl2pa.commands.sweep_outcomes import outcome_of
from dl2pa.config import Config
from dl2pa.runplan import RunPlan
from dl2pa.search.journal import Trial
from launcher.pool import Pool


class LocalExecutor:
    """Trains trials as processes that end with this command.

    Args:
        configs: configurations that the trials resemble; they decide on the GPUs of each trial.
        parallel: number of concurrent trials.
    """

    detached = False

    def __init__(self, configs: Sequence[Config], parallel: int) -> None:
        environments = worker_environments(configs, parallel)
        self.one_gpu_each = any(environments)
        self.pool = Pool(environments)
        self._parallel = parallel
        self._plans: dict[int, tuple[RunPlan, int]] = {}

    @property
    def stopping(self) -> bool:
        return self.pool.stopping

    def has_room(self) -> bool:
        return self.pool.has_room

    def state_of(self, trial: Trial, plan: RunPlan) -> str:
        state = plan.directory.status().get("state")
        return str(state) if state in ("finished", "failed") else "stopped"

    def start(self, trial: Trial, plan: RunPlan) -> None:
        plan.directory.check_place()
        task = train_task(plan, self._parallel)
        log_size = task.log.stat().st_size if task.log.exists() else 0
        try:
            self.pool.start(trial.number, task)
        except OSError as error:
            raise plan.directory.not_writable(error) from None
        self._plans[trial.number] = (plan, log_size)

    def stop(self, plan: RunPlan) -> None:
        plan.directory.stop_file.touch()

    def wait(self) -> None:
        self.pool.wait()

    def ended(self) -> list[tuple[int, str | None]]:
        return [(number, self._error(number, code)) for number, code in self.pool.collect()]

    def _error(self, number: int, code: int) -> str | None:
        plan, log_size = self._plans.pop(number)
        outcome = outcome_of(plan, code, self.stopping, log_size)
        return outcome.error or "failed" if outcome.state == "failed" else None
