"""MAGPO and related systems: cooperative multi-agent reinforcement learning in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magpo.runs.policy import TrainedPolicy

__version__ = "0.1.0"


def load_policy(folder: Any, **choices: Any) -> "TrainedPolicy":
    """Load the best policy of a run's results folder; see `magpo.runs.policy.load_policy`."""
    from magpo.runs.policy import load_policy  # imported late, because it imports JAX

    return load_policy(folder, **choices)
