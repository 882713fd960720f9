"""MAGPO: the identity before an update, advantages, both losses on fixed numbers, the contract."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo import config, envs
from magpo.networks.heads import Categorical
from magpo.systems import magpo

SMALL = [
    "env=lbf/2s-8x8-2p-2f-coop",
    "tuned=false",
    "num_envs=6",
    "rollout_length=8",
    "total_steps=96",
    "num_evaluations=1",
    "system.ppo_epochs=2",
    "network.guider.embed_dim=8",
    "network.guider.n_head=2",
    "network.guider.chunk_size=4",
    "network.learner.hidden_dim=8",
]


@pytest.fixture(scope="module")
def system():
    """Episodes of LBF that are cut off at 5 steps, so that a rollout of 8 has ends in it."""
    options = config.load("magpo", SMALL)
    env = envs.make(options.env.name, **(options.env.options | {"time_limit": 5}))
    return magpo.make(options.algorithm, env)


@pytest.fixture(scope="module")
def collected(system):
    """The second rollout: it starts in the middle of episodes, which end at different steps."""
    state = jax.jit(magpo.init, static_argnums=0)(system, jax.random.key(0))
    staggered = state.env_state.env.replace(step_count=jnp.arange(6, dtype=jnp.int32) % 5)
    state = state._replace(env_state=state.env_state._replace(env=staggered))
    # A policy that is not uniform, or a wrong mask could hide.
    state = state._replace(params=jax.tree.map(lambda x: x * 2.0, state.params))
    rollout = jax.jit(magpo.rollout, static_argnums=0)
    before, _ = rollout(system, state)
    after, out = rollout(system, before)
    return before, after, out


def batch_of(system, before, out):
    by_sequence = magpo.by_sequence
    transitions = out.transitions
    return magpo.Batch(
        observation=by_sequence(transitions.observation),
        reset_before=by_sequence(transitions.reset_before),
        action=by_sequence(transitions.action),
        log_prob=by_sequence(transitions.log_prob),
        value=by_sequence(transitions.value),
        advantage=by_sequence(transitions.reward),
        target=by_sequence(transitions.value),
        memory=before.memory,
    )


def test_before_an_update_the_ratio_is_one(system, collected):
    before, _, out = collected
    resets = out.transitions.reset_before
    assert (resets[:, 0] != resets[:, 1]).any() and before.memory.learner.any()
    batch = batch_of(system, before, out)
    value, policy = jax.jit(system.guider.apply)(
        before.params.guider, before.memory.guider, batch.observation, batch.action,
        batch.reset_before,
    )  # fmt: skip
    np.testing.assert_allclose(policy.log_prob(batch.action), batch.log_prob, atol=1e-5)
    np.testing.assert_allclose(value, batch.value, atol=1e-5)

    _, metrics = jax.jit(magpo.losses, static_argnums=1)(
        before.params, system, batch, jax.random.key(0)
    )
    assert metrics["policy/guider_ratio_std"] < 1e-5
    assert metrics["loss/value"] < 1e-9


def test_the_learner_in_training_is_the_learner_that_acts(system, collected):
    """Its memory along the rollout, its KL in the loss, and `act`, one agent and step at a time."""
    before, after, out = collected
    params = before.params.learner
    transitions = out.transitions

    def policy_of_one(hidden, view, mask):
        never = jnp.zeros((1, 1), bool)
        return system.learner.apply(params, hidden[None], view[None, None], mask[None, None], never)

    policy_of_all = jax.jit(jax.vmap(jax.vmap(policy_of_one)))
    act = jax.jit(magpo.act, static_argnums=(0, 5))
    hidden, log_probs = np.asarray(before.memory.learner), []
    for t in range(system.config.rollout_length):
        observation = jax.tree.map(lambda x, t=t: x[t], transitions.observation)
        hidden = np.where(transitions.reset_before[t][:, None, None], 0, hidden)
        _, policy = policy_of_all(hidden, observation.agents_view, observation.action_mask)
        log_probs.append(policy.log_probs[:, :, 0, 0])
        action, hidden = act(system, params, hidden, observation, jax.random.key(t), True)
        np.testing.assert_array_equal(action, log_probs[-1].argmax(-1))
    np.testing.assert_allclose(hidden, after.memory.learner, atol=1e-5)

    batch = batch_of(system, before, out)
    _, guider = system.guider.apply(
        before.params.guider, before.memory.guider, batch.observation, batch.action,
        batch.reset_before,
    )  # fmt: skip
    expected = guider.kl(Categorical(jnp.stack(log_probs, axis=1))).mean()
    _, metrics = jax.jit(magpo.losses, static_argnums=1)(
        before.params, system, batch, jax.random.key(0)
    )
    np.testing.assert_allclose(metrics["policy/kl_guider_to_learner"], expected, rtol=1e-4)


def slow_advantages(t, last_value, gamma, gae_lambda):
    """Generalised advantages as a sum over the future, one number at a time."""
    T, E, N = t.value.shape
    out = np.zeros((T, E, N))
    for e, n in np.ndindex(E, N):
        for start in range(T):
            weight = 1.0
            for s in range(start, T):
                if t.discount[s, e] == 0:
                    following = 0.0
                elif t.ended[s, e]:
                    following = t.terminal_value[s, e, n]
                else:
                    following = t.value[s + 1, e, n] if s + 1 < T else last_value[e, n]
                delta = t.reward[s, e, n] + gamma * following - t.value[s, e, n]
                out[start, e, n] += weight * delta
                if t.ended[s, e]:
                    break
                weight *= gamma * gae_lambda
    return out


@pytest.mark.parametrize("truncates", [True, False])
def test_advantages_are_the_slow_ones(truncates):
    T, E, N = 6, 5, 3
    rng = np.random.default_rng(0)
    ended = rng.random((T, E)) < 0.3
    ended[0, 0] = ended[T - 1, 1] = True
    terminated = ended if not truncates else ended & (rng.random((T, E)) < 0.5)
    transitions = magpo.Transition(
        observation=None,
        reset_before=None,
        action=None,
        log_prob=None,
        value=rng.normal(size=(T, E, N)),
        reward=rng.normal(size=(T, E, N)),
        discount=1.0 - terminated,
        ended=ended,
        terminal_value=rng.normal(size=(T, E, N)) if truncates else None,
    )
    last_value = rng.normal(size=(E, N))
    advantage, target = magpo.advantages(
        jax.tree.map(jnp.asarray, transitions), jnp.asarray(last_value), 0.9, 0.8
    )
    np.testing.assert_allclose(
        advantage, slow_advantages(transitions, last_value, 0.9, 0.8), atol=1e-5
    )
    np.testing.assert_allclose(target, advantage + transitions.value, atol=1e-6)


def test_a_truncated_episode_is_worth_its_last_observation(system, collected):
    """The stored terminal values are those of the guider's memory before the reset."""
    _, _, out = collected
    t = out.transitions
    assert (t.terminal_value[~np.asarray(t.ended)] == 0).all()
    truncated = np.asarray(t.ended & (t.discount > 0))
    assert truncated.any() and (t.terminal_value[truncated] != 0).all()


