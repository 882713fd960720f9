"""MPE, SMAX and MABrax checked against jaxmarl's simulators, given the same actions."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magpo import envs
from magpo.envs import registry, simulators

B = 4


def simulate(simulator, reset_keys, step_keys, actions):
    """Step a simulator with actions (T, B, N[, A]); `step_keys` maps a step to its B keys.

    Return the first observations (B, ...), each step's observations, rewards and dones (T, B, ...),
    all by agent, and T + 1 states.
    """
    first, state = jax.jit(jax.vmap(simulator.reset))(reset_keys)
    step = jax.jit(jax.vmap(simulator.step_env))
    steps, states = [], [state]
    for t, action in enumerate(actions):
        given = {agent: jnp.asarray(action[:, i]) for i, agent in enumerate(simulator.agents)}
        views, state, rewards, dones, _ = step(step_keys(t), state, given)
        steps.append((views, rewards, dones))
        states.append(state)
    return first, *jax.tree.map(lambda *leaves: np.stack(leaves), *steps), states


def stacked(by_agent, simulator):
    """Stack each agent's array (..., B, ...) into (..., B, N, ...)."""
    lead = 1 if np.shape(by_agent[simulator.agents[0]])[0] == B else 2
    return np.stack([by_agent[agent] for agent in simulator.agents], axis=lead)


@pytest.mark.parametrize("action_range", ["box", "released"])
def test_mpe_matches_jaxmarl(play, action_range):
    env = envs.make("mpe/simple_spread_5ag", global_state=True, action_range=action_range)
    played = play(env, 1, B)
    simulator = simulators.load("mpe").SimpleSpreadMPE(5, 5, action_type="Continuous")
    given = (played.actions + 1) / 2 if action_range == "box" else played.actions
    unused = jax.random.split(jax.random.key(3), B)
    first, views, rewards, dones, _ = simulate(simulator, played.keys, lambda t: unused, given)
    ours, before = played.timesteps, played.first.observation.agents_view
    np.testing.assert_allclose(before[..., 5:], stacked(first, simulator))
    seen = ours.observation.agents_view[..., 5:]
    np.testing.assert_allclose(seen, stacked(views, simulator), atol=1e-5)
    np.testing.assert_allclose(ours.reward, stacked(rewards, simulator), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(ours.last(), dones["__all__"])
    assert (np.ptp(ours.reward, axis=-1) > 0).any()  # agents collide separately
    assert (played.ends == 25).all() and ours.truncated()[25].all()


@pytest.fixture(scope="module")
def battle(play):
    env = envs.make("smax/3m", global_state=True)
    played = play(env, 1, B)
    simulator = simulators.load("smax").HeuristicEnemySMAX(
        scenario=simulators.load("smax.smax_env").MAP_NAME_TO_SCENARIO["3m"]
    )
    begin, key = jnp.moveaxis(jax.vmap(jax.random.split)(played.keys), 1, 0)
    step_keys = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(0, None)))
    raw = simulate(simulator, begin, lambda t: step_keys(key, t), played.actions)
    return played, simulator, raw


