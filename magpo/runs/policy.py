"""Trained policies, loaded from a results folder without the environment they were trained on.

    policy = magpo.load_policy("results/magpo/rware/tiny-4ag/<run-id>")
    carry = policy.initial_carry((32,))
    action, carry = policy.act(carry, observation, key, greedy=True)

A folder contains numbers and names; nothing in it is executed. The policy acts by the installed
system that the run names, or by a module of your own.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magpo import config, contract, envs, plugins
from magpo.config.members import Member, text
from magpo.config.schema import RunConfig
from magpo.contract import Algorithm, Deployed, Parameters
from magpo.errors import ConfigError
from magpo.files import UNREADABLE, complain
from magpo.runs import checkpoint, folders
from magpo.types import Array, Environment, EnvSpec, Observation, spec


@dataclass(frozen=True)
class TrainedRun:
    """The best policies of a run, from its newest usable checkpoint."""

    config: RunConfig
    algorithm: Algorithm
    env: EnvSpec
    params: Any  # (M, ...) NumPy, the best of each member
    score: np.ndarray  # (M,) mean episode return of their evaluation
    chunk: np.ndarray  # (M,) chunks trained before that evaluation

    def places(self, seed: int | None = None, setting: Mapping[str, Any] = {}) -> np.ndarray:
        """Return the indices (K,) of the members with this seed and these values.

        Raises ConfigError if there are none.
        """
        vary = self.config.vary
        for key, value in setting.items():
            if value not in vary.get(key, ()):
                has = "; ".join(f"vary.{k}=[{','.join(map(text, v))}]" for k, v in vary.items())
                raise ConfigError(
                    f"vary.{key}={json.dumps(value)}: the run has {has or 'nothing that varies'}"
                )
        if seed not in (None, *self.config.seeds):
            raise ConfigError(f"seed={seed}: the run has {list(self.config.seeds)}")
        chosen = [
            seed in (None, member.seed) and setting.items() <= member.setting.items()
            for member in self.config.members
        ]
        if not any(chosen):
            raise ConfigError(f"the run, whose keys vary in step, has no setting {dict(setting)}")
        return np.flatnonzero(chosen)

    def best(self, places: np.ndarray) -> int:
        """Return the one of these indices with the highest score."""
        return int(places[np.nanargmax(self.score[places])])


def read(folder: str | Path, system: ModuleType | None = None) -> TrainedRun:
    """Load the best policies of a run. Raises ConfigError.

    `system` is the module of a system of your own; without it, the run's system must be one of
    magpo's or a plugin.
    """
    folder = Path(folder).expanduser()
    module = system or _system(folder)
    trained = folders.newest_checkpoint(folder, partial(_load, module))
    if trained is None:
        raise ConfigError(f"{folder}: has no checkpoint yet")
    for name in plugins.require(trained.config.imports, module):
        complain(f"warning: {name} has changed since the run was trained")
    return trained


def _load(module: ModuleType, path: Path, meta: Mapping[str, Any]) -> TrainedRun:
    """Load a checkpoint's best policies. Raises CheckpointError unless they can act."""
    algorithm = contract.algorithm(module)
    record = checkpoint.load_named(path, meta, "record")
    try:
        run = config.from_values(module, meta["config"], path)  # config.yaml could have been edited
        best: Any = config.nested(record)["best"]
        trained = TrainedRun(run, algorithm, EnvSpec(**meta["env"]), **best)
        number, leaves = len(run.members), jax.tree.leaves(best)
        whole = all(x.shape[:1] == (number,) and x.dtype != np.float64 for x in leaves)
        if not whole or trained.score.ndim + trained.chunk.ndim != 2:
            raise ConfigError(f"not 32 bits for each of {number} members")
        policy, env = build(trained, 0), trained.env
        view = jnp.zeros((env.num_agents, env.num_features))
        mask = jnp.ones((env.num_agents, env.action_dim), bool)
        seen = Observation(agents_view=view, action_mask=mask, step_count=jnp.int32(0))
        jax.eval_shape(policy.act, policy.initial_carry(), seen, jax.random.key(0))
    except Exception as error:  # anything that a system raises for wrong parameters
        reason = " ".join(str(error).split()) or type(error).__name__
        raise checkpoint.CheckpointError(f"{path}: its policies cannot act: {reason}") from error
    checkpoint.check_best(path, trained.score, trained.chunk, trained.params)
    return trained


def _system(folder: Path) -> ModuleType:
    """Return the run's system, which must be a plugin or one of the package. Raises ConfigError."""
    try:
        run = config.plain_values(folder / "config.yaml")["run"]
        name, imports = str(run["system"]), dict(run.get("imports", {}))
    except UNREADABLE as error:
        raise ConfigError(f"{folder}: no run there (no config.yaml that can be read)") from error
    plugins.require(imports)
    return plugins.system(name, imports)


