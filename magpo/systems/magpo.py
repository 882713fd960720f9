"""MAGPO: multi-agent guided policy optimisation.

A centralised *guider*, autoregressive over the agents (Sable or MAT), collects the experience and
is trained by PPO. Decentralised *learners*, one recurrent policy shared by all agents, imitate the
guider, each from its own observations. The guider's ratio to the learners is clipped to `delta`,
and a KL term pulls the guider back where the ratio has left this bound, so that the guider finds no
coordination that the learners cannot follow. Only the learners are evaluated and deployed.

Source: "Multi-Agent Guided Policy Optimization". The paper's mu_phi is `guider`, its pi_theta is
`learner`, and its mu_old is the guider that collected the rollout.

- `guider_loss`: Eq. 9 with the double clipping of Eq. 10 and the KL mask m
- `learner_loss`: Eq. 11 and 12; the paper's lambda is `rl_coef`
- `advantages`: generalised advantage estimation from the guider's values

As in the released code, but not in the paper, the guider's loss includes a value loss and an
entropy bonus. Differences from the released code:

- The learners minimise KL(pi || mu), as printed in Eq. 11 (`learner_kl`).
- Truncated episodes bootstrap.
- The guider's feed-forward layers train (`network.guider.ffn`).

Not from the paper, but ours: `adapted`, which moves delta in training (`delta_mode: adaptive`).

Run:

    python -m magpo.systems.magpo env=rware/tiny-4ag
"""

import sys
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

if __name__ == "magpo":
    sys.exit("error: run systems as python -m magpo.systems.<name>, and rename a copy of magpo.py")

import chex
import jax
import jax.numpy as jnp
import optax
from pydantic import Field

from magpo import experiment, moments
from magpo.contract import Card, Deployed, Parameters, as_data, hyperparameters
from magpo.envs.wrappers import AutoReset, terminal_value
from magpo.errors import ConfigError
from magpo.metrics import episode_means, episode_sums, explained_variance, masked_mean
from magpo.moments import Moments
from magpo.networks.autoregressive import init_joint
from magpo.networks.heads import Distribution, executed_action
from magpo.networks.kernels import spread
from magpo.networks.mat import MAT
from magpo.networks.recurrent import Actors, split_time
from magpo.networks.sable import Sable
from magpo.optimiser import clipped_adam, descend, grad_norms, init_each
from magpo.types import Array, Environment, EnvSpec, Metrics, Observation, TimeStep
from magpo.values import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, must_divide

