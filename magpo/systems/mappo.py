"""MAPPO: proximal policy optimisation with a centralised critic.

Decentralised recurrent actors share one set of parameters and act on their own observations. A
recurrent critic reads the global state once per timestep and returns one value per agent. With
`critic_input: observation`, it reads each agent's own observations instead, which is IPPO.

Source: "The Surprising Effectiveness of PPO in Cooperative Multi-Agent Games" (Yu et al., 2022).

- `actor_loss`: the clipped surrogate objective and the entropy bonus
- `critic_loss`: the clipped value loss
- `advantages`: generalised advantage estimation

Differences from the released code of the MAGPO paper:

- The critic reads the state once instead of one copy per agent.
- Every agent has its own value.
- Truncated episodes bootstrap.
- Chunks of `recurrent_chunk_size` steps are contiguous.

Run:

    python -m magpo.systems.mappo env=rware/tiny-4ag
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from magpo import experiment, moments
from magpo.contract import Card, Deployed, Parameters, as_data, hyperparameters
from magpo.envs.wrappers import AutoReset, terminal_value
from magpo.errors import ConfigError
from magpo.metrics import episode_means, episode_sums, explained_variance, masked_mean
from magpo.moments import Moments
from magpo.networks.heads import Distribution, executed_action
from magpo.networks.kernels import spread
from magpo.networks.recurrent import Actors, Critic, split_time
from magpo.optimiser import clipped_adam, descend, grad_norms, init_each
from magpo.types import Array, Environment, EnvSpec, Metrics, Observation, TimeStep
from magpo.values import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, must_divide

CARD = Card(
    centralised="a critic, in training",
    deployed=Deployed.EACH_AGENT,
    carry="GRU",
    parameters=Parameters.SHARED,
)


@hyperparameters
class Hyper:
    """The hyperparameters, `system.*`."""

    actor_lr: PositiveFloat
    critic_lr: PositiveFloat
    ppo_epochs: PositiveInt
    num_minibatches: PositiveInt
    clip_eps: PositiveFloat
    ent_coef: NonNegativeFloat
    vf_coef: NonNegativeFloat
    max_grad_norm: PositiveFloat
    gamma: Fraction
    gae_lambda: Fraction
    recurrent_chunk_size: PositiveInt
    critic_input: Literal["global_state", "observation"]
    value_norm: bool
    anneal_lr: bool
    dead_agents: Literal["learn", "mask"]


@dataclass(frozen=True)
class RecurrentConfig:
    """The settings of a network, `network.actor.*` or `network.critic.*`."""

    hidden_dim: PositiveInt


@dataclass(frozen=True)
class NetworkConfig:
    actor: RecurrentConfig
    critic: RecurrentConfig


@dataclass(frozen=True)
class Config:
    num_envs: int
    rollout_length: int
    updates_per_chunk: int
    num_updates: int
    hyper: Hyper
    network: NetworkConfig

    def __post_init__(self) -> None:
        length, chunk_size = self.rollout_length, self.hyper.recurrent_chunk_size
        must_divide("system.recurrent_chunk_size", chunk_size, "rollout_length", length)
        sequences = "the number of sequences, num_envs * rollout_length / recurrent_chunk_size"
        num_minibatches = self.hyper.num_minibatches
        must_divide("system.num_minibatches", num_minibatches, sequences, self.num_sequences)

    @property
    def num_sequences(self) -> int:
        """The number of chunks in the rollouts of all environments."""
        return self.num_envs * self.rollout_length // self.hyper.recurrent_chunk_size

    @property
    def needs_global_state(self) -> bool:
        """Return whether the critic reads the global state."""
        return self.hyper.critic_input == "global_state"


class Params(NamedTuple):
    """The parameters of both networks; also the structure of gradients and optimiser states."""

    actor: Any
    critic: Any


class Carry(NamedTuple):
    """Hidden states of E running episodes; K = 1 critic on the global state, or K = N."""

    actor: Array  # (E, N, H)
    critic: Array  # (E, K, H)


class TrainState(NamedTuple):
    params: Params
    opt_state: Params
    hyper: Hyper  # floats () each
    key: Array
    env_state: Any  # (E, ...)
    timestep: TimeStep  # (E, ...) with the observation to act on next
    carry: Carry
    moments: Moments | None  # of the value targets; None without `value_norm`


class Transition(NamedTuple):
    """One step of E environments. `rollout` stacks T of them."""

    observation: Observation  # (E, ...)
    reset_before: Array  # (E,) bool, true for an episode's first observation
    action: Array  # (E, N[, A]), raw: a squashed action before tanh
    log_prob: Array  # (E, N)
    value: Array  # (E, N)
    reward: Array  # (E, N)
    discount: Array  # (E,) 0 where the episode terminated
    ended: Array  # (E,) bool, terminated or truncated
    terminal_value: Array | None  # (E, N) where truncated; None on suites that never truncate


class Rollout(NamedTuple):
    transitions: Transition  # (T, E, ...)
    carry: Carry  # (T / C, E, ...) at the start of each chunk of C steps
    last_value: Array  # (E, N) of the observation after the last transition
    episodes: Metrics  # () sums over the episodes that ended, and their number


class Batch(NamedTuple):
    """B sequences of C steps, the chunks of all rollouts; minibatches are drawn from B."""

    steps: Transition  # (B, C, ...)
    advantage: Array  # (B, C, N)
    target: Array  # (B, C, N)
    learns: Array | None  # (B, C, N) bool, the agents alive; None: all agents learn
    carry: Carry  # (B, ...) before the first step


@dataclass(frozen=True)
class Setup:
    """The static parts of the system, the same for all members."""

    config: Config
    spec: EnvSpec
    actor: Actors
    critic: Critic


def make(config: Config, spec: EnvSpec) -> Setup:
    """Assemble the networks for an environment. Raises ConfigError."""
    if config.hyper.dead_agents == "mask" and spec.stop_action is None:
        raise ConfigError(f"system.dead_agents=mask is for smax/..., not {spec.name}")
    actor, critic = config.network.actor.hidden_dim, config.network.critic.hidden_dim
    critic_input = config.hyper.critic_input
    return Setup(config, spec, Actors(spec, actor), Critic(spec, critic, critic_input))


def advantages(
    transitions: Transition, last_value: Array, gamma: float, gae_lambda: float
) -> tuple[Array, Array]:
    """Return generalised advantage estimates and value targets, (T, E, N) (Schulman et al., 2016).

    A terminated episode's end is worth 0, a truncated episode's end the value of its last
    observation. The trace is cut at both.
    """
    next_value = jnp.concatenate([transitions.value[1:], last_value[None]])  # (T, E, N)
    if transitions.terminal_value is not None:
        ended = transitions.ended[..., None]
        next_value = jnp.where(ended, transitions.terminal_value, next_value)
    discount = gamma * transitions.discount[..., None]
    td_error = transitions.reward + discount * next_value - transitions.value
    trace = gamma * gae_lambda * (1.0 - transitions.ended[..., None])

    def step(advantage: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        td_error, trace = inputs
        advantage = td_error + trace * advantage
        return advantage, advantage

    _, advantage = jax.lax.scan(step, jnp.zeros_like(last_value), (td_error, trace), reverse=True)
    return advantage, advantage + transitions.value


def actor_loss(
    hyper: Hyper, policy: Distribution, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """Return PPO's clipped surrogate loss, with an entropy bonus."""
    log_ratio = policy.log_prob(batch.steps.action) - batch.steps.log_prob
    chex.assert_equal_shape((log_ratio, batch.advantage))
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - hyper.clip_eps, 1 + hyper.clip_eps)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
    policy_loss = -masked_mean(surrogate, batch.learns)
    entropy = masked_mean(policy.entropy(key), batch.learns)
    return policy_loss - hyper.ent_coef * entropy, {
        "loss/policy": policy_loss,
        "policy/entropy": entropy,
        "policy/approx_kl": (ratio - 1 - log_ratio).mean(),
        "policy/clipped_share": (jnp.abs(ratio - 1) > hyper.clip_eps).mean(),
        "policy/ratio_std": ratio.std(),
    }


