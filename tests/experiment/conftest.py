"""Fixtures for runs of the counting system."""

from experiment.counting import _restore_jax_config, config  # noqa: F401
