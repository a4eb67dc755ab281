"""torchrun, without its own report of a failed worker: what went wrong is in the run directory."""

from __future__ import annotations

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["DL2PA_AGENT_PID"] = str(os.getpid())
    try:
        main()
    except ChildFailedError:
        sys.exit(1)
