"""COMA: counterfactual multi-agent policy gradients, with PPO's loss.

Decentralised actors share one set of parameters. A recurrent critic values the joint action in the
global state. An agent's advantage compares this value with the mean over all of the agent's own
actions, weighted by its policy, while the other agents' actions stay the same.

Sources: "Counterfactual Multi-Agent Policy Gradients" (Foerster et al., 2018), and "Generalized
Per-Agent Advantage Estimation for Multi-Agent Policy Optimization" (Kim et al., 2026), which has
COMA as a baseline.

- `decide`: the counterfactual baseline, Eq. 2 of Kim et al.
- `targets`: TD(lambda); the target network is the critic at the start of an update
- `actor_loss`: PPO's clipped surrogate, as in Section 3.1 of Kim et al.; with `ppo_epochs: 1`,
  `num_minibatches: 1` and `ent_coef: 0`, its gradient is COMA's, on normalised advantages

Run:

    python -m magpo.systems.coma env=smax/5m_vs_6m
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from magpo import experiment
from magpo.contract import Card, Deployed, Parameters, as_data, hyperparameters
from magpo.envs import stops
from magpo.envs.wrappers import AutoReset, terminal_value
from magpo.metrics import episode_means, episode_sums, explained_variance
from magpo.networks.heads import Categorical, Distribution, executed_action
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
    ent_coef: NonNegativeFloat
    vf_coef: NonNegativeFloat
    max_grad_norm: PositiveFloat
    gamma: Fraction
    td_lambda: Fraction
    baseline_samples: PositiveInt
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
        num_minibatches = self.hyper.num_minibatches
        must_divide("system.num_minibatches", num_minibatches, "num_envs", self.num_envs)


class Params(NamedTuple):
    """The parameters of both networks; also the structure of gradients and optimiser states."""

    actor: Any
    critic: Any


class Carry(NamedTuple):
    """Hidden states of E running episodes."""

    actor: Any  # (E, N, H), () without memory
    critic: Array  # (E, H)


class Decision(NamedTuple):
    """A joint action in each of E environments, with its value and baselines."""

    carry: Carry  # (E, ...) after the step
    action: Array  # (E, N[, A]), raw: a squashed action before tanh
    log_prob: Array  # (E, N)
    forced: Array  # (E, N) bool, where the action is not the policy's
    value: Array  # (E, N) of the joint action
    baseline: Array  # (E, N) the value expected over the agent's own action


class TrainState(NamedTuple):
    params: Params
    opt_state: Params
    hyper: Hyper  # floats () each
    key: Array
    env_state: Any  # (E, ...)
    timestep: TimeStep  # (E, ...) with the observation to act on next
    carry: Carry


class Transition(NamedTuple):
    """One step of E environments. `rollout` stacks T of them."""

    observation: Observation  # (E, ...)
    reset_before: Array  # (E,) bool, true for an episode's first observation
    action: Array  # (E, N[, A]), raw: a squashed action before tanh
    log_prob: Array  # (E, N)
    forced: Array  # (E, N) bool, where the action is not the policy's
    value: Array  # (E, N) of the joint action
    baseline: Array  # (E, N) the value expected over the agent's own action
    reward: Array  # (E, N)
    discount: Array  # (E,) 0 where the episode terminated
    ended: Array  # (E,) bool, terminated or truncated
    terminal_value: Array | None  # (E, N) where truncated; None on suites that never truncate


class Rollout(NamedTuple):
    transitions: Transition  # (T, E, ...)
    carry: Carry  # (E, ...) before the first transition
    last_value: Array  # (E, N) of the observation after the last transition, and actions there
    episodes: Metrics  # () sums over the episodes that ended, and their number


class Batch(NamedTuple):
    """B sequences of C steps, each an environment's rollout; minibatches are drawn from B."""

    steps: Transition  # (B, C, ...)
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
        critic=ActionCritic(spec, critic.hidden_dim, sees="all"),
    )


