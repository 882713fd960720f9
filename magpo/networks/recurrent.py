"""A GRU over a sequence, the decentralised actors, and the recurrent critics.

The GRU's input projections are one matmul over all timesteps; only the recurrence is scanned. Its
reverse pass is written out because automatic differentiation of a scan adds up the weight gradient
step by step; here the gate gradients are kept and the weight gradient is one matmul at the end.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import lecun_normal, orthogonal, zeros_init

from magpo.networks.heads import ActionKind, Distribution, PolicyHead, executed_action
from magpo.networks.torsos import Dense, parts
from magpo.types import Array, Observation


class _Gates(NamedTuple):
    """What the reverse pass needs of one step, each (B, H)."""

    reset: Array  # r
    update: Array  # z
    candidate: Array  # n
    recurrent: Array  # the hidden state's part of the candidate, before r scales it


def _keep(reset_before: Array, hidden: Array) -> Array:
    return jnp.where(reset_before[..., None], 0.0, hidden)


def _gru_step(hidden: Array, inputs: Array, kernel: Array, bias: Array) -> tuple[Array, _Gates]:
    input_r, input_z, input_n = jnp.split(inputs, 3, axis=-1)
    hidden_r, hidden_z, hidden_n = jnp.split(hidden @ kernel, 3, axis=-1)
    reset = jax.nn.sigmoid(input_r + hidden_r)
    update = jax.nn.sigmoid(input_z + hidden_z)
    recurrent = hidden_n + bias
    candidate = jnp.tanh(input_n + reset * recurrent)
    hidden = candidate + update * (hidden - candidate)
    return hidden, _Gates(reset, update, candidate, recurrent)


@jax.custom_vjp
def gru_scan(
    hidden: Array, inputs: Array, reset_before: Array, kernel: Array, bias: Array
) -> Array:
    """Hidden states (T, B, H) of a GRU over `inputs`.

    Args:
        hidden: (B, H), before the first step.
        inputs: (T, B, 3H), the projected inputs of the reset, update and candidate gates.
        reset_before: (T, B) bool, where the hidden state is zeroed before the step.
        kernel: (H, 3H) recurrent weights.
        bias: (H,) of the candidate's recurrent part.
    """
    return _gru_forward(hidden, inputs, reset_before, kernel, bias)[0]


def _gru_forward(
    hidden: Array, inputs: Array, reset_before: Array, kernel: Array, bias: Array
) -> tuple[Array, tuple]:
    def step(hidden, step_inputs):
        inputs, reset_before = step_inputs
        hidden, gates = _gru_step(_keep(reset_before, hidden), inputs, kernel, bias)
        return hidden, (hidden, gates)

    _, (hiddens, gates) = jax.lax.scan(step, hidden, (inputs, reset_before))
    return hiddens, (hidden, hiddens, gates, reset_before, kernel)


def _gru_backward(residuals: tuple, d_hiddens: Array) -> tuple:
    hidden, hiddens, gates, reset_before, kernel = residuals
    before = _keep(reset_before, jnp.concatenate([hidden[None], hiddens[:-1]]))  # (T, B, H)

    def step(d_hidden, step_inputs):
        d_output, before, gates, reset_before = step_inputs
        d_hidden = d_hidden + d_output
        d_candidate = d_hidden * (1.0 - gates.update) * (1.0 - gates.candidate**2)
        d_update = d_hidden * (before - gates.candidate) * gates.update * (1.0 - gates.update)
        d_reset = d_candidate * gates.recurrent * gates.reset * (1.0 - gates.reset)
        d_gates = jnp.concatenate([d_reset, d_update, d_candidate * gates.reset], axis=-1)
        d_before = d_hidden * gates.update + d_gates @ kernel.T
        return _keep(reset_before, d_before), (d_gates, d_candidate)

    d_hidden, (d_gates, d_candidate) = jax.lax.scan(
        step, jnp.zeros_like(hidden), (d_hiddens, before, gates, reset_before), reverse=True
    )
    width = hidden.shape[-1]
    d_inputs = jnp.concatenate([d_gates[..., : 2 * width], d_candidate], axis=-1)
    d_kernel = before.reshape(-1, width).T @ d_gates.reshape(-1, 3 * width)
    d_bias = d_gates[..., 2 * width :].sum((0, 1))
    return d_hidden, d_inputs, None, d_kernel, d_bias


gru_scan.defvjp(_gru_forward, _gru_backward)


class GRU(nn.Module):
    """(T, B, D) inputs to (T, B, H) hidden states; as Cho et al. (2014), in cuDNN's form."""

    hidden_dim: int

    @nn.compact
    def __call__(self, hidden: Array, inputs: Array, reset_before: Array) -> Array:
        width = 3 * self.hidden_dim
        kernel_init = parts(lecun_normal(), 3)
        projected = Dense(width, kernel_init=kernel_init, name="input")(inputs)
        kernel = self.param("kernel", parts(orthogonal(), 3), (self.hidden_dim, width))
        bias = self.param("bias", zeros_init(), (self.hidden_dim,))
        return gru_scan(hidden, projected, reset_before, kernel, bias)


