"""Fixtures for runs of the counting system."""

from experiment.counting import _leave_jax_as_it_is, config  # noqa: F401
