"""The gradient steps that all systems take."""

from typing import Any, TypeVar

import optax

from magpo.types import Metrics

P = TypeVar("P", bound=tuple[Any, ...])


def clipped_adam(
    learning_rate: float | optax.Schedule, max_grad_norm: float
) -> optax.GradientTransformation:
    """Return Adam on gradients clipped by their global norm; both arguments may be traced.

    Adam's state does not depend on them. Adam works on one flat vector, so that a GPU needs one
    kernel per operation, not one per operation and array of parameters.
    """
    return optax.flatten(
        optax.chain(
            optax.clip_by_global_norm(max_grad_norm),
            optax.scale_by_adam(eps=1e-5),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def init_each(optimisers: P, params: P) -> P:
    """Return each network's optimiser state."""
    return type(params)(*(o.init(p) for o, p in zip(optimisers, params, strict=True)))


def descend(optimisers: P, params: P, opt_state: P, grads: P) -> tuple[P, P]:
    """Return the parameters and optimiser states after a gradient step.

    The arguments are NamedTuples with a field per network; each network has its own optimiser.
    """
    steps = [
        o.update(g, s, p) for o, p, s, g in zip(optimisers, params, opt_state, grads, strict=True)
    ]
    updates, opt_state = (type(params)(*parts) for parts in zip(*steps, strict=True))
    return optax.apply_updates(params, updates), opt_state


def grad_norms(**grads: Any) -> Metrics:
    """Return each network's metric `grad_norm/<network>`: the global norm before clipping."""
    return {f"grad_norm/{network}": optax.tree.norm(tree) for network, tree in grads.items()}
