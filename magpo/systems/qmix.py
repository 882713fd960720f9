"""QMIX: monotonic value factorisation.

Each agent has a recurrent network of action values, with parameters shared by all agents. A mixing
network, whose weights depend on the global state, makes the team's value from the agents' values.
It never decreases with them, so that each agent's best action is part of the best joint action.
Double Q-learning trains both networks on sequences from a replay buffer.

Source: "QMIX: Monotonic Value Function Factorisation for Deep Multi-Agent Reinforcement Learning"
(Rashid et al., 2018).

- `team_value`: the mixing network of Eq. 4 and 5
- `targets`: n-step returns with double Q-learning (van Hasselt et al., 2016)
- `explore`: epsilon-greedy over legal actions

The default values are those of JaxMARL's QMIX for SMAX. Differences from JaxMARL's code:

- Episodes continue from one rollout to the next; a sequence in the buffer keeps the hidden states
  with which it began (Kapturowski et al., 2019).
- Truncated episodes bootstrap.
- The team's reward is the mean over agents.

Run:

    python -m magpo.systems.qmix env=smax/3m
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import flashbax
import jax
import jax.numpy as jnp
import optax

from magpo import experiment
from magpo.contract import Card, Deployed, Parameters, as_data, hyperparameters
from magpo.envs.wrappers import AutoReset, strong
from magpo.errors import ConfigError
from magpo.metrics import episode_means, episode_sums
from magpo.networks.heads import ActionValues
from magpo.networks.kernels import spread
from magpo.networks.mixing import Mixer
from magpo.networks.recurrent import Actors
from magpo.optimiser import grad_norms
from magpo.types import Array, Environment, EnvSpec, Metrics, Observation, TimeStep
from magpo.values import Fraction, NonNegativeInt, PositiveFloat, PositiveInt

CARD = Card(
    centralised="a mixing network, in training",
    deployed=Deployed.EACH_AGENT,
    carry="GRU",
    parameters=Parameters.SHARED,
    actions="discrete",
)


@hyperparameters
class Hyper:
    """The hyperparameters, `system.*`."""

    actor_lr: PositiveFloat
    gradient_steps: PositiveInt
    batch_size: PositiveInt
    buffer_size: PositiveInt
    learning_starts: NonNegativeInt
    target_period: PositiveInt
    n_step: PositiveInt
    max_grad_norm: PositiveFloat
    gamma: Fraction
    reward_scale: PositiveFloat
    epsilon_start: Fraction
    epsilon_end: Fraction
    epsilon_decay: Fraction


@dataclass(frozen=True)
class AgentsConfig:
    """The settings of the agents' network, `network.agents.*`."""

    hidden_dim: PositiveInt


@dataclass(frozen=True)
class MixerConfig:
    """The settings of the mixing network, `network.mixer.*`."""

    embed_dim: PositiveInt
    hypernet_dim: PositiveInt
    init_scale: PositiveFloat


@dataclass(frozen=True)
class NetworkConfig:
    agents: AgentsConfig
    mixer: MixerConfig


@dataclass(frozen=True)
class Config:
    num_envs: int
    rollout_length: int
    updates_per_chunk: int
    num_updates: int
    hyper: Hyper
    network: NetworkConfig
    needs_global_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        least, size = max(self.num_envs, self.hyper.batch_size), self.hyper.buffer_size
        if size < least:
            raise ValueError(
                f"system.buffer_size must be at least {least}, which num_envs or "
                f"system.batch_size needs, not {size}"
            )


class Params(NamedTuple):
    """The parameters of both networks; also the structure of their gradients."""

    agents: Any
    mixer: Any


class TrainState(NamedTuple):
    params: Params
    target_params: Params
    opt_state: Any
    hyper: Hyper  # floats () each
    key: Array
    env_state: Any  # (E, ...)
    timestep: TimeStep  # (E, ...) with the observation to act on next
    carry: Array  # (E, N, H)
    buffer: Any  # flashbax's, of `Sequence`s
    update_count: Array  # () int32, so far


