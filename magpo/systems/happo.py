"""HAPPO: heterogeneous-agent proximal policy optimisation.

Decentralised recurrent actors, each agent with parameters of its own, and a recurrent critic on the
global state. Each update trains the agents one after the other, in a random order: an agent
improves on what those before it have just become, which the factor F, the product of their new
ratios, puts into its advantage. That is what guarantees monotonic improvement without sharing
parameters.

Source: "Trust Region Policy Optimisation in Multi-Agent Reinforcement Learning" (Kuba et al.,
2022), Section 4.2 and Algorithm 4:
    `actor_loss`     the clipped surrogate objective times F, and the entropy bonus, which is not
    `update_actors`  the sequence of agents and their factor
    `critic_loss`    the clipped value loss; the critic is trained once an update
    `advantages`     generalised advantage estimation, normalised once an update
Unlike the released code of the MAGPO paper: each agent has its own value, truncated episodes
bootstrap, and chunks of `recurrent_chunk_size` steps are contiguous.

    python -m magpo.systems.happo env=rware/tiny-4ag
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from magpo import experiment
from magpo.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, must_divide
from magpo.envs.wrappers import AutoReset, episode_means, episode_sums
from magpo.networks.heads import Policy, executed_action
from magpo.networks.recurrent import RecurrentActor, RecurrentCritic, act_alone, init_alone
from magpo.types import Array, Card, Environment, Observation, TimeStep

CARD = Card("a critic, in training", "each agent's policy", "GRU", parameters="each agent's own")


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
    fixed_order: bool


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
        return True


class Params(NamedTuple):
    """The parameters of all networks; also the shape of optimiser states."""

    actor: Any  # (N, ...)
    critic: Any


class Memory(NamedTuple):
    """Hidden states of E running episodes."""

    actor: Array  # (E, N, H)
    critic: Array  # (E, H)


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
    """B sequences, the chunks of all environments, of C steps."""

    observation: Observation  # (C, B, ...)
    reset_before: Array  # (C, B)
    action: Array  # (C, B, N[, A])
    log_prob: Array  # (C, B, N)
    value: Array  # (C, B, N)
    advantage: Array  # (C, B, N)
    target: Array  # (C, B, N)
    memory: Memory  # (1, B, ...) at the start of the sequence


class AgentBatch(NamedTuple):
    """What an agent's minibatch is drawn from."""

    agents_view: Array  # (C, B, O)
    action_mask: Array  # (C, B, A)
    reset_before: Array  # (C, B)
    action: Array  # (C, B[, A])
    log_prob: Array  # (C, B)
    advantage: Array  # (C, B)
    factor: Array  # (C, B) of the agents before it
    hidden: Array  # (1, B, H) at the start of the sequence


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
            num_values=env.num_agents, hidden_dim=config.network.critic.hidden_dim
        ),
        optimiser=Params(optimiser(config.system.actor_lr), optimiser(config.system.critic_lr)),
    )


def run_actors(
    system: System, params: Any, hidden: Array, observation: Observation, reset_before: Array
) -> tuple[Array, Policy]:
    """Hidden states (B, N, H) and policies (T, B, N) along sequences of B environments."""
    of_agent = jax.vmap(system.actor.apply, in_axes=(0, 1, 2, 2, None), out_axes=(1, 2))
    return of_agent(params, hidden, observation.agents_view, observation.action_mask, reset_before)


