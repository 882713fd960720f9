"""Trained policies: out of a results folder, without the environment they were trained on.

    policy = magpo.load_policy("results/magpo/rware/tiny-4ag/<run-id>")
    carry = policy.initial_carry((32,))
    action, carry = policy.act(carry, observation, key, greedy=True)

What is loaded is numbers and names; nothing in the folder is executed. The system that acts is the
installed one of the run's name, or a module of your own.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from pydantic import TypeAdapter, ValidationError

from magpo import checkpoint, config, runs
from magpo.checkpoint import CheckpointError
from magpo.config import ConfigError, RunConfig
from magpo.types import Array, Card, Environment, EnvSpec, Observation


@dataclass(frozen=True)
class Trained:
    """What a run's newest usable checkpoint says of its best policies."""

    config: RunConfig
    module: ModuleType
    env: EnvSpec
    params: Any  # (S, ...) NumPy, the best of each seed
    score: np.ndarray  # (S,) mean episode return of the evaluation that made them the best
    chunk: np.ndarray  # (S,) chunks trained by then

    @property
    def card(self) -> Card:
        """What kind of system it is; one of your own that does not say has shared parameters."""
        return getattr(self.module, "CARD", Card("", "each agent's policy", "", "shared"))

    def seed_index(self, seed: int | None) -> int:
        """Where a seed's parameters are; by default those of the best score."""
        if seed is None:
            return int(np.nanargmax(self.score))
        if seed not in self.config.seeds:
            raise ConfigError(f"seed={seed}: the run has {list(self.config.seeds)}")
        return self.config.seeds.index(seed)


def read(folder: str | Path, system: ModuleType | None = None) -> Trained:
    """Load the best policies of a run. Raises ConfigError.

    `system` is the module of a system of your own; without it the run's has to be one of magpo's.
    """
    folder = Path(folder)
    module = system or _system(folder)
    name = module.__name__.rpartition(".")[2]
    found = runs.newest_checkpoint(folder)
    if found is None:
        raise ConfigError(f"{folder}: has no checkpoint yet")
    path, meta = found
    run = config.from_values(system or name, meta["config"], path)  # config.yaml could be edited
    try:
        record = checkpoint.load_named(path, meta, "record")
        env = TypeAdapter(EnvSpec).validate_json(json.dumps(meta["env"]), strict=True)
        score, chunk = record["best.score"], record["best.chunk"]
        if len(score) != len(run.seeds):
            raise CheckpointError(f"parameters of {len(score)} seeds, not {len(run.seeds)}")
    except (CheckpointError, ValidationError, KeyError) as error:
        raise ConfigError(f"{path}: {str(error).partition(chr(10))[0]}") from error
    params: dict[str, Any] = {}
    for name, array in record.items():
        if name.startswith("best.params."):
            *parents, last = name.split(".")[2:]
            group = params
            for parent in parents:
                group = group.setdefault(parent, {})
            group[last] = array
    return Trained(run, module, env, params, score, chunk)


def _system(folder: Path) -> ModuleType:
    """The module of the run's system: one of the package's, never what a file names freely."""
    try:
        name = config.plain_values(folder / "config.yaml")["run"]["system"]
    except (ConfigError, TypeError, KeyError) as error:
        raise ConfigError(f"{folder}: no run there (no config.yaml that can be read)") from error
    if name not in config.systems():
        raise ConfigError(f"{folder}: a run of {name!r}; pass its module as `system`")
    return import_module(f"magpo.systems.{name}")


