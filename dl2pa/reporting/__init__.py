"""Reports over finished runs and pages of one run. Reports only read the run directories."""

from dl2pa.reporting.compare import Comparison, compare
from dl2pa.reporting.runs import find_runs, read_run
from dl2pa.reporting.write import record, write_report

__all__ = ["Comparison", "compare", "find_runs", "read_run", "record", "write_report"]
