"""GPAE-MAPPO: PPO with generalised per-agent advantages, also on earlier rollouts.

Decentralised actors share one set of parameters. For each agent, the critic values a state given
the actions of all *other* agents, never the agent's own, so the advantage measures how much the
agent's own action contributed to the team's return. Doubly truncated importance weights cut the
advantage's traces, so that training can reuse the last `reuse` rollouts.

Source: "Generalized Per-Agent Advantage Estimation for Multi-Agent Policy Optimization" (Kim et
al., 2026). There, pi is the policy at the start of an iteration and mu the policy that collected
the data.

- `advantages`: Eq. 7, and the target of Eq. 11
- `traces`: c, by Eq. 8 (`trace: dt`) or one of its ablations (`st`, `it`, `none`)
- `critic_loss`: Eq. 10; the target network is the critic at the start of the iteration
- `actor_loss`: PPO with the ratio to mu, clipped around `clip_center`
- `update`: Algorithm 1

With `advantage: gae`, the same loop uses MAPPO's estimator: one value of the state for all agents.
Each iteration recomputes the estimates for all of the last `reuse` rollouts. Each epoch draws
minibatches from these rollouts without replacement: as many as without reuse (`reuse_epochs:
sample`), or all of them (`reuse_epochs: all`).

Run:

    python -m magpo.systems.gpae_mappo env=smax/5m_vs_6m
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from pydantic import Field

from magpo import experiment
from magpo.contract import Card, Deployed, Parameters, as_data, hyperparameters
from magpo.envs import stops
from magpo.envs.wrappers import AutoReset
from magpo.metrics import episode_means, episode_sums, explained_variance
from magpo.networks.heads import Distribution, executed_action
from magpo.networks.kernels import spread
from magpo.networks.recurrent import ActionCritic, Actors, split_time
from magpo.optimiser import clipped_adam, descend, grad_norms, init_each
from magpo.types import Array, Environment, EnvSpec, Metrics, Observation, TimeStep
from magpo.values import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, must_divide

CARD = Card(
    centralised="a critic, in training",
    deployed=Deployed.EACH_AGENT,
    carry="GRU or none",
    parameters=Parameters.SHARED,
    per_environment=("env_state", "timestep", "carry", "buffer"),
)


@hyperparameters
class Hyper:
    """The hyperparameters, `system.*`."""

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
    eta: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    reuse: PositiveInt
    reuse_epochs: Literal["sample", "all"]
    anomaly_probability: Fraction


@dataclass(frozen=True)
class ActorConfig:
    """The actor's settings, `network.actor.*`."""

    hidden_dim: PositiveInt
    memory: bool


@dataclass(frozen=True)
class CriticConfig:
    """The critic's settings, `network.critic.*`."""

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
    hyper: Hyper
    network: NetworkConfig
    needs_global_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        hyper = self.hyper
        must_divide("system.num_minibatches", hyper.num_minibatches, "num_envs", self.num_envs)
        if hyper.advantage == "gae" and hyper.reuse > 1:
            raise ValueError(f"system.advantage=gae needs system.reuse=1, not {hyper.reuse}")

    @property
    def minibatches(self) -> int:
        """The number of gradient steps in an epoch."""
        hyper = self.hyper
        return hyper.num_minibatches * (hyper.reuse if hyper.reuse_epochs == "all" else 1)


class Params(NamedTuple):
    """The parameters of both networks; also the structure of gradients and optimiser states."""

    actor: Any
    critic: Any


class Carry(NamedTuple):
    """Hidden states of E running episodes."""

    actor: Any  # (E, N, H), () without memory
    critic: Array  # (E, H)


class StateAction(NamedTuple):
    """A state where a rollout ends or an episode is cut off, and a joint action sampled there."""

    state: Array  # (B, ..., G)
    action: Array  # (B, ..., N[, A])


