"""MAT: an autoregressive joint policy and its values by attention (Wen et al., 2022).

An encoder reads the observations of all agents at one timestep and gives each agent's value; a
decoder gives each agent's policy from the encoding and the actions of the agents before it. It has
no memory, and otherwise the methods of `magpo.networks.sable.Sable`. Axis letters beyond
`magpo.types`: B environments or sequences, F embedding features.
"""

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.initializers import orthogonal

from magpo.networks.attention import Attention, TokenWeights, token
from magpo.networks.autoregressive import JointAction, Turn, decode, shifted
from magpo.networks.heads import ActionKind, Distribution, PolicyHead
from magpo.networks.torsos import Dense
from magpo.types import Array, Observation


def _dense(width: int, gain: float = 2**0.5, use_bias: bool = True) -> nn.Module:
    return Dense(width, use_bias=use_bias, kernel_init=orthogonal(gain))


class _EncoderBlock(nn.Module):
    embed_dim: int
    n_head: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        attended = Attention(self.embed_dim, self.n_head)(x, x, causal=False)
        x = nn.LayerNorm()(x + attended)
        mixed = nn.Sequential([_dense(self.embed_dim), nn.gelu, _dense(self.embed_dim, 0.01)])(x)
        return nn.LayerNorm()(x + mixed)


class _DecoderBlock(nn.Module):
    embed_dim: int
    n_head: int

    def setup(self) -> None:
        self.self_attention = Attention(self.embed_dim, self.n_head)
        self.cross_attention = Attention(self.embed_dim, self.n_head)
        self.norms = [nn.LayerNorm() for _ in range(3)]
        self.mix = nn.Sequential([_dense(self.embed_dim), nn.gelu, _dense(self.embed_dim, 0.01)])

    def _finish(self, encoded: Array, attended: Array) -> Array:
        x = self.norms[1](encoded + attended)
        return self.norms[2](x + self.mix(x))

    def __call__(self, x: Array, encoded: Array) -> Array:
        x = self.norms[0](x + self.self_attention(x, x, causal=True))
        return self._finish(encoded, self.cross_attention(encoded, x, causal=True))

    def token(
        self,
        x: Array,
        encoded: Array,
        layers: tuple[TokenWeights, TokenWeights],
        caches: tuple[tuple[Array, ...], tuple[Array, ...]],
        agent: Array,
    ) -> tuple[Array, tuple[tuple[Array, ...], tuple[Array, ...]]]:
        attended, own = token(layers[0], x, x, caches[0], agent)
        x = self.norms[0](x + attended)
        attended, cross = token(layers[1], encoded, x, caches[1], agent)
        return self._finish(encoded, attended), (own, cross)

    def token_weights(self) -> tuple[TokenWeights, TokenWeights]:
        return self.self_attention.token_weights(), self.cross_attention.token_weights()


class MAT(nn.Module):
    """All agents' policy and values."""

    action_dim: int
    action_kind: ActionKind
    embed_dim: int
    n_head: int
    n_block: int

    def setup(self) -> None:
        block = (self.embed_dim, self.n_head)
        embed = self.embed_dim
        self.embed_observation = nn.Sequential(
            [nn.LayerNorm(), _dense(embed), nn.gelu, nn.LayerNorm()]
        )
        self.encoder = [_EncoderBlock(*block) for _ in range(self.n_block)]
        self.value_torso = nn.Sequential([_dense(embed), nn.gelu, nn.LayerNorm()])
        self.value_head = _dense(1, 0.01)
        self.embed_action = nn.Sequential([_dense(embed, use_bias=False), nn.gelu, nn.LayerNorm()])
        self.decoder = [_DecoderBlock(*block) for _ in range(self.n_block)]
        self.policy_torso = nn.Sequential([_dense(embed), nn.gelu, nn.LayerNorm()])
        self.policy_head = PolicyHead(self.action_dim, self.action_kind)

    def initial_carry(self, batch_size: int) -> tuple[()]:
        del batch_size
        return ()

    def __call__(
        self, carry: tuple[()], observation: Observation, action: Array, reset_before: Array | None
    ) -> tuple[Array, Distribution]:
        """Values and policies (..., N) of any leading axes.

        `action` (..., N[, A]) is raw. `carry` and `reset_before` say nothing.
        """
        del carry, reset_before
        encoded, value = self._encode(observation)
        x = self.embed_action(shifted(action, self.action_dim, self.action_kind))
        for block in self.decoder:
            x = block(x, encoded)
        return value, self.policy_head(self.policy_torso(x), observation.action_mask)

    def value(
        self, carry: tuple[()], observation: Observation, reset_before: Array | None
    ) -> Array:
        """(B, N) values of one timestep."""
        del carry, reset_before
        return self._encode(observation)[1]

    def act(
        self,
        carry: tuple[()],
        observation: Observation,
        reset_before: Array | None,
        key: Array,
        greedy: bool = False,
    ) -> JointAction:
        """One timestep, agent after agent; the observation has a leading axis B."""
        del reset_before
        encoded, value = self._encode(observation)
        batch, num_agents = value.shape
        empty = jnp.zeros((batch, self.n_head, num_agents, self.embed_dim // self.n_head))
        weights = [block.token_weights() for block in self.decoder]

        def take_turn(caches: list, read: Array, turn: Turn) -> tuple[list, Distribution]:
            x, after = self.embed_action(read), []
            for block, layers, cache in zip(self.decoder, weights, caches, strict=True):
                x, cache = block.token(x, turn.encoded, layers, cache, turn.agent)
                after.append(cache)
            return after, self.policy_head(self.policy_torso(x), turn.action_mask)

        cache = (empty,) if self.n_head == 1 else (empty, empty)  # of keys and values
        caches = [(cache, cache) for _ in self.decoder]
        _, action, log_prob = decode(
            take_turn, caches, encoded, observation.action_mask, key, self.action_kind, greedy
        )
        return JointAction(carry, action, log_prob, value)

    def _encode(self, observation: Observation) -> tuple[Array, Array]:
        """The encoding (..., N, F) and the values (..., N)."""
        x = self.embed_observation(observation.agents_view)
        for block in self.encoder:
            x = block(x)
        return x, self.value_head(self.value_torso(x))[..., 0]
