"""Experiment tracking: events go to a spool on disk, and from there to MLflow in the background.

Only the sending thread imports MLflow; importing this package does not.
"""

from dl2pa.tracking.client import Tracker
from dl2pa.tracking.server import choose_uri, local_uri, sqlite_file
from dl2pa.tracking.sync import SyncReport, sync

__all__ = [
    "SyncReport",
    "Tracker",
    "choose_uri",
    "local_uri",
    "sqlite_file",
    "sync",
]
