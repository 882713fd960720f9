"""Every system solves every probe."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo import config
from magpo.evaluate import evaluate
from systems.probe import LENGTH, Kind, Probe

GAMMA = 0.7
SETTINGS = {
    "magpo": [
        "system.actor_lr=0.003",
        "system.num_minibatches=1",
        "network.guider.embed_dim=16",
        "network.guider.chunk_size=6",
        "network.learner.hidden_dim=16",
    ]
}


def values(name, system, state):
    """What the critic expects of the state that training stopped in, (E, N)."""
    arguments = state.timestep.observation, state.timestep.last()
    match name:
        case "magpo":
            return system.guider.apply(
                state.params.guider, state.memory.guider, *arguments, method="value"
            )


@pytest.fixture(scope="module", params=SETTINGS)
def trained(request):
    """Mean returns of the deployed policy, the critic's values and the steps they are for."""
    module = importlib.import_module(f"magpo.systems.{request.param}")
    shared = ["num_envs=16", "rollout_length=12", "num_evaluations=1", "total_steps=23040"]
    algorithm = config.load(
        request.param,
        ["env=lbf/2s-8x8-2p-2f-coop", "tuned=false", f"system.gamma={GAMMA}", *shared]
        + SETTINGS[request.param],
    ).algorithm

    def train(kind, key):
        env = Probe(kind)
        system = module.make(algorithm, env)
        state, _ = module.train_chunk(system, module.init(system, key))
        params = module.policy_params(state)
        scores = evaluate(module, system, env, params, key, 64)
        observation = state.timestep.observation
        seen = observation.agents_view[:, 0, 2]  # behind the agent id
        value = values(request.param, system, state)
        return scores["episode_return"].mean(), value, observation.step_count, seen

    keys = jax.random.split(jax.random.key(0), len(Kind))
    return jax.jit(jax.vmap(train))(jnp.arange(len(Kind)), keys)


@pytest.mark.parametrize(
    ("kind", "best"),
    [(Kind.ACTED, LENGTH), (Kind.COPIED, LENGTH), (Kind.COORDINATED, LENGTH), (Kind.REMEMBERED, 1)],
)
def test_the_policy_is_good(trained, kind, best):
    assert trained[0][kind] > 0.9 * best


@pytest.mark.parametrize("kind", [Kind.CONSTANT, Kind.OBSERVED, Kind.DELAYED, Kind.TRUNCATED])
def test_the_values_are_right(trained, kind):
    _, value, step_count, seen = (np.asarray(x[kind]) for x in trained)
    left = LENGTH - step_count  # steps to the end, that of the reward included
    expected = {
        Kind.CONSTANT: (1 - GAMMA**left) / (1 - GAMMA),
        Kind.OBSERVED: np.where(seen > 0, GAMMA ** (left - 1), 0),
        Kind.DELAYED: GAMMA ** (left - 1),
        Kind.TRUNCATED: np.full(left.shape, 1 / (1 - GAMMA)),
    }[kind]
    np.testing.assert_allclose(value, np.stack([expected] * 2, axis=-1), atol=0.15)
