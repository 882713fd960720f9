"""The environments: `make("rware/tiny-4ag")`, `tasks()`."""

from magpo.envs.registry import make, options, register, tasks

__all__ = ["make", "options", "register", "tasks"]