CARD = Card(
    centralised="a guider, in training",
    deployed=Deployed.EACH_AGENT,
    carry="GRU",
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
    delta: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None
    delta_mode: Literal["fixed", "adaptive"]
    delta_target: PositiveFloat
    rl_coef: NonNegativeFloat
    learner_kl: Literal["guider_to_learner", "learner_to_guider"]
    value_norm: bool
    anneal_lr: bool
    dead_agents: Literal["learn", "mask"]


@dataclass(frozen=True)
class GuiderConfig:
    """The guider's settings, `network.guider.*`."""

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
    """The learner's settings, `network.learner.*`."""

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
    num_updates: int
    hyper: Hyper
    network: NetworkConfig
    needs_global_state: ClassVar[bool] = False

    def __post_init__(self) -> None:
        num_minibatches, chunk_size = self.hyper.num_minibatches, self.network.guider.chunk_size
        must_divide("system.num_minibatches", num_minibatches, "num_envs", self.num_envs)
        must_divide("network.guider.chunk_size", chunk_size, "rollout_length", self.rollout_length)
        if self.hyper.delta_mode == "adaptive" and self.hyper.delta is None:
            raise ValueError(
                "system.delta_mode=adaptive begins with system.delta, so not with null"
            )


class Params(NamedTuple):
    """The parameters of both networks; also the structure of gradients and optimiser states."""

    guider: Any
    learner: Any


class Carry(NamedTuple):
    """The recurrent state of both networks."""

    guider: Any  # (E, ...)
    learner: Array  # (E, N, H)


class TrainState(NamedTuple):
    params: Params
    opt_state: Params
    hyper: Hyper  # floats () each
    key: Array
    env_state: Any  # (E, ...)
    timestep: TimeStep  # (E, ...) with the observation to act on next
    carry: Carry
    moments: Moments | None  # of the value targets; None without `value_norm`
    exponent: Array | None  # () delta is `hyper.delta` to this power; None if `delta_mode: fixed`


class Transition(NamedTuple):
    """One step of E environments. `rollout` stacks T of them."""

    observation: Observation  # (E, ...)
    reset_before: Array  # (E,) bool, true for an episode's first observation
    action: Array  # (E, N[, A]), raw: a squashed action before tanh
    log_prob: Array  # (E, N) of the guider
    value: Array  # (E, N)
    reward: Array  # (E, N)
    discount: Array  # (E,) 0 where the episode terminated
    ended: Array  # (E,) bool, terminated or truncated
    terminal_value: Array | None  # (E, N) where truncated; None on suites that never truncate


class Rollout(NamedTuple):
    transitions: Transition  # (T, E, ...)
    carry: Carry  # (E, ...) at the start
    last_value: Array  # (E, N) of the observation after the last transition
    episodes: Metrics  # () sums over the episodes that ended, and their number


class Batch(NamedTuple):
    """B sequences of C steps, each an environment's whole rollout; minibatches are drawn from B."""

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
    guider: Sable | MAT
    learner: Actors


def make(config: Config, spec: EnvSpec) -> Setup:
    """Assemble the networks for an environment. Raises ConfigError."""
    if config.hyper.dead_agents == "mask" and spec.stop_action is None:
        raise ConfigError(f"system.dead_agents=mask is for smax/..., not {spec.name}")
    sizes, action = asdict(config.network.guider), (spec.action_dim, spec.action_kind)
    if sizes.pop("kind") == "sable":
        guider: Any = Sable(spec.num_agents, *action, **sizes)
    else:
        guider = MAT(*action, **{key: sizes[key] for key in ("embed_dim", "n_head", "n_block")})
    return Setup(config, spec, guider, learner=Actors(spec, config.network.learner.hidden_dim))


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


def guider_loss(
    hyper: Hyper,
    guider: Distribution,
    learner: Distribution,
    value: Array,
    batch: Batch,
    key: Array,
) -> tuple[Array, Metrics]:
    """Return the guider's loss (Eq. 9 and 10): doubly clipped PPO and a masked KL to the learner.

    The KL applies where the guider's ratio to the learner has left `delta`.
    """
    steps, learner = batch.steps, jax.lax.stop_gradient(learner)
    log_guider, log_learner = guider.log_prob(steps.action), learner.log_prob(steps.action)
    log_ratio, log_distance = log_guider - steps.log_prob, log_guider - log_learner
    chex.assert_equal_shape((log_ratio, log_distance, batch.advantage, value, batch.target))
    ratio, log_delta = jnp.exp(log_ratio), jnp.log(jnp.asarray(hyper.delta))  # null: infinite
    within_delta = jnp.clip(log_distance, -log_delta, log_delta)
    clipped = jnp.exp(within_delta + log_learner - steps.log_prob)
    clipped = jnp.clip(clipped, 1 - hyper.clip_eps, 1 + hyper.clip_eps)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
    outside = jnp.abs(log_distance) > log_delta
    kl = guider.kl(learner)
    policy_loss = masked_mean(outside * kl - surrogate, batch.learns)
    entropy = masked_mean(guider.entropy(key), batch.learns)

    value_change = jnp.clip(value - steps.value, -hyper.clip_eps, hyper.clip_eps)
    errors = (value - batch.target) ** 2, (steps.value + value_change - batch.target) ** 2
    value_loss = 0.5 * masked_mean(jnp.maximum(*errors), batch.learns)

    loss = policy_loss - hyper.ent_coef * entropy + hyper.vf_coef * value_loss
    return loss, {
        "loss/guider": policy_loss,
        "loss/value": value_loss,
        "value/explained_variance": explained_variance(value, batch.target),
        "policy/guider_entropy": entropy,
        "policy/approx_kl": (ratio - 1 - log_ratio).mean(),
        "policy/clipped_share": (jnp.abs(ratio - 1) > hyper.clip_eps).mean(),
        "policy/masked_share": outside.mean(),
        "policy/kl_guider_to_learner": kl.mean(),
        "policy/guider_ratio_std": ratio.std(),
    }


def learner_loss(
    hyper: Hyper, guider: Distribution, learner: Distribution, batch: Batch
) -> tuple[Array, Metrics]:
    """Return the learner's loss (Eq. 11 and 12): a KL to imitate the guider, and a PPO term."""
    guider = jax.lax.stop_gradient(guider)
    reverse_kl = learner.kl(guider)
    kl = guider.kl(learner) if hyper.learner_kl == "guider_to_learner" else reverse_kl
    ratio = jnp.exp(learner.log_prob(batch.steps.action) - batch.steps.log_prob)
    clipped = jnp.clip(ratio, 1 - hyper.clip_eps, 1 + hyper.clip_eps)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
    loss = masked_mean(kl - hyper.rl_coef * surrogate, batch.learns)
    return loss, {
        "loss/learner": loss,
        "policy/kl_learner_to_guider": reverse_kl.mean(),
        "policy/learner_ratio_std": ratio.std(),
    }


def rollout(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Rollout]:
    """Act with the guider for T steps, then run the learners along the rollout."""
    config, params = setup.config, state.params.guider
    envs, no_reset = AutoReset(env, config.num_envs), jnp.zeros(config.num_envs, bool)

    def value(carry: Any, observation: Observation, reset_before: Array) -> Array:
        value = setup.guider.apply(params, carry, observation, reset_before, method="value")
        return moments.denormalise(state.moments, value)

    def step(state: TrainState, key: Array) -> tuple[TrainState, tuple[Transition, Metrics]]:
        observation, reset_before = state.timestep.observation, state.timestep.last()
        joint = setup.guider.apply(
            params, state.carry.guider, observation, reset_before, key, method="act"
        )
        action = executed_action(joint.action, setup.spec.action_kind)
        env_state, timestep = envs.step(state.env_state, action)
        transition = Transition(
            observation=observation,
            reset_before=reset_before,
            action=joint.action,
            log_prob=joint.log_prob,
            value=moments.denormalise(state.moments, joint.value),
            reward=timestep.reward,
            discount=timestep.discount,
            ended=timestep.last(),
            terminal_value=terminal_value(
                timestep, lambda terminal: value(joint.carry, terminal, no_reset)
            ),
        )
        carry = state.carry._replace(guider=joint.carry)
        state = state._replace(env_state=env_state, timestep=timestep, carry=carry)
        return state, (transition, episode_sums(timestep))

    start, (key, key_steps) = state.carry, jax.random.split(state.key)
    keys = jax.random.split(key_steps, config.rollout_length)
    state, (transitions, episodes) = jax.lax.scan(step, state._replace(key=key), keys)
    last = state.timestep
    last_value = value(state.carry.guider, last.observation, last.last())
    inputs = transitions.observation, transitions.reset_before
    learner, _ = setup.learner.unroll(
        state.params.learner, start.learner, *split_time(inputs, config.rollout_length)
    )
    state = state._replace(carry=state.carry._replace(learner=learner))
    episodes = jax.tree.map(jnp.sum, episodes)
    return state, Rollout(
        transitions=transitions, carry=start, last_value=last_value, episodes=episodes
    )


def sequences(hyper: Hyper, collected: Rollout) -> Batch:
    """Split a rollout into sequences, with their advantages and value targets."""
    steps = collected.transitions
    estimates = advantages(steps, collected.last_value, hyper.gamma, hyper.gae_lambda)
    steps, (advantage, target) = split_time((steps, estimates), len(steps.reward))
    learns = None
    if hyper.dead_agents == "mask":
        learns = steps.observation.action_mask.sum(axis=-1) > 1  # the dead have no choice
    return Batch(
        steps=steps, advantage=advantage, target=target, learns=learns, carry=collected.carry
    )


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
    steps, carry = batch.steps, batch.carry
    of_guider = carry.guider, steps.observation, steps.action, steps.reset_before
    value, guider = spread(setup.guider.apply, params.guider, *of_guider)
    of_learner = carry.learner, steps.observation, steps.reset_before
    _, learner = spread(setup.learner.unroll, params.learner, *of_learner)
    loss_guider, metrics_guider = guider_loss(hyper, guider, learner, value, batch, key)
    loss_learner, metrics_learner = learner_loss(hyper, guider, learner, batch)
    return loss_guider + loss_learner, metrics_guider | metrics_learner


def optimiser(config: Config, hyper: Hyper) -> optax.GradientTransformation:
    """Return both networks' optimiser; `anneal_lr` anneals the step size to 0."""
    steps_per_update = hyper.ppo_epochs * hyper.num_minibatches
    num_steps = float(config.num_updates * steps_per_update)  # int32 overflows
    falling = optax.linear_schedule(hyper.actor_lr, 0.0, num_steps)
    return clipped_adam(falling if hyper.anneal_lr else hyper.actor_lr, hyper.max_grad_norm)


def update_minibatch(
    setup: Setup, state: TrainState, batch: Batch, key: Array
) -> tuple[TrainState, Metrics]:
    """Take a gradient step with each network, on advantages normalised over the minibatch."""
    hyper, advantage = state.hyper, batch.advantage
    mean, std = advantage.mean(where=batch.learns), advantage.std(where=batch.learns)
    batch = batch._replace(advantage=(advantage - mean) / (std + 1e-8))
    grads, metrics = jax.grad(losses, has_aux=True)(state.params, setup, hyper, batch, key)
    adam = optimiser(setup.config, hyper)
    params, opt_state = descend(Params(adam, adam), state.params, state.opt_state, grads)
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


def bound(state: TrainState) -> Any:
    """Return delta, (): the hyperparameter, or where `delta_mode: adaptive` has moved it."""
    delta: Any = state.hyper.delta
    return delta if state.exponent is None else delta**state.exponent


def adapted(state: TrainState, kl: Array, masked_share: Array) -> TrainState:
    """Move delta on a log scale, so that the guider's KL to the learners stays at `delta_target`.

    Above the target, delta moves towards 1. Below it, delta moves away from 1, but only while it
    holds the guider back; elsewhere it changes nothing and would only drift. The arguments, (),
    are means over an update's last epoch.
    """
    if state.exponent is None:
        return state
    hyper: Any = state.hyper
    step = 0.3 * jnp.clip(jnp.log(hyper.delta_target / jnp.maximum(kl, 1e-9)), -1.0, 1.0)
    step = jnp.where((step > 0) & (masked_share < 0.001), 0.0, step)
    log_delta = jnp.clip(jnp.log(bound(state)) * jnp.exp(step), jnp.log(1.01), jnp.log(10.0))
    return state._replace(exponent=log_delta / jnp.log(hyper.delta))


def update(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Metrics]:
    """Collect a rollout and train on it for `ppo_epochs`."""
    state, collected = rollout(setup, env, state)
    state, batch = normalised(state, sequences(state.hyper, collected))
    key, key_epochs = jax.random.split(state.key)
    hyper, delta = state.hyper, bound(state)
    state, metrics = jax.lax.scan(
        lambda state, key: update_epoch(setup, state, batch, key),
        state._replace(key=key, hyper=replace(hyper, delta=delta)),
        jax.random.split(key_epochs, hyper.ppo_epochs),
    )
    last = jax.tree.map(lambda x: x[-1].mean(), metrics)
    kl, masked_share = last["policy/kl_guider_to_learner"], last["policy/masked_share"]
    state = adapted(state._replace(hyper=hyper), kl, masked_share)
    metrics = jax.tree.map(jnp.mean, metrics) | {"policy/delta": delta}
    return state, metrics | episode_means(collected.episodes)


def init(setup: Setup, env: Environment, key: Array) -> TrainState:
    """Return the state before the first update: everything that training changes."""
    config, hyper = setup.config, setup.config.hyper
    key, key_env, key_guider, key_learner = jax.random.split(key, 4)
    env_state, timestep = AutoReset(env, config.num_envs).reset(key_env)
    carry = Carry(
        guider=setup.guider.initial_carry(config.num_envs),
        learner=setup.learner.initial_carry((config.num_envs,)),
    )
    params = Params(
        guider=init_joint(setup.guider, key_guider, carry.guider, timestep.observation, setup.spec),
        learner=setup.learner.init(key_learner),
    )
    adam = optimiser(config, hyper)
    return TrainState(
        params=params,
        opt_state=init_each(Params(adam, adam), params),
        hyper=as_data(hyper),
        key=key,
        env_state=env_state,
        timestep=timestep,
        carry=carry,
        moments=moments.init(hyper.value_norm),
        exponent=jnp.ones(()) if hyper.delta_mode == "adaptive" else None,
    )


def train_chunk(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Metrics]:
    """Run the U updates between two evaluations; each metric is (U,)."""
    return jax.lax.scan(
        lambda state, _: update(setup, env, state), state, length=setup.config.updates_per_chunk
    )


def policy_params(state: TrainState) -> Any:
    """Return the learner's parameters, which are evaluated, kept as best and deployed."""
    return state.params.learner


def initial_carry(setup: Setup, batch_shape: tuple[int, ...]) -> Array:
    """Return the learner's carry at an episode's start, (*batch_shape, N, H)."""
    return setup.learner.initial_carry(batch_shape)


def act(
    setup: Setup, params: Any, carry: Array, observation: Observation, key: Array, greedy: bool
) -> tuple[Array, Array]:
    """Return actions (B, N[, A]), each from one agent's observation, and the next carry."""
    return setup.learner.act(params, carry, observation, key, greedy)


def main() -> None:
    """Run `python -m magpo.systems.magpo env=<suite>/<task> key=value ...`."""
    experiment.main(__file__)


if __name__ == "__main__":
    main()
