"""MAPPO: proximal policy optimisation with a centralised critic.

Decentralised recurrent actors, one set of parameters for all agents, each on its own observations;
a recurrent critic on the global state, once a timestep, with one value for each agent. With
`critic_input: observation` the critic reads each agent's own observations instead: IPPO.

Source: "The Surprising Effectiveness of PPO in Cooperative Multi-Agent Games" (Yu et al., 2022):
    `actor_loss`    the clipped surrogate objective and the entropy bonus
    `critic_loss`   the clipped value loss
    `advantages`    generalised advantage estimation
Unlike the released code of the MAGPO paper: the critic is not run once for every agent on copies of
the state, its values are each agent's own, truncated episodes bootstrap, and chunks of
`recurrent_chunk_size` steps are contiguous.

    python -m magpo.systems.mappo env=rware/tiny-4ag
"""

import sys
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from magpo import experiment
from magpo.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, must_divide
from magpo.envs.wrappers import AutoReset, episode_means, episode_sums
from magpo.networks.heads import Policy, executed_action
from magpo.networks.recurrent import RecurrentActor, RecurrentCritic, act_alone, init_alone
from magpo.types import Array, Card, Environment, Observation, TimeStep

CARD = Card("a critic, in training", "each agent's policy", "GRU", parameters="shared")


@dataclass(frozen=True)
class SystemConfig:
    """`system.*`"""

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


@dataclass(frozen=True)
class RecurrentConfig:
    """`network.actor.*`, `network.critic.*`"""

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
    system: SystemConfig
    network: NetworkConfig

    def __post_init__(self) -> None:
        length, chunk_size = self.rollout_length, self.system.recurrent_chunk_size
        must_divide("system.recurrent_chunk_size", chunk_size, "rollout_length", length)
        sequences = "the number of sequences, num_envs * rollout_length / recurrent_chunk_size"
        num_minibatches, number = self.system.num_minibatches, self.num_sequences
        must_divide("system.num_minibatches", num_minibatches, sequences, number)

    @property
    def num_chunks(self) -> int:
        """Sequences that each environment's rollout is split into."""
        return self.rollout_length // self.system.recurrent_chunk_size

    @property
    def num_sequences(self) -> int:
        return self.num_envs * self.num_chunks

    @property
    def global_state(self) -> bool:
        """Whether the environment is asked for its global state."""
        return self.system.critic_input == "global_state"


class Params(NamedTuple):
    """The parameters of both networks; also the shape of gradients and optimiser states."""

    actor: Any
    critic: Any


class Memory(NamedTuple):
    """Hidden states of E running episodes; K = 1 critic on the state, or one for each agent."""

    actor: Array  # (E, N, H)
    critic: Array  # (E, K, H)


class TrainState(NamedTuple):
    params: Params
    opt_state: Params
    key: Array
    env_state: Any  # (E, ...)
    timestep: TimeStep  # (E, ...), whose observation is acted on next
    memory: Memory


class Transition(NamedTuple):
    """One step of E environments. `rollout` stacks T of them."""

    observation: Observation  # (E, ...)
    reset_before: Array  # (E,) bool, the observation is an episode's first
    action: Array  # (E, N[, A]), raw: a squashed action before tanh
    log_prob: Array  # (E, N)
    value: Array  # (E, N)
    reward: Array  # (E, N)
    discount: Array  # (E,) 0 where the episode terminated
    ended: Array  # (E,) bool, terminated or truncated
    terminal_value: Array | None  # (E, N) where truncated; None on suites that never truncate


class Rollout(NamedTuple):
    transitions: Transition  # (T, E, ...)
    memory: Memory  # (K, E, ...) at the start of each of K chunks
    last_value: Array  # (E, N) of the observation after the last transition
    episodes: dict[str, Array]  # () sums over the episodes that ended, and their number


class Batch(NamedTuple):
    """What a minibatch is drawn from: B sequences, the chunks of all environments, of C steps."""

    observation: Observation  # (C, B, ...)
    reset_before: Array  # (C, B)
    action: Array  # (C, B, N[, A])
    log_prob: Array  # (C, B, N)
    value: Array  # (C, B, N)
    advantage: Array  # (C, B, N)
    target: Array  # (C, B, N)
    memory: Memory  # (1, B, ...) at the start of the sequence


