"""MAT: the multi-agent transformer, trained by PPO.

One network, centralised in acting as in training: an encoder reads the observations of all agents
at one timestep and gives each agent's value; a decoder gives one agent's policy after the other,
from the encoding and the actions of the agents before it. There is no memory over time.

Source: "Multi-Agent Reinforcement Learning is a Sequence Modeling Problem" (Wen et al., 2022); the
network is `magpo.networks.mat`.
    `ppo_loss`      the clipped surrogate objective for each agent, Eq. 5; its values' loss, Eq. 4
    `advantages`    generalised advantage estimation from the encoder's values
Acting caches keys and values: each agent's turn reads one token. Unlike the released code of the
MAGPO paper, truncated episodes bootstrap.

    python -m magpo.systems.mat env=rware/tiny-4ag
"""

import sys
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from magpo import experiment
from magpo.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, must_divide
from magpo.envs.wrappers import AutoReset, episode_means, episode_sums
from magpo.networks.heads import Policy, executed_action
from magpo.networks.mat import MAT
from magpo.types import Array, Card, Environment, Observation, TimeStep, action_spec

CARD = Card("acting and critic", "a joint policy", "none", parameters="shared")


@dataclass(frozen=True)
class SystemConfig:
    """`system.*`"""

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
    """`network.*`"""

    embed_dim: PositiveInt
    n_head: PositiveInt
    n_block: PositiveInt

    def __post_init__(self) -> None:
        must_divide("n_head", self.n_head, "embed_dim", self.embed_dim)


@dataclass(frozen=True)
class Config:
    num_envs: int
    rollout_length: int
    updates_per_chunk: int
    system: SystemConfig
    network: NetworkConfig

    def __post_init__(self) -> None:
        num_minibatches, what = self.system.num_minibatches, "num_envs * rollout_length"
        must_divide("system.num_minibatches", num_minibatches, what, self.num_timesteps)

    @property
    def num_timesteps(self) -> int:
        """What a minibatch is drawn from."""
        return self.num_envs * self.rollout_length


class TrainState(NamedTuple):
    params: Any
    opt_state: Any
    key: Array
    env_state: Any  # (E, ...)
    timestep: TimeStep  # (E, ...), whose observation is acted on next


class Transition(NamedTuple):
    """One step of E environments. `rollout` stacks T of them."""

    observation: Observation  # (E, ...)
    action: Array  # (E, N[, A]), raw: a squashed action before tanh
    log_prob: Array  # (E, N)
    value: Array  # (E, N)
    reward: Array  # (E, N)
    discount: Array  # (E,) 0 where the episode terminated
    ended: Array  # (E,) bool, terminated or truncated
    terminal_value: Array | None  # (E, N) where truncated; None on suites that never truncate


class Rollout(NamedTuple):
    transitions: Transition  # (T, E, ...)
    last_value: Array  # (E, N) of the observation after the last transition
    episodes: dict[str, Array]  # () sums over the episodes that ended, and their number


class Batch(NamedTuple):
    """What a minibatch is drawn from: B timesteps, agents in order."""

    observation: Observation  # (B, ...)
    action: Array  # (B, N[, A])
    log_prob: Array  # (B, N)
    value: Array  # (B, N)
    advantage: Array  # (B, N)
    target: Array  # (B, N)


@dataclass(frozen=True)
class System:
    """All that is static."""

    config: Config
    env: Environment
    envs: AutoReset  # num_envs of them
    network: MAT
    optimiser: optax.GradientTransformation


def make(config: Config, env: Environment) -> System:
    """Assemble network and optimiser for an environment."""
    return System(
        config=config,
        env=env,
        envs=AutoReset(env, config.num_envs),
        network=MAT(
            action_dim=env.action_dim,
            action_kind=env.action_kind,
            **asdict(config.network),
        ),
        optimiser=optax.flatten(  # one vector: a kernel for each step of Adam, not for each leaf
            optax.chain(
                optax.clip_by_global_norm(config.system.max_grad_norm),
                optax.adam(config.system.actor_lr, eps=1e-5),
            )
        ),
    )


