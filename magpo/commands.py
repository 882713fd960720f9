"""Functions as command lines, such as `python -m magpo.evaluate` and the scripts."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import make_dataclass
from inspect import Parameter, signature
from typing import Any, get_type_hints

import jax

from magpo.config import compose
from magpo.errors import ConfigError
from magpo.files import exit_on_config_error, printing
from magpo.values import unknown_key, validate


@printing()
def run(usage: str | None, function: Callable[..., object]) -> None:
    """Call a function with the command line's arguments, checked by its parameters' types.

    Prints the usage instead with --help, or if arguments are required and none are given. Each
    parameter is a key; --key is short for key=true, and words without "=" are the positional
    parameters. Other arguments go unchanged to the function's *args. Keys below `env` go to the
    parameter `options`, keys below `vary` to `vary`; `import=` imports plugins.
    """
    arguments, parameters = sys.argv[1:], signature(function).parameters.items()
    keys = {key: p for key, p in parameters if p.kind is not p.VAR_POSITIONAL}
    required = [key for key, p in keys.items() if p.default is p.empty]
    if {"-h", "--help"} & set(arguments) or (required and not arguments):
        print(str(usage).strip())
        return
    jax.config.update("jax_enable_x64", False)
    with exit_on_config_error():
        compose.load_imports(arguments)
        given, others = _given(arguments, keys, len(keys) < len(parameters))
        types = get_type_hints(function, include_extras=True)
        fields = [(key, types[key]) for key in keys if key in {*required, *given}]
        values = dict(vars(validate(make_dataclass("Arguments", fields), given)))
        words = [key for key in required if keys[key].kind is not Parameter.KEYWORD_ONLY]
        first = [values.pop(key) for key in words] if others else []
        try:
            function(*first, *others, **values)
        except OSError as error:
            if error.filename is None:  # standard output
                raise
            raise ConfigError(str(error)) from error


def _given(
    arguments: Sequence[str], keys: Mapping[str, Parameter], takes_others: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments' values by key, and the arguments that belong to no key."""
    words = [key for key, p in keys.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    given, others = dict[str, Any](), list[str]()
    for argument in arguments:
        text = f"{argument[2:]}=true" if argument.startswith("--") else argument
        if "=" not in text and (free := [word for word in words if word not in given]):
            given[free[0]] = text
        elif takes_others and ("=" not in text or text.partition("=")[0] not in keys):
            others.append(text)
        elif not text.startswith("import="):
            key, value = compose.parse(text)
            group, _, option = key.partition(".")
            if option and (place := {"env": "options", "vary": "vary"}.get(group, "")) in keys:
                given.setdefault(place, {})[option] = value
            elif key in keys:
                given[key] = value
            else:
                raise ConfigError(unknown_key(key, [*keys, "import"]))
    return given, others
