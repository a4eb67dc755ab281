"""The configuration: YAML with bases and overrides in, frozen typed objects out."""

from dl2pa.config.load import dump_config, fingerprint, flatten, load_config, merge, parse_config
from dl2pa.config.schema import Config

__all__ = ["Config", "dump_config", "fingerprint", "flatten", "load_config", "merge", "parse_config"]