def run_critic(
    system: System, params: Any, hidden: Array, observation: Observation, reset_before: Array
) -> tuple[Array, Array]:
    """Hidden states (B, H) and values (T, B, N) along sequences of B environments."""
    whole = observation.global_state
    assert whole is not None
    critic: tuple[Array, Array] = system.critic.apply(params, hidden, whole, reset_before)
    return critic


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
    config: SystemConfig, policy: Policy, batch: AgentBatch, key: Array
) -> tuple[Array, dict[str, Array]]:
    """PPO's clipped surrogate objective of one agent, after those before it (Algorithm 4)."""
    ratio = jnp.exp(policy.log_prob(batch.action) - batch.log_prob)
    clipped = jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
    surrogate = (batch.factor * surrogate).mean()
    entropy = policy.entropy(key).mean()
    return -surrogate - config.ent_coef * entropy, {
        "loss/policy": -surrogate,
        "policy/entropy": entropy,
        "policy/clipped_share": (ratio != clipped).mean(),
        "policy/ratio_std": ratio.std(),
        "policy/factor_std": batch.factor.std(),
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
        actor, policy = run_actors(system, state.params.actor, loop.memory.actor, *seen)
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


class Learning(NamedTuple):
    """What a gradient step of one network changes."""

    params: Any
    opt_state: Any


def descend(optimiser: optax.GradientTransformation, learning: Learning, grads: Any) -> Learning:
    """The parameters a step down their gradients."""
    updates, opt_state = optimiser.update(grads, learning.opt_state, learning.params)
    return Learning(optax.apply_updates(learning.params, updates), opt_state)


def actor_minibatch(
    system: System, learning: Learning, batch: AgentBatch, key: Array
) -> tuple[Learning, dict[str, Array]]:
    """One gradient step of one agent's actor."""

    def loss(params: Any) -> tuple[Array, dict[str, Array]]:
        return actor_loss(system.config.system, policy_of(system, params, batch), batch, key)

    grads, metrics = jax.grad(loss, has_aux=True)(learning.params)
    return descend(system.optimiser.actor, learning, grads), metrics


def policy_of(system: System, params: Any, batch: AgentBatch) -> Policy:
    """One agent's policy (C, B) along its sequences."""
    inputs = batch.hidden[0], batch.agents_view, batch.action_mask, batch.reset_before
    return system.actor.apply(params, *inputs)[1]


def critic_minibatch(
    system: System, learning: Learning, batch: Batch, key: Array
) -> tuple[Learning, dict[str, Array]]:
    """One gradient step of the critic."""
    del key

    def loss(params: Any) -> tuple[Array, dict[str, Array]]:
        inputs = batch.memory.critic[0], batch.observation, batch.reset_before
        _, value = run_critic(system, params, *inputs)
        return critic_loss(system.config.system, value, batch)

    grads, metrics = jax.grad(loss, has_aux=True)(learning.params)
    return descend(system.optimiser.critic, learning, grads), metrics


def train(
    system: System, minibatch: Callable[..., Any], learning: Learning, batch: Any, key: Array
) -> tuple[Learning, dict[str, Array]]:
    """`ppo_epochs` of one network, in minibatches of whole sequences; metrics are means."""
    config = system.config

    def one_minibatch(
        learning: Learning, inputs: tuple[Array, Array]
    ) -> tuple[Learning, dict[str, Array]]:
        columns, key = inputs
        return minibatch(system, learning, jax.tree.map(lambda x: x[:, columns], batch), key)

    def epoch(learning: Learning, key: Array) -> tuple[Learning, dict[str, Array]]:
        key_order, key_minibatches = jax.random.split(key)
        order = jax.random.permutation(key_order, config.num_sequences)
        order = order.reshape(config.system.num_minibatches, -1)
        keys = jax.random.split(key_minibatches, config.system.num_minibatches)
        return jax.lax.scan(one_minibatch, learning, (order, keys))

    learning, metrics = jax.lax.scan(
        epoch, learning, jax.random.split(key, config.system.ppo_epochs)
    )
    return learning, jax.tree.map(jnp.mean, metrics)


def update_actors(
    system: System, learning: Learning, batch: Batch, key: Array
) -> tuple[Learning, dict[str, Array]]:
    """Train the agents (N, ...) one after the other; each finds those before it in its factor."""
    key_order, key_agents = jax.random.split(key)
    order = jnp.arange(system.env.num_agents)
    if not system.config.system.fixed_order:
        order = jax.random.permutation(key_order, order)

    def turn(
        before: tuple[Learning, Array], inputs: tuple[Array, Array]
    ) -> tuple[tuple[Learning, Array], dict[str, Array]]:
        (learning, factor), (agent, key) = before, inputs
        own = of_agent(batch, agent, factor)
        trained, metrics = train(
            system, actor_minibatch, jax.tree.map(lambda x: x[agent], learning), own, key
        )
        log_prob = policy_of(system, trained.params, own).log_prob(own.action)
        factor = factor * jnp.exp(log_prob - own.log_prob)
        learning = jax.tree.map(lambda all, one: all.at[agent].set(one), learning, trained)
        return (learning, factor), metrics

    start = learning, jnp.ones_like(batch.log_prob[..., 0])
    keys = jax.random.split(key_agents, system.env.num_agents)
    (learning, _), metrics = jax.lax.scan(turn, start, (order, keys))
    return learning, jax.tree.map(jnp.mean, metrics)


def of_agent(batch: Batch, agent: Array, factor: Array) -> AgentBatch:
    """An agent's own part of a batch."""
    return AgentBatch(
        agents_view=batch.observation.agents_view[:, :, agent],
        action_mask=batch.observation.action_mask[:, :, agent],
        reset_before=batch.reset_before,
        action=batch.action[:, :, agent],
        log_prob=batch.log_prob[:, :, agent],
        advantage=batch.advantage[:, :, agent],
        factor=factor,
        hidden=batch.memory.actor[:, :, agent],
    )


def sequences(system: System, collected: Rollout) -> Batch:
    """Split a rollout into its chunks, and normalise the advantages."""
    config = system.config
    advantage, target = advantages(
        collected.transitions,
        collected.last_value,
        config.system.gamma,
        config.system.gae_lambda,
    )

    normalised = (advantage - advantage.mean()) / (advantage.std() + 1e-8)

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
        advantage=by_sequence(normalised),
        target=by_sequence(target),
        memory=jax.tree.map(
            lambda x: x.reshape(1, config.num_sequences, *x.shape[2:]), collected.memory
        ),
    )


