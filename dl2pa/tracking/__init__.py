"""Experiment tracking that cannot hurt training: a spool on disk first, MLflow second.

MLflow is imported by the sending thread only, never by importing this package.
"""

from dl2pa.tracking.cleaning import has_hidden_credentials, redact, redact_lines
from dl2pa.tracking.client import Tracker
from dl2pa.tracking.server import choose_uri, local_uri
from dl2pa.tracking.sync import SyncReport, sync

__all__ = [
    "SyncReport",
    "Tracker",
    "choose_uri",
    "has_hidden_credentials",
    "local_uri",
    "redact",
    "redact_lines",
    "sync",
]