def policy_of(*probabilities) -> Categorical:
    return Categorical(jnp.log(jnp.array(probabilities)))


def settings(**changes) -> magpo.SystemConfig:
    values = config.load("magpo", SMALL).algorithm.system
    return dataclasses.replace(values, **changes)


def fixed_batch(log_prob, advantage, value=0.0, target=0.0):
    fields = dict.fromkeys(magpo.Batch._fields)
    n = len(advantage)
    fields |= {
        "action": jnp.zeros(n, int),
        "log_prob": jnp.log(jnp.array(log_prob)),
        "advantage": jnp.array(advantage),
        "value": jnp.full(n, value),
        "target": jnp.full(n, target),
    }
    return magpo.Batch(**fields)


@pytest.mark.parametrize(
    ("guider", "learner", "old", "advantage", "surrogate", "masked"),
    [
        (0.5, 0.5, 0.5, 1.0, 1.0, False),  # nothing moved
        (0.6, 0.5, 0.5, 1.0, 1.2, False),  # at PPO's upper edge
        (0.7, 0.5, 0.5, 1.0, 1.2, False),  # beyond it: clipped
        (0.7, 0.5, 0.5, -1.0, -1.4, False),  # pessimistic: a bad action keeps its gradient
        (0.9, 0.5, 0.9, 1.0, 0.5 * 1.5 / 0.9, True),  # clipped by delta although the ratio is 1
        (0.2, 0.5, 0.2, 1.0, 1.0, True),  # below 1/delta: min takes the ratio
        (0.2, 0.5, 0.2, -1.0, -1.2, True),  # 0.5/1.5/0.2 = 1.67, clipped to 1.2
    ],
)
def test_guider_loss_on_fixed_numbers(guider, learner, old, advantage, surrogate, masked):
    values = settings(delta=1.5, clip_eps=0.2, ent_coef=0.0, vf_coef=0.0)
    mu, pi = policy_of([guider, 1 - guider]), policy_of([learner, 1 - learner])
    batch = fixed_batch([old], [advantage])
    loss, metrics = magpo.guider_loss(values, mu, pi, batch.value, batch, jax.random.key(0))
    assert metrics["policy/masked_share"] == masked
    np.testing.assert_allclose(loss, masked * mu.kl(pi)[0] - surrogate, rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0, 0.5), (0.1, 0.5 * 1.9**2), (1.9, 0.5 * 1.8**2)],  # old 0, target 2, clip 0.2
)
def test_value_loss_takes_the_worse_of_free_and_clipped(value, expected):
    values = settings(ent_coef=0.0, vf_coef=1.0, clip_eps=0.2)
    even = policy_of([0.5, 0.5])
    batch = fixed_batch([0.5], [0.0], value=0.0, target=2.0)
    _, metrics = magpo.guider_loss(values, even, even, jnp.array([value]), batch, jax.random.key(0))
    clipped = 0.5 * (min(max(value, -0.2), 0.2) - 2) ** 2
    np.testing.assert_allclose(metrics["loss/value"], max(expected, clipped), rtol=1e-5)


