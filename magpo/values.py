"""Checks of input values, by pydantic, with one-line errors."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from magpo.errors import ConfigError, nearest

T = TypeVar("T")


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 2e7 steps


Integer = Annotated[int, BeforeValidator(_whole)]
PositiveInt = Annotated[Integer, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[Integer, Field(ge=0, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]  # ~ is the home folder
Seed = Annotated[Integer, Field(ge=0, lt=2**32)]


def as_argument(value: Any) -> str:
    """Return a value in the form that the command line takes."""
    return json.dumps(value, separators=(",", ":"), default=str).replace('"', "")


def must_divide(key: str, value: int, of: str, number: int) -> None:
    """Raise ValueError if `value`, set by `key`, does not divide `number`, named `of`."""
    if number % value:
        raise ValueError(f"{key} must divide {of} = {number}, not {value}")


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Return the error line for an unknown key."""
    return f"unknown key {key!r}: {nearest(key, known)}--help lists all"


def validate(schema: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass with JSON's strictness: no strings for numbers, no unknown keys."""
    try:
        text = json.dumps(values)
        return TypeAdapter(schema).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        # An unknown key explains more than a missing one, which may be the same key misspelt.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
        first, *others = errors
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(_line(first, schema) + more) from None


def _line(error: ErrorDetails, schema: type) -> str:
    """Return a pydantic error as a sentence."""
    *parents, last = [str(part) for part in error["loc"]] or [""]
    # On the command line, an algorithm's `hyper` is called `system`.
    shown = ["system" if parent == "hyper" else parent for parent in parents]
    key = ".".join([*shown, "system" if last == "hyper" and not parents else last])
    if error["type"] == "unexpected_keyword_argument":
        for parent in parents:
            schema = get_type_hints(schema)[parent]
        return unknown_key(key, [".".join((*shown, field.name)) for field in fields(schema)])
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    listed = f"list, such as [{error['input']}]"
    rule = error["msg"].replace("Input should", "must").replace("valid array", listed)
    return f"{key} {rule.replace('an object', 'a group of keys')}, not {error['input']!r}"
