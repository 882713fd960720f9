"""GPAE-MAPPO: PPO on generalised per-agent advantages, from old rollouts too.

Decentralised actors, one set of parameters for all agents. The critic values a state for each agent
given what all *others* do, never what the agent itself does: the advantage then says how much of
the team's fortune was that agent's doing. Its traces are cut by doubly truncated importance
weights, so that the last `reuse` rollouts can be learned from.

Source: "Generalized Per-Agent Advantage Estimation for Multi-Agent Policy Optimization" (Kim et
al., 2026). With pi for the policy at the start of an iteration, mu for the one that collected:
    `advantages`    Eq. 7, and the target of Eq. 11
    `traces`        Eq. 8: c is dt, its ablations st, it, none
    `critic_loss`   Eq. 10; the target network is the critic at the start of the iteration
    `actor_loss`    PPO with the ratio to mu; `clip_center` says around what it is clipped
    `update`        Algorithm 1
`advantage: gae` is MAPPO's estimator in the same loop: one value for all agents, of the state only.
An iteration learns from as many rollouts as it collects, drawn from the buffer: of each environment
one of its last `reuse`, so that old data costs no gradient steps and no more estimates.

    python -m magpo.systems.gpae_mappo env=smax/5m_vs_6m
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from magpo import experiment
from magpo.config import (
    ConfigError,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    must_divide,
)
from magpo.envs.wrappers import AutoReset, episode_means, episode_sums
from magpo.networks.heads import Policy, executed_action
from magpo.networks.recurrent import (
    FeedForwardActor,
    PerAgentCritic,
    RecurrentActor,
    act_alone,
    init_alone,
)
from magpo.types import Array, Card, Environment, Observation, TimeStep, action_spec

CARD = Card("a critic, in training", "each agent's policy", "GRU or none", parameters="shared")


@dataclass(frozen=True)
class SystemConfig:
    """`system.*`"""

    actor_lr: PositiveFloat
    critic_lr: PositiveFloat
    anneal_lr: bool
    ppo_epochs: PositiveInt
    num_minibatches: PositiveInt
    clip_eps: PositiveFloat
    clip_center: Literal["current", "behaviour"]
    ent_coef: NonNegativeFloat
    vf_coef: NonNegativeFloat
    max_grad_norm: PositiveFloat
    gamma: Fraction
    gae_lambda: Fraction
    advantage: Literal["gpae", "gae"]
    trace: Literal["dt", "st", "it", "none"]
    eta: PositiveFloat
    reuse: PositiveInt
    anomaly_probability: Fraction

    def __post_init__(self) -> None:
        if self.eta < 1:
            raise ValueError(f"eta bounds the other agents' ratio: at least 1, not {self.eta}")
        if self.advantage == "gae" and self.reuse > 1:
            raise ValueError(f"advantage=gae is on-policy: reuse must be 1, not {self.reuse}")


@dataclass(frozen=True)
class ActorConfig:
    """`network.actor.*`"""

    hidden_dim: PositiveInt
    memory: bool


@dataclass(frozen=True)
class CriticConfig:
    """`network.critic.*`"""

    hidden_dim: PositiveInt


@dataclass(frozen=True)
class NetworkConfig:
    actor: ActorConfig
    critic: CriticConfig


@dataclass(frozen=True)
class Config:
    num_envs: int
    rollout_length: int
    updates_per_chunk: int
    num_updates: int
    system: SystemConfig
    network: NetworkConfig

    def __post_init__(self) -> None:
        num_minibatches = self.system.num_minibatches
        must_divide("system.num_minibatches", num_minibatches, "num_envs", self.num_envs)

    @property
    def global_state(self) -> bool:
        """Whether the environment is asked for its global state."""
        return True


class Params(NamedTuple):
    """The parameters of both networks; also the shape of gradients and optimiser states."""

    actor: Any
    critic: Any


class Memory(NamedTuple):
    """Hidden states of E running episodes."""

    actor: Any  # (E, N, H), () without memory
    critic: Array  # (E, H)


class StateAction(NamedTuple):
    """What follows a rollout or a cut; the action is drawn once, when that is collected."""

    state: Array  # (B, ..., G)
    action: Array  # (B, ..., N[, A])


class TrainState(NamedTuple):
    params: Params
    opt_state: Params
    key: Array
    env_state: Any  # (E, ...)
    timestep: TimeStep  # (E, ...), whose observation is acted on next
    memory: Memory
    buffer: "Trajectory | None"  # (E, M, ...) the last M rollouts; None if on-policy
    num_rollouts: Array  # () int32, collected so far


class Transition(NamedTuple):
    """One step of E environments. `Trajectory` has T of them."""

    observation: Observation  # (E, ...)
    reset_before: Array  # (E,) bool, the observation is an episode's first
    action: Array  # (E, N[, A]), raw: a squashed action before tanh
    log_prob: Array  # (E, N)
    forced: Array  # (E, N) bool, where the action is not the policy's
    reward: Array  # (E, N)
    discount: Array  # (E,) 0 where the episode terminated
    ended: Array  # (E,) bool, terminated or truncated
    terminal: StateAction | None  # (E, ...) where truncated; None on suites that never truncate


class Trajectory(NamedTuple):
    """B rollouts, of one environment each."""

    steps: Transition  # (B, T, ...)
    last: StateAction  # (B, ...) after the last step
    memory: Memory  # (B, ...) at the start


class Estimates(NamedTuple):
    """What the present policy and critic say of trajectories."""

    log_ratio: Array  # (B, T, N) of the present policy to the one that collected
    value: Array  # (B, T, N)
    next_value: Array  # (B, T, N)


class Batch(NamedTuple):
    """What a minibatch is drawn from: whole rollouts, agents in order."""

    steps: Transition  # (B, T, ...)
    memory: Memory  # (B, ...) at the start of the rollout
    ratio: Array  # (B, T, N) at the start of the iteration
    advantage: Array  # (B, T, N)
    target: Array  # (B, T, N)


@dataclass(frozen=True)
class System:
    """All that is static."""

    config: Config
    env: Environment
    envs: AutoReset  # num_envs of them
    actor: RecurrentActor | FeedForwardActor
    critic: PerAgentCritic
    optimiser: Params  # each network's optax.GradientTransformation
    stop_action: int | None  # of the environment, where it has one


def make(config: Config, env: Environment) -> System:
    """Assemble networks and optimisers for an environment."""
    of_env = {"action_dim": env.action_dim, "action_kind": env.action_kind}
    actor = RecurrentActor if config.network.actor.memory else FeedForwardActor
    values = config.system
    # A float: there may be more steps than an int32 counts.
    num_steps = float(config.num_updates * values.ppo_epochs * values.num_minibatches)

    def optimiser(learning_rate: float) -> optax.GradientTransformation:
        last = 0.0 if values.anneal_lr else learning_rate
        schedule = optax.linear_schedule(learning_rate, last, num_steps)
        return optax.flatten(  # one vector: a kernel for each step of Adam, not for each leaf
            optax.chain(
                optax.clip_by_global_norm(values.max_grad_norm),
                optax.adam(schedule, eps=1e-5),
            )
        )

    return System(
        config=config,
        env=env,
        envs=AutoReset(env, config.num_envs),
        actor=actor(**of_env, hidden_dim=config.network.actor.hidden_dim),
        critic=PerAgentCritic(
            **of_env,
            num_agents=env.num_agents,
            hidden_dim=config.network.critic.hidden_dim,
            sees_actions=values.advantage == "gpae",
        ),
        optimiser=Params(optimiser(values.actor_lr), optimiser(values.critic_lr)),
        stop_action=getattr(env, "stop_action", None),
    )


def by_time(tree: Any) -> Any:
    """(B, T, ...) to (T, B, ...), and back."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)


