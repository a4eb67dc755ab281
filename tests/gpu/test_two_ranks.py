"""Two ranks on one GPU over gloo, as two machines with one GPU each: NCCL refuses to share a GPU."""

from __future__ import annotations

import pytest
import torch

from gpu.ranks import start_ranks


def test_two_ranks_train_the_weights_of_one(device: torch.device) -> None:
    first, second = start_ranks(2, device.type, backend="gloo", nodes=2)
    assert first["digests"] == second["digests"] and len(set(first["digests"])) == 1
    assert first["total"] == 2 and first["device"] == second["device"]
    (alone,) = start_ranks(1, device.type, backend="gloo")
    # BatchNorm has the statistics of each rank's part.
    assert first["norm"] == pytest.approx(alone["norm"], rel=0.02)
