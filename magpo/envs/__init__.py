"""The environments: `make("rware/tiny-4ag")` and `tasks()`; `check` tests your own."""

from magpo.envs.check import check
from magpo.envs.registry import make, options, register, tasks

__all__ = ["check", "make", "options", "register", "tasks"]
