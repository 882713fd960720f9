"""Properties of all systems: identities, advantages, shapes, seeds, no callbacks."""

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from magpo.contract import as_data
from systems import cases
from systems.cases import LBF


@pytest.mark.parametrize("name", cases.CASES)
def test_training_reproduces_what_the_rollout_stored(name):
    """Compare log-probs and values before any update, within episodes and after their ends."""
    case = cases.build(name)
    state = cases.jitted(case.module.init)(case.setup, case.env, jax.random.key(0))
    state = jax.jit(lambda state: cases.sharpen(cases.stagger(state)))(state)
    before = cases.jitted(case.module.rollout)(case.setup, case.env, state)[0]
    zero = cases.differences(case, before)
    assert len(zero) >= 2
    for what, difference in zero.items():
        np.testing.assert_allclose(difference, 0.0, atol=1e-5, err_msg=what)
    step_count = before.timestep.observation.step_count
    assert (step_count != step_count[0]).any()  # episodes begin and end at different steps


@pytest.mark.parametrize("name", [*cases.POLICY_GRADIENT, "magpo, mat"])
def test_training_reproduces_what_the_rollout_stored_for_continuous_actions(name):
    case = cases.build(name, "mpe/simple_spread_3ag")
    state = cases.jitted(case.module.init)(case.setup, case.env, jax.random.key(0))
    for what, difference in cases.differences(case, state).items():
        np.testing.assert_allclose(difference, 0.0, atol=1e-4, err_msg=what)


def primitives(jaxpr):
    """Count each primitive of a jaxpr, nested ones included."""
    counts = Counter(equation.primitive.name for equation in jaxpr.eqns)
    for equation in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            counts += primitives(inner)
    return counts


VALUES = [(0.001, 0.9), (0.01, 0.95), (0.0002, 0.8)]  # actor_lr, gamma


def with_values(name, actor_lr, gamma):
    return cases.build(name, LBF, f"system.actor_lr={actor_lr}", f"system.gamma={gamma}")


class Traced(NamedTuple):
    """`train_chunk` of a system, traced with the first of VALUES."""

    name: str
    case: cases.Case
    state: Any  # shapes
    program: Any
    train_chunk: Any  # jitted; a second trace is an error


@pytest.fixture(scope="module", params=cases.SYSTEMS)
def traced(request):
    case = with_values(request.param, *VALUES[0])
    module, setup, env = case
    state = jax.eval_shape(lambda key: module.init(setup, env, key), jax.random.key(0))
    chex.clear_trace_counter()
    train_chunk = jax.jit(chex.assert_max_traces(module.train_chunk, n=1), static_argnums=(0, 1))
    return Traced(request.param, case, state, train_chunk.trace(setup, env, state), train_chunk)


def test_training_keeps_its_shapes_and_has_no_callbacks(traced):
    """Check that one trace serves all chunks, and is no larger for longer rollouts."""
    module, setup, env = traced.case
    after, _ = traced.program.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), traced.state
    )
    assert not any(x.weak_type for x in traced.program.jaxpr.out_avals)
    short = primitives(traced.program.jaxpr.jaxpr)
    assert not [name for name in short if "callback" in name]
    longer = dataclasses.replace(setup.config, rollout_length=32)
    other = dataclasses.replace(setup, config=longer)
    state = jax.eval_shape(lambda key: module.init(other, env, key), jax.random.key(0))
    long = jax.make_jaxpr(lambda state: module.train_chunk(other, env, state))(state)
    assert short == primitives(long.jaxpr)


def test_another_hyperparameter_value_gives_the_same_program(traced):
    module, setup, env = with_values(traced.name, *VALUES[1])
    other = jax.jit(module.train_chunk, static_argnums=(0, 1)).trace(setup, env, traced.state)
    ours, theirs = traced.program.lower().as_text(), other.lower().as_text()
    assert ours == theirs