def advantages(
    transitions: Transition, last_value: Array, gamma: float, gae_lambda: float
) -> tuple[Array, Array]:
    """Generalised advantage estimates and value targets, (T, E, N) (Schulman et al., 2016).

    A terminated episode's end is worth 0, a truncated one's the value of its last observation; the
    trace is cut at both.
    """
    next_value = jnp.concatenate([transitions.value[1:], last_value[None]])  # (T, E, N)
    if transitions.terminal_value is not None:
        ended = transitions.ended[..., None]
        next_value = jnp.where(ended, transitions.terminal_value, next_value)
    discount = gamma * transitions.discount[..., None]
    delta = transitions.reward + discount * next_value - transitions.value
    trace = gamma * gae_lambda * (1.0 - transitions.ended[..., None])

    def step(advantage: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, trace = inputs
        advantage = delta + trace * advantage
        return advantage, advantage

    _, advantage = jax.lax.scan(step, jnp.zeros_like(last_value), (delta, trace), reverse=True)
    return advantage, advantage + transitions.value


def ppo_loss(
    config: SystemConfig, policy: Policy, value: Array, batch: Batch, key: Array
) -> tuple[Array, dict[str, Array]]:
    """PPO's clipped surrogate objective for each agent, entropy bonus and clipped value loss."""
    ratio = jnp.exp(policy.log_prob(batch.action) - batch.log_prob)
    clipped = jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
    entropy = policy.entropy(key).mean()

    near = batch.value + jnp.clip(value - batch.value, -config.clip_eps, config.clip_eps)
    errors = (value - batch.target) ** 2, (near - batch.target) ** 2
    value_loss = 0.5 * jnp.maximum(*errors).mean()

    return -surrogate - config.ent_coef * entropy + config.vf_coef * value_loss, {
        "loss/policy": -surrogate,
        "loss/value": value_loss,
        "policy/entropy": entropy,
        "policy/clipped_share": (ratio != clipped).mean(),
        "policy/ratio_std": ratio.std(),
    }


def rollout(system: System, state: TrainState) -> tuple[TrainState, Rollout]:
    """Act for T steps, one agent after the other."""

    class Loop(NamedTuple):
        env_state: Any
        timestep: TimeStep

    def step(loop: Loop, key: Array) -> tuple[Loop, tuple[Transition, dict[str, Array]]]:
        observation = loop.timestep.observation
        acted = system.network.apply(state.params, (), observation, None, key, method="act")
        action = executed_action(acted.action, system.env.action_kind)
        env_state, timestep = system.envs.step(loop.env_state, action)
        transition = Transition(
            observation=observation,
            action=acted.action,
            log_prob=acted.log_prob,
            value=acted.value,
            reward=timestep.reward,
            discount=timestep.discount,
            ended=timestep.last(),
            terminal_value=terminal_value(system, state.params, timestep),
        )
        return Loop(env_state, timestep), (transition, episode_sums(timestep))

    key, key_steps = jax.random.split(state.key)
    keys = jax.random.split(key_steps, system.config.rollout_length)
    loop = Loop(state.env_state, state.timestep)
    loop, (transitions, episodes) = jax.lax.scan(step, loop, keys)
    last_value = system.network.apply(
        state.params, (), loop.timestep.observation, None, method="value"
    )
    collected = Rollout(transitions, last_value, jax.tree.map(jnp.sum, episodes))
    return state._replace(key=key, **loop._asdict()), collected


def terminal_value(system: System, params: Any, timestep: TimeStep) -> Array | None:
    """Values (E, N) of truncated episodes' last observations, 0 elsewhere."""
    terminal = timestep.terminal_observation
    if terminal is None:
        return None
    truncated = timestep.truncated()

    def value() -> Array:
        value = system.network.apply(params, (), terminal, None, method="value")
        return jnp.where(truncated[:, None], value, 0.0)

    return jax.lax.cond(truncated.any(), value, lambda: jnp.zeros_like(timestep.reward))


def losses(params: Any, system: System, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    """One forward pass over a minibatch, and its loss."""
    value, policy = system.network.apply(params, (), batch.observation, batch.action, None)
    return ppo_loss(system.config.system, policy, value, batch, key)


class Learning(NamedTuple):
    """What a gradient step changes."""

    params: Any
    opt_state: Any


def update_minibatch(
    system: System, learning: Learning, batch: Batch, key: Array
) -> tuple[Learning, dict[str, Array]]:
    """One gradient step, on advantages normalised over the minibatch."""
    advantage = batch.advantage
    normalised = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    batch = batch._replace(advantage=normalised)
    grads, metrics = jax.grad(losses, has_aux=True)(learning.params, system, batch, key)
    updates, opt_state = system.optimiser.update(grads, learning.opt_state, learning.params)
    return Learning(optax.apply_updates(learning.params, updates), opt_state), metrics


def update_epoch(
    system: System, learning: Learning, batch: Batch, key: Array
) -> tuple[Learning, dict[str, Array]]:
    """One pass over the batch, in minibatches of whole timesteps."""
    config = system.config
    key_order, key_minibatches = jax.random.split(key)
    order = jax.random.permutation(key_order, config.num_timesteps)
    order = order.reshape(config.system.num_minibatches, -1)

    def minibatch(learning: Learning, inputs: tuple[Array, Array]) -> tuple[Learning, dict]:
        rows, key = inputs
        return update_minibatch(system, learning, jax.tree.map(lambda x: x[rows], batch), key)

    keys = jax.random.split(key_minibatches, config.system.num_minibatches)
    return jax.lax.scan(minibatch, learning, (order, keys))


def timesteps(system: System, collected: Rollout) -> Batch:
    """A rollout's timesteps, of all environments."""
    config = system.config
    advantage, target = advantages(
        collected.transitions,
        collected.last_value,
        config.system.gamma,
        config.system.gae_lambda,
    )
    transitions = collected.transitions
    batch = Batch(
        observation=transitions.observation,
        action=transitions.action,
        log_prob=transitions.log_prob,
        value=transitions.value,
        advantage=advantage,
        target=target,
    )
    return jax.tree.map(lambda x: x.reshape(config.num_timesteps, *x.shape[2:]), batch)


def update(system: System, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
    """One rollout, then `ppo_epochs` over it."""
    state, collected = rollout(system, state)
    batch = timesteps(system, collected)
    key, key_epochs = jax.random.split(state.key)
    learning, metrics = jax.lax.scan(
        lambda learning, key: update_epoch(system, learning, batch, key),
        Learning(state.params, state.opt_state),
        jax.random.split(key_epochs, system.config.system.ppo_epochs),
    )
    metrics = jax.tree.map(jnp.mean, metrics)
    state = state._replace(key=key, **learning._asdict())
    return state, metrics | episode_means(collected.episodes)


def init(system: System, key: Array) -> TrainState:
    """Everything that changes, before the first update."""
    key, key_env, key_network = jax.random.split(key, 3)
    env_state, timestep = system.envs.reset(key_env)
    spec = action_spec(system.env)
    action = jnp.zeros((system.config.num_envs, *spec.shape), spec.dtype)
    params = system.network.init(key_network, (), timestep.observation, action, None)
    return TrainState(params, system.optimiser.init(params), key, env_state, timestep)


def train_chunk(system: System, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
    """The updates between two evaluations; metrics are (U,) each."""
    return jax.lax.scan(
        lambda state, _: update(system, state), state, length=system.config.updates_per_chunk
    )


def policy_params(state: TrainState) -> Any:
    """What is evaluated, kept as best, deployed: the whole network."""
    return state.params


def initial_carry(system: System, batch_shape: tuple[int, ...]) -> tuple[()]:
    """No memory."""
    del system, batch_shape
    return ()


def act(
    system: System,
    params: Any,
    carry: tuple[()],
    observation: Observation,
    key: Array,
    greedy: bool,
) -> tuple[Array, tuple[()]]:
    """All agents' actions (B, N[, A]), from all agents' observations."""
    acted = system.network.apply(params, carry, observation, None, key, greedy, method="act")
    return executed_action(acted.action, system.env.action_kind), carry


def main() -> None:
    """`python -m magpo.systems.mat env=<suite>/<task> key=value ...`"""
    experiment.main(sys.modules[__name__])


if __name__ == "__main__":
    main()
