"""Experiment tracking that cannot hurt training: a spool on disk first, MLflow second.

MLflow is imported by the sending thread only, never by importing this package.
"""

from dl2pa.tracking.client import Tracker
from dl2pa.tracking.server import check_uri, choose_uri, local_uri, sqlite_file
from dl2pa.tracking.sync import SyncReport, sync

__all__ = [
    "SyncReport",
    "Tracker",
    "check_uri",
    "choose_uri",
    "local_uri",
    "sqlite_file",
    "sync",
]