def test_another_hyperparameter_value_causes_no_retracing(traced):
    _, setup, env = traced.case
    for values in VALUES:
        hyper = as_data(with_values(traced.name, *values).setup.config.hyper)
        traced.train_chunk.trace(setup, env, traced.state._replace(hyper=hyper))


def test_users_can_vmap_over_seeds_and_settings():
    """Train in a new process: batched LAPACK QR would hang on a machine with few cores."""
    code = """
import dataclasses, jax, jax.numpy as jnp
from systems import cases

module, setup, env = cases.build("mappo", "coordsum/3x10-30", "network.actor.hidden_dim=128")

def train(key, actor_lr):
    state = module.init(setup, env, key)
    state = state._replace(hyper=dataclasses.replace(state.hyper, actor_lr=actor_lr))
    return module.train_chunk(setup, env, state)[1]["loss/value"]

keys = jax.random.split(jax.random.key(0), 8)
loss = jax.jit(jax.vmap(train))(keys, jnp.linspace(1e-4, 1e-2, 8))
assert loss.shape == (8, setup.config.updates_per_chunk) and jnp.isfinite(loss).all()
"""
    command = [sys.executable, "-c", code]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, timeout=300)


def slow_advantages(t, last_value, gamma, gae_lambda):
    """Compute generalised advantages as sums over the future, one number at a time."""
    T, E, N = t["value"].shape
    out = np.zeros((T, E, N))
    for e, n in np.ndindex(E, N):
        for start in range(T):
            weight = 1.0
            for s in range(start, T):
                if t["discount"][s, e] == 0:
                    following = 0.0
                elif t["ended"][s, e]:
                    following = t["terminal_value"][s, e, n]
                else:
                    following = t["value"][s + 1, e, n] if s + 1 < T else last_value[e, n]
                delta = t["reward"][s, e, n] + gamma * following - t["value"][s, e, n]
                out[start, e, n] += weight * delta
                if t["ended"][s, e]:
                    break
                weight *= gamma * gae_lambda
    return out


@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("name", cases.POLICY_GRADIENT)
def test_advantages_match_the_slow_model(name, truncates):
    T, E, N = 6, 5, 3
    rng = np.random.default_rng(0)
    ended = rng.random((T, E)) < 0.3
    ended[0, 0] = ended[T - 1, 1] = True
    terminated = ended if not truncates else ended & (rng.random((T, E)) < 0.5)
    t = {
        "value": rng.normal(size=(T, E, N)),
        "reward": rng.normal(size=(T, E, N)),
        "discount": 1.0 - terminated,
        "ended": ended,
        "terminal_value": rng.normal(size=(T, E, N)) if truncates else None,
    }
    last_value = rng.normal(size=(E, N))
    module = cases.build(name).module
    fields = dict.fromkeys(module.Transition._fields)
    given = jax.tree.map(jnp.asarray, t)
    if hasattr(module, "Estimates"):  # GPAE, on-policy: all traces are lambda
        following = np.concatenate([t["value"][1:], last_value[None]])
        if truncates:
            following = np.where(ended[..., None], t["terminal_value"], following)
        value, following = (jnp.asarray(x).swapaxes(0, 1) for x in (t["value"], following))
        steps = {k: given[k].swapaxes(0, 1) for k in ("reward", "discount", "ended")}
        zero = jnp.zeros_like(value)
        estimates = module.Estimates(zero, value, following)
        results = module.advantages(module.Transition(**fields | steps), estimates, zero + 0.8, 0.9)
        advantage, target = (x.swapaxes(0, 1) for x in results)
    else:
        estimate = getattr(module, "advantages", None) or module.targets
        transitions = module.Transition(**fields | given)
        results = estimate(transitions, jnp.asarray(last_value), 0.9, 0.8)
        # COMA has no use for these advantages.
        advantage, target = results if type(results) is tuple else (results - t["value"], results)
    np.testing.assert_allclose(advantage, slow_advantages(t, last_value, 0.9, 0.8), atol=1e-5)
    np.testing.assert_allclose(target, advantage + t["value"], atol=1e-6)
