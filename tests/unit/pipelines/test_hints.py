"""Settings of DALI's decoder."""

from __future__ import annotations

import pytest

from dl2pa.config import parse_config
from dl2pa.config.identity import checkpoint_identity
from dl2pa.config.load import fingerprint
from pipelines.hints import DecoderHints


def test_dali_accepts_every_hint() -> None:
    backend = pytest.importorskip("nvidia.dali.backend")
    schema = backend.GetSchema("decoders__ImageSlice")
    options = DecoderHints(0.5, (600, 400)).dali_options()
    assert all(schema.HasArgument(name) for name in options)
    assert list(options.values()) == [0.5, 600, 400]


def test_hints_are_part_of_no_identity() -> None:
    plain = parse_config({})
    hinted = parse_config({"data": {"hw_decoder_load": 0.9, "hw_decoder_size": [5000, 4000]}})
    assert fingerprint(plain) == fingerprint(hinted)
    assert checkpoint_identity(plain) == checkpoint_identity(hinted)