def run_actor(
    system: System, params: Any, hidden: Any, observation: Observation, reset_before: Array
) -> tuple[Any, Policy]:
    """Hidden states (B, N, H) and policies (T, B, N) along sequences of B environments."""
    length, batch, num_agents = observation.agents_view.shape[:3]
    after, policy = system.actor.apply(
        params,
        jax.tree.map(lambda x: x.reshape(batch * num_agents, -1), hidden),
        observation.agents_view.reshape(length, batch * num_agents, -1),
        observation.action_mask.reshape(length, batch * num_agents, -1),
        jnp.repeat(reset_before, num_agents, axis=1),
    )
    return jax.tree.map(lambda x: x.reshape(batch, num_agents, -1), after), jax.tree.map(
        lambda x: x.reshape(length, batch, num_agents, -1), policy
    )


def traces(config: SystemConfig, log_ratio: Array) -> Array:
    """c, (B, T, N): how much of what follows an action is believed (Eq. 8; its ablations)."""
    joint = log_ratio.sum(axis=-1, keepdims=True)
    log_trace = {
        "dt": log_ratio + jnp.minimum(jnp.log(config.eta), joint - log_ratio),
        "st": jnp.broadcast_to(joint, log_ratio.shape),
        "it": log_ratio,
        "none": jnp.zeros_like(log_ratio),
    }[config.trace]
    return config.gae_lambda * jnp.exp(jnp.minimum(0.0, log_trace))