class TrainState(NamedTuple):
    params: Params
    opt_state: Params
    hyper: Hyper  # floats () each
    key: Array
    env_state: Any  # (E, ...)
    timestep: TimeStep  # (E, ...) with the observation to act on next
    carry: Carry
    buffer: "Trajectory | None"  # (E, M, ...) the last M rollouts; None if on-policy
    num_rollouts: Array  # () int32, collected so far


class Transition(NamedTuple):
    """One step of E environments. `Trajectory` has T of them."""

    observation: Observation  # (E, ...)
    reset_before: Array  # (E,) bool, true for an episode's first observation
    action: Array  # (E, N[, A]), raw: a squashed action before tanh
    log_prob: Array  # (E, N)
    forced: Array  # (E, N) bool, where the action is not the policy's
    reward: Array  # (E, N)
    discount: Array  # (E,) 0 where the episode terminated
    ended: Array  # (E,) bool, terminated or truncated
    terminal: StateAction | None  # (E, ...) where truncated; None on suites that never truncate


class Trajectory(NamedTuple):
    """B rollouts of one environment each."""

    steps: Transition  # (B, C, ...)
    last: StateAction  # (B, ...) after the last step
    carry: Carry  # (B, ...) before the first step


class Estimates(NamedTuple):
    """The current policy's and critic's estimates for trajectories."""

    log_ratio: Array  # (B, C, N) of the current policy to the policy that collected the step
    value: Array  # (B, C, N)
    next_value: Array  # (B, C, N)


class Batch(NamedTuple):
    """B sequences of C steps, each an environment's whole rollout; minibatches are drawn from B."""

    steps: Transition  # (B, C, ...)
    ratio: Array  # (B, C, N) at the start of the iteration
    advantage: Array  # (B, C, N)
    target: Array  # (B, C, N)
    carry: Carry  # (B, ...) before the first step


@dataclass(frozen=True)
class Setup:
    """The static parts of the system, the same for all members."""

    config: Config
    spec: EnvSpec
    actor: Actors
    critic: ActionCritic


def make(config: Config, spec: EnvSpec) -> Setup:
    """Assemble the networks for an environment. Raises ConfigError."""
    stops.check(config.hyper.anomaly_probability, spec)
    actor, critic = config.network.actor, config.network.critic
    return Setup(
        config,
        spec,
        actor=Actors(spec, actor.hidden_dim, recurrent=actor.memory),
        critic=ActionCritic(
            spec, critic.hidden_dim, sees="others" if config.hyper.advantage == "gpae" else "state"
        ),
    )


def traces(hyper: Hyper, log_ratio: Array) -> Array:
    """Return the trace weights c, (B, C, N): Eq. 8, or the ablation that `trace` names."""
    log_joint = log_ratio.sum(axis=-1, keepdims=True)
    log_trace = {
        "dt": log_ratio + jnp.minimum(jnp.log(hyper.eta), log_joint - log_ratio),
        "st": jnp.broadcast_to(log_joint, log_ratio.shape),
        "it": log_ratio,
        "none": jnp.zeros_like(log_ratio),
    }[hyper.trace]
    return hyper.gae_lambda * jnp.exp(jnp.minimum(0.0, log_trace))


