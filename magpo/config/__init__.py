"""A run's configuration: `load` composes and checks it."""

from magpo.config.compose import (
    from_values,
    load,
    locate,
    option_names,
    read,
)
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
    unknown_key,
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
    "locate",
    "must_divide",
    "nested",
    "option_names",
    "plain_values",
    "read",
    "unknown_key",
]
