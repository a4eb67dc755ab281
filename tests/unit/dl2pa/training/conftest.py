from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dl2pa.training.distributed import World


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small work on a shared machine: a second thread only waits for its turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def alone() -> World:
    """One process on the CPU."""
    return World(0, 1, 0, 1, torch.device("cpu"), 1)
