"""A run's configuration: `load` composes and checks it."""

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