class Transition(NamedTuple):
    """One step of E environments. `rollout` stacks T of them."""

    observation: Observation  # (E, ...)
    reset_before: Array  # (E,) bool, true for an episode's first observation
    action: Array  # (E, N)
    reward: Array  # (E,) the team's
    discount: Array  # (E,) 0 where the episode terminated
    ended: Array  # (E,) bool, terminated or truncated
    truncated: Array  # (E,) bool
    terminal: Observation | None  # (E, ...) where truncated; None on suites that never truncate


class Rollout(NamedTuple):
    transitions: Transition  # (T, E, ...)
    carry: Array  # (E, N, H) at the start
    last: tuple[Observation, Array]  # (E, ...) after the last transition, with its `reset_before`
    episodes: Metrics  # () sums over the episodes that ended, and their number


class Sequence(NamedTuple):
    """An environment's rollout as the buffer keeps it; B of them are a batch.

    The observations are those of T steps, the one after them, and the last one of each truncated
    episode, in the order in which they were made: D in all. Step t's is number `place[t]`, and the
    one that step t leads to is the next.
    """

    observation: Observation  # (D, ...)
    reset_before: Array  # (D,) bool
    place: Array  # (T,) int32
    action: Array  # (T, N)
    reward: Array  # (T,)
    discount: Array  # (T,)
    ended: Array  # (T,) bool
    carry: Array  # (N, H) before the first step


@dataclass(frozen=True)
class Setup:
    """The static parts of the system, the same for all members."""

    config: Config
    spec: EnvSpec
    agents: Actors
    mixer: Mixer


def make(config: Config, spec: EnvSpec) -> Setup:
    """Assemble the networks for an environment. Raises ConfigError for continuous actions."""
    if spec.action_kind == "continuous":
        raise ConfigError(f"qmix needs discrete actions; {spec.name} has continuous ones")
    agents = Actors(spec, config.network.agents.hidden_dim, values=True)
    return Setup(config, spec, agents, Mixer(**asdict(config.network.mixer)))


def replay(setup: Setup) -> Any:
    """Return the pure functions of the replay buffer."""
    hyper = setup.config.hyper
    return flashbax.make_item_buffer(
        hyper.buffer_size, min_length=1, sample_batch_size=hyper.batch_size, add_batches=True
    )


def optimiser(hyper: Hyper) -> optax.GradientTransformation:
    """Return rectified Adam on gradients clipped by their global norm."""
    return optax.flatten(
        optax.chain(
            optax.clip_by_global_norm(hyper.max_grad_norm),
            optax.scale_by_radam(),
            optax.scale_by_learning_rate(hyper.actor_lr),
        )
    )


def epsilon(setup: Setup, state: TrainState) -> Array:
    """Return the probability of a random action, which falls linearly at the run's start."""
    hyper = state.hyper
    falls = jnp.maximum(hyper.epsilon_decay * setup.config.num_updates, 1e-6)  # updates
    progress = jnp.minimum(state.update_count / falls, 1.0)
    return hyper.epsilon_start + (hyper.epsilon_end - hyper.epsilon_start) * progress


def explore(values: ActionValues, action_mask: Array, epsilon: Array, key: Array) -> Array:
    """Return each agent's best action, or with probability epsilon a random legal one, (E, N)."""
    key_random, key_choice = jax.random.split(key)
    random = jax.random.categorical(key_random, jnp.where(action_mask, 0.0, -jnp.inf))
    explores = jax.random.uniform(key_choice, random.shape) < epsilon
    return jnp.where(explores, random, values.mode())


def rollout(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Rollout]:
    """Act for T steps with epsilon-greedy exploration."""
    envs, chance = AutoReset(env, setup.config.num_envs), epsilon(setup, state)
    agents = partial(setup.agents.step, state.params.agents)

    def step(state: TrainState, key: Array) -> tuple[TrainState, tuple[Transition, Metrics]]:
        observation, reset_before = state.timestep.observation, state.timestep.last()
        carry, values = agents(state.carry, observation, reset_before)
        action = explore(values, observation.action_mask, chance, key)
        env_state, timestep = envs.step(state.env_state, action)
        transition = Transition(
            observation=observation,
            reset_before=reset_before,
            action=action,
            reward=timestep.reward.mean(-1),
            discount=timestep.discount,
            ended=timestep.last(),
            truncated=timestep.truncated(),
            terminal=timestep.terminal_observation,
        )
        state = state._replace(env_state=env_state, timestep=timestep, carry=carry)
        return state, (transition, episode_sums(timestep))

    start, (key, key_steps) = state.carry, jax.random.split(state.key)
    keys = jax.random.split(key_steps, setup.config.rollout_length)
    state, (transitions, episodes) = jax.lax.scan(step, state._replace(key=key), keys)
    return state, Rollout(
        transitions=transitions,
        carry=start,
        last=(state.timestep.observation, state.timestep.last()),
        episodes=jax.tree.map(jnp.sum, episodes),
    )


