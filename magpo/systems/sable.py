"""Sable: retention over all agents and all steps of an episode, trained by PPO.

One network is centralised both in training and in acting. An encoder reads all agents' observations
and returns each agent's value. A decoder returns one agent's policy after the other, from the
encoding and the actions of the agents before it. Retention remembers the whole episode at a
constant cost per step. With `network.memory: false`, each timestep stands alone.

Source: "Sable: a Performant, Efficient and Scalable Sequence Model for MARL" (Mahjoub et al.,
2025). The network is `magpo.networks.sable`.

- `ppo_loss`: the clipped surrogate objective, the entropy bonus and the clipped value loss
- `advantages`: generalised advantage estimation from the encoder's values

Differences from the released code:

- The feed-forward layers train (`network.ffn`).
- The agents keep their order in training.
- Truncated episodes bootstrap.

Run:

    python -m magpo.systems.sable env=rware/tiny-4ag
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from magpo import experiment
from magpo.contract import Card, Deployed, Parameters, as_data, hyperparameters
from magpo.envs.wrappers import AutoReset, terminal_value
from magpo.metrics import episode_means, episode_sums, explained_variance
from magpo.networks.autoregressive import init_joint
from magpo.networks.heads import Distribution, executed_action
from magpo.networks.kernels import spread
from magpo.networks.recurrent import split_time
from magpo.networks.sable import Sable, SableCarry
from magpo.optimiser import clipped_adam, grad_norms
from magpo.types import Array, Environment, EnvSpec, Metrics, Observation, TimeStep
from magpo.values import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, must_divide

CARD = Card(
    centralised="acting and critic",
    deployed=Deployed.JOINT,
    carry="retention or none",
    parameters=Parameters.SHARED,
)


@hyperparameters
class Hyper:
    """The hyperparameters, `system.*`."""

    actor_lr: PositiveFloat
    ppo_epochs: PositiveInt
    num_minibatches: PositiveInt
    clip_eps: PositiveFloat
    ent_coef: NonNegativeFloat
    vf_coef: NonNegativeFloat
    max_grad_norm: PositiveFloat
    gamma: Fraction
    gae_lambda: Fraction


@dataclass(frozen=True)
class NetworkConfig:
    """The network's settings, `network.*`."""

    embed_dim: PositiveInt
    n_head: PositiveInt
    n_block: PositiveInt
    decay_scaling_factor: Fraction
    chunk_size: PositiveInt
    ffn: bool
    memory: bool

    def __post_init__(self) -> None:
        must_divide("2 * n_head", 2 * self.n_head, "embed_dim", self.embed_dim)


@dataclass(frozen=True)
class Config:
    num_envs: int
    rollout_length: int
    updates_per_chunk: int
    hyper: Hyper
    network: NetworkConfig
    needs_global_state: ClassVar[bool] = False

    def __post_init__(self) -> None:
        sequences = "num_envs" if self.network.memory else "num_envs * rollout_length"
        num_minibatches, number = self.hyper.num_minibatches, self.num_sequences
        must_divide("system.num_minibatches", num_minibatches, sequences, number)
        length, chunk_size = self.rollout_length, self.network.chunk_size
        if self.network.memory:
            must_divide("network.chunk_size", chunk_size, "rollout_length", length)

    @property
    def sequence_length(self) -> int:
        """The length of the sequences from which minibatches are drawn."""
        return self.rollout_length if self.network.memory else 1

    @property
    def num_sequences(self) -> int:
        return self.num_envs * self.rollout_length // self.sequence_length


class TrainState(NamedTuple):
    params: Any
    opt_state: Any
    hyper: Hyper  # floats () each
    key: Array
    env_state: Any  # (E, ...)
    timestep: TimeStep  # (E, ...) with the observation to act on next
    carry: SableCarry  # (E, ...)


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
    carry: SableCarry  # (E, ...) at the start
    last_value: Array  # (E, N) of the observation after the last transition
    episodes: Metrics  # () sums over the episodes that ended, and their number


