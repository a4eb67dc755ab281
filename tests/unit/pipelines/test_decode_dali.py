"""Settings of the DALI decoder that keep the feed thread short; their effect needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipelines.decode_dali import DaliDecoder
from pipelines.transforms import Transforms

dali: Any = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
TRAIN, CPU = Transforms(16, train=True), torch.device("cpu")


@pytest.mark.parametrize("train", [True, False])
def test_inputs_are_not_copied(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, Any]] = []
    external_source = dali.fn.external_source

    def recorded(**kwargs: Any) -> Any:
        options.append(kwargs)
        return external_source(**kwargs)

    monkeypatch.setattr(dali.fn, "external_source", recorded)
    decoder = DaliDecoder(Transforms(16, train=train), 4, 1, CPU)
    assert list(decoder.decode(iter(()))) == []
    decoder.close()
    assert [one["no_copy"] for one in options] == [True]


def test_a_gpu_pipeline_runs_on_the_stream_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a stream, `run` blocks until the images are decoded."""
    calls: list[Any] = []

    class Pipe:
        def run(self, *stream: Any) -> Any:
            calls.append(stream)
            raise StopIteration

    device, stream = torch.device("cuda", 1), object()
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
    monkeypatch.setattr(DaliDecoder, "_build", lambda _decoder: Pipe())
    assert list(DaliDecoder(TRAIN, 4, 1, device).decode(iter(()))) == []
    assert calls == [device, (stream,)]