def sequences(setup: Setup, collected: Rollout) -> Sequence:
    """Split a rollout into one sequence for each environment, (E, ...)."""
    return jax.vmap(
        lambda steps, last, carry: _sequence(setup, steps, last, carry), in_axes=(1, 0, 0)
    )(collected.transitions, collected.last, collected.carry)


def _sequence(
    setup: Setup, steps: Transition, last: tuple[Observation, Array], carry: Array
) -> Sequence:
    """Put the observations of one environment's T steps in order."""
    length = setup.config.rollout_length
    made = (steps.observation, steps.reset_before)
    made = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), made, last)  # (T + 1, ...)
    place = jnp.arange(length + 1)
    if steps.terminal is not None:
        # An episode is truncated at its time limit alone, so there are at most `number` of these.
        number = -(-length // setup.spec.time_limit)
        place = place.at[1:].add(jnp.cumsum(steps.truncated))
        terminal = jnp.where(steps.truncated, place[:-1] + 1, length + 1 + number)
        order = jnp.full(length + 1 + number, length)  # the places without use repeat the last one
        order = order.at[place].set(jnp.arange(length + 1))
        order = order.at[terminal].set(length + 1 + jnp.arange(length), mode="drop")
        at_ends = (steps.terminal, jnp.zeros(length, bool))
        made = jax.tree.map(lambda x, y: jnp.concatenate([x, y])[order], made, at_ends)
    observation, reset_before = made
    return Sequence(
        observation=observation,
        reset_before=reset_before,
        place=place[:-1],
        action=steps.action,
        reward=steps.reward,
        discount=steps.discount,
        ended=steps.ended,
        carry=carry,
    )


def at_steps(x: Array, batch: Sequence) -> Array:
    """Return the entries (B, T, ...) of x (B, D, ...) that belong to the steps."""
    place = batch.place.reshape(*batch.place.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, place, axis=1)


def team_value(setup: Setup, params: Params, value: Array, global_state: Array) -> Array:
    """Return the team's value (...) from the agents' values (..., N) and the state (..., G)."""
    return setup.mixer.apply(params.mixer, value, global_state)


def targets(hyper: Hyper, value: Array, batch: Sequence) -> Array:
    """Return n-step returns (B, T), which end early where an episode does.

    `value` (B, D) is the team's at every observation. A terminated episode's end is worth 0.
    """
    next_value = jnp.take_along_axis(value, batch.place + 1, axis=1)  # (B, T)
    reward = hyper.reward_scale * batch.reward
    one_step = reward + hyper.gamma * batch.discount * next_value

    def extend(_: int, returns: Array) -> Array:
        later = jnp.concatenate([returns[:, 1:], next_value[:, -1:]], axis=1)
        return jnp.where(batch.ended, one_step, reward + hyper.gamma * later)

    return jax.lax.fori_loop(0, hyper.n_step - 1, extend, one_step)


def loss(
    params: Params, setup: Setup, hyper: Hyper, target_params: Params, batch: Sequence
) -> tuple[Array, Metrics]:
    """Return the mean squared error of the team's values.

    The online network chooses the best next actions, and the target network values them.
    """
    inputs = batch.carry, batch.observation, batch.reset_before
    _, online = spread(setup.agents.unroll, params.agents, *inputs)
    _, target = spread(setup.agents.unroll, target_params.agents, *inputs)
    state = batch.observation.global_state
    assert state is not None
    next_value = team_value(setup, target_params, target.of(online.mode()), state)  # (B, D)
    returns = jax.lax.stop_gradient(targets(hyper, next_value, batch))
    chosen = ActionValues(at_steps(online.value, batch)).of(batch.action)  # (B, T, N)
    value = team_value(setup, params, chosen, at_steps(state, batch))
    error = ((value - returns) ** 2).mean()
    return error, {"loss/value": error, "value/mean": value.mean(), "value/target": returns.mean()}


def gradient_step(setup: Setup, state: TrainState, key: Array) -> tuple[TrainState, Metrics]:
    """Take a gradient step on a batch from the buffer."""
    batch = replay(setup).sample(state.buffer, key).experience
    grads, metrics = jax.grad(loss, has_aux=True)(
        state.params, setup, state.hyper, state.target_params, batch
    )
    updates, opt_state = optimiser(state.hyper).update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    metrics |= grad_norms(**grads._asdict())
    return state._replace(params=params, opt_state=opt_state), metrics


def update(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Metrics]:
    """Collect a rollout, put it into the buffer and train on batches from the buffer."""
    config, hyper, chance = setup.config, state.hyper, epsilon(setup, state)
    state, collected = rollout(setup, env, state)
    key, key_steps = jax.random.split(state.key)
    state = state._replace(
        key=key,
        buffer=replay(setup).add(state.buffer, sequences(setup, collected)),
        update_count=state.update_count + 1,
    )
    keys = jax.random.split(key_steps, hyper.gradient_steps)
    trained, metrics = jax.lax.scan(partial(gradient_step, setup), state, keys)
    # The first updates only fill the buffer. They are counted, because steps would overflow int32.
    start = hyper.learning_starts / (config.num_envs * config.rollout_length)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(state.update_count >= start, new, old),
        (trained.params, trained.opt_state),
        (state.params, state.opt_state),
    )
    target_params = optax.periodic_update(
        params, state.target_params, state.update_count, hyper.target_period
    )
    state = state._replace(params=params, opt_state=opt_state, target_params=target_params)
    metrics = jax.tree.map(jnp.mean, metrics) | {"policy/epsilon": chance}
    return state, metrics | episode_means(collected.episodes)


