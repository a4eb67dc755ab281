"""Finished runs beside the published tables: run directories in, Markdown, HTML and plots out. Only reads runs."""

from dl2pa.reporting.compare import Comparison, compare
from dl2pa.reporting.runs import find_runs, read_run
from dl2pa.reporting.write import record, write_report

__all__ = ["Comparison", "compare", "find_runs", "read_run", "record", "write_report"]