class Batch(NamedTuple):
    """B sequences of C steps; minibatches are drawn from B.

    With memory, each is an environment's whole rollout (B = E, C = T), otherwise a single step.
    """

    steps: Transition  # (B, C, ...)
    advantage: Array  # (B, C, N)
    target: Array  # (B, C, N)
    carry: SableCarry  # (B, ...) before the first step


@dataclass(frozen=True)
class Setup:
    """The static parts of the system, the same for all members."""

    config: Config
    spec: EnvSpec
    network: Sable


def make(config: Config, spec: EnvSpec) -> Setup:
    """Assemble the network for an environment."""
    agents = spec.num_agents, spec.action_dim, spec.action_kind
    return Setup(config, spec, network=Sable(*agents, **asdict(config.network)))


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


def ppo_loss(
    hyper: Hyper, policy: Distribution, value: Array, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """Return PPO's clipped surrogate loss, with an entropy bonus and the clipped value loss."""
    steps = batch.steps
    log_ratio = policy.log_prob(steps.action) - steps.log_prob
    chex.assert_equal_shape((log_ratio, batch.advantage, value, batch.target))
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - hyper.clip_eps, 1 + hyper.clip_eps)
    policy_loss = -jnp.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
    entropy = policy.entropy(key).mean()

    value_change = jnp.clip(value - steps.value, -hyper.clip_eps, hyper.clip_eps)
    errors = (value - batch.target) ** 2, (steps.value + value_change - batch.target) ** 2
    value_loss = 0.5 * jnp.maximum(*errors).mean()

    return policy_loss - hyper.ent_coef * entropy + hyper.vf_coef * value_loss, {
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "value/explained_variance": explained_variance(value, batch.target),
        "policy/entropy": entropy,
        "policy/approx_kl": (ratio - 1 - log_ratio).mean(),
        "policy/clipped_share": (jnp.abs(ratio - 1) > hyper.clip_eps).mean(),
        "policy/ratio_std": ratio.std(),
    }


def rollout(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Rollout]:
    """Act for T steps, one agent after the other."""
    config, params = setup.config, state.params
    envs, no_reset = AutoReset(env, config.num_envs), jnp.zeros(config.num_envs, bool)

    def value(carry: Any, observation: Observation, reset_before: Array) -> Array:
        return setup.network.apply(params, carry, observation, reset_before, method="value")

    def step(state: TrainState, key: Array) -> tuple[TrainState, tuple[Transition, Metrics]]:
        observation, reset_before = state.timestep.observation, state.timestep.last()
        joint = setup.network.apply(
            params, state.carry, observation, reset_before, key, method="act"
        )
        action = executed_action(joint.action, setup.spec.action_kind)
        env_state, timestep = envs.step(state.env_state, action)
        transition = Transition(
            observation=observation,
            reset_before=reset_before,
            action=joint.action,
            log_prob=joint.log_prob,
            value=joint.value,
            reward=timestep.reward,
            discount=timestep.discount,
            ended=timestep.last(),
            terminal_value=terminal_value(
                timestep, lambda terminal: value(joint.carry, terminal, no_reset)
            ),
        )
        state = state._replace(env_state=env_state, timestep=timestep, carry=joint.carry)
        return state, (transition, episode_sums(timestep))

    start, (key, key_steps) = state.carry, jax.random.split(state.key)
    keys = jax.random.split(key_steps, config.rollout_length)
    state, (transitions, episodes) = jax.lax.scan(step, state._replace(key=key), keys)
    last = state.timestep
    last_value = value(state.carry, last.observation, last.last())
    episodes = jax.tree.map(jnp.sum, episodes)
    return state, Rollout(
        transitions=transitions, carry=start, last_value=last_value, episodes=episodes
    )


