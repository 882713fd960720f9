"""MAGPO: multi-agent guided policy optimisation.

A centralised *guider*, autoregressive over the agents (Sable or MAT), collects the experience and
is trained by PPO. Decentralised *learners*, one recurrent policy shared by all agents, imitate it,
each from its own observations. The guider is clipped to a ratio `delta` of the learners, and pulled
back where it left it, so that it finds no coordination that they cannot follow. Only the learners
are evaluated and deployed.

Source: "Multi-Agent Guided Policy Optimization". In its symbols, mu_phi is `guider`, pi_theta is
`learner`, mu_old is the guider that collected the rollout:
    `guider_loss`   Eq. 9, double clipping Eq. 10, KL mask m
    `learner_loss`  Eq. 11 and 12; the paper's lambda is `rl_coef`
    `advantages`    generalised advantage estimation from the guider's values
Beyond the paper, as its released code: value loss and entropy bonus in the guider's loss. Unlike
that code: KL(pi || mu) as Eq. 11 prints it (`learner_kl`), truncated episodes bootstrap, and the
guider's feed-forward layers train (`network.guider.ffn`).

    python -m magpo.systems.magpo env=rware/tiny-4ag
"""

import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from magpo import experiment
from magpo.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, must_divide
from magpo.envs.wrappers import AutoReset, episode_means, episode_sums
from magpo.networks.autoregressive import init_along
from magpo.networks.heads import Policy, executed_action
from magpo.networks.mat import MAT
from magpo.networks.recurrent import RecurrentActor, act_alone, init_alone
from magpo.networks.sable import Sable
from magpo.types import Array, Card, Environment, Observation, TimeStep, action_spec

CARD = Card("a guider, in training", "each agent's policy", "GRU", parameters="shared")


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
    delta: PositiveFloat
    rl_coef: NonNegativeFloat
    learner_kl: Literal["guider_to_learner", "learner_to_guider"]

    def __post_init__(self) -> None:
        if self.delta <= 1:
            raise ValueError(f"delta bounds a ratio to (1/delta, delta): above 1, not {self.delta}")


@dataclass(frozen=True)
class GuiderConfig:
    """`network.guider.*`"""

    kind: Literal["sable", "mat"]
    embed_dim: PositiveInt
    n_head: PositiveInt
    n_block: PositiveInt
    decay_scaling_factor: Fraction
    chunk_size: PositiveInt
    ffn: bool

    def __post_init__(self) -> None:
        must_divide("2 * n_head", 2 * self.n_head, "embed_dim", self.embed_dim)


@dataclass(frozen=True)
class LearnerConfig:
    """`network.learner.*`"""

    hidden_dim: PositiveInt


@dataclass(frozen=True)
class NetworkConfig:
    guider: GuiderConfig
    learner: LearnerConfig


@dataclass(frozen=True)
class Config:
    num_envs: int
    rollout_length: int
    updates_per_chunk: int
    system: SystemConfig
    network: NetworkConfig

    def __post_init__(self) -> None:
        num_minibatches, chunk_size = self.system.num_minibatches, self.network.guider.chunk_size
        must_divide("system.num_minibatches", num_minibatches, "num_envs", self.num_envs)
        must_divide("network.guider.chunk_size", chunk_size, "rollout_length", self.rollout_length)


class Params(NamedTuple):
    """The parameters of both networks; also the shape of gradients and optimiser states."""

    guider: Any
    learner: Any


class Memory(NamedTuple):
    """What the networks remember of the E running episodes."""

    guider: Any  # (E, ...)
    learner: Array  # (E, N, H)


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
    log_prob: Array  # (E, N) of the guider
    value: Array  # (E, N)
    reward: Array  # (E, N)
    discount: Array  # (E,) 0 where the episode terminated
    ended: Array  # (E,) bool, terminated or truncated
    terminal_value: Array | None  # (E, N) where truncated; None on suites that never truncate


class Rollout(NamedTuple):
    transitions: Transition  # (T, E, ...)
    memory: Memory  # (E, ...) at the start
    last_value: Array  # (E, N) of the observation after the last transition
    episodes: dict[str, Array]  # () sums over the episodes that ended, and their number