def advantages(
    transitions: Transition, estimates: Estimates, trace: Array, gamma: float
) -> tuple[Array, Array]:
    """Generalised per-agent advantages (Eq. 7) and value targets (Eq. 11), (B, T, N).

    A terminated episode's end is worth 0, a truncated one's the value of its last observation; the
    trace is cut at both. An advantage follows into the past by the *later* step's trace.
    """
    discount = gamma * transitions.discount[..., None]
    delta = transitions.reward + discount * estimates.next_value - estimates.value
    later = jnp.concatenate([trace[:, 1:], jnp.zeros_like(trace[:, :1])], axis=1)
    follows = gamma * (1.0 - transitions.ended[..., None]) * later

    def step(advantage: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, follows = inputs
        advantage = delta + follows * advantage
        return advantage, advantage

    start = jnp.zeros_like(delta[:, 0])
    _, advantage = jax.lax.scan(step, start, by_time((delta, follows)), reverse=True)
    advantage = by_time(advantage)
    bounded = jnp.exp(jnp.minimum(0.0, estimates.log_ratio))
    return advantage, estimates.value + bounded * advantage


def actor_loss(
    config: SystemConfig, policy: Policy, batch: Batch, key: Array
) -> tuple[Array, dict[str, Array]]:
    """PPO's clipped surrogate objective on old data, with an entropy bonus."""
    ratio = jnp.exp(policy.log_prob(batch.steps.action) - batch.steps.log_prob)
    center = batch.ratio if config.clip_center == "current" else jnp.ones_like(batch.ratio)
    clipped = jnp.clip(ratio, center - config.clip_eps, center + config.clip_eps)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
    entropy = policy.entropy(key).mean()
    return -surrogate - config.ent_coef * entropy, {
        "loss/policy": -surrogate,
        "policy/entropy": entropy,
        "policy/clipped_share": (ratio != clipped).mean(),
        "policy/ratio_std": ratio.std(),
    }


def critic_loss(config: SystemConfig, value: Array, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """Eq. 10."""
    loss = ((value - batch.target) ** 2).mean()
    return config.vf_coef * loss, {"loss/value": loss}


def rollout(system: System, state: TrainState) -> tuple[TrainState, Trajectory, dict[str, Array]]:
    """Act for T steps; also the sums over the episodes that ended, () each, and their number."""

    class Loop(NamedTuple):
        env_state: Any
        timestep: TimeStep
        memory: Memory

    def step(loop: Loop, key: Array) -> tuple[Loop, tuple[Transition, dict[str, Array]]]:
        key_action, key_stop, key_terminal = jax.random.split(key, 3)
        observation, reset_before = loop.timestep.observation, loop.timestep.last()
        hidden, policy = act_on(system, state.params.actor, loop.memory.actor, loop.timestep)
        seen = global_state(observation)[None], reset_before[None]
        critic = partial(system.critic.apply, state.params.critic, method="remember")
        memory = Memory(hidden, critic(loop.memory.critic, *seen)[0])
        action, forced = stop(system, observation, policy.sample(key_action)[0], key_stop)
        env_state, timestep = system.envs.step(
            loop.env_state, executed_action(action, system.env.action_kind)
        )
        transition = Transition(
            observation=observation,
            reset_before=reset_before,
            action=action,
            log_prob=policy.log_prob(action[None])[0],
            forced=forced,
            reward=timestep.reward,
            discount=timestep.discount,
            ended=timestep.last(),
            terminal=terminal(system, state.params.actor, hidden, timestep, action, key_terminal),
        )
        return Loop(env_state, timestep, memory), (transition, episode_sums(timestep))

    key, key_steps, key_last = jax.random.split(state.key, 3)
    keys = jax.random.split(key_steps, system.config.rollout_length)
    loop = Loop(state.env_state, state.timestep, state.memory)
    loop, (transitions, episodes) = jax.lax.scan(step, loop, keys)
    _, policy = act_on(system, state.params.actor, loop.memory.actor, loop.timestep)
    last = StateAction(global_state(loop.timestep.observation), policy.sample(key_last)[0])
    trajectory = Trajectory(by_time(transitions), last, state.memory)
    state = state._replace(key=key, **loop._asdict())
    return state, trajectory, jax.tree.map(jnp.sum, episodes)


def global_state(observation: Observation) -> Array:
    """(..., G), asked for by `Config.global_state`."""
    assert observation.global_state is not None
    return observation.global_state


def act_on(system: System, params: Any, hidden: Any, timestep: TimeStep) -> tuple[Any, Policy]:
    """Hidden states (E, N, H) and policies (1, E, N) on a timestep's observation."""
    seen = jax.tree.map(lambda x: x[None], (timestep.observation, timestep.last()))
    return run_actor(system, params, hidden, *seen)


def stop(
    system: System, observation: Observation, action: Array, key: Array
) -> tuple[Array, Array]:
    """With `anomaly_probability` one agent that has a choice stops instead (Section 3.1)."""
    probability = system.config.system.anomaly_probability
    if not probability or system.stop_action is None:
        return action, jnp.zeros(observation.action_mask.shape[:-1], bool)
    key_when, key_who = jax.random.split(key)
    has_choice = observation.action_mask.sum(axis=-1) > 1
    who = jax.random.categorical(key_who, jnp.where(has_choice, 0.0, -jnp.inf))
    when = jax.random.bernoulli(key_when, probability, who.shape) & has_choice.any(axis=-1)
    forced = when[:, None] & (jnp.arange(system.env.num_agents) == who[:, None])
    return jnp.where(forced, system.stop_action, action), forced


def terminal(
    system: System, params: Any, hidden: Any, timestep: TimeStep, acted: Array, key: Array
) -> StateAction | None:
    """The last states (E, G) of episodes; actions, shaped as those `acted`, where truncated."""
    observation = timestep.terminal_observation
    if observation is None:
        return None
    seen = timestep._replace(observation=observation, step_type=jnp.zeros_like(timestep.step_type))
    action = jax.lax.cond(
        timestep.truncated().any(),
        lambda: act_on(system, params, hidden, seen)[1].sample(key)[0],
        lambda: jnp.zeros_like(acted),
    )
    return StateAction(global_state(observation), action)


def estimate(system: System, params: Params, trajectory: Trajectory) -> Estimates:
    """One pass of each network along all trajectories."""
    steps = by_time(trajectory.steps)
    observation, memory, last = steps.observation, trajectory.memory, trajectory.last
    _, policy = run_actor(system, params.actor, memory.actor, observation, steps.reset_before)
    log_ratio = policy.log_prob(steps.action) - steps.log_prob
    state, action, reset_before = (
        jnp.concatenate([along, after[None]])
        for along, after in (
            (global_state(observation), last.state),
            (steps.action, last.action),
            (steps.reset_before, steps.ended[-1]),
        )
    )
    given = memory.critic, state, action, reset_before
    hiddens, value = system.critic.apply(params.critic, *given)  # (T + 1, B, H), (T + 1, B, N)
    next_value = value[1:]
    if steps.terminal is not None:
        single = steps.ended.size  # T * B sequences of one step
        state, action = (x.reshape(1, single, *x.shape[2:]) for x in steps.terminal)
        given = hiddens[:-1].reshape(single, -1), state, action, jnp.zeros((1, single), bool)
        cut_off = jax.lax.cond(
            (steps.ended & (steps.discount > 0)).any(),  # else a terminated one's worth is not read
            lambda: system.critic.apply(params.critic, *given)[1].reshape(next_value.shape),
            lambda: jnp.zeros_like(next_value),
        )
        next_value = jnp.where(steps.ended[..., None], cut_off, next_value)
    log_ratio, value, next_value = by_time((log_ratio, value[:-1], next_value))
    return Estimates(log_ratio, value, next_value)


def losses(
    params: Params, system: System, batch: Batch, key: Array
) -> tuple[Array, dict[str, Array]]:
    """Both networks along a minibatch's rollouts; each loss moves its own network only."""
    steps, memory = by_time(batch.steps), batch.memory
    seen, state = (steps.observation, steps.reset_before), global_state(steps.observation)
    _, policy = run_actor(system, params.actor, memory.actor, *seen)
    _, value = system.critic.apply(params.critic, memory.critic, state, steps.action, seen[1])
    config = system.config.system
    loss_actor, metrics_actor = actor_loss(config, by_time(policy), batch, key)
    loss_critic, metrics_critic = critic_loss(config, by_time(value), batch)
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
    """One pass over shuffled minibatches of whole rollouts."""
    config = system.config
    key_order, key_minibatches = jax.random.split(key)
    order = jax.random.permutation(key_order, config.num_envs)

    def minibatch(learning: Learning, inputs: tuple[Array, Array]) -> tuple[Learning, dict]:
        rows, key = inputs
        return update_minibatch(system, learning, jax.tree.map(lambda x: x[rows], batch), key)

    keys = jax.random.split(key_minibatches, config.system.num_minibatches)
    return jax.lax.scan(minibatch, learning, (order.reshape(keys.size, -1), keys))


def draw(
    system: System, state: TrainState, newest: Trajectory, key: Array
) -> tuple[TrainState, Trajectory]:
    """Keep the newest rollouts; of each environment, one of those kept."""
    if state.buffer is None:
        return state, newest
    number, reuse = state.num_rollouts, system.config.system.reuse
    buffer = jax.tree.map(lambda x, new: x.at[:, number % reuse].set(new), state.buffer, newest)
    chosen = jax.random.randint(key, (system.config.num_envs,), 0, jnp.minimum(number + 1, reuse))
    drawn = jax.vmap(lambda kept, slot: jax.tree.map(lambda x: x[slot], kept))(buffer, chosen)
    return state._replace(buffer=buffer, num_rollouts=number + 1), drawn


def update(system: System, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
    """Algorithm 1: collect, draw from the last rollouts, estimate, then `ppo_epochs`."""
    config = system.config.system
    state, trajectory, episodes = rollout(system, state)
    key, key_draw, key_epochs = jax.random.split(state.key, 3)
    state, trajectory = draw(system, state, trajectory, key_draw)
    estimates = estimate(system, state.params, trajectory)
    trace = traces(config, estimates.log_ratio)
    advantage, target = advantages(trajectory.steps, estimates, trace, config.gamma)
    batch = Batch(
        steps=trajectory.steps,
        memory=trajectory.memory,
        ratio=jnp.exp(estimates.log_ratio),
        advantage=advantage,
        target=target,
    )
    learning, metrics = jax.lax.scan(
        lambda learning, key: update_epoch(system, learning, batch, key),
        Learning(state.params, state.opt_state),
        jax.random.split(key_epochs, config.ppo_epochs),
    )
    metrics = jax.tree.map(jnp.mean, metrics) | measure(config, batch, trace)
    state = state._replace(key=key, **learning._asdict())
    return state, metrics | episode_means(episodes)


def measure(config: SystemConfig, batch: Batch, trace: Array) -> dict[str, Array]:
    """The paper's figures: the gap of Eq. 9, signed too, and Section 3.1's of advantages."""
    log_joint = jnp.log(batch.ratio).sum(axis=-1, keepdims=True)
    joint = jnp.exp(jnp.minimum(log_joint, 20.0))  # of many agents it may exceed a float
    gap = jnp.abs(joint - trace) - jnp.abs(batch.ratio - trace)
    metrics = {
        "gpae/delta_c": gap.mean(),
        "gpae/delta_c_abs": jnp.abs(gap).mean(),
        "policy/largest_ratio": batch.ratio.max(),
    }
    if config.anomaly_probability:
        advantage, forced = batch.advantage, batch.steps.forced
        num_others = advantage.shape[-1] - 1
        above = (advantage[..., None, :] - advantage[..., None]).sum(axis=-1) / num_others
        total = jnp.where(forced, above, 0.0).sum()
        metrics["gpae/advantage_gap"] = total / jnp.maximum(forced.sum(), 1)
    return metrics


def init(system: System, key: Array) -> TrainState:
    """Everything that changes, before the first update. Raises ConfigError."""
    config = system.config
    if config.system.anomaly_probability and system.stop_action is None:
        raise ConfigError(f"system.anomaly_probability is for smax/..., not {system.env.name}")
    key, key_env, key_actor, key_critic = jax.random.split(key, 4)
    env_state, timestep = system.envs.reset(key_env)
    memory = Memory(
        actor=initial_carry(system, (config.num_envs,)),
        critic=jnp.zeros((config.num_envs, config.network.critic.hidden_dim)),
    )
    whole, never = global_state(timestep.observation)[None, :1], jnp.zeros((1, 1), bool)
    spec = action_spec(system.env)
    action = jnp.zeros((1, 1, *spec.shape), spec.dtype)
    params = Params(
        actor=init_alone(system.actor, key_actor, memory.actor, timestep.observation),
        critic=system.critic.init(key_critic, memory.critic[:1], whole, action, never),
    )
    opt_state = Params(*(o.init(p) for o, p in zip(system.optimiser, params, strict=True)))
    state = TrainState(params, opt_state, key, env_state, timestep, memory, None, jnp.int32(0))
    if config.system.reuse == 1:
        return state
    _, trajectory, _ = jax.eval_shape(lambda state: rollout(system, state), state)
    slots = config.num_envs, config.system.reuse
    return state._replace(
        buffer=jax.tree.map(lambda x: jnp.zeros((*slots, *x.shape[1:]), x.dtype), trajectory)
    )


def train_chunk(system: System, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
    """The updates between two evaluations; metrics are (U,) each."""
    return jax.lax.scan(
        lambda state, _: update(system, state), state, length=system.config.updates_per_chunk
    )


def policy_params(state: TrainState) -> Any:
    """What is evaluated, kept as best, deployed: the actor's parameters."""
    return state.params.actor


def initial_carry(system: System, batch_shape: tuple[int, ...]) -> Any:
    """The actors' memory at an episode's start, (*batch_shape, N, H), or () without memory."""
    config = system.config.network.actor
    shape = (*batch_shape, system.env.num_agents, config.hidden_dim)
    return jnp.zeros(shape) if config.memory else ()


def act(
    system: System, params: Any, carry: Any, observation: Observation, key: Array, greedy: bool
) -> tuple[Array, Any]:
    """Decentralised actions (B, N[, A]): each from one agent's observation, by construction."""
    return act_alone(system.actor, params, carry, observation, key, greedy)


def main() -> None:
    """`python -m magpo.systems.gpae_mappo env=<suite>/<task> key=value ...`"""
    experiment.main(sys.modules[__name__])


if __name__ == "__main__":
    main()
