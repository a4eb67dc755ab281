from __future__ import annotations

import pytest
import torch

from dl2pa.training.distributed import World
from support.threads import one_thread as one_thread


@pytest.fixture
def alone() -> World:
    """One process on the CPU."""
    return World(0, 1, 0, 1, torch.device("cpu"), 1)