@dataclass(frozen=True)
class System:
    """All that is static."""

    config: Config
    env: Environment
    envs: AutoReset  # num_envs of them
    actor: RecurrentActor
    critic: RecurrentCritic
    optimiser: Params  # each network's optax.GradientTransformation


def make(config: Config, env: Environment) -> System:
    """Assemble networks and optimisers for an environment."""

    def optimiser(learning_rate: float) -> optax.GradientTransformation:
        return optax.flatten(  # one vector: a kernel for each step of Adam, not for each leaf
            optax.chain(
                optax.clip_by_global_norm(config.system.max_grad_norm),
                optax.adam(learning_rate, eps=1e-5),
            )
        )

    return System(
        config=config,
        env=env,
        envs=AutoReset(env, config.num_envs),
        actor=RecurrentActor(env.action_dim, env.action_kind, config.network.actor.hidden_dim),
        critic=RecurrentCritic(
            num_values=env.num_agents if config.global_state else 1,
            hidden_dim=config.network.critic.hidden_dim,
        ),
        optimiser=Params(optimiser(config.system.actor_lr), optimiser(config.system.critic_lr)),
    )


def merge(x: Array) -> Array:
    """(T, B, N, ...) to (T, B * N, ...): one sequence an agent."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def run_actor(
    system: System, params: Any, hidden: Array, observation: Observation, reset_before: Array
) -> tuple[Array, Policy]:
    """Hidden states (B, N, H) and policies (T, B, N) along sequences of B environments."""
    num_agents = system.env.num_agents
    after, policy = system.actor.apply(
        params,
        hidden.reshape(-1, hidden.shape[-1]),
        merge(observation.agents_view),
        merge(observation.action_mask),
        jnp.repeat(reset_before, num_agents, axis=1),
    )
    by_agent = (*reset_before.shape, num_agents)  # (T, B, N)
    return after.reshape(hidden.shape), jax.tree.map(
        lambda x: x.reshape(*by_agent, *x.shape[2:]), policy
    )


def run_critic(
    system: System, params: Any, hidden: Array, observation: Observation, reset_before: Array
) -> tuple[Array, Array]:
    """Hidden states (B, K, H) and values (T, B, N) along sequences of B environments."""
    state = observation.global_state
    after, value = system.critic.apply(
        params,
        hidden.reshape(-1, hidden.shape[-1]),
        merge(observation.agents_view) if state is None else state,
        jnp.repeat(reset_before, hidden.shape[1], axis=1),
    )
    return after.reshape(hidden.shape), value.reshape(*reset_before.shape, system.env.num_agents)


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


def actor_loss(
    config: SystemConfig, policy: Policy, batch: Batch, key: Array
) -> tuple[Array, dict[str, Array]]:
    """PPO's clipped surrogate objective, with an entropy bonus."""
    ratio = jnp.exp(policy.log_prob(batch.action) - batch.log_prob)
    clipped = jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
    entropy = policy.entropy(key).mean()
    return -surrogate - config.ent_coef * entropy, {
        "loss/policy": -surrogate,
        "policy/entropy": entropy,
        "policy/clipped_share": (ratio != clipped).mean(),
        "policy/ratio_std": ratio.std(),
    }


