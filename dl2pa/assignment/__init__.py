"""Which class each prototype stands for: the statistic, the exact solve, and both over a process group."""

from dl2pa.assignment.match import Matching, match, reduce_statistic, verify_same
from dl2pa.assignment.schedule import MatchSchedule
from dl2pa.assignment.solve import solve_assignment
from dl2pa.assignment.statistic import ClassStatistic

__all__ = [
    "ClassStatistic",
    "MatchSchedule",
    "Matching",
    "match",
    "reduce_statistic",
    "solve_assignment",
    "verify_same",
]
