"""torch.compile and CUDA graphs: a compiled run trains and resumes."""

from __future__ import annotations

import pytest

pytest.importorskip("pydantic")

from support.commands import run_here


@pytest.mark.parametrize("mode", ["true", "graphs"])
def test_a_compiled_training_runs_and_resumes(mode: str, rehearsing: bool, train_command: list[str]) -> None:
    if rehearsing and mode == "graphs":
        pytest.skip("CUDA graphs need a GPU")
    precision = "fp32" if rehearsing else "bf16"
    for limit in (6, 12) if rehearsing else (20, 40):
        overrides = [f"train.precision={precision}", f"train.compile={mode}", f"train.max_steps={limit}"]
        done = run_here(*train_command, *overrides)
        assert done.code == 0, done.error
        assert done.result["steps"] == limit
