"""A world of one process with both backends, as torchrun starts it for one GPU."""

from __future__ import annotations

import torch

from gpu.ranks import start_ranks


def test_a_world_of_one_uses_both_backends(device: torch.device) -> None:
    (result,) = start_ranks(1, device.type)
    assert result["total"] == 1 and not result["joined"]
    if device.type == "cuda":
        assert "cpu:gloo" in result["backend"] and "cuda:nccl" in result["backend"]