class RecurrentActor(nn.Module):
    """One agent's policy from its own observations: Dense, GRU, Dense, head (Yu et al., 2022)."""

    action_dim: int
    action_kind: ActionKind
    hidden_dim: int

    def setup(self) -> None:
        self.embed = Dense(self.hidden_dim, kernel_init=orthogonal(2**0.5))
        self.memory = GRU(self.hidden_dim)
        self.mix = Dense(self.hidden_dim, kernel_init=orthogonal(2**0.5))
        self.head = PolicyHead(self.action_dim, self.action_kind)

    def __call__(
        self, hidden: Array, agents_view: Array, action_mask: Array, reset_before: Array
    ) -> tuple[Array, Distribution]:
        """hidden (B, H), agents_view (T, B, O), action_mask (T, B, A), reset_before (T, B)."""
        hiddens = self.remember(hidden, agents_view, reset_before)  # (T, B, H)
        return hiddens[-1], self.head(nn.relu(self.mix(hiddens)), action_mask)

    def remember(self, hidden: Array, agents_view: Array, reset_before: Array) -> Array:
        """The hidden states alone, (T, B, H)."""
        return self.memory(hidden, nn.relu(self.embed(agents_view)), reset_before)


class FeedForwardActor(nn.Module):
    """As `RecurrentActor`, without memory: two tanh layers, for continuous control."""

    action_dim: int
    action_kind: ActionKind
    hidden_dim: int

    @nn.compact
    def __call__(
        self, hidden: tuple[()], agents_view: Array, action_mask: Array, reset_before: Array
    ) -> tuple[tuple[()], Distribution]:
        """agents_view (T, B, O), action_mask (T, B, A); nothing is remembered or reset."""
        del reset_before
        x = agents_view
        for _ in range(2):
            x = nn.tanh(Dense(self.hidden_dim, kernel_init=orthogonal(2**0.5))(x))
        return hidden, PolicyHead(self.action_dim, self.action_kind)(x, action_mask)


Actor = RecurrentActor | FeedForwardActor


def init_alone(actor: Actor, key: Array, hidden: Any, observation: Observation) -> Any:
    """An actor's parameters, from what the first agent sees; hidden and observation (E, ...)."""
    view, mask = observation.agents_view[None, :, 0], observation.action_mask[None, :, 0]
    hidden = jax.tree.map(lambda x: x[:, 0], hidden)
    return actor.init(key, hidden, view, mask, jnp.zeros(view.shape[:2], bool))


def act_alone(
    actor: Actor,
    params: Any,
    hidden: Any,
    observation: Observation,
    key: Array,
    greedy: bool,
    own_params: bool = False,
) -> tuple[Array, Any]:
    """Actions (B, N[, A]) and hidden states, each from one agent's observation, by construction.

    With `own_params` the parameters are (N, ...), each agent's own.
    """

    def act_one(
        params: Any, hidden: Any, view: Array, mask: Array, key: Array
    ) -> tuple[Array, Any]:
        hidden = jax.tree.map(lambda x: x[None], hidden)
        inputs = view[None, None], mask[None, None], jnp.zeros((1, 1), bool)
        hidden, policy = actor.apply(params, hidden, *inputs)
        raw = policy.mode() if greedy else policy.sample(key)
        hidden = jax.tree.map(lambda x: x[0], hidden)
        return executed_action(raw, actor.action_kind)[0, 0], hidden

    agents = jax.vmap(act_one, in_axes=(0 if own_params else None, 0, 0, 0, 0))
    keys = jax.random.split(key, observation.agents_view.shape[:2])
    return jax.vmap(agents, in_axes=(None, 0, 0, 0, 0))(
        params, hidden, observation.agents_view, observation.action_mask, keys
    )