def critic_loss(config: SystemConfig, value: Array, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """The worse of the squared errors of the value and of the value held near the old one."""
    near = batch.value + jnp.clip(value - batch.value, -config.clip_eps, config.clip_eps)
    errors = (value - batch.target) ** 2, (near - batch.target) ** 2
    loss = 0.5 * jnp.maximum(*errors).mean()
    return config.vf_coef * loss, {"loss/value": loss}


def rollout(system: System, state: TrainState) -> tuple[TrainState, Rollout]:
    """Act for T steps, and keep the hidden states at the start of each chunk."""

    class Loop(NamedTuple):
        env_state: Any
        timestep: TimeStep
        memory: Memory

    def step(loop: Loop, key: Array) -> tuple[Loop, tuple[Transition, dict[str, Array]]]:
        observation, reset_before = loop.timestep.observation, loop.timestep.last()
        seen = jax.tree.map(lambda x: x[None], (observation, reset_before))  # (1, E, ...)
        actor, policy = run_actor(system, state.params.actor, loop.memory.actor, *seen)
        critic, value = run_critic(system, state.params.critic, loop.memory.critic, *seen)
        action = policy.sample(key)
        env_state, timestep = system.envs.step(
            loop.env_state, executed_action(action, system.env.action_kind)[0]
        )
        transition = Transition(
            observation=observation,
            reset_before=reset_before,
            action=action[0],
            log_prob=policy.log_prob(action)[0],
            value=value[0],
            reward=timestep.reward,
            discount=timestep.discount,
            ended=timestep.last(),
            terminal_value=terminal_value(system, state.params.critic, critic, timestep),
        )
        memory = Memory(actor, critic)
        return Loop(env_state, timestep, memory), (transition, episode_sums(timestep))

    def chunk(loop: Loop, keys: Array) -> tuple[Loop, tuple[Memory, Any]]:
        after, collected = jax.lax.scan(step, loop, keys)
        return after, (loop.memory, collected)

    config = system.config
    key, key_steps = jax.random.split(state.key)
    keys = jax.random.split(key_steps, (config.num_chunks, config.system.recurrent_chunk_size))
    loop = Loop(state.env_state, state.timestep, state.memory)
    loop, (memory, (transitions, episodes)) = jax.lax.scan(chunk, loop, keys)
    transitions = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), transitions)  # (T, E, ...)
    last = jax.tree.map(lambda x: x[None], (loop.timestep.observation, loop.timestep.last()))
    _, last_value = run_critic(system, state.params.critic, loop.memory.critic, *last)
    state = state._replace(key=key, **loop._asdict())
    return state, Rollout(transitions, memory, last_value[0], jax.tree.map(jnp.sum, episodes))


def terminal_value(system: System, params: Any, hidden: Array, timestep: TimeStep) -> Array | None:
    """Values (E, N) of truncated episodes' last observations, 0 elsewhere."""
    terminal = timestep.terminal_observation
    if terminal is None:
        return None
    truncated = timestep.truncated()

    def value() -> Array:
        seen = jax.tree.map(lambda x: x[None], (terminal, jnp.zeros_like(truncated)))
        _, value = run_critic(system, params, hidden, *seen)
        return jnp.where(truncated[:, None], value[0], 0.0)

    return jax.lax.cond(truncated.any(), value, lambda: jnp.zeros_like(timestep.reward))


def losses(
    params: Params, system: System, batch: Batch, key: Array
) -> tuple[Array, dict[str, Array]]:
    """Both networks along a minibatch's sequences; each loss moves its own network only."""
    config, seen = system.config.system, (batch.observation, batch.reset_before)
    actor, critic = (hidden[0] for hidden in batch.memory)
    _, policy = run_actor(system, params.actor, actor, *seen)
    _, value = run_critic(system, params.critic, critic, *seen)
    loss_actor, metrics_actor = actor_loss(config, policy, batch, key)
    loss_critic, metrics_critic = critic_loss(config, value, batch)
    return loss_actor + loss_critic, metrics_actor | metrics_critic


class Learning(NamedTuple):
    """What a gradient step changes."""

    params: Params
    opt_state: Params


def update_minibatch(
    system: System, learning: Learning, batch: Batch, key: Array
) -> tuple[Learning, dict[str, Array]]:
    """One gradient step of each network, on advantages normalised over the minibatch."""
    advantage = batch.advantage
    normalised = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    batch = batch._replace(advantage=normalised)
    grads, metrics = jax.grad(losses, has_aux=True)(learning.params, system, batch, key)

    def descend(optimiser: Any, params: Any, grads: Any, opt_state: Any) -> tuple[Any, Any]:
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    networks = map(descend, system.optimiser, learning.params, grads, learning.opt_state)
    params, opt_state = zip(*networks, strict=True)
    return Learning(Params(*params), Params(*opt_state)), metrics


