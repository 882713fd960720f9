"""MAT: the multi-agent transformer, trained by PPO.

One network is centralised both in training and in acting. An encoder reads all agents' observations
of one timestep and returns each agent's value. A decoder returns one agent's policy after the
other, from the encoding and the actions of the agents before it. There is no memory over time.

Source: "Multi-Agent Reinforcement Learning is a Sequence Modeling Problem" (Wen et al., 2022). The
network is `magpo.networks.mat`.

- `ppo_loss`: the clipped surrogate objective per agent, Eq. 5, and the loss of the values, Eq. 4
- `advantages`: generalised advantage estimation from the encoder's values

Acting caches keys and values, so each agent's turn reads one token. Unlike in the released code of
the MAGPO paper, truncated episodes bootstrap.

Run:

    python -m magpo.systems.mat env=rware/tiny-4ag
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
from magpo.networks.mat import MAT
from magpo.networks.recurrent import split_time
from magpo.optimiser import clipped_adam, grad_norms
from magpo.types import Array, Environment, EnvSpec, Metrics, Observation, TimeStep
from magpo.values import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, must_divide

CARD = Card(
    centralised="acting and critic",
    deployed=Deployed.JOINT,
    carry="none",
    parameters=Parameters.SHARED,
    per_environment=("env_state", "timestep"),
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

    def __post_init__(self) -> None:
        must_divide("n_head", self.n_head, "embed_dim", self.embed_dim)


@dataclass(frozen=True)
class Config:
    num_envs: int
    rollout_length: int
    updates_per_chunk: int
    hyper: Hyper
    network: NetworkConfig
    needs_global_state: ClassVar[bool] = False

    def __post_init__(self) -> None:
        num_minibatches, what = self.hyper.num_minibatches, "num_envs * rollout_length"
        must_divide("system.num_minibatches", num_minibatches, what, self.num_timesteps)

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps in a rollout, from which minibatches are drawn."""
        return self.num_envs * self.rollout_length


class TrainState(NamedTuple):
    params: Any
    opt_state: Any
    hyper: Hyper  # floats () each
    key: Array
    env_state: Any  # (E, ...)
    timestep: TimeStep  # (E, ...) with the observation to act on next


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
    episodes: Metrics  # () sums over the episodes that ended, and their number


class Batch(NamedTuple):
    """B timesteps, as sequences of C = 1 step; minibatches are drawn from B."""

    steps: Transition  # (B, C, ...)
    advantage: Array  # (B, C, N)
    target: Array  # (B, C, N)


@dataclass(frozen=True)
class Setup:
    """The static parts of the system, the same for all members."""

    config: Config
    spec: EnvSpec
    network: MAT


def make(config: Config, spec: EnvSpec) -> Setup:
    """Assemble the network for an environment."""
    network = MAT(spec.action_dim, spec.action_kind, **asdict(config.network))
    return Setup(config, spec, network)


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
    envs = AutoReset(env, config.num_envs)

    def value(observation: Observation) -> Array:
        return setup.network.apply(params, (), observation, None, method="value")

    def step(state: TrainState, key: Array) -> tuple[TrainState, tuple[Transition, Metrics]]:
        observation = state.timestep.observation
        joint = setup.network.apply(params, (), observation, None, key, method="act")
        action = executed_action(joint.action, setup.spec.action_kind)
        env_state, timestep = envs.step(state.env_state, action)
        transition = Transition(
            observation=observation,
            action=joint.action,
            log_prob=joint.log_prob,
            value=joint.value,
            reward=timestep.reward,
            discount=timestep.discount,
            ended=timestep.last(),
            terminal_value=terminal_value(timestep, value),
        )
        state = state._replace(env_state=env_state, timestep=timestep)
        return state, (transition, episode_sums(timestep))

    key, key_steps = jax.random.split(state.key)
    keys = jax.random.split(key_steps, config.rollout_length)
    state, (transitions, episodes) = jax.lax.scan(step, state._replace(key=key), keys)
    last_value = value(state.timestep.observation)
    return state, Rollout(transitions, last_value, jax.tree.map(jnp.sum, episodes))


def sequences(hyper: Hyper, collected: Rollout) -> Batch:
    """Split a rollout into timesteps, with their advantages and value targets."""
    steps = collected.transitions
    estimates = advantages(steps, collected.last_value, hyper.gamma, hyper.gae_lambda)
    steps, (advantage, target) = split_time((steps, estimates), length=1)
    return Batch(steps=steps, advantage=advantage, target=target)


def losses(
    params: Any, setup: Setup, hyper: Hyper, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """Run the network along the sequences and return its loss."""
    steps = batch.steps
    inputs = (), steps.observation, steps.action, None
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
    """Pass over the batch once, in random minibatches of timesteps."""
    key_order, key_minibatches = jax.random.split(key)
    order = jax.random.permutation(key_order, setup.config.num_timesteps)
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
    return state, jax.tree.map(jnp.mean, metrics) | episode_means(collected.episodes)


def init(setup: Setup, env: Environment, key: Array) -> TrainState:
    """Return the state before the first update: everything that training changes."""
    config, hyper = setup.config, setup.config.hyper
    key, key_env, key_network = jax.random.split(key, 3)
    env_state, timestep = AutoReset(env, config.num_envs).reset(key_env)
    params = init_joint(setup.network, key_network, (), timestep.observation, setup.spec)
    return TrainState(
        params=params,
        opt_state=clipped_adam(hyper.actor_lr, hyper.max_grad_norm).init(params),
        hyper=as_data(hyper),
        key=key,
        env_state=env_state,
        timestep=timestep,
    )


def train_chunk(setup: Setup, env: Environment, state: TrainState) -> tuple[TrainState, Metrics]:
    """Run the U updates between two evaluations; each metric is (U,)."""
    return jax.lax.scan(
        lambda state, _: update(setup, env, state), state, length=setup.config.updates_per_chunk
    )


def policy_params(state: TrainState) -> Any:
    """Return the network's parameters, which are evaluated, kept as best and deployed."""
    return state.params


def initial_carry(setup: Setup, batch_shape: tuple[int, ...]) -> tuple[()]:
    """Return the empty carry: there is no memory over time."""
    del setup, batch_shape
    return ()


def act(
    setup: Setup, params: Any, carry: tuple[()], observation: Observation, key: Array, greedy: bool
) -> tuple[Array, tuple[()]]:
    """Return all agents' actions (B, N[, A]), from all observations, and the next carry."""
    joint = setup.network.apply(params, carry, observation, None, key, greedy, method="act")
    return executed_action(joint.action, setup.spec.action_kind), carry


def main() -> None:
    """Run `python -m magpo.systems.mat env=<suite>/<task> key=value ...`."""
    experiment.main(__file__)


if __name__ == "__main__":
    main()