class RecurrentCritic(nn.Module):
    """Values from an agent's observations or the global state: Dense, GRU, Dense, head."""

    num_values: int
    hidden_dim: int

    @nn.compact
    def __call__(self, hidden: Array, inputs: Array, reset_before: Array) -> tuple[Array, Array]:
        """hidden (B, H), inputs (T, B, D), reset_before (T, B) to hidden and values (T, B, V)."""
        init = orthogonal(2**0.5)
        embedded = nn.relu(Dense(self.hidden_dim, kernel_init=init, name="embed")(inputs))
        hiddens = GRU(self.hidden_dim, name="memory")(hidden, embedded, reset_before)
        mixed = nn.relu(Dense(self.hidden_dim, kernel_init=init, name="mix")(hiddens))
        head = Dense(self.num_values, kernel_init=orthogonal(1.0), name="head")
        return hiddens[-1], head(mixed)


@jax.custom_vjp
def _look_up(table: Array, action: Array) -> Array:
    """table (N, A, H), action (..., N) int to rows (..., N, H)."""
    return table[jnp.arange(table.shape[0]), action]


def _look_up_backward(inputs: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
    table, action = inputs  # one matmul: the scatter of autodiff adds up in any order on a GPU
    chosen = jax.nn.one_hot(action, table.shape[1])
    return jnp.einsum("...na,...nh->nah", chosen, d_rows), None


_look_up.defvjp(lambda table, action: (_look_up(table, action), (table, action)), _look_up_backward)


@jax.custom_vjp
def _sum_of_others(x: Array) -> Array:
    """(..., N, H) to the sums over all agents but one, whose own row counts exactly nothing."""
    others = 1.0 - jnp.eye(x.shape[-2])
    return (others[..., None] * x[..., None, :, :]).sum(axis=-2)


_sum_of_others.defvjp(
    lambda x: (_sum_of_others(x), None),
    lambda _, d_sums: (d_sums.sum(axis=-2, keepdims=True) - d_sums,),  # near enough for a gradient
)


class PerAgentCritic(nn.Module):
    """EQ^i(s, a^-i): what a state is worth to agent i, given the actions of all others.

    Dense and GRU on the global state, then one layer on that, the others' actions and the agent's
    id (Kim et al., 2026, Section 4.1). With `sees_actions: false` the value of the state alone, the
    same for all agents.
    """

    num_agents: int
    action_dim: int
    action_kind: ActionKind
    hidden_dim: int
    sees_actions: bool

    def setup(self) -> None:
        init = orthogonal(2**0.5)
        self.embed = Dense(self.hidden_dim, kernel_init=init)
        self.memory = GRU(self.hidden_dim)
        self.head = Dense(1, kernel_init=orthogonal(1.0))
        num_features = self.hidden_dim
        if self.sees_actions:
            num_features += self.num_agents * (self.action_dim + 1)
        self.kernel = self.param("kernel", init, (num_features, self.hidden_dim))
        self.bias = self.param("bias", zeros_init(), (self.hidden_dim,))

    def remember(self, hidden: Array, global_state: Array, reset_before: Array) -> Array:
        """hidden (B, H), global_state (T, B, G), reset_before (T, B) to hidden states (T, B, H)."""
        return self.memory(hidden, nn.relu(self.embed(global_state)), reset_before)

    def value(self, hiddens: Array, action: Array) -> Array:
        """hiddens (..., H) after the state, raw actions (..., N[, A]) to values (..., N)."""
        of_state, of_others = self.kernel[: self.hidden_dim], self.kernel[self.hidden_dim :]
        mixed = (hiddens @ of_state + self.bias)[..., None, :]  # (..., 1, H)
        if self.sees_actions:
            of_id, of_actions = of_others[: self.num_agents], of_others[self.num_agents :]
            of_actions = of_actions.reshape(self.num_agents, self.action_dim, self.hidden_dim)
            if self.action_kind == "discrete":
                each = _look_up(of_actions, action)
            else:
                executed = executed_action(action, self.action_kind)
                each = jnp.einsum("...na,nah->...nh", executed, of_actions)
            mixed = mixed + _sum_of_others(each) + of_id
        value = self.head(nn.relu(mixed))[..., 0]
        return jnp.broadcast_to(value, (*hiddens.shape[:-1], self.num_agents))

    def __call__(
        self, hidden: Array, global_state: Array, action: Array, reset_before: Array
    ) -> tuple[Array, Array]:
        """Hidden states (T, B, H) and values (T, B, N)."""
        hiddens = self.remember(hidden, global_state, reset_before)
        return hiddens, self.value(hiddens, action)
