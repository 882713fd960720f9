"""A trained policy as one portable file that needs only JAX.

usage: python -m magpo.export run=<folder> [key=value ...]

  run=<folder>         a run's results folder; its policy with the best score is exported
  out=<folder>         the folder for policy.stablehlo and policy.json (default: <run>/policy)
  seed=<seed>          only policies of this seed
  vary.<key>=<value>   only policies with this value, if the run varied it
  agent=0              the agent whose policy is exported, if the agents' policies differ

policy.stablehlo is one agent's decentralised policy in StableHLO, made by `jax.export`, parameters
included. policy.json describes its inputs and outputs. The batch size is free. To use it without
magpo:

    policy = jax.export.deserialize(Path("policy.stablehlo").read_bytes())
    outputs = policy.call(*inputs)  # in the order of policy.json
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from magpo import commands
from magpo.runs.policy import TrainedPolicy, load_policy
from magpo.types import Array, Observation
from magpo.values import NonNegativeInt, Seed, UserPath


def export(policy: TrainedPolicy) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes and the description of one agent's exported policy.

    The inputs are, with a batch axis B, the leaves of the recurrent state (carry), the agent's view
    and action mask, and the steps since the episode began; then, without a batch axis, two random
    32-bit numbers and whether to act greedily. The outputs are the actions and the leaves of the
    next carry.
    """
    batch = tuple(jax.export.symbolic_shape("batch"))
    leaves, structure = jax.tree.flatten(policy.initial_carry((1,)))

    def act(*inputs: Array) -> tuple[Array, ...]:
        *before, view, mask, step_count, random_bits, greedy = inputs
        observation = Observation(view, mask, step_count)
        key = jax.random.wrap_key_data(random_bits, impl="threefry2x32")
        carry = jax.tree.unflatten(structure, before)
        likely, after = policy.act(carry, observation, key, greedy=True)
        sampled, _ = policy.act(carry, observation, key, greedy=False)
        return jnp.where(greedy, likely, sampled), *jax.tree.leaves(after)

    named = {
        f"carry_{i}": jax.ShapeDtypeStruct((*batch, *leaf.shape[1:]), leaf.dtype)
        for i, leaf in enumerate(leaves)
    }
    outputs = ["action", *named]
    named |= {
        "agents_view": jax.ShapeDtypeStruct((*batch, policy.env.num_features), jnp.float32),
        "action_mask": jax.ShapeDtypeStruct((*batch, policy.env.action_dim), jnp.bool),
        "step_count": jax.ShapeDtypeStruct(batch, jnp.int32),
        "random_bits": jax.ShapeDtypeStruct((2,), jnp.uint32),
        "greedy": jax.ShapeDtypeStruct((), jnp.bool),
    }
    exported = jax.export.export(jax.jit(act), platforms=("cpu", "cuda", "tpu"))(*named.values())
    description = {
        "task": policy.env.name,
        "action_kind": policy.env.action_kind,
        "inputs": dict(zip(named, map(str, exported.in_avals), strict=True)),
        "outputs": dict(zip(outputs, map(str, exported.out_avals), strict=True)),
        "carry_at_the_start": "zeros",
        "random_bits": "two new uint32 numbers at every step; unused where greedy",
        "agents_view": "the agent's own, as magpo.envs gives it: its one-hot id first",
        "jax": jax.__version__,
    }
    return bytes(exported.serialize()), description


def main(
    *,
    run: UserPath,
    out: UserPath | None = None,
    seed: Seed | None = None,
    vary: Mapping[str, float | None] = {},
    agent: NonNegativeInt = 0,
) -> None:
    """Export one agent's policy of a run."""
    policy = load_policy(run, seed, vary, agent)
    data, description = export(policy)
    folder = Path(out or Path(run, "policy"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "policy.stablehlo").write_bytes(data)
    (folder / "policy.json").write_text(json.dumps(description, indent=2) + "\n")
    print(f"{folder / 'policy.stablehlo'}: {len(data):,} bytes")


if __name__ == "__main__":
    commands.run(__doc__, main)
