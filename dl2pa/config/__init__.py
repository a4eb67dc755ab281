"""Configuration: YAML files and overrides, validated into frozen typed objects."""

from dl2pa.config.load import (
    dump_config,
    fingerprint,
    flat_overrides,
    flatten,
    load_config,
    load_recorded_config,
    merge,
    parse_config,
)
from dl2pa.config.schema import Config

__all__ = [
    "Config",
    "dump_config",
    "fingerprint",
    "flat_overrides",
    "flatten",
    "load_config",
    "load_recorded_config",
    "merge",
    "parse_config",
]
