"""The environments: `make("rware/tiny-4ag")`, `tasks()`."""

from magpo.envs.registry import make, options, tasks

__all__ = ["make", "options", "tasks"]