def init(setup: Setup, env: Environment, key: Array) -> TrainState:
    """Return the state before the first update: everything that training changes."""
    config, hyper = setup.config, setup.config.hyper
    key, key_env, key_agents, key_mixer = jax.random.split(key, 4)
    env_state, timestep = AutoReset(env, config.num_envs).reset(key_env)
    values = jnp.zeros((config.num_envs, setup.spec.num_agents))
    params = Params(
        agents=setup.agents.init(key_agents),
        mixer=setup.mixer.init(key_mixer, values, timestep.observation.global_state),
    )
    state = TrainState(
        params=params,
        target_params=jax.tree.map(jnp.copy, params),
        opt_state=optimiser(hyper).init(params),
        hyper=as_data(hyper),
        key=key,
        env_state=env_state,
        timestep=timestep,
        carry=setup.agents.initial_carry((config.num_envs,)),
        buffer=None,
        update_count=jnp.int32(0),
    )
    collected = jax.eval_shape(lambda state: sequences(setup, rollout(setup, env, state)[1]), state)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), collected)
    return state._replace(buffer=strong(replay(setup).init(empty)))


def train_chunk(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Metrics]:
    """Run the U updates between two evaluations; each metric is (U,)."""
    return jax.lax.scan(
        lambda state, _: update(setup, env, state), state, length=setup.config.updates_per_chunk
    )


def policy_params(state: TrainState) -> Any:
    """Return the agents' parameters, which are evaluated, kept as best and deployed."""
    return state.params.agents


def initial_carry(setup: Setup, batch_shape: tuple[int, ...]) -> Array:
    """Return the agents' carry at an episode's start, (*batch_shape, N, H)."""
    return setup.agents.initial_carry(batch_shape)


def act(
    setup: Setup, params: Any, carry: Array, observation: Observation, key: Array, greedy: bool
) -> tuple[Array, Array]:
    """Return each agent's best action (B, N), whether `greedy` or not, and the next carry."""
    return setup.agents.act(params, carry, observation, key, greedy)


def main() -> None:
    """Run `python -m magpo.systems.qmix env=<suite>/<task> key=value ...`."""
    experiment.main(__file__)


if __name__ == "__main__":
    main()
