"""Assignment of labels to prototypes: class statistics, exact solver and the update over a process group."""

from dl2pa.assignment.diagnostics import MatchDiagnostics
from dl2pa.assignment.margin import second_best_margin
from dl2pa.assignment.match import Matching, all_reduce_statistic, match, verify_same
from dl2pa.assignment.quadratic import QuadraticSolver
from dl2pa.assignment.refit import nearest_code, refit, set_directions
from dl2pa.assignment.rotation import rotate
from dl2pa.assignment.schedule import MatchSchedule
from dl2pa.assignment.solve import AssignmentSolver, Solution, solve_assignment
from dl2pa.assignment.statistic import ClassStatistic

__all__ = [
    "AssignmentSolver",
    "ClassStatistic",
    "MatchDiagnostics",
    "MatchSchedule",
    "Matching",
    "QuadraticSolver",
    "Solution",
    "all_reduce_statistic",
    "match",
    "nearest_code",
    "refit",
    "rotate",
    "second_best_margin",
    "set_directions",
    "solve_assignment",
    "verify_same",
]
