"""Recurrent policies and critics, with all agents as an array axis.

Each network here reads one sequence; `Actors`, `Critic` and `ActionCritic` run it for all agents of
all environments. Axis letters beyond `magpo.types`: B environments or sequences, C steps of a
sequence, K sequences that a critic reads of each environment, H features of a hidden state.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import lecun_normal, zeros_init

from magpo.networks.gru import gru
from magpo.networks.heads import (
    ActionKind,
    ActionValues,
    Distribution,
    PolicyHead,
    executed_action,
)
from magpo.networks.kernels import look_up, sum_of_others
from magpo.networks.torsos import Dense, mask_out, orthogonal, parts
from magpo.types import Array, EnvSpec, Observation, action_spec


class GRU(nn.Module):
    """A GRU from (C, B, D) inputs to (C, B, H) hidden states (Cho et al., 2014, in cuDNN's form).

    The input projections are one matmul over all steps; only the recurrence is scanned.
    """

    hidden_dim: int

    @nn.compact
    def __call__(self, hidden: Array, inputs: Array, reset_before: Array) -> Array:
        width = 3 * self.hidden_dim
        kernel_init = parts(lecun_normal(), 3)
        projected = Dense(width, kernel_init=kernel_init, name="input")(inputs)
        kernel = self.param("kernel", parts(orthogonal(), 3), (self.hidden_dim, width))
        bias = self.param("bias", zeros_init(), (self.hidden_dim,))
        return gru(hidden, projected, reset_before, kernel, bias)


class RecurrentActor(nn.Module):
    """One agent's policy from its own observations: Dense, GRU, Dense, head (Yu et al., 2022)."""

    action_dim: int
    action_kind: ActionKind
    hidden_dim: int

    @nn.compact
    def __call__(
        self, hidden: Array, agents_view: Array, action_mask: Array, reset_before: Array
    ) -> tuple[Array, Distribution]:
        """Return the last hidden state (B, H) and the distributions (C, B).

        hidden (B, H), agents_view (C, B, O), action_mask (C, B, A), reset_before (C, B).
        """
        init = orthogonal(2**0.5)
        embedded = nn.relu(Dense(self.hidden_dim, kernel_init=init, name="embed")(agents_view))
        hiddens = GRU(self.hidden_dim, name="gru")(hidden, embedded, reset_before)
        mixed = nn.relu(Dense(self.hidden_dim, kernel_init=init, name="mix")(hiddens))
        head = PolicyHead(self.action_dim, self.action_kind, name="head")
        return hiddens[-1], head(mixed, action_mask)


class FeedForwardActor(nn.Module):
    """One agent's policy without memory: two tanh layers and a head, for continuous control."""

    action_dim: int
    action_kind: ActionKind
    hidden_dim: int

    @nn.compact
    def __call__(
        self, hidden: tuple[()], agents_view: Array, action_mask: Array, reset_before: Array
    ) -> tuple[tuple[()], Distribution]:
        """Return the empty `hidden` and the distributions (C, B); `reset_before` is ignored.

        agents_view (C, B, O), action_mask (C, B, A).
        """
        del reset_before
        x = agents_view
        for _ in range(2):
            x = nn.tanh(Dense(self.hidden_dim, kernel_init=orthogonal(2**0.5))(x))
        return hidden, PolicyHead(self.action_dim, self.action_kind)(x, action_mask)


class RecurrentActionValues(nn.Module):
    """One agent's action values from its own observations: Dense, GRU, head."""

    action_dim: int
    action_kind: ActionKind
    hidden_dim: int

    @nn.compact
    def __call__(
        self, hidden: Array, agents_view: Array, action_mask: Array, reset_before: Array
    ) -> tuple[Array, ActionValues]:
        """Return the last hidden state (B, H) and the values (C, B, A).

        hidden (B, H), agents_view (C, B, O), action_mask (C, B, A), reset_before (C, B).
        """
        init = orthogonal()
        embedded = nn.relu(Dense(self.hidden_dim, kernel_init=init, name="embed")(agents_view))
        hiddens = GRU(self.hidden_dim, name="gru")(hidden, embedded, reset_before)
        value = Dense(self.action_dim, kernel_init=init, name="head")(hiddens)
        return hiddens[-1], ActionValues(mask_out(value, action_mask))


class RecurrentCritic(nn.Module):
    """Values from an agent's observations or the global state: Dense, GRU, Dense, head."""

    num_values: int
    hidden_dim: int

    @nn.compact
    def __call__(self, hidden: Array, inputs: Array, reset_before: Array) -> tuple[Array, Array]:
        """Return the last hidden state (B, H) and the values (C, B, V).

        hidden (B, H), inputs (C, B, D), reset_before (C, B).
        """
        init = orthogonal(2**0.5)
        embedded = nn.relu(Dense(self.hidden_dim, kernel_init=init, name="embed")(inputs))
        hiddens = GRU(self.hidden_dim, name="gru")(hidden, embedded, reset_before)
        mixed = nn.relu(Dense(self.hidden_dim, kernel_init=init, name="mix")(hiddens))
        head = Dense(self.num_values, kernel_init=orthogonal(1.0), name="head")
        return hiddens[-1], head(mixed)


def split_time(tree: Any, length: int) -> Any:
    """Split (T, E, ...) into contiguous sequences (B, C, ...) of one environment each, C = length.

    B = T / C * E; the first E sequences are the first ones of all environments.
    """

    def split(x: Array) -> Array:
        chunks = x.reshape(-1, length, *x.shape[1:]).swapaxes(1, 2)  # (T / C, E, C, ...)
        return chunks.reshape(-1, *chunks.shape[2:])

    return jax.tree.map(split, tree)


def _unroll(
    network: nn.Module, params: Any, carry: Any, inputs: tuple[Array, ...], reset_before: Array
) -> tuple[Any, Any]:
    """Run a network along all sequences at once.

    Takes `carry` (B, K, H), `inputs` (B, C, K, ...) and `reset_before` (B, C); returns the carry
    after the last step and outputs (B, C, K, ...). The network gets time as its first axis and the
    B * K sequences as rows.
    """
    batch, length, number = inputs[0].shape[:3]
    chex.assert_equal_shape_prefix((reset_before, *inputs), 2)
    chex.assert_tree_shape_prefix(carry, (batch, number))

    def rows(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(length, batch * number, *x.shape[3:])

    hidden = jax.tree.map(lambda x: x.reshape(batch * number, -1), carry)
    resets = jnp.repeat(reset_before.T, number, axis=1)
    hidden, outputs = network.apply(params, hidden, *map(rows, inputs), resets)
    return (
        jax.tree.map(lambda x: x.reshape(batch, number, -1), hidden),
        jax.tree.map(
            lambda x: x.reshape(length, batch, number, *x.shape[2:]).swapaxes(0, 1), outputs
        ),
    )


def _step(unroll: Any, params: Any, carry: Any, *inputs: Any) -> tuple[Any, Any]:
    """Run `unroll` for one step of inputs (B, ...); return the carry and outputs (B, ...)."""
    carry, outputs = unroll(params, carry, *jax.tree.map(lambda x: x[:, None], inputs))
    return carry, jax.tree.map(lambda x: x[:, 0], outputs)


@dataclass(frozen=True)
class Actors:
    """All agents' decentralised policies.

    If `shared`, all agents have one set of parameters, otherwise each its own, along a leading axis
    N. If `values`, the networks return ActionValues instead of distributions.
    """

    spec: EnvSpec
    hidden_dim: int
    recurrent: bool = True
    shared: bool = True
    values: bool = False

    @property
    def network(self) -> RecurrentActor | FeedForwardActor | RecurrentActionValues:
        """One agent's network."""
        kind: Any = RecurrentActor if self.recurrent else FeedForwardActor
        kind = RecurrentActionValues if self.values else kind
        return kind(self.spec.action_dim, self.spec.action_kind, self.hidden_dim)

    def init(self, key: Array) -> Any:
        """Return the parameters."""
        view = jnp.zeros((1, 1, self.spec.num_features))
        mask, reset_before = jnp.ones((1, 1, self.spec.action_dim), bool), jnp.ones((1, 1), bool)
        hidden = jax.tree.map(lambda x: x[:, 0], self.initial_carry((1,)))

        def init(key: Array) -> Any:
            return self.network.init(key, hidden, view, mask, reset_before)

        return (
            init(key)
            if self.shared
            else jax.vmap(init)(jax.random.split(key, self.spec.num_agents))
        )

    def initial_carry(self, batch_shape: tuple[int, ...]) -> Any:
        """Return the carry at an episode's start, (*batch_shape, N, H); () without recurrence."""
        if not self.recurrent:
            return ()
        return jnp.zeros((*batch_shape, self.spec.num_agents, self.hidden_dim))

    def unroll(
        self, params: Any, carry: Any, observation: Observation, reset_before: Array
    ) -> tuple[Any, Any]:
        """Run the policies along sequences.

        Args:
            carry: (B, N, H) before the first step.
            observation: leading axes (B, C).
            reset_before: (B, C) bool, where the carry is zeroed before the step.

        Returns:
            The carry (B, N, H) after the last step and the distributions (B, C, N).
        """
        if self.shared:
            return self.unroll_shared(params, carry, observation, reset_before)
        view, mask = (x.swapaxes(0, 1) for x in (observation.agents_view, observation.action_mask))
        of_agents = jax.vmap(self.network.apply, in_axes=(0, 1, 2, 2, None), out_axes=(1, 2))
        carry, distribution = of_agents(params, carry, view, mask, reset_before.T)
        return carry, jax.tree.map(lambda x: x.swapaxes(0, 1), distribution)

    def unroll_shared(
        self, params: Any, carry: Any, observation: Observation, reset_before: Array
    ) -> tuple[Any, Any]:
        """Run `unroll` with one set of parameters for all agents in `observation`."""
        inputs = observation.agents_view, observation.action_mask
        return _unroll(self.network, params, carry, inputs, reset_before)

    def step(
        self, params: Any, carry: Any, observation: Observation, reset_before: Array
    ) -> tuple[Any, Any]:
        """Run the policies for one step; return the carry (B, N, H) and distributions (B, N)."""
        return _step(self.unroll, params, carry, observation, reset_before)

    def act(
        self, params: Any, carry: Any, observation: Observation, key: Array, greedy: bool
    ) -> tuple[Array, Any]:
        """Return actions (B, N[, A]) and the next carry.

        A function of one agent's observation alone, mapped over agents, computes each action: no
        other agent's view can leak into it.
        """

        def act_alone(
            params: Any, hidden: Any, view: Array, mask: Array, key: Array
        ) -> tuple[Array, Any]:
            hidden, inputs = jax.tree.map(lambda x: x[None], (hidden, (view[None], mask[None])))
            no_reset = jnp.zeros((1, 1), bool)
            hidden, distribution = self.network.apply(params, hidden, *inputs, no_reset)
            raw = distribution.mode() if greedy else distribution.sample(key)
            action = executed_action(raw, self.spec.action_kind)
            return action[0, 0], jax.tree.map(lambda x: x[0], hidden)

        keys = jax.random.split(key, observation.agents_view.shape[:2])
        over_agents = jax.vmap(act_alone, in_axes=(None if self.shared else 0, 0, 0, 0, 0))
        over_batch = jax.vmap(over_agents, in_axes=(None, 0, 0, 0, 0))
        return over_batch(params, carry, observation.agents_view, observation.action_mask, keys)


@dataclass(frozen=True)
class Critic:
    """A critic that values each agent from the global state or from the agent's observation."""

    spec: EnvSpec
    hidden_dim: int
    sees: Literal["global_state", "observation"] = "global_state"

    def __post_init__(self) -> None:
        if self.sees == "global_state" and self.spec.num_state_features is None:
            raise ValueError(
                f"the critic reads a global state, but {self.spec.name} was made without one"
            )

    @property
    def network(self) -> RecurrentCritic:
        """The network of all agents' values, or of one agent's if it sees observations."""
        num_values = self.spec.num_agents if self.sees == "global_state" else 1
        return RecurrentCritic(num_values, self.hidden_dim)

    def init(self, key: Array) -> Any:
        """Return the parameters."""
        state = self.sees == "global_state"
        num_inputs = self.spec.num_state_features if state else self.spec.num_features
        inputs, reset_before = jnp.zeros((1, 1, num_inputs or 0)), jnp.ones((1, 1), bool)
        return self.network.init(key, jnp.zeros((1, self.hidden_dim)), inputs, reset_before)

    def initial_carry(self, batch_shape: tuple[int, ...]) -> Array:
        """Return the carry at an episode's start, (*batch_shape, K, H)."""
        number = 1 if self.sees == "global_state" else self.spec.num_agents
        return jnp.zeros((*batch_shape, number, self.hidden_dim))

    def unroll(
        self, params: Any, carry: Array, observation: Observation, reset_before: Array
    ) -> tuple[Array, Array]:
        """Run the critic along sequences, as `Actors.unroll` does, to values (B, C, N)."""
        inputs = observation.agents_view
        if self.sees == "global_state":
            assert observation.global_state is not None
            inputs = observation.global_state[:, :, None]
        carry, value = _unroll(self.network, params, carry, (inputs,), reset_before)
        return carry, value.reshape(*reset_before.shape, self.spec.num_agents)

    def step(
        self, params: Any, carry: Array, observation: Observation, reset_before: Array
    ) -> tuple[Array, Array]:
        """Run the critic for one step; return the carry (B, K, H) and the values (B, N)."""
        return _step(self.unroll, params, carry, observation, reset_before)


Sees = Literal["state", "others", "all"]  # the actions that a per-agent critic reads


class PerAgentCritic(nn.Module):
    """The value of a state for each agent, given the actions that it `sees`.

    A dense layer and a GRU read the global state. The next layer also reads the agent's id and the
    actions of all other agents, for EQ^i(s, a^-i) (Kim et al., 2026, Section 4.1) and DAE, or
    those of all agents, for Q(s, (a^i, a^-i)) (Foerster et al., 2018). If a critic sees the state
    alone, its value is the same for all agents.
    """

    num_agents: int
    action_dim: int
    action_kind: ActionKind
    hidden_dim: int
    sees: Sees

    @nn.compact
    def __call__(
        self,
        hidden: Array,
        global_state: Array,
        action: Array,
        reset_before: Array,
        own_actions: Array | None = None,
    ) -> tuple[Array, Array]:
        """Return hidden states (C, B, H) and values (C, B, N), or (C, B, N, K) of own actions.

        Args:
            hidden: (B, H) before the first step.
            global_state: (C, B, G).
            action: (C, B, N[, A]), raw.
            reset_before: (C, B) bool.
            own_actions: (C, B, N, K[, A]), raw: K actions of each agent to be valued, the other
                agents' actions being those in `action`; for a critic that sees all actions.
        """
        init = orthogonal(2**0.5)
        embedded = nn.relu(Dense(self.hidden_dim, kernel_init=init, name="embed")(global_state))
        hiddens = GRU(self.hidden_dim, name="gru")(hidden, embedded, reset_before)
        others = self.num_agents, self.num_agents * self.action_dim  # rows of ids and actions
        read = {"state": (), "others": others, "all": (*others, self.action_dim)}[self.sees]
        rows = self.hidden_dim, *read
        kernel = self.param("kernel", init, (sum(rows), self.hidden_dim))
        state_kernel, *kernels = jnp.split(kernel, list(accumulate(rows))[:-1])
        mixed = hiddens @ state_kernel + self.param("bias", zeros_init(), (self.hidden_dim,))
        mixed = mixed[..., None, :]  # (C, B, 1, H)
        if self.sees != "state":
            mixed = mixed + sum_of_others(self._embed_actions(kernels[1], action)) + kernels[0]
        if self.sees == "all":
            assert own_actions is not None
            mixed = mixed[..., None, :] + self._inputs(own_actions) @ kernels[2]  # (C, B, N, K, H)
        value = Dense(1, kernel_init=orthogonal(1.0), name="head")(nn.relu(mixed))[..., 0]
        return hiddens, jnp.broadcast_to(
            value, (*hiddens.shape[:-1], self.num_agents, *value.shape[3:])
        )

    def _embed_actions(self, kernel: Array, action: Array) -> Array:
        """Return each agent's action times its own rows of the kernel, (C, B, N, H)."""
        kernel = kernel.reshape(self.num_agents, self.action_dim, self.hidden_dim)
        if self.action_kind == "discrete":
            return look_up(kernel, action)
        return jnp.einsum("...na,nah->...nh", self._inputs(action), kernel)

    def _inputs(self, action: Array) -> Array:
        """Return raw actions as the network reads them, (..., A): one-hot or executed."""
        if self.action_kind == "discrete":
            return jax.nn.one_hot(action, self.action_dim)
        return executed_action(action, self.action_kind)


@dataclass(frozen=True)
class ActionCritic:
    """A `PerAgentCritic` along sequences of the global state and all agents' actions."""

    spec: EnvSpec
    hidden_dim: int
    sees: Sees

    @property
    def network(self) -> PerAgentCritic:
        """The network of all agents' values."""
        spec = self.spec
        agents = spec.num_agents, spec.action_dim, spec.action_kind
        return PerAgentCritic(*agents, self.hidden_dim, self.sees)

    def init(self, key: Array) -> Any:
        """Return the parameters."""
        action = action_spec(self.spec)
        state = jnp.zeros((1, 1, self.spec.num_state_features or 0))
        actions, reset_before = (
            jnp.zeros((1, 1, *action.shape), action.dtype),
            jnp.ones((1, 1), bool),
        )
        own = [actions[:, :, :, None]] if self.sees == "all" else []
        inputs = state, actions, reset_before, *own
        return self.network.init(key, self.initial_carry((1,)), *inputs)

    def initial_carry(self, batch_shape: tuple[int, ...]) -> Array:
        """Return the carry at an episode's start, (*batch_shape, H)."""
        return jnp.zeros((*batch_shape, self.hidden_dim))

    def unroll(self, params: Any, carry: Array, *inputs: Array) -> tuple[Array, Array]:
        """Return the carries (B, C, H) after every step and the values (B, C, N[, K]).

        carry (B, H); inputs: state (B, C, G), raw action (B, C, N[, A]), reset_before (B, C) and,
        for a critic that sees all actions, own actions (B, C, N, K[, A]).
        """
        chex.assert_equal_shape_prefix(inputs, 2)
        by_time = (x.swapaxes(0, 1) for x in inputs)
        carries, value = self.network.apply(params, carry, *by_time)
        return carries.swapaxes(0, 1), value.swapaxes(0, 1)

    def step(self, params: Any, carry: Array, *inputs: Array) -> tuple[Array, Array]:
        """Run `unroll` for one step, with any leading axes; return (..., H) and (..., N[, K])."""
        shape = carry.shape[:-1]
        rows = (x.reshape(1, -1, *x.shape[len(shape) :]) for x in inputs)
        carries, value = self.network.apply(params, carry.reshape(-1, self.hidden_dim), *rows)
        return carries.reshape(carry.shape), value.reshape(*shape, *value.shape[2:])