@pytest.mark.parametrize("direction", ["guider_to_learner", "learner_to_guider"])
def test_learner_loss_on_fixed_numbers(direction):
    values = settings(learner_kl=direction, rl_coef=2.0, clip_eps=0.2)
    mu, pi = policy_of([0.6, 0.4], [0.6, 0.4]), policy_of([0.3, 0.7], [0.9, 0.1])
    batch = fixed_batch([0.5, 0.5], [1.0, 1.0])
    loss, _ = magpo.learner_loss(values, mu, pi, batch)
    p, q = (mu, pi) if direction == "guider_to_learner" else (pi, mu)
    surrogate = np.array([0.3 / 0.5, 1.2])
    np.testing.assert_allclose(loss, (np.asarray(p.kl(q)) - 2.0 * surrogate).mean(), rtol=1e-5)


def test_each_loss_moves_its_own_network_only():
    values, key = settings(delta=1.1), jax.random.key(0)
    batch = fixed_batch([0.5, 0.4, 0.6], [1.0, -2.0, 0.5])
    logits = jax.random.normal(key, (2, 3, 4))

    def policies(logits):
        return (Categorical(jax.nn.log_softmax(x)) for x in logits)

    def of_guider(logits):
        return magpo.guider_loss(values, *policies(logits), batch.value, batch, key)[0]

    def of_learner(logits):
        return magpo.learner_loss(values, *policies(logits), batch)[0]

    mu, pi = jax.grad(of_guider)(logits)
    assert (mu != 0).any() and (pi == 0).all()
    mu, pi = jax.grad(of_learner)(logits)
    assert (mu == 0).all() and (pi != 0).any()


def test_training_keeps_its_shapes_and_calls_nobody(system):
    """One trace serves all chunks, at any rollout length; nothing in it talks to the host."""
    state = jax.eval_shape(lambda key: magpo.init(system, key), jax.random.key(0))
    after, _ = jax.eval_shape(lambda s: magpo.train_chunk(system, s), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert not any(x.weak_type for x in jax.tree.leaves(after))

    def program(rollout_length):
        longer = dataclasses.replace(system.config, rollout_length=rollout_length)
        other = dataclasses.replace(system, config=longer)
        return str(jax.make_jaxpr(lambda s: magpo.train_chunk(other, s))(state))

    short, long = program(8), program(32)
    assert "callback" not in short
    assert short.count(" = ") == long.count(" = ")


def test_a_seed_trains_the_same_alone_and_among_others(system):
    def train(key):
        state, metrics = magpo.train_chunk(system, magpo.init(system, key))
        return state.params, metrics

    keys = jax.random.split(jax.random.key(0), 3)
    among = jax.jit(jax.vmap(train))(keys)
    alone = jax.jit(train)(keys[1])
    for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(among), strict=True):
        np.testing.assert_allclose(x, y[1], atol=2e-4)
    assert not np.allclose(among[1]["loss/guider"][0], among[1]["loss/guider"][1])