@dataclass(frozen=True, eq=False)
class TrainedPolicy:
    """A trained policy of all agents or of one. `*batch` stands for any number of leading axes."""

    algorithm: Algorithm = field(repr=False)
    setup: Any = field(repr=False)
    env: EnvSpec
    params: Any = field(repr=False)
    one_agent: bool
    member: Member  # the run's member, with its seed and setting
    score: float  # mean episode return of its evaluation

    def initial_carry(self, batch_shape: tuple[int, ...] = ()) -> Any:
        """Return the recurrent state at the start of an episode, `(*batch[, N], ...)` each."""
        carry = self.algorithm.initial_carry(self.setup, (int(np.prod(batch_shape)),))
        return jax.tree.map(partial(self._outwards, batch_shape), carry)

    def act(
        self, carry: Any, observation: Observation, key: Array, greedy: bool = False
    ) -> tuple[Array, Any]:
        """Return actions `(*batch[, N][, A])` and the recurrent state after the step.

        The observation has agents_view `(*batch[, N], O)`, action_mask `(*batch[, N], A)` and
        step_count `(*batch)`; N is absent if the policy is one agent's. `greedy` takes the most
        likely action instead of a sampled one.
        """
        acted: tuple[Array, Any] = self._act(self.params, carry, observation, key, greedy)
        return acted

    @partial(jax.jit, static_argnames=("self", "greedy"))
    def _act(
        self, params: Any, carry: Any, observation: Observation, key: Array, greedy: bool
    ) -> Any:
        batch_shape = observation.step_count.shape

        def inwards(x: Array) -> Array:
            x = x.reshape(-1, *x.shape[len(batch_shape) :])
            return x[:, None] if self.one_agent else x

        inner, carry = jax.tree.map(inwards, (observation, carry))
        inner = inner._replace(step_count=observation.step_count.reshape(-1))
        acted = self.algorithm.act(self.setup, params, carry, inner, key, greedy)
        return jax.tree.map(partial(self._outwards, batch_shape), acted)

    def _outwards(self, batch_shape: tuple[int, ...], x: Array) -> Array:
        """Reshape (B, N, ...), as a system has it, to (*batch[, N], ...)."""
        x = x[:, 0] if self.one_agent else x
        return x.reshape(*batch_shape, *x.shape[1:])


def load_policy(
    folder: str | Path,
    seed: int | None = None,
    setting: Mapping[str, float | None] | None = None,
    agent: int | None = None,
    system: ModuleType | None = None,
) -> TrainedPolicy:
    """Load the best policy of a run's results folder. Raises ConfigError.

    Args:
        seed: consider only policies of this seed.
        setting: consider only policies with these values of varied hyperparameters, such as
            {"system.delta": 1.2}.
        agent: load the policy of this agent alone, which sees its own observation; by default, load
            all agents' policies.
        system: the module, if the system is not one of magpo's.
    """
    trained = read(folder, system)
    return build(trained, trained.best(trained.places(seed, setting or {})), agent)


def build(
    trained: TrainedRun, place: int, agent: int | None = None, env: Environment | None = None
) -> TrainedPolicy:
    """Build the policy of the member at index `place`, for its own or another environment.

    Raises ConfigError.
    """
    env_spec, member = spec(env) if env else trained.env, trained.config.members[place]
    params = jax.tree.map(lambda x: x[place], trained.params)
    card = trained.algorithm.CARD
    if agent is not None:
        if not 0 <= agent < env_spec.num_agents:
            raise ConfigError(f"agent={agent}: must be 0 .. {env_spec.num_agents - 1}")
        if card.deployed is Deployed.JOINT:
            raise ConfigError(f"agent={agent}: {trained.config.system} acts for all agents at once")
        if card.parameters is Parameters.PER_AGENT:
            params = jax.tree.map(lambda x: x[agent : agent + 1], params)
    return TrainedPolicy(
        algorithm=trained.algorithm,
        setup=trained.algorithm.make(trained.config.algorithm_of(member.setting), env_spec),
        env=env_spec,
        params=params,
        one_agent=agent is not None,
        member=member,
        score=float(trained.score[place]),
    )


def make_env(trained: TrainedRun, task: str | None, options: Mapping[str, Any]) -> Environment:
    """Make the run's environment or another task's, with some options changed.

    Raises ConfigError if there is no such task or option, or if the policies cannot act in it.
    """
    seen = trained.env
    env = envs.make(
        task or seen.name,
        global_state=trained.config.algorithm.needs_global_state,
        **{**(trained.config.env.options if task in (None, seen.name) else {}), **options},
    )

    def fits(env: EnvSpec) -> str:
        own = trained.algorithm.CARD.parameters is Parameters.PER_AGENT
        agents = f"{env.num_agents} agents, each with " if own else ""
        return f"{agents}{env.num_features} features and {env.action_dim} {env.action_kind} actions"

    if (ours := fits(seen)) != (theirs := fits(spec(env))):
        raise ConfigError(f"the policy is for {ours}; {env.name} has {theirs}")
    return env