def advantages(
    transitions: Transition, estimates: Estimates, trace: Array, gamma: float
) -> tuple[Array, Array]:
    """Return generalised per-agent advantages (Eq. 7) and value targets (Eq. 11), (B, C, N).

    A terminated episode's end is worth 0, a truncated episode's end the value of its last
    observation. The trace is cut at both. The *next* step's trace weights the next advantage.
    """
    discount = gamma * transitions.discount[..., None]
    td_error = transitions.reward + discount * estimates.next_value - estimates.value
    next_trace = jnp.concatenate([trace[:, 1:], jnp.zeros_like(trace[:, :1])], axis=1)
    weight = gamma * (1.0 - transitions.ended[..., None]) * next_trace

    def step(advantage: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        td_error, weight = inputs
        advantage = td_error + weight * advantage
        return advantage, advantage

    by_time = td_error.swapaxes(0, 1), weight.swapaxes(0, 1)
    _, advantage = jax.lax.scan(step, jnp.zeros_like(td_error[:, 0]), by_time, reverse=True)
    advantage = advantage.swapaxes(0, 1)
    truncated_ratio = jnp.exp(jnp.minimum(0.0, estimates.log_ratio))
    return advantage, estimates.value + truncated_ratio * advantage


def actor_loss(
    hyper: Hyper, policy: Distribution, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """Return PPO's clipped surrogate loss, also on earlier rollouts, with an entropy bonus."""
    log_ratio = policy.log_prob(batch.steps.action) - batch.steps.log_prob
    ratio = bounded_exp(log_ratio)
    center = batch.ratio if hyper.clip_center == "current" else jnp.ones_like(batch.ratio)
    clipped = jnp.clip(ratio, center - hyper.clip_eps, center + hyper.clip_eps)
    policy_loss = -jnp.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
    entropy = policy.entropy(key).mean()
    return policy_loss - hyper.ent_coef * entropy, {
        "loss/policy": policy_loss,
        "policy/entropy": entropy,
        "policy/approx_kl": (ratio - 1 - log_ratio).mean(),
        "policy/clipped_share": (jnp.abs(ratio - center) > hyper.clip_eps).mean(),
        "policy/ratio_std": ratio.std(),
    }


def bounded_exp(log_ratio: Array) -> Array:
    """Return ratios of at most e^20: one that overflows, from e^89 on, makes PPO's gradient NaN."""
    return jnp.exp(jnp.minimum(log_ratio, 20.0))


def critic_loss(hyper: Hyper, value: Array, batch: Batch) -> tuple[Array, Metrics]:
    """Return the mean squared error of Eq. 10, times `vf_coef`."""
    value_loss = ((value - batch.target) ** 2).mean()
    return hyper.vf_coef * value_loss, {
        "loss/value": value_loss,
        "value/explained_variance": explained_variance(value, batch.target),
    }


def rollout(
    setup: Setup, env: Environment, state: TrainState
) -> tuple[TrainState, Trajectory, Metrics]:
    """Act for T steps; also return metrics summed over the ended episodes, and their number.

    The critic's carry does not advance here: `update` advances it with the estimates.
    """
    config, params, hyper = setup.config, state.params, state.hyper
    envs = AutoReset(env, config.num_envs)

    def step(state: TrainState, key: Array) -> tuple[TrainState, tuple[Transition, Metrics]]:
        key_action, key_stop, key_terminal = jax.random.split(key, 3)
        observation, reset_before = inputs = state.timestep.observation, state.timestep.last()
        actor_carry, policy = setup.actor.step(params.actor, state.carry.actor, *inputs)
        action, forced = stops.force(
            setup.spec, hyper.anomaly_probability, observation, policy.sample(key_action), key_stop
        )
        executed = executed_action(action, setup.spec.action_kind)
        env_state, timestep = envs.step(state.env_state, executed)
        transition = Transition(
            observation=observation,
            reset_before=reset_before,
            action=action,
            log_prob=policy.log_prob(action),
            forced=forced,
            reward=timestep.reward,
            discount=timestep.discount,
            ended=timestep.last(),
            terminal=terminal(setup, params.actor, actor_carry, timestep, action, key_terminal),
        )
        carry = state.carry._replace(actor=actor_carry)
        state = state._replace(env_state=env_state, timestep=timestep, carry=carry)
        return state, (transition, episode_sums(timestep))

    start, (key, key_steps, key_last) = state.carry, jax.random.split(state.key, 3)
    keys = jax.random.split(key_steps, config.rollout_length)
    state, (transitions, episodes) = jax.lax.scan(step, state._replace(key=key), keys)
    observation, _ = inputs = state.timestep.observation, state.timestep.last()
    _, policy = setup.actor.step(params.actor, state.carry.actor, *inputs)
    last = StateAction(global_state(observation), policy.sample(key_last))
    steps = split_time(transitions, config.rollout_length)
    return state, Trajectory(steps, last, start), jax.tree.map(jnp.sum, episodes)


def global_state(observation: Observation) -> Array:
    """Return the global state, (..., G), which `Config.needs_global_state` asks for."""
    assert observation.global_state is not None
    return observation.global_state


def terminal(
    setup: Setup, params: Any, carry: Any, timestep: TimeStep, action: Array, key: Array
) -> StateAction | None:
    """Return states (E, G) before any restart, and joint actions there, valid where truncated."""
    observation, truncated = timestep.terminal_observation, timestep.truncated()
    if observation is None:
        return None
    no_reset = jnp.zeros_like(truncated)
    sampled = jax.lax.cond(
        truncated.any(),
        lambda: setup.actor.step(params, carry, observation, no_reset)[1].sample(key),
        lambda: jnp.zeros_like(action),
    )
    return StateAction(global_state(observation), sampled)


def estimate(setup: Setup, params: Params, trajectory: Trajectory) -> tuple[Estimates, Array]:
    """Run both networks along all trajectories, once.

    Returns the estimates, and the critic's carries (B, H) after the trajectories' last steps.
    """
    steps, last, carry = trajectory.steps, trajectory.last, trajectory.carry
    _, policy = setup.actor.unroll(params.actor, carry.actor, steps.observation, steps.reset_before)
    states_actions_resets = (
        jnp.concatenate([along, after[:, None]], axis=1)
        for along, after in (
            (global_state(steps.observation), last.state),
            (steps.action, last.action),
            (steps.reset_before, steps.ended[:, -1]),
        )
    )
    carries, value = setup.critic.unroll(params.critic, carry.critic, *states_actions_resets)
    next_value = value[:, 1:]  # `value` is (B, C + 1, N)
    if steps.terminal is not None:
        no_reset, (state, action) = jnp.zeros_like(steps.ended), steps.terminal
        terminal_value = jax.lax.cond(
            (steps.ended & (steps.discount > 0)).any(),  # a terminated episode's end is worth 0
            lambda: setup.critic.step(params.critic, carries[:, :-1], state, action, no_reset)[1],
            lambda: jnp.zeros_like(next_value),
        )
        next_value = jnp.where(steps.ended[..., None], terminal_value, next_value)
    estimates = Estimates(
        log_ratio=policy.log_prob(steps.action) - steps.log_prob,
        value=value[:, :-1],
        next_value=next_value,
    )
    return estimates, carries[:, -2]  # the next rollout begins with `last`


def losses(
    params: Params, setup: Setup, hyper: Hyper, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """Run both networks along the sequences and add their losses; each trains its own network."""
    steps, carry = batch.steps, batch.carry
    inputs = steps.observation, steps.reset_before
    _, policy = spread(setup.actor.unroll, params.actor, carry.actor, *inputs)
    states_actions_resets = global_state(steps.observation), steps.action, steps.reset_before
    _, value = spread(setup.critic.unroll, params.critic, carry.critic, *states_actions_resets)
    chex.assert_equal_shape((value, batch.ratio, batch.advantage, batch.target))
    loss_actor, metrics_actor = actor_loss(hyper, policy, batch, key)
    loss_critic, metrics_critic = critic_loss(hyper, value, batch)
    return loss_actor + loss_critic, metrics_actor | metrics_critic


def optimisers(config: Config, hyper: Hyper) -> Params:
    """Return each network's optax.GradientTransformation; `anneal_lr` anneals both rates to 0."""
    num_steps = float(config.num_updates * hyper.ppo_epochs * config.minibatches)  # int32 overflows

    def adam(learning_rate: float) -> optax.GradientTransformation:
        last = 0.0 if hyper.anneal_lr else learning_rate
        schedule = optax.linear_schedule(learning_rate, last, num_steps)
        return clipped_adam(schedule, hyper.max_grad_norm)

    return Params(actor=adam(hyper.actor_lr), critic=adam(hyper.critic_lr))


def update_minibatch(
    setup: Setup, state: TrainState, batch: Batch, key: Array
) -> tuple[TrainState, Metrics]:
    """Take a gradient step with each network, on advantages normalised over the minibatch."""
    hyper, advantage = state.hyper, batch.advantage
    normalised = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    batch = batch._replace(advantage=normalised)
    grads, metrics = jax.grad(losses, has_aux=True)(state.params, setup, hyper, batch, key)
    params, opt_state = descend(
        optimisers(setup.config, hyper), state.params, state.opt_state, grads
    )
    state = state._replace(params=params, opt_state=opt_state)
    return state, metrics | grad_norms(**grads._asdict())


def update_epoch(
    setup: Setup, state: TrainState, batch: Batch, filled: Array, key: Array
) -> tuple[TrainState, Metrics]:
    """Train on random minibatches of the rollouts that are `filled`, (B,).

    No rollout is drawn twice before each was drawn once. While the buffer fills, `reuse_epochs:
    all` draws them again.
    """
    config, (key_order, key_minibatches) = setup.config, jax.random.split(key)
    order = jnp.argsort(jnp.where(filled, jax.random.uniform(key_order, filled.shape), jnp.inf))
    size = config.num_envs // state.hyper.num_minibatches
    drawn = order[jnp.arange(config.minibatches * size) % filled.sum()]

    def minibatch(state: TrainState, inputs: tuple[Array, Array]) -> tuple[TrainState, Metrics]:
        rows, key = inputs
        return update_minibatch(setup, state, jax.tree.map(lambda x: x[rows], batch), key)

    keys = jax.random.split(key_minibatches, config.minibatches)
    return jax.lax.scan(minibatch, state, (drawn.reshape(-1, size), keys))


def remember(state: TrainState, newest: Trajectory) -> tuple[TrainState, Trajectory]:
    """Replace the buffer's oldest rollouts with the newest; also return its content (E, M, ...)."""
    slot = state.num_rollouts % state.hyper.reuse
    state = state._replace(num_rollouts=state.num_rollouts + 1)
    if state.buffer is None:
        return state, jax.tree.map(lambda x: x[:, None], newest)
    buffer = jax.tree.map(lambda x, new: x.at[:, slot].set(new), state.buffer, newest)
    return state._replace(buffer=buffer), buffer


def estimate_each(setup: Setup, params: Params, kept: Trajectory) -> tuple[Estimates, Array]:
    """Estimate the environments' M rollouts one by one, which takes less memory than all at once.

    `kept` and the results are (E, M, ...).
    """
    found = jax.lax.map(
        lambda slot: estimate(setup, params, jax.tree.map(lambda x: x[:, slot], kept)),
        jnp.arange(setup.config.hyper.reuse),
    )
    return jax.tree.map(lambda x: x.swapaxes(0, 1), found)


def update(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Metrics]:
    """Collect a rollout, estimate the last `reuse` rollouts and train on them (Algorithm 1)."""
    hyper, newest_slot = state.hyper, state.num_rollouts % state.hyper.reuse
    state, newest, episodes = rollout(setup, env, state)
    state, kept = remember(state, newest)
    estimates, carries = estimate_each(setup, state.params, kept)
    carry = state.carry._replace(critic=carries[:, newest_slot])
    trajectory, estimates = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), (kept, estimates)
    )  # (E * M, ...)
    trace = traces(hyper, estimates.log_ratio)
    advantage, target = advantages(trajectory.steps, estimates, trace, hyper.gamma)
    batch = Batch(
        steps=trajectory.steps,
        ratio=bounded_exp(estimates.log_ratio),
        advantage=advantage,
        target=target,
        carry=trajectory.carry,
    )
    filled = jnp.arange(len(trace)) % hyper.reuse < state.num_rollouts  # (E * M,)
    key, key_epochs = jax.random.split(state.key)
    trained, metrics = jax.lax.scan(
        lambda state, key: update_epoch(setup, state, batch, filled, key),
        state._replace(key=key, carry=carry, buffer=None),  # XLA would copy the buffer
        jax.random.split(key_epochs, hyper.ppo_epochs),
    )
    metrics = jax.tree.map(jnp.mean, metrics) | paper_metrics(setup, batch, trace, filled)
    return trained._replace(buffer=state.buffer), metrics | episode_means(episodes)


def paper_metrics(setup: Setup, batch: Batch, trace: Array, filled: Array) -> Metrics:
    """Return Eq. 9's distances and gaps, the largest ratio, and Section 3.1's gap."""
    filled = jnp.broadcast_to(filled[:, None, None], trace.shape)
    log_joint = jnp.log(batch.ratio).sum(axis=-1, keepdims=True)
    joint = bounded_exp(log_joint)  # the joint ratio of many agents may overflow
    of_joint, of_own = jnp.abs(joint - trace), jnp.abs(batch.ratio - trace)
    gap = of_joint - of_own
    return {
        "gpae/distance_joint": of_joint.mean(where=filled),
        "gpae/distance_own": of_own.mean(where=filled),
        "gpae/delta_c": gap.mean(where=filled),
        "gpae/delta_c_abs": jnp.abs(gap).mean(where=filled),
        "policy/largest_ratio": batch.ratio.max(where=filled, initial=0.0),
        **stops.advantage_gap(setup.spec, batch.advantage, batch.steps.forced & filled),
    }


def init(setup: Setup, env: Environment, key: Array) -> TrainState:
    """Return the state before the first update: everything that training changes."""
    batch_shape, hyper = (setup.config.num_envs,), setup.config.hyper
    key, key_env, key_actor, key_critic = jax.random.split(key, 4)
    env_state, timestep = AutoReset(env, *batch_shape).reset(key_env)
    params = Params(setup.actor.init(key_actor), setup.critic.init(key_critic))
    carry = Carry(setup.actor.initial_carry(batch_shape), setup.critic.initial_carry(batch_shape))
    state = TrainState(
        params=params,
        opt_state=init_each(optimisers(setup.config, hyper), params),
        hyper=as_data(hyper),
        key=key,
        env_state=env_state,
        timestep=timestep,
        carry=carry,
        buffer=None,
        num_rollouts=jnp.int32(0),
    )
    if hyper.reuse == 1:
        return state
    _, rollouts, _ = jax.eval_shape(lambda state: rollout(setup, env, state), state)
    slots = *batch_shape, hyper.reuse
    buffer = jax.tree.map(lambda x: jnp.zeros((*slots, *x.shape[1:]), x.dtype), rollouts)
    return state._replace(buffer=buffer)


def train_chunk(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Metrics]:
    """Run the U updates between two evaluations; each metric is (U,)."""
    return jax.lax.scan(
        lambda state, _: update(setup, env, state), state, length=setup.config.updates_per_chunk
    )


def policy_params(state: TrainState) -> Any:
    """Return the actor's parameters, which are evaluated, kept as best and deployed."""
    return state.params.actor


def initial_carry(setup: Setup, batch_shape: tuple[int, ...]) -> Any:
    """Return the actors' carry at an episode's start, (*batch_shape, N, H), () without memory."""
    return setup.actor.initial_carry(batch_shape)


def act(
    setup: Setup, params: Any, carry: Any, observation: Observation, key: Array, greedy: bool
) -> tuple[Array, Any]:
    """Return actions (B, N[, A]), each from one agent's observation, and the next carry."""
    return setup.actor.act(params, carry, observation, key, greedy)


def main() -> None:
    """Run `python -m magpo.systems.gpae_mappo env=<suite>/<task> key=value ...`."""
    experiment.main(__file__)


if __name__ == "__main__":
    main()
