from __future__ import annotations

import pytest

from dl2pa.assignment import MatchSchedule

STEPS = 4


def updates(schedule: MatchSchedule, epochs: int = 6) -> tuple[list[int], list[int]]:
    """Global steps (4 per epoch) and epochs (0-based) after which the schedule has an update."""
    steps = [g for g in range(1, epochs * STEPS + 1) if schedule.after_step((g - 1) // STEPS, g)]
    return steps, [e for e in range(epochs) if schedule.after_epoch(e)]


@pytest.mark.parametrize(
    ("rules", "steps", "epochs"),
    [
        ({}, [], [0, 1, 2, 3, 4, 5]),
        ({"every_epochs": 0}, [], []),
        ({"every_epochs": 2}, [], [1, 3, 5]),
        ({"every_epochs": 2, "last_epoch": 4}, [], [1, 3]),
        ({"last_epoch": 2}, [], [0, 1]),
        ({"every_epochs": 0, "every_steps": 5}, [5, 10, 15, 20], []),
        ({"every_epochs": 0, "every_steps": 5, "last_epoch": 3}, [5, 10], []),
        ({"early_steps": 2, "early_epochs": 2}, [2, 4, 6, 8], [0, 1, 2, 3, 4, 5]),
        ({"early_steps": 2}, [], [0, 1, 2, 3, 4, 5]),
        ({"early_steps": 3, "early_epochs": 1, "every_steps": 8, "every_epochs": 0}, [3, 8, 16, 24], []),
        ({"warmup_epochs": 2}, [], [1, 2, 3, 4, 5]),
        ({"warmup_epochs": 2, "every_epochs": 0}, [], [1]),
        ({"warmup_epochs": 2, "every_epochs": 3}, [], [1, 2, 5]),
        ({"warmup_epochs": 1, "early_steps": 2, "early_epochs": 1, "every_epochs": 0}, [6, 8], [0]),
        ({"warmup_epochs": 3, "every_steps": 2, "every_epochs": 0}, list(range(14, 25, 2)), [2]),
        ({"warmup_epochs": 2, "last_epoch": 3}, [], [1, 2]),
    ],
    ids=str,
)
def test_updates_follow_the_rules(rules: dict[str, int], steps: list[int], epochs: list[int]) -> None:
    assert updates(MatchSchedule(**rules)) == (steps, epochs)
