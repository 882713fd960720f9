"""Errors that a user can cause."""


class ConfigError(ValueError):
    """Bad input, in one line: what is wrong, what is allowed, the nearest match."""
