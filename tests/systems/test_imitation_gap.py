"""The MAGPO paper's Section 3: independent policies cannot imitate every joint policy.

Two agents are rewarded for choosing different actions. With an entropy bonus the best joint policy
lets the first agent choose at random and the second take the other action. Each agent alone then
flips a coin, and two independent coins differ half of the time: CTDS distils exactly this policy.
MAGPO keeps its guider where the learners can follow.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from magpo import config
from magpo.contract import as_data
from magpo.evaluate import evaluate
from magpo.systems import magpo
from magpo.types import spec
from systems.cases import PROBED_GUIDED
from systems.probe import LENGTH, Kind, Probe


def trained(*more, variants):
    """Return the guider's and the learners' shares of rewarded steps, (variants, S)."""
    # A lower learning rate than the probes' and four times the environments: once all rewards are
    # equal, normalised advantages are noise. If it outweighs the entropy bonus, the guider's coin
    # drifts to one side, where learners can follow (fully in 1 seed of 32 with 16 environments).
    own = ["system.actor_lr=0.001", "system.ent_coef=0.1", "total_steps=76800", *more]
    shared = ["num_envs=64", "rollout_length=12", "num_evaluations=1"]
    task = ["env=lbf/2s-8x8-2p-2f-coop", "tuned=false"]
    algorithm = config.load("magpo", [*task, *shared, *PROBED_GUIDED, *own]).algorithm
    env = Probe(Kind.COMPLEMENTED)
    setup = magpo.make(algorithm, spec(env))

    def init(hyper, key):
        return magpo.init(setup, env, key)._replace(hyper=hyper)

    def train(state):
        state, metrics = magpo.train_chunk(setup, env, state)
        return state, metrics["rollout/episode_return"][-20:].mean()

    def learners(state, key):
        scores = evaluate(magpo, setup, env, magpo.policy_params(state), key, 256)
        return scores["episode_return"].mean()

    settings = [replace(algorithm.hyper, **changes) for changes in variants]
    hyper = jax.tree.map(lambda *values: np.stack(values), *map(as_data, settings))
    keys = jax.random.split(jax.random.key(0), 3)[:2]
    state = jax.jit(jax.vmap(jax.vmap(init, (None, 0)), (0, None)))(hyper, keys)
    # This program runs long enough to be worth optimising.
    optimised = {"xla_backend_optimization_level": 1}
    state, guider = jax.jit(jax.vmap(jax.vmap(train)), compiler_options=optimised)(state)
    learned = jax.jit(jax.vmap(jax.vmap(learners), (0, None)))(state, keys)
    return [guider / LENGTH, learned / LENGTH]


@pytest.fixture(scope="module")
def shares():
    """Return the shares of MAGPO, then of CTDS, (2, S).

    CTDS is MAGPO without delta and rl_coef (test_magpo.py), so one program trains both.
    """
    return trained(variants=[{}, {"delta": None, "rl_coef": 0.0}])


def test_ctds_learners_cannot_follow_their_guider(shares):
    guider, learners = (x[1] for x in shares)
    assert (guider > 0.9).all()
    assert learners.mean() == pytest.approx(0.5, abs=0.12)
    assert (learners < 0.8).all()


def test_magpo_learners_can_follow_their_guider(shares):
    guider, learners = (x[0] for x in shares)
    assert (guider > 0.9).all()
    assert (learners > 0.9).all()


def test_learners_can_follow_a_guider_with_an_adaptive_delta():
    (guider,), (learners,) = trained("system.delta_mode=adaptive", variants=[{}])
    assert (guider > 0.9).all()
    assert (learners > 0.9).all()