@dataclass(frozen=True, eq=False)
class Policy:
    """A trained policy of all agents, or of one. `*batch` is any number of leading axes."""

    module: ModuleType = field(repr=False)
    system: Any = field(repr=False)
    env: EnvSpec
    params: Any = field(repr=False)
    one_agent: bool

    def initial_carry(self, batch_shape: tuple[int, ...] = ()) -> Any:
        """The memory at the start of an episode, (*batch[, N], ...) each."""
        size = int(np.prod(batch_shape, dtype=int))
        carry = self.module.initial_carry(self.system, (size,))
        return jax.tree.map(partial(_outwards, self, batch_shape), carry)

    def act(
        self, carry: Any, observation: Observation, key: Array, greedy: bool = False
    ) -> tuple[Array, Any]:
        """Actions (*batch[, N][, A]) and the memory after the step.

        Args:
            observation: agents_view (*batch[, N], O), action_mask (*batch[, N], A), step_count
                (*batch); N is absent where the policy is one agent's.
            greedy: the most likely action instead of a sampled one.
        """
        acted: tuple[Array, Any] = _act(self, self.params, carry, observation, key, greedy)
        return acted


def _outwards(policy: Policy, batch_shape: tuple[int, ...], x: Array) -> Array:
    """(B, N, ...) as a system has it to (*batch[, N], ...)."""
    x = x[:, 0] if policy.one_agent else x
    return x.reshape(*batch_shape, *x.shape[1:])


@partial(jax.jit, static_argnames=("policy", "greedy"))
def _act(
    policy: Policy, params: Any, carry: Any, observation: Observation, key: Array, greedy: bool
) -> tuple[Array, Any]:
    batch_shape = observation.step_count.shape
    rank = len(batch_shape)

    def inwards(x: Array, agents: bool) -> Array:
        x = x.reshape(-1, *x.shape[rank:])
        return x[:, None] if agents and policy.one_agent else x

    outwards = partial(_outwards, policy, batch_shape)
    inner = Observation(
        agents_view=inwards(observation.agents_view, agents=True),
        action_mask=inwards(observation.action_mask, agents=True),
        step_count=inwards(observation.step_count, agents=False),
    )
    action, carry = policy.module.act(
        policy.system,
        params,
        jax.tree.map(partial(inwards, agents=True), carry),
        inner,
        key,
        greedy,
    )
    return outwards(action), jax.tree.map(outwards, carry)


def load_policy(
    folder: str | Path,
    seed: int | None = None,
    agent: int | None = None,
    system: ModuleType | None = None,
) -> Policy:
    """The best policy of a run's results folder. Raises ConfigError.

    Args:
        seed: whose; by default that of the best score.
        agent: the policy of this agent alone, from its own observation; by default all agents'.
        system: the module, where the system is not one of magpo's.
    """
    return build(read(folder, system), seed, agent)


def build(
    trained: Trained, seed: int | None = None, agent: int | None = None, env: Any = None
) -> Policy:
    """A `Policy` of what was read, for the environment it was trained on or another."""
    spec = env or trained.env
    index = trained.seed_index(seed)
    params = jax.tree.map(lambda x: x[index], trained.params)
    if agent is not None:
        if not 0 <= agent < spec.num_agents:
            raise ConfigError(f"agent={agent}: there are {spec.num_agents}, from 0 on")
        if trained.card.deployed == "a joint policy":
            raise ConfigError(f"agent={agent}: {trained.config.system} acts for all agents at once")
        if trained.card.parameters == "each agent's own":
            params = jax.tree.map(lambda x: x[agent : agent + 1], params)
    return Policy(
        module=trained.module,
        system=trained.module.make(trained.config.algorithm, spec),
        env=spec,
        params=params,
        one_agent=agent is not None,
    )


def check_fits(trained: Trained, env: Environment) -> None:
    """Raise ConfigError where the policy cannot act in an environment."""
    if trained.card.parameters == "each agent's own" and env.num_agents != trained.env.num_agents:
        raise ConfigError(
            f"the run has a policy for each of {trained.env.num_agents} agents, "
            f"{env.name} has {env.num_agents}"
        )
    ours, theirs = trained.env, env.observation_spec.agents_view.shape[-1]
    if (ours.num_features, ours.action_dim, ours.action_kind) != (
        theirs,
        env.action_dim,
        env.action_kind,
    ):
        raise ConfigError(
            f"the policy reads {ours.num_features} features and has {ours.action_dim} "
            f"{ours.action_kind} actions, {env.name} has {theirs} and {env.action_dim} "
            f"{env.action_kind}"
        )
