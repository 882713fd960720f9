"""DAE: PPO with difference advantage estimates.

Decentralised actors share one set of parameters, and a recurrent critic reads the global state, as
in MAPPO. A second network predicts each agent's reward from the global state and the actions of
all *other* agents, that is, the reward expected over the agent's own action. Each agent's advantage
is GAE without a share of the rewards that were to be expected whatever the agent did; the share
shrinks with `beta` from step to step, because later rewards also depend on the agent's action.

Source: "Difference Advantage Estimation for Multi-Agent Policy Gradients" (Li et al., 2022), in the
form of Eq. 3 of "Generalized Per-Agent Advantage Estimation for Multi-Agent Policy Optimization"
(Kim et al., 2026), one of whose baselines it is. The authors' code is github.com/liyheng/DAE.

- `advantages`: generalised advantage estimates, equal to MAPPO's
- `expected_rewards`: what Eq. 3 subtracts from them
- `reward_loss`: the regression of rewards

Run:

    python -m magpo.systems.dae env=smax/5m_vs_6m
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
from magpo.networks.heads import Distribution, executed_action
from magpo.networks.kernels import spread
from magpo.networks.recurrent import ActionCritic, Actors, Critic, split_time
from magpo.optimiser import clipped_adam, descend, grad_norms, init_each
from magpo.types import Array, Environment, EnvSpec, Metrics, Observation, TimeStep
from magpo.values import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, must_divide

CARD = Card(
    centralised="critics, in training",
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
    gae_lambda: Fraction
    beta: Fraction
    anomaly_probability: Fraction


@dataclass(frozen=True)
class ActorConfig:
    """The actor's settings, `network.actor.*`."""

    hidden_dim: PositiveInt
    memory: bool


@dataclass(frozen=True)
class CriticConfig:
    """The settings of the critic and of the reward network, `network.critic.*`."""

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
    """The networks' parameters; also the structure of gradients and optimiser states."""

    actor: Any
    critic: Any
    reward: Any


class Carry(NamedTuple):
    """Hidden states of E running episodes."""

    actor: Any  # (E, N, H), () without memory
    critic: Array  # (E, 1, H)
    reward: Array  # (E, H)


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
    value: Array  # (E, N)
    reward: Array  # (E, N)
    expected_reward: Array  # (E, N) over the agent's own action
    discount: Array  # (E,) 0 where the episode terminated
    ended: Array  # (E,) bool, terminated or truncated
    terminal_value: Array | None  # (E, N) where truncated; None on suites that never truncate


class Rollout(NamedTuple):
    transitions: Transition  # (T, E, ...)
    carry: Carry  # (E, ...) before the first transition
    last_value: Array  # (E, N) of the observation after the last transition
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
    critic: Critic
    reward: ActionCritic


def make(config: Config, spec: EnvSpec) -> Setup:
    """Assemble the networks for an environment. Raises ConfigError."""
    stops.check(config.hyper.anomaly_probability, spec)
    actor, width = config.network.actor, config.network.critic.hidden_dim
    return Setup(
        config,
        spec,
        actor=Actors(spec, actor.hidden_dim, recurrent=actor.memory),
        critic=Critic(spec, width),
        reward=ActionCritic(spec, width, sees="others"),
    )


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