def test_smax_matches_jaxmarl(battle):
    played, simulator, (first, views, rewards, dones, states) = battle
    seen, ours = played.timesteps.observation, played.timesteps
    until = played.until_end
    before = played.first.observation.agents_view
    np.testing.assert_allclose(before[..., 3:], stacked(first, simulator))
    features = stacked(views, simulator)
    np.testing.assert_allclose(seen.agents_view[..., 3:][until], features[until], atol=1e-5)
    np.testing.assert_allclose(seen.global_state[until], views["world_state"][until], rtol=1e-5)
    legal = jax.jit(jax.vmap(simulator.get_avail_actions))
    masks = np.stack([stacked(legal(state), simulator) for state in states[1:]])
    np.testing.assert_array_equal(seen.action_mask[until], masks[until])
    expected = stacked(rewards, simulator)
    np.testing.assert_allclose(ours.reward[until], expected[until], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(ours.last()[until], dones["__all__"][until])
    assert (expected > 0).any()


def test_smax_distinguishes_a_dead_team_from_the_time_limit(battle, play):
    played, _, (*_, states) = battle
    for b, end in enumerate(played.ends):
        alive = np.asarray(states[end + 1].state.unit_alive[b])
        allies, enemies = alive[:3].any(), alive[3:].any()
        assert not (allies and enemies) and end < 100  # random play loses well before the limit
        assert played.timesteps.discount[end, b] == 0
        assert played.timesteps.metrics["win_rate"][end, b] == (allies and not enemies)
    short = play(envs.make("smax/3m", time_limit=4), 1, B)
    assert (short.ends == 3).all() and short.timesteps.truncated()[3].all()
    released = envs.make("smax/3m", time_limit=4, ends="released")
    assert not released.truncates
    assert (play(released, 1, B).timesteps.discount[3] == 0).all()


def test_smax_is_won_when_all_enemies_are_dead():
    """Leave one marine on each side, the enemy's about to die."""
    env = envs.make("smax/3m")
    state, _ = jax.jit(env.reset)(jax.random.key(0))
    units = state.battle.state
    health = jnp.where(jnp.arange(6) % 3 == 0, 45.0, 0.0).at[3].set(1.0)
    units = units.replace(
        unit_health=health,
        unit_alive=health > 0,
        unit_positions=units.unit_positions.at[3].set(units.unit_positions[0] + 1.0),
    )
    state = state._replace(battle=state.battle.replace(state=units))
    shoot = jnp.array([0, 4, 4])  # the first agent shoots each enemy in turn
    outcomes = {a: jax.jit(env.step)(state, shoot.at[0].set(a))[1] for a in range(5, 8)}
    won = [int(a) for a, t in outcomes.items() if t.metrics["win_rate"] == 1]
    assert len(won) == 1
    assert outcomes[won[0]].last() and outcomes[won[0]].discount == 0
    assert outcomes[won[0]].reward[0] >= 1


def test_mabrax_matches_jaxmarl(play):
    env = envs.make("mabrax/hopper-3x1", global_state=True, time_limit=30)
    played = play(env, 1, B)
    simulator = simulators.load("mabrax").Hopper(
        episode_length=30, auto_reset=False, homogenisation_method="max"
    )
    unused = jax.random.split(jax.random.key(3), B)
    first, views, rewards, dones, states = simulate(
        simulator, played.keys, lambda t: unused, played.actions
    )
    ours, until = played.timesteps, played.until_end
    before = played.first.observation.agents_view
    np.testing.assert_allclose(before, stacked(first, simulator), atol=1e-5)
    found, expected = ours.observation.agents_view[until], stacked(views, simulator)[until]
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)
    whole = np.stack([state.obs for state in states[1:]])
    np.testing.assert_allclose(ours.observation.global_state[until], whole[until], atol=1e-2)
    expected = rewards["__all__"]
    for agent in range(3):
        np.testing.assert_allclose(ours.reward[..., agent][until], expected[until], atol=1e-2)
    np.testing.assert_array_equal(ours.last()[until], dones["__all__"][until])
    fallen = played.ends < 29
    assert fallen.sum() > 0
    final = ours.discount[played.ends, np.arange(B)]
    np.testing.assert_array_equal(final, np.where(fallen, 0, 1))


@pytest.mark.parametrize(
    ("task", "first_velocity"),
    [("mabrax/ant-8x1", 19), ("mabrax/halfcheetah-6x1", 11), ("mabrax/walker2d-6x1", 11)],
)
def test_with_the_corrected_mapping_an_agent_sees_the_joint_it_moves(task, first_velocity):
    env = envs.make(task, mapping="corrected", backend="spring", global_state=True)
    reset, step = jax.jit(env.reset), jax.jit(jax.vmap(env.step, in_axes=(None, 0)))
    state, _ = reset(jax.random.key(0))
    num_agents = env.num_agents
    pushes = jnp.concatenate([jnp.zeros((1, num_agents)), jnp.eye(num_agents)])[..., None]
    _, timesteps = step(state, pushes)
    still, *pushed = np.asarray(timesteps.observation.global_state)
    for agent, after in enumerate(pushed):
        moved = first_velocity + np.argmax(np.abs(after - still)[first_velocity:])
        assert moved in env._seen[agent]
        others = [a for a in range(num_agents) if a != agent and moved in env._seen[a]]
        assert not others


def test_the_corrected_humanoid_reads_only_existing_features():
    jaxmarls, env = (
        envs.make("mabrax/humanoid-9-8", mapping=mapping) for mapping in ("jaxmarl", "corrected")
    )
    size = env.simulator.env.observation_size
    assert max(max(seen) for seen in jaxmarls._seen) >= size  # clamped to the last feature
    for seen in env._seen:
        assert seen.max() < size and len(set(seen.tolist())) == len(seen)
    arms = set(range(22 + 17, 22 + 23))  # the arms' velocities, after 22 positions
    assert arms <= set(env._seen[0].tolist()) and not arms & set(env._seen[1].tolist())


def test_the_padded_action_of_a_smaller_agent_is_masked():
    env = envs.make("mabrax/humanoid-9-8")
    _, timestep = jax.eval_shape(env.reset, jax.random.key(0))
    assert timestep.observation.action_mask.shape == (2, 9)
    mask = np.array(env._mask)
    assert mask[0].all() and mask[1].sum() == 8 and not mask[1, 8]


@pytest.mark.parametrize(("block", "options"), [(-2, {}), (-1, {"size": 5, "time_limit": 8})])
def test_the_guides_wrappers_pass_the_check(block, options, monkeypatch):
    monkeypatch.setattr(registry, "registered", {})
    page = (Path(__file__).parents[2] / "docs/guides/environment.md").read_text()
    program = re.findall(r"```python\n(.*?)```", page, re.S)[block]
    exec(program, {"__name__": __name__})
    (task,) = registry.registered
    envs.check(envs.make(task, global_state=True, **options))