def critic_loss(hyper: Hyper, value: Array, batch: Batch) -> tuple[Array, Metrics]:
    """Return the clipped value loss: the larger of the clipped and unclipped squared errors."""
    chex.assert_equal_shape((value, batch.steps.value, batch.target))
    value_change = jnp.clip(value - batch.steps.value, -hyper.clip_eps, hyper.clip_eps)
    errors = (value - batch.target) ** 2, (batch.steps.value + value_change - batch.target) ** 2
    value_loss = 0.5 * masked_mean(jnp.maximum(*errors), batch.learns)
    return hyper.vf_coef * value_loss, {
        "loss/value": value_loss,
        "value/explained_variance": explained_variance(value, batch.target),
    }


def rollout(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Rollout]:
    """Act for T steps and keep the carry at the start of each chunk."""
    config = setup.config
    envs, no_reset = AutoReset(env, config.num_envs), jnp.zeros(config.num_envs, bool)
    actor = partial(setup.actor.step, state.params.actor)

    def critic(carry: Array, observation: Observation, reset_before: Array) -> tuple[Array, Array]:
        carry, value = setup.critic.step(state.params.critic, carry, observation, reset_before)
        return carry, moments.denormalise(state.moments, value)

    def step(state: TrainState, key: Array) -> tuple[TrainState, tuple[Transition, Metrics]]:
        observation, reset_before = state.timestep.observation, state.timestep.last()
        actor_carry, policy = actor(state.carry.actor, observation, reset_before)
        critic_carry, value = critic(state.carry.critic, observation, reset_before)
        action = policy.sample(key)
        executed = executed_action(action, setup.spec.action_kind)
        env_state, timestep = envs.step(state.env_state, executed)
        transition = Transition(
            observation=observation,
            reset_before=reset_before,
            action=action,
            log_prob=policy.log_prob(action),
            value=value,
            reward=timestep.reward,
            discount=timestep.discount,
            ended=timestep.last(),
            terminal_value=terminal_value(
                timestep, lambda terminal: critic(critic_carry, terminal, no_reset)[1]
            ),
        )
        carry = Carry(actor_carry, critic_carry)
        state = state._replace(env_state=env_state, timestep=timestep, carry=carry)
        return state, (transition, episode_sums(timestep))

    def chunk(state: TrainState, keys: Array) -> tuple[TrainState, tuple[Carry, Any]]:
        after, collected = jax.lax.scan(step, state, keys)
        return after, (state.carry, collected)

    key, key_steps = jax.random.split(state.key)
    chunk_size = state.hyper.recurrent_chunk_size
    keys = jax.random.split(key_steps, (config.rollout_length // chunk_size, chunk_size))
    state, (carry, collected) = jax.lax.scan(chunk, state._replace(key=key), keys)
    transitions, episodes = collected
    transitions = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), transitions)  # (T, E, ...)
    last = state.timestep
    _, last_value = critic(state.carry.critic, last.observation, last.last())
    episodes = jax.tree.map(jnp.sum, episodes)
    return state, Rollout(
        transitions=transitions, carry=carry, last_value=last_value, episodes=episodes
    )