def sequences(setup: Setup, hyper: Hyper, collected: Rollout) -> Batch:
    """Split a rollout into sequences, with their advantages and value targets."""
    steps = collected.transitions
    estimates = advantages(steps, collected.last_value, hyper.gamma, hyper.gae_lambda)
    steps, (advantage, target) = split_time((steps, estimates), setup.config.sequence_length)
    return Batch(steps=steps, advantage=advantage, target=target, carry=collected.carry)


def losses(
    params: Any, setup: Setup, hyper: Hyper, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """Run the network along the sequences and return its loss."""
    steps = batch.steps
    inputs = batch.carry, steps.observation, steps.action, steps.reset_before
    value, policy = spread(setup.network.apply, params, *inputs)
    return ppo_loss(hyper, policy, value, batch, key)


def update_minibatch(
    setup: Setup, state: TrainState, batch: Batch, key: Array
) -> tuple[TrainState, Metrics]:
    """Take a gradient step, on advantages normalised over the minibatch."""
    hyper, advantage = state.hyper, batch.advantage
    normalised = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    batch = batch._replace(advantage=normalised)
    grads, metrics = jax.grad(losses, has_aux=True)(state.params, setup, hyper, batch, key)
    adam = clipped_adam(hyper.actor_lr, hyper.max_grad_norm)
    updates, opt_state = adam.update(grads, state.opt_state, state.params)
    state = state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    return state, metrics | grad_norms(network=grads)


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
    batch = sequences(setup, state.hyper, collected)
    key, key_epochs = jax.random.split(state.key)
    state, metrics = jax.lax.scan(
        lambda state, key: update_epoch(setup, state, batch, key),
        state._replace(key=key),
        jax.random.split(key_epochs, state.hyper.ppo_epochs),
    )
    return state, jax.tree.map(jnp.mean, metrics) | episode_means(collected.episodes)


def init(setup: Setup, env: Environment, key: Array) -> TrainState:
    """Return the state before the first update: everything that training changes."""
    config, hyper = setup.config, setup.config.hyper
    key, key_env, key_network = jax.random.split(key, 3)
    env_state, timestep = AutoReset(env, config.num_envs).reset(key_env)
    carry = initial_carry(setup, (config.num_envs,))
    params = init_joint(setup.network, key_network, carry, timestep.observation, setup.spec)
    return TrainState(
        params=params,
        opt_state=clipped_adam(hyper.actor_lr, hyper.max_grad_norm).init(params),
        hyper=as_data(hyper),
        key=key,
        env_state=env_state,
        timestep=timestep,
        carry=carry,
    )


def train_chunk(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Metrics]:
    """Run the U updates between two evaluations; each metric is (U,)."""
    return jax.lax.scan(
        lambda state, _: update(setup, env, state), state, length=setup.config.updates_per_chunk
    )


def policy_params(state: TrainState) -> Any:
    """Return the network's parameters, which are evaluated, kept as best and deployed."""
    return state.params


def initial_carry(setup: Setup, batch_shape: tuple[int, ...]) -> SableCarry:
    """Return the carry at an episode's start, (B, ...) each."""
    (batch_size,) = batch_shape
    return setup.network.initial_carry(batch_size)


def act(
    setup: Setup,
    params: Any,
    carry: SableCarry,
    observation: Observation,
    key: Array,
    greedy: bool,
) -> tuple[Array, SableCarry]:
    """Return all agents' actions (B, N[, A]), from all observations, and the next carry."""
    no_reset = jnp.zeros(observation.step_count.shape, bool)
    joint = setup.network.apply(params, carry, observation, no_reset, key, greedy, method="act")
    return executed_action(joint.action, setup.spec.action_kind), joint.carry


def main() -> None:
    """Run `python -m magpo.systems.sable env=<suite>/<task> key=value ...`."""
    experiment.main(__file__)


if __name__ == "__main__":
    main()
