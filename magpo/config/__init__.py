"""A run's configuration: `load` composes and checks it."""

from magpo.config.compose import from_values, load, read
from magpo.config.schema import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RunConfig,
    differences,
    dump,
    dump_setting,
    flat,
    must_divide,
    nested,
    plain_values,
)

__all__ = [
    "Fraction",
    "NonNegativeFloat",
    "PositiveFloat",
    "PositiveInt",
    "RunConfig",
    "differences",
    "dump",
    "dump_setting",
    "flat",
    "from_values",
    "load",
    "must_divide",
    "nested",
    "plain_values",
    "read",
]
