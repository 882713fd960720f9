"""A run's configuration, composed and checked by `load`."""

from magpo.config.compose import from_values, load
from magpo.config.schema import (
    RunConfig,
    differences,
    dump,
    dump_setting,
    flat,
    nested,
    plain_values,
)

__all__ = [
    "RunConfig",
    "differences",
    "dump",
    "dump_setting",
    "flat",
    "from_values",
    "load",
    "nested",
    "plain_values",
]