class Batch(NamedTuple):
    """What a minibatch is drawn from: whole sequences, one an environment, agents in order."""

    observation: Observation  # (E, T, ...)
    reset_before: Array  # (E, T)
    action: Array  # (E, T, N[, A])
    log_prob: Array  # (E, T, N)
    value: Array  # (E, T, N)
    advantage: Array  # (E, T, N)
    target: Array  # (E, T, N)
    memory: Memory  # (E, ...) at the start of the rollout


@dataclass(frozen=True)
class System:
    """All that is static."""

    config: Config
    env: Environment
    envs: AutoReset  # num_envs of them
    guider: Sable | MAT
    learner: RecurrentActor
    optimiser: optax.GradientTransformation  # its rule; each network has its own state


def make(config: Config, env: Environment) -> System:
    """Assemble networks and optimiser for an environment."""
    of_env = {"action_dim": env.action_dim, "action_kind": env.action_kind}
    sizes = asdict(config.network.guider)
    if sizes.pop("kind") == "sable":
        guider: Any = Sable(num_agents=env.num_agents, **of_env, **sizes)
    else:
        guider = MAT(**of_env, **{key: sizes[key] for key in ("embed_dim", "n_head", "n_block")})
    return System(
        config=config,
        env=env,
        envs=AutoReset(env, config.num_envs),
        guider=guider,
        learner=RecurrentActor(**of_env, **asdict(config.network.learner)),
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


def guider_loss(
    config: SystemConfig, guider: Policy, learner: Policy, value: Array, batch: Batch, key: Array
) -> tuple[Array, dict[str, Array]]:
    """Eq. 9 and 10: PPO, doubly clipped, with a KL to the learner where the ratio left delta."""
    learner = jax.lax.stop_gradient(learner)
    log_guider, log_learner = guider.log_prob(batch.action), learner.log_prob(batch.action)
    ratio = jnp.exp(log_guider - batch.log_prob)
    log_distance, log_delta = log_guider - log_learner, jnp.log(config.delta)
    within_delta = jnp.clip(log_distance, -log_delta, log_delta)
    clipped = jnp.exp(within_delta + log_learner - batch.log_prob)
    clipped = jnp.clip(clipped, 1 - config.clip_eps, 1 + config.clip_eps)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
    outside = jnp.abs(log_distance) > log_delta
    kl = guider.kl(learner)
    entropy = guider.entropy(key).mean()

    near = batch.value + jnp.clip(value - batch.value, -config.clip_eps, config.clip_eps)
    errors = (value - batch.target) ** 2, (near - batch.target) ** 2
    value_loss = 0.5 * jnp.maximum(*errors).mean()

    policy_loss = (outside * kl - surrogate).mean()
    loss = policy_loss - config.ent_coef * entropy + config.vf_coef * value_loss
    return loss, {
        "loss/guider": policy_loss,
        "loss/value": value_loss,
        "policy/guider_entropy": entropy,
        "policy/masked_share": outside.mean(),
        "policy/kl_guider_to_learner": kl.mean(),
        "policy/guider_ratio_std": ratio.std(),
    }


def learner_loss(
    config: SystemConfig, guider: Policy, learner: Policy, batch: Batch
) -> tuple[Array, dict[str, Array]]:
    """Eq. 11 and 12: imitate the guider, and improve on its experience by a PPO term."""
    guider = jax.lax.stop_gradient(guider)
    reverse_kl = learner.kl(guider)
    kl = guider.kl(learner) if config.learner_kl == "guider_to_learner" else reverse_kl
    ratio = jnp.exp(learner.log_prob(batch.action) - batch.log_prob)
    clipped = jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
    loss = (kl - config.rl_coef * surrogate).mean()
    return loss, {
        "loss/learner": loss,
        "policy/kl_learner_to_guider": reverse_kl.mean(),
        "policy/learner_ratio_std": ratio.std(),
    }


def rollout(system: System, state: TrainState) -> tuple[TrainState, Rollout]:
    """Act with the guider for T steps, and step the learner's memory along."""

    class Loop(NamedTuple):
        env_state: Any
        timestep: TimeStep
        memory: Any

    def step(loop: Loop, key: Array) -> tuple[Loop, tuple[Transition, dict[str, Array]]]:
        observation, reset_before = loop.timestep.observation, loop.timestep.last()
        params = state.params.guider
        acted = system.guider.apply(
            params, loop.memory, observation, reset_before, key, method="act"
        )
        action = executed_action(acted.action, system.env.action_kind)
        env_state, timestep = system.envs.step(loop.env_state, action)
        transition = Transition(
            observation=observation,
            reset_before=reset_before,
            action=acted.action,
            log_prob=acted.log_prob,
            value=acted.value,
            reward=timestep.reward,
            discount=timestep.discount,
            ended=timestep.last(),
            terminal_value=terminal_value(system, params, acted.carry, timestep),
        )
        return Loop(env_state, timestep, acted.carry), (transition, episode_sums(timestep))

    key, key_steps = jax.random.split(state.key)
    keys = jax.random.split(key_steps, system.config.rollout_length)
    loop = Loop(state.env_state, state.timestep, state.memory.guider)
    loop, (transitions, episodes) = jax.lax.scan(step, loop, keys)
    last = loop.timestep
    last_value = system.guider.apply(
        state.params.guider, loop.memory, last.observation, last.last(), method="value"
    )
    episodes = jax.tree.map(jnp.sum, episodes)
    collected = Rollout(transitions, state.memory, last_value, episodes)
    state = state._replace(
        key=key,
        env_state=loop.env_state,
        timestep=last,
        memory=Memory(loop.memory, advance_learner(system, state, transitions)),
    )
    return state, collected


def terminal_value(system: System, params: Any, memory: Any, timestep: TimeStep) -> Array | None:
    """Values (E, N) of truncated episodes' last observations, 0 elsewhere."""
    terminal = timestep.terminal_observation
    if terminal is None:
        return None
    truncated = timestep.truncated()

    def value() -> Array:
        never = jnp.zeros_like(truncated)
        value = system.guider.apply(params, memory, terminal, never, method="value")
        return jnp.where(truncated[:, None], value, 0.0)

    return jax.lax.cond(truncated.any(), value, lambda: jnp.zeros_like(timestep.reward))


def advance_learner(system: System, state: TrainState, transitions: Transition) -> Array:
    """The learner's hidden states (E, N, H) after the rollout."""
    view = merge_agents(transitions.observation.agents_view)
    hidden = state.memory.learner
    hiddens = system.learner.apply(
        state.params.learner,
        hidden.reshape(-1, hidden.shape[-1]),
        view,
        jnp.repeat(transitions.reset_before, system.env.num_agents, axis=1),
        method="remember",
    )
    return hiddens[-1].reshape(hidden.shape)


def merge_agents(x: Array) -> Array:
    """(T, E, N, ...) to (T, E * N, ...): a learner's sequences, one an agent."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def losses(
    params: Params, system: System, batch: Batch, key: Array
) -> tuple[Array, dict[str, Array]]:
    """One forward pass of each network; each loss moves its own network only."""
    value, guider = system.guider.apply(
        params.guider, batch.memory.guider, batch.observation, batch.action, batch.reset_before
    )
    view, mask = (
        merge_agents(x.swapaxes(0, 1))
        for x in (batch.observation.agents_view, batch.observation.action_mask)
    )
    hidden = batch.memory.learner
    reset_before = jnp.repeat(batch.reset_before.T, system.env.num_agents, axis=1)  # (T, E*N)
    _, learner = system.learner.apply(
        params.learner, hidden.reshape(-1, hidden.shape[-1]), view, mask, reset_before
    )
    as_guider = (reset_before.shape[0], *hidden.shape[:2])  # (T, E, N)
    learner = jax.tree.map(
        lambda x: x.reshape(*as_guider, *x.shape[2:]).swapaxes(0, 1), learner
    )  # (E, T, N, ...)

    config = system.config.system
    loss_guider, metrics_guider = guider_loss(config, guider, learner, value, batch, key)
    loss_learner, metrics_learner = learner_loss(config, guider, learner, batch)
    return loss_guider + loss_learner, metrics_guider | metrics_learner


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

    def descend(params: Any, grads: Any, opt_state: Any) -> tuple[Any, Any]:
        updates, opt_state = system.optimiser.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    networks = map(descend, learning.params, grads, learning.opt_state)
    params, opt_state = zip(*networks, strict=True)
    return Learning(Params(*params), Params(*opt_state)), metrics


def update_epoch(
    system: System, learning: Learning, batch: Batch, key: Array
) -> tuple[Learning, dict[str, Array]]:
    """One pass over the batch, in minibatches of whole sequences."""
    config = system.config
    key_order, key_minibatches = jax.random.split(key)
    order = jax.random.permutation(key_order, config.num_envs)
    order = order.reshape(config.system.num_minibatches, -1)

    def minibatch(learning: Learning, inputs: tuple[Array, Array]) -> tuple[Learning, dict]:
        rows, key = inputs
        return update_minibatch(system, learning, jax.tree.map(lambda x: x[rows], batch), key)

    keys = jax.random.split(key_minibatches, config.system.num_minibatches)
    return jax.lax.scan(minibatch, learning, (order, keys))


def by_sequence(tree: Any) -> Any:
    """(T, E, ...) to (E, T, ...)"""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)


def sequences(system: System, collected: Rollout) -> Batch:
    """A rollout's sequences, with their advantages."""
    config, transitions = system.config.system, collected.transitions
    advantage, target = advantages(
        transitions, collected.last_value, config.gamma, config.gae_lambda
    )
    return Batch(
        observation=by_sequence(transitions.observation),
        reset_before=by_sequence(transitions.reset_before),
        action=by_sequence(transitions.action),
        log_prob=by_sequence(transitions.log_prob),
        value=by_sequence(transitions.value),
        advantage=by_sequence(advantage),
        target=by_sequence(target),
        memory=collected.memory,
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
    config, env = system.config, system.env
    key, key_env, key_guider, key_learner = jax.random.split(key, 4)
    env_state, timestep = system.envs.reset(key_env)
    observation = timestep.observation
    hidden = jnp.zeros((config.num_envs, env.num_agents, config.network.learner.hidden_dim))
    memory = Memory(system.guider.initial_carry(config.num_envs), hidden)
    chunk_size = config.network.guider.chunk_size
    params = Params(
        guider=init_along(
            system.guider, key_guider, memory.guider, observation, action_spec(env), chunk_size
        ),
        learner=init_alone(system.learner, key_learner, hidden, observation),
    )
    opt_state = Params(*(system.optimiser.init(network) for network in params))
    return TrainState(params, opt_state, key, env_state, timestep, memory)


def train_chunk(system: System, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
    """The updates between two evaluations; metrics are (U,) each."""
    return jax.lax.scan(
        lambda state, _: update(system, state), state, length=system.config.updates_per_chunk
    )


def policy_params(state: TrainState) -> Any:
    """What is evaluated, kept as best, deployed: the learner's parameters."""
    return state.params.learner


def initial_carry(system: System, batch_shape: tuple[int, ...]) -> Array:
    """The deployed policy's memory at an episode's start, (*batch_shape, N, H)."""
    hidden_dim = system.config.network.learner.hidden_dim
    return jnp.zeros((*batch_shape, system.env.num_agents, hidden_dim))


def act(
    system: System, params: Any, carry: Array, observation: Observation, key: Array, greedy: bool
) -> tuple[Array, Array]:
    """Decentralised actions (B, N[, A]): each from one agent's observation, by construction."""
    return act_alone(system.learner, params, carry, observation, key, greedy)


def main() -> None:
    """`python -m magpo.systems.magpo env=<suite>/<task> key=value ...`"""
    experiment.main(sys.modules[__name__])


if __name__ == "__main__":
    main()
