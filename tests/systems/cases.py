"""The seven systems, as small as they get, and what the tests have to know of each."""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from magpo import config, envs

SHARED = [
    "tuned=false",
    "num_envs=6",
    "rollout_length=8",
    "total_steps=96",
    "num_evaluations=1",
    "system.ppo_epochs=2",
    "system.num_minibatches=2",
]
GUIDED = [
    "network.guider.embed_dim=8",
    "network.guider.n_head=2",
    "network.guider.chunk_size=4",
    "network.learner.hidden_dim=8",
]
RECURRENT = ["network.actor.hidden_dim=8", "network.critic.hidden_dim=6"]
SEQUENCE = ["network.embed_dim=8", "network.n_head=2"]
CASES = {
    "magpo": ["magpo", *GUIDED],
    "magpo, mat": ["magpo", *GUIDED, "network.guider.kind=mat"],
    "ctds": ["ctds", *GUIDED],
    "mappo": ["mappo", *RECURRENT, "system.recurrent_chunk_size=4"],
    "ippo": ["mappo", *RECURRENT, "system.critic_input=observation"],
    "happo": ["happo", *RECURRENT, "system.recurrent_chunk_size=4"],
    "mat": ["mat", *SEQUENCE],
    "sable": ["sable", *SEQUENCE, "network.chunk_size=4"],
    "sable, no memory": ["sable", *SEQUENCE, "network.memory=false"],
    "gpae": ["gpae_mappo", *RECURRENT, "system.reuse=3"],
    "gae": ["gpae_mappo", *RECURRENT, "system.advantage=gae", "system.reuse=1"],
    "gpae, no memory": ["gpae_mappo", *RECURRENT, "network.actor.memory=false"],
}
SEVEN = ["magpo", "ctds", "mappo", "happo", "mat", "sable", "gpae"]


class Case(NamedTuple):
    module: ModuleType
    system: Any


def build(name: str, task: str = "lbf/2s-8x8-2p-2f-coop", *overrides: str) -> Case:
    """A system on episodes that are cut off at 5 steps: a rollout of 8 has ends in it."""
    system, *own = CASES[name]
    options = config.load(system, [f"env={task}", *SHARED, *own, *overrides])
    global_state = getattr(options.algorithm, "global_state", False)
    values = options.env.options | {"time_limit": 5}
    env = envs.make(options.env.name, global_state=global_state, **values)
    module = importlib.import_module(f"magpo.systems.{system}")
    return Case(module, module.make(options.algorithm, env))


def stagger(state: Any) -> Any:
    """Episodes of LBF under way, which end at different steps."""
    num_envs = state.timestep.step_type.shape[0]
    steps = jnp.arange(num_envs, dtype=jnp.int32) % 5
    lbf = state.env_state.env.replace(step_count=steps)
    return state._replace(env_state=state.env_state._replace(env=lbf))


def sharpened(state: Any) -> Any:
    """Policies that are not uniform, or a wrong mask could hide."""
    return state._replace(params=jax.tree.map(lambda x: x * 2.0, state.params))


def differences(case: Case, state: Any) -> dict[str, jax.Array]:
    """Between what a rollout from `state` stored and what training recomputes of it: all zero."""
    module, system = case
    key = jax.random.key(0)
    name = module.__name__.rpartition(".")[2]
    if name == "gpae_mappo":
        _, trajectory, _ = module.rollout(system, state)
        estimates = module.estimate(system, state.params, trajectory)
        fields = dict.fromkeys(module.Batch._fields, estimates.value)
        fields |= {"steps": trajectory.steps, "memory": trajectory.memory}
        _, metrics = module.losses(state.params, system, module.Batch(**fields), key)
        return {
            "log_prob": estimates.log_ratio,
            "ratio": metrics["policy/ratio_std"],
            "value": metrics["loss/value"],
        }
    _, collected = module.rollout(system, state)
    batch = (module.timesteps if name == "mat" else module.sequences)(system, collected)
    batch = batch._replace(target=batch.value)
    if name == "happo":
        factor = jnp.ones_like(batch.log_prob[..., 0])

        def log_ratio(agent):
            own = module.of_agent(batch, agent, factor)
            params = jax.tree.map(lambda x: x[agent], state.params.actor)
            return module.policy_of(system, params, own).log_prob(own.action) - own.log_prob

        _, value = module.run_critic(
            system, state.params.critic, batch.memory.critic[0], batch.observation,
            batch.reset_before,
        )  # fmt: skip
        return {
            "log_prob": jax.vmap(log_ratio)(jnp.arange(system.env.num_agents)),
            "value": value - batch.value,
        }
    _, metrics = module.losses(state.params, system, batch, key)
    return {name: x for name, x in metrics.items() if name in OF_THE_ACTING_POLICY}


OF_THE_ACTING_POLICY = ("loss/value", "policy/ratio_std", "policy/guider_ratio_std")