def expected_rewards(transitions: Transition, trace_decay: float, beta: float) -> Array:
    """Return what DAE subtracts from the advantages, (T, E, N), by Eq. 3.

    It is the sum over l of trace_decay^l beta^(l+1) E[r_(t+l)], up to the end of the episode or of
    the rollout, where `trace_decay` is gamma times lambda.
    """

    def step(ahead: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        expected, ended = inputs
        ahead = beta * (expected + trace_decay * (1.0 - ended[..., None]) * ahead)
        return ahead, ahead

    inputs = transitions.expected_reward, transitions.ended
    _, ahead = jax.lax.scan(step, jnp.zeros_like(inputs[0][0]), inputs, reverse=True)
    return ahead


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


def reward_loss(expected: Array, batch: Batch) -> tuple[Array, Metrics]:
    """Return half the mean squared error of the expected rewards."""
    chex.assert_equal_shape((expected, batch.steps.reward))
    loss = 0.5 * ((expected - batch.steps.reward) ** 2).mean()
    return loss, {"loss/reward": loss}


def rollout(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Rollout]:
    """Act for T steps."""
    config, hyper = setup.config, state.hyper
    envs, no_reset = AutoReset(env, config.num_envs), jnp.zeros(config.num_envs, bool)
    actor = partial(setup.actor.step, state.params.actor)
    critic = partial(setup.critic.step, state.params.critic)
    reward = partial(setup.reward.step, state.params.reward)

    def step(state: TrainState, key: Array) -> tuple[TrainState, tuple[Transition, Metrics]]:
        key_action, key_stop = jax.random.split(key)
        observation, reset_before = state.timestep.observation, state.timestep.last()
        actor_carry, policy = actor(state.carry.actor, observation, reset_before)
        critic_carry, value = critic(state.carry.critic, observation, reset_before)
        action, forced = stops.force(
            setup.spec, hyper.anomaly_probability, observation, policy.sample(key_action), key_stop
        )
        given = global_state(observation), action, reset_before
        reward_carry, expected_reward = reward(state.carry.reward, *given)
        executed = executed_action(action, setup.spec.action_kind)
        env_state, timestep = envs.step(state.env_state, executed)
        transition = Transition(
            observation=observation,
            reset_before=reset_before,
            action=action,
            log_prob=policy.log_prob(action),
            forced=forced,
            value=value,
            reward=timestep.reward,
            expected_reward=expected_reward,
            discount=timestep.discount,
            ended=timestep.last(),
            terminal_value=terminal_value(
                timestep, lambda terminal: critic(critic_carry, terminal, no_reset)[1]
            ),
        )
        carry = Carry(actor_carry, critic_carry, reward_carry)
        state = state._replace(env_state=env_state, timestep=timestep, carry=carry)
        return state, (transition, episode_sums(timestep))

    start, (key, key_steps) = state.carry, jax.random.split(state.key)
    keys = jax.random.split(key_steps, config.rollout_length)
    state, (transitions, episodes) = jax.lax.scan(step, state._replace(key=key), keys)
    last = state.timestep
    _, last_value = critic(state.carry.critic, last.observation, last.last())
    episodes = jax.tree.map(jnp.sum, episodes)
    return state, Rollout(
        transitions=transitions, carry=start, last_value=last_value, episodes=episodes
    )


def global_state(observation: Observation) -> Array:
    """Return the global state, (..., G), which `Config.needs_global_state` asks for."""
    assert observation.global_state is not None
    return observation.global_state


def sequences(hyper: Hyper, collected: Rollout) -> Batch:
    """Return each environment's rollout with its advantages (Eq. 3) and value targets."""
    steps, trace_decay = collected.transitions, hyper.gamma * hyper.gae_lambda
    advantage, target = advantages(steps, collected.last_value, hyper.gamma, hyper.gae_lambda)
    expected = expected_rewards(steps, trace_decay, hyper.beta)
    estimates = advantage - expected, target - expected
    steps, (advantage, target) = split_time((steps, estimates), len(advantage))
    return Batch(steps=steps, advantage=advantage, target=target, carry=collected.carry)


def losses(
    params: Params, setup: Setup, hyper: Hyper, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """Run the networks along the sequences and add their losses; each trains its own network."""
    steps, carry = batch.steps, batch.carry
    inputs = steps.observation, steps.reset_before
    _, policy = spread(setup.actor.unroll, params.actor, carry.actor, *inputs)
    _, value = spread(setup.critic.unroll, params.critic, carry.critic, *inputs)
    given = global_state(steps.observation), steps.action, steps.reset_before
    _, expected = spread(setup.reward.unroll, params.reward, carry.reward, *given)
    loss_actor, metrics_actor = actor_loss(hyper, policy, batch, key)
    loss_critic, metrics_critic = critic_loss(hyper, value, batch)
    loss_reward, metrics_reward = reward_loss(expected, batch)
    loss = loss_actor + loss_critic + loss_reward
    return loss, metrics_actor | metrics_critic | metrics_reward


def optimisers(config: Config, hyper: Hyper) -> Params:
    """Return each network's optax.GradientTransformation; `anneal_lr` anneals all rates to 0."""
    steps_per_update = hyper.ppo_epochs * hyper.num_minibatches
    num_steps = float(config.num_updates * steps_per_update)  # int32 overflows

    def adam(learning_rate: float) -> optax.GradientTransformation:
        last = 0.0 if hyper.anneal_lr else learning_rate
        schedule = optax.linear_schedule(learning_rate, last, num_steps)
        return clipped_adam(schedule, hyper.max_grad_norm)

    return Params(adam(hyper.actor_lr), adam(hyper.critic_lr), adam(hyper.critic_lr))


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
    key, key_env, *keys = jax.random.split(key, 5)
    env_state, timestep = AutoReset(env, *batch_shape).reset(key_env)
    networks: list[Any] = [setup.actor, setup.critic, setup.reward]
    carry = Carry(*(network.initial_carry(batch_shape) for network in networks))
    params = Params(*(network.init(key) for network, key in zip(networks, keys, strict=True)))
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
    """Run `python -m magpo.systems.dae env=<suite>/<task> key=value ...`."""
    experiment.main(__file__)


if __name__ == "__main__":
    main()