def update(system: System, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
    """One rollout, then `ppo_epochs` over it for each actor and for the critic."""
    state, collected = rollout(system, state)
    batch = sequences(system, collected)
    key, key_actors, key_critic = jax.random.split(state.key, 3)
    learning = Params(*map(Learning, state.params, state.opt_state))
    actor, metrics = update_actors(system, learning.actor, batch, key_actors)
    critic, critic_metrics = train(system, critic_minibatch, learning.critic, batch, key_critic)
    state = state._replace(
        key=key,
        params=Params(actor.params, critic.params),
        opt_state=Params(actor.opt_state, critic.opt_state),
    )
    return state, metrics | critic_metrics | episode_means(collected.episodes)


def init(system: System, key: Array) -> TrainState:
    """Everything that changes, before the first update."""
    config = system.config
    key, key_env, key_actor, key_critic = jax.random.split(key, 4)
    env_state, timestep = system.envs.reset(key_env)
    memory = Memory(
        actor=initial_carry(system, (config.num_envs,)),
        critic=jnp.zeros((config.num_envs, config.network.critic.hidden_dim)),
    )
    whole = jax.tree.map(lambda x: x[None], timestep.observation.global_state)
    inputs = whole, jnp.zeros((1, config.num_envs), bool)
    params = Params(
        actor=jax.lax.map(
            lambda key: init_alone(system.actor, key, memory.actor, timestep.observation),
            jax.random.split(key_actor, system.env.num_agents),
        ),
        critic=system.critic.init(key_critic, memory.critic, *inputs),
    )
    opt_state = Params(
        actor=jax.vmap(system.optimiser.actor.init)(params.actor),
        critic=system.optimiser.critic.init(params.critic),
    )
    return TrainState(params, opt_state, key, env_state, timestep, memory)


def train_chunk(system: System, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
    """The updates between two evaluations; metrics are (U,) each."""
    return jax.lax.scan(
        lambda state, _: update(system, state), state, length=system.config.updates_per_chunk
    )


def policy_params(state: TrainState) -> Any:
    """What is evaluated, kept as best, deployed: the actors' parameters, (N, ...)."""
    return state.params.actor


def initial_carry(system: System, batch_shape: tuple[int, ...]) -> Array:
    """The actors' memory at an episode's start, (*batch_shape, N, H)."""
    hidden_dim = system.config.network.actor.hidden_dim
    return jnp.zeros((*batch_shape, system.env.num_agents, hidden_dim))


def act(
    system: System, params: Any, carry: Array, observation: Observation, key: Array, greedy: bool
) -> tuple[Array, Array]:
    """Decentralised actions (B, N[, A]): each from one agent's observation, by construction."""
    return act_alone(system.actor, params, carry, observation, key, greedy, own_params=True)


def main() -> None:
    """`python -m magpo.systems.happo env=<suite>/<task> key=value ...`"""
    experiment.main(sys.modules[__name__])


if __name__ == "__main__":
    main()