def update_epoch(
    system: System, learning: Learning, batch: Batch, key: Array
) -> tuple[Learning, dict[str, Array]]:
    """One pass over the batch, in minibatches of whole sequences."""
    config = system.config
    key_order, key_minibatches = jax.random.split(key)
    order = jax.random.permutation(key_order, config.num_sequences)
    order = order.reshape(config.system.num_minibatches, -1)

    def minibatch(learning: Learning, inputs: tuple[Array, Array]) -> tuple[Learning, dict]:
        columns, key = inputs
        drawn = jax.tree.map(lambda x: x[:, columns], batch)
        return update_minibatch(system, learning, drawn, key)

    keys = jax.random.split(key_minibatches, config.system.num_minibatches)
    return jax.lax.scan(minibatch, learning, (order, keys))


def sequences(system: System, collected: Rollout) -> Batch:
    """Split a rollout into its chunks."""
    config = system.config
    advantage, target = advantages(
        collected.transitions,
        collected.last_value,
        config.system.gamma,
        config.system.gae_lambda,
    )

    def by_sequence(tree: Any) -> Any:
        """(T, E, ...) to (C, B, ...)"""
        return jax.tree.map(
            lambda x: (
                x.reshape(config.num_chunks, -1, *x.shape[1:])
                .swapaxes(0, 1)
                .reshape(-1, config.num_sequences, *x.shape[2:])
            ),
            tree,
        )

    transitions = by_sequence(collected.transitions._replace(terminal_value=None))
    return Batch(
        observation=transitions.observation,
        reset_before=transitions.reset_before,
        action=transitions.action,
        log_prob=transitions.log_prob,
        value=transitions.value,
        advantage=by_sequence(advantage),
        target=by_sequence(target),
        memory=jax.tree.map(
            lambda x: x.reshape(1, config.num_sequences, *x.shape[2:]), collected.memory
        ),
    )


def update(system: System, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
    """One rollout, then `ppo_epochs` over it."""
    state, collected = rollout(system, state)
    batch = sequences(system, collected)
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
    config, num_agents = system.config, system.env.num_agents
    key, key_env, key_actor, key_critic = jax.random.split(key, 4)
    env_state, timestep = system.envs.reset(key_env)
    num_critics = 1 if config.global_state else num_agents
    memory = Memory(
        actor=initial_carry(system, (config.num_envs,)),
        critic=jnp.zeros((config.num_envs, num_critics, config.network.critic.hidden_dim)),
    )
    view, whole = timestep.observation.agents_view[:, 0], timestep.observation.global_state
    critic_inputs, never = (view if whole is None else whole)[None, :1], jnp.zeros((1, 1), bool)
    params = Params(
        actor=init_alone(system.actor, key_actor, memory.actor, timestep.observation),
        critic=system.critic.init(key_critic, memory.critic[:1, 0], critic_inputs, never),
    )
    opt_state = Params(*(o.init(p) for o, p in zip(system.optimiser, params, strict=True)))
    return TrainState(params, opt_state, key, env_state, timestep, memory)


def train_chunk(system: System, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
    """The updates between two evaluations; metrics are (U,) each."""
    return jax.lax.scan(
        lambda state, _: update(system, state), state, length=system.config.updates_per_chunk
    )


def policy_params(state: TrainState) -> Any:
    """What is evaluated, kept as best, deployed: the actor's parameters."""
    return state.params.actor


def initial_carry(system: System, batch_shape: tuple[int, ...]) -> Array:
    """The actors' memory at an episode's start, (*batch_shape, N, H)."""
    hidden_dim = system.config.network.actor.hidden_dim
    return jnp.zeros((*batch_shape, system.env.num_agents, hidden_dim))


def act(
    system: System, params: Any, carry: Array, observation: Observation, key: Array, greedy: bool
) -> tuple[Array, Array]:
    """Decentralised actions (B, N[, A]): each from one agent's observation, by construction."""
    return act_alone(system.actor, params, carry, observation, key, greedy)


def main() -> None:
    """`python -m magpo.systems.mappo env=<suite>/<task> key=value ...`"""
    experiment.main(sys.modules[__name__])


if __name__ == "__main__":
    main()