def targets(transitions: Transition, last_value: Array, gamma: float, td_lambda: float) -> Array:
    """Return TD(lambda) targets for the values of the actions taken, (T, E, N).

    A terminated episode's end is worth 0, a truncated episode's end the value of its last
    observation and of actions sampled there. The trace is cut at both.
    """
    next_value = jnp.concatenate([transitions.value[1:], last_value[None]])  # (T, E, N)
    if transitions.terminal_value is not None:
        ended = transitions.ended[..., None]
        next_value = jnp.where(ended, transitions.terminal_value, next_value)
    discount = gamma * transitions.discount[..., None]
    td_error = transitions.reward + discount * next_value - transitions.value
    trace = gamma * td_lambda * (1.0 - transitions.ended[..., None])

    def step(change: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        td_error, trace = inputs
        change = td_error + trace * change
        return change, change

    _, change = jax.lax.scan(step, jnp.zeros_like(last_value), (td_error, trace), reverse=True)
    return transitions.value + change


def decide(
    setup: Setup,
    hyper: Hyper,
    params: Params,
    carry: Carry,
    observation: Observation,
    reset_before: Array,
    key: Array,
) -> Decision:
    """Sample actions, and compute their values and the counterfactual baselines (Eq. 2)."""
    key_action, key_stop, key_own = jax.random.split(key, 3)
    actor_carry, policy = setup.actor.step(params.actor, carry.actor, observation, reset_before)
    action, forced = stops.force(
        setup.spec, hyper.anomaly_probability, observation, policy.sample(key_action), key_stop
    )
    if isinstance(policy, Categorical):  # all of an agent's actions
        probs = jnp.exp(policy.log_probs)  # (E, N, A)
        own_actions = jnp.broadcast_to(jnp.arange(probs.shape[-1]), probs.shape)
        taken = own_actions == action[..., None]
    else:  # the action taken, then samples
        number = hyper.baseline_samples
        samples = jax.vmap(policy.sample)(jax.random.split(key_own, number))
        own_actions = jnp.moveaxis(jnp.concatenate([action[None], samples]), 0, 2)
        taken = jnp.arange(number + 1) == 0
        probs = ~taken / number
    given = global_state(observation), action, reset_before, own_actions
    critic_carry, values = setup.critic.step(params.critic, carry.critic, *given)
    return Decision(
        carry=Carry(actor_carry, critic_carry),
        action=action,
        log_prob=policy.log_prob(action),
        forced=forced,
        value=(taken * values).sum(axis=-1),
        baseline=(probs * values).sum(axis=-1),
    )


def actor_loss(
    hyper: Hyper, policy: Distribution, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """Return PPO's clipped surrogate loss, with an entropy bonus."""
    log_ratio = policy.log_prob(batch.steps.action) - batch.steps.log_prob
    chex.assert_equal_shape((log_ratio, batch.advantage))
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - hyper.clip_eps, 1 + hyper.clip_eps)
    policy_loss = -jnp.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
    entropy = policy.entropy(key).mean()
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
    value_loss = 0.5 * jnp.maximum(*errors).mean()
    return hyper.vf_coef * value_loss, {
        "loss/value": value_loss,
        "value/explained_variance": explained_variance(value, batch.target),
    }


def rollout(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Rollout]:
    """Act for T steps."""
    config = setup.config
    envs, no_reset = AutoReset(env, config.num_envs), jnp.zeros(config.num_envs, bool)
    decide_now = partial(decide, setup, state.hyper, state.params)

    def step(state: TrainState, key: Array) -> tuple[TrainState, tuple[Transition, Metrics]]:
        key, key_terminal = jax.random.split(key)
        observation, reset_before = inputs = state.timestep.observation, state.timestep.last()
        decision = decide_now(state.carry, *inputs, key)
        executed = executed_action(decision.action, setup.spec.action_kind)
        env_state, timestep = envs.step(state.env_state, executed)
        transition = Transition(
            observation=observation,
            reset_before=reset_before,
            action=decision.action,
            log_prob=decision.log_prob,
            forced=decision.forced,
            value=decision.value,
            baseline=decision.baseline,
            reward=timestep.reward,
            discount=timestep.discount,
            ended=timestep.last(),
            terminal_value=terminal_value(
                timestep,
                lambda terminal: decide_now(decision.carry, terminal, no_reset, key_terminal).value,
            ),
        )
        state = state._replace(env_state=env_state, timestep=timestep, carry=decision.carry)
        return state, (transition, episode_sums(timestep))

    start, (key, key_steps, key_last) = state.carry, jax.random.split(state.key, 3)
    keys = jax.random.split(key_steps, config.rollout_length)
    state, (transitions, episodes) = jax.lax.scan(step, state._replace(key=key), keys)
    last = state.timestep
    last_value = decide_now(state.carry, last.observation, last.last(), key_last).value
    episodes = jax.tree.map(jnp.sum, episodes)
    return state, Rollout(
        transitions=transitions, carry=start, last_value=last_value, episodes=episodes
    )


def global_state(observation: Observation) -> Array:
    """Return the global state, (..., G), which `Config.needs_global_state` asks for."""
    assert observation.global_state is not None
    return observation.global_state


def sequences(hyper: Hyper, collected: Rollout) -> Batch:
    """Return each environment's rollout with its advantages (Eq. 2) and value targets."""
    steps = collected.transitions
    target = targets(steps, collected.last_value, hyper.gamma, hyper.td_lambda)
    steps, target = split_time((steps, target), len(target))
    advantage = steps.value - steps.baseline
    return Batch(steps=steps, advantage=advantage, target=target, carry=collected.carry)


def losses(
    params: Params, setup: Setup, hyper: Hyper, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """Run both networks along the sequences and add their losses; each trains its own network."""
    steps, carry = batch.steps, batch.carry
    inputs = steps.observation, steps.reset_before
    _, policy = spread(setup.actor.unroll, params.actor, carry.actor, *inputs)
    own_action = steps.action[:, :, :, None]  # (B, C, N, 1[, A])
    given = global_state(steps.observation), steps.action, steps.reset_before, own_action
    _, value = spread(setup.critic.unroll, params.critic, carry.critic, *given)
    loss_actor, metrics_actor = actor_loss(hyper, policy, batch, key)
    loss_critic, metrics_critic = critic_loss(hyper, value[..., 0], batch)
    return loss_actor + loss_critic, metrics_actor | metrics_critic


def optimisers(config: Config, hyper: Hyper) -> Params:
    """Return each network's optax.GradientTransformation; `anneal_lr` anneals both rates to 0."""
    steps_per_update = hyper.ppo_epochs * hyper.num_minibatches
    num_steps = float(config.num_updates * steps_per_update)  # int32 overflows

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
    setup: Setup, state: TrainState, batch: Batch, key: Array
) -> tuple[TrainState, Metrics]:
    """Pass over the batch once, in random minibatches of sequences."""
    key_order, key_minibatches = jax.random.split(key)
    order = jax.random.permutation(key_order, setup.config.num_envs)
    order = order.reshape(state.hyper.num_minibatches, -1)

    def minibatch(state: TrainState, inputs: tuple[Array, Array]) -> tuple[TrainState, Metrics]:
        rows, key = inputs
        return update_minibatch(setup, state, jax.tree.map(lambda x: x[rows], batch), key)

    keys = jax.random.split(key_minibatches, len(order))
    return jax.lax.scan(minibatch, state, (order, keys))


def update(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Metrics]:
    """Collect a rollout and train on it for `ppo_epochs`."""
    state, collected = rollout(setup, env, state)
    batch = sequences(state.hyper, collected)
    key, key_epochs = jax.random.split(state.key)
    state, metrics = jax.lax.scan(
        lambda state, key: update_epoch(setup, state, batch, key),
        state._replace(key=key),
        jax.random.split(key_epochs, state.hyper.ppo_epochs),
    )
    gap = stops.advantage_gap(setup.spec, batch.advantage, batch.steps.forced)
    return state, jax.tree.map(jnp.mean, metrics) | gap | episode_means(collected.episodes)


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
    )


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
    """Run `python -m magpo.systems.coma env=<suite>/<task> key=value ...`."""
    experiment.main(__file__)


if __name__ == "__main__":
    main()