def sequences(hyper: Hyper, collected: Rollout) -> Batch:
    """Split a rollout into chunks, with their advantages and value targets."""
    steps = collected.transitions
    estimates = advantages(steps, collected.last_value, hyper.gamma, hyper.gae_lambda)
    carry = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), collected.carry)
    steps, (advantage, target) = split_time((steps, estimates), hyper.recurrent_chunk_size)
    learns = None
    if hyper.dead_agents == "mask":
        learns = steps.observation.action_mask.sum(axis=-1) > 1  # the dead have no choice
    return Batch(steps=steps, advantage=advantage, target=target, learns=learns, carry=carry)


def normalised(state: TrainState, batch: Batch) -> tuple[TrainState, Batch]:
    """Add the value targets to the moments and normalise them.

    The rollout's values return to the units in which the critic computed them.
    """
    before, after = state.moments, moments.updated(state.moments, batch.target)
    steps = batch.steps._replace(value=moments.normalise(before, batch.steps.value))
    batch = batch._replace(steps=steps, target=moments.normalise(after, batch.target))
    return state._replace(moments=after), batch


def losses(
    params: Params, setup: Setup, hyper: Hyper, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """Run both networks along the sequences and add their losses; each trains its own network."""
    inputs = batch.steps.observation, batch.steps.reset_before
    _, policy = spread(setup.actor.unroll, params.actor, batch.carry.actor, *inputs)
    _, value = spread(setup.critic.unroll, params.critic, batch.carry.critic, *inputs)
    loss_actor, metrics_actor = actor_loss(hyper, policy, batch, key)
    loss_critic, metrics_critic = critic_loss(hyper, value, batch)
    return loss_actor + loss_critic, metrics_actor | metrics_critic


def optimisers(config: Config, hyper: Hyper) -> Params:
    """Return each network's optax.GradientTransformation; `anneal_lr` anneals both rates to 0."""
    steps_per_update = hyper.ppo_epochs * hyper.num_minibatches
    num_steps = float(config.num_updates * steps_per_update)  # int32 overflows

    def adam(learning_rate: float) -> optax.GradientTransformation:
        falling = optax.linear_schedule(learning_rate, 0.0, num_steps)
        return clipped_adam(falling if hyper.anneal_lr else learning_rate, hyper.max_grad_norm)

    return Params(actor=adam(hyper.actor_lr), critic=adam(hyper.critic_lr))


def update_minibatch(
    setup: Setup, state: TrainState, batch: Batch, key: Array
) -> tuple[TrainState, Metrics]:
    """Take a gradient step with each network, on advantages normalised over the minibatch."""
    hyper, advantage = state.hyper, batch.advantage
    mean, std = advantage.mean(where=batch.learns), advantage.std(where=batch.learns)
    batch = batch._replace(advantage=(advantage - mean) / (std + 1e-8))
    grads, metrics = jax.grad(losses, has_aux=True)(state.params, setup, hyper, batch, key)
    params, opt_state = descend(
        optimisers(setup.config, hyper), state.params, state.opt_state, grads
    )
    state = state._replace(params=params, opt_state=opt_state)
    return state, metrics | grad_norms(**grads._asdict())


def update_epoch(
    setup: Setup, state: TrainState, batch: Batch, key: Array
) -> tuple[TrainState, Metrics]:
    """Pass over the batch once, in random minibatches of sequences."""
    key_order, key_minibatches = jax.random.split(key)
    order = jax.random.permutation(key_order, setup.config.num_sequences)
    order = order.reshape(state.hyper.num_minibatches, -1)

    def minibatch(state: TrainState, inputs: tuple[Array, Array]) -> tuple[TrainState, Metrics]:
        rows, key = inputs
        return update_minibatch(setup, state, jax.tree.map(lambda x: x[rows], batch), key)

    keys = jax.random.split(key_minibatches, len(order))
    return jax.lax.scan(minibatch, state, (order, keys))


def update(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Metrics]:
    """Collect a rollout and train on it for `ppo_epochs`."""
    state, collected = rollout(setup, env, state)
    state, batch = normalised(state, sequences(state.hyper, collected))
    key, key_epochs = jax.random.split(state.key)
    state, metrics = jax.lax.scan(
        lambda state, key: update_epoch(setup, state, batch, key),
        state._replace(key=key),
        jax.random.split(key_epochs, state.hyper.ppo_epochs),
    )
    return state, jax.tree.map(jnp.mean, metrics) | episode_means(collected.episodes)


def init(setup: Setup, env: Environment, key: Array) -> TrainState:
    """Return the state before the first update: everything that training changes."""
    batch_shape, hyper = (setup.config.num_envs,), setup.config.hyper
    key, key_env, key_actor, key_critic = jax.random.split(key, 4)
    env_state, timestep = AutoReset(env, *batch_shape).reset(key_env)
    carry = Carry(setup.actor.initial_carry(batch_shape), setup.critic.initial_carry(batch_shape))
    params = Params(setup.actor.init(key_actor), setup.critic.init(key_critic))
    return TrainState(
        params=params,
        opt_state=init_each(optimisers(setup.config, hyper), params),
        hyper=as_data(hyper),
        key=key,
        env_state=env_state,
        timestep=timestep,
        carry=carry,
        moments=moments.init(hyper.value_norm),
    )


def train_chunk(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Metrics]:
    """Run the U updates between two evaluations; each metric is (U,)."""
    return jax.lax.scan(
        lambda state, _: update(setup, env, state), state, length=setup.config.updates_per_chunk
    )


def policy_params(state: TrainState) -> Any:
    """Return the actor's parameters, which are evaluated, kept as best and deployed."""
    return state.params.actor


def initial_carry(setup: Setup, batch_shape: tuple[int, ...]) -> Array:
    """Return the actors' carry at an episode's start, (*batch_shape, N, H)."""
    return setup.actor.initial_carry(batch_shape)


def act(
    setup: Setup, params: Any, carry: Array, observation: Observation, key: Array, greedy: bool
) -> tuple[Array, Array]:
    """Return actions (B, N[, A]), each from one agent's observation, and the next carry."""
    return setup.actor.act(params, carry, observation, key, greedy)


def main() -> None:
    """Run `python -m magpo.systems.mappo env=<suite>/<task> key=value ...`."""
    experiment.main(__file__)


if __name__ == "__main__":
    main()
