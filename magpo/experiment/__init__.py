"""The experiment that trains, evaluates, logs and saves a run's members.

`run` is for Python, `main` for a system's command line.
"""

from magpo.experiment.loop import Result, main, run
from magpo.experiment.programs import (
    build_programs,
    compile_programs,
    make_env,
    make_setup,
    member_inputs,
)
from magpo.experiment.recorder import DivergenceError
from magpo.hardware.devices import set_up_jax

__all__ = [
    "DivergenceError",
    "Result",
    "build_programs",
    "compile_programs",
    "main",
    "make_env",
    "make_setup",
    "member_inputs",
    "run",
    "set_up_jax",
]
