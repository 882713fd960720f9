"""The contract between a system and everything that runs, saves, loads and exports it.

A system is a module with the names of `Algorithm`. All its functions are pure and written for ONE
member (a seed with one setting of the varied hyperparameters) and for no particular device. The
experiment loop maps them over members.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import (
    Any,
    NamedTuple,
    Protocol,
    TypeVar,
    cast,
    dataclass_transform,
    get_args,
    get_type_hints,
)

import jax
import numpy as np

from magpo.errors import ConfigError
from magpo.types import Array, Environment, EnvSpec, Observation

H = TypeVar("H")
# What a run provides to a system's Config: `system.*`, `network.*` and four numbers.
PROVIDED = ("hyper", "network", "num_envs", "rollout_length", "updates_per_chunk", "num_updates")


class Deployed(Enum):
    """The policy that acts outside training."""

    EACH_AGENT = "each agent's policy"
    JOINT = "a joint policy"


class Parameters(Enum):
    """The owner of the deployed policy's parameters."""

    SHARED = "shared"
    PER_AGENT = "each agent's own"


class Card(NamedTuple):
    """A short description of a system: its row in `python -m magpo.systems`."""

    centralised: str  # the part that sees all agents
    deployed: Deployed
    carry: str  # the deployed policy's recurrent state
    parameters: Parameters
    # The TrainState's fields whose arrays have a leading axis of environments. Several devices can
    # share these arrays; each has a copy of all others.
    per_environment: tuple[str, ...] = ("env_state", "timestep", "carry")
    actions: str = "discrete, continuous"  # the kinds of actions that it learns


class AlgorithmConfig(Protocol):
    """A frozen dataclass whose fields are among PROVIDED.

    All settings share one `setup`, in which the floats of `hyper` are NaN: a system reads them from
    the TrainState.
    """

    @property
    def hyper(self) -> Any: ...  # `system.*`, a class made by `hyperparameters`

    @property
    def needs_global_state(self) -> bool: ...  # whether the system reads `Observation.global_state`


class TrainState(Protocol):
    """Everything that changes during training: a NamedTuple with at least these fields."""

    @property
    def params(self) -> Any: ...

    @property
    def hyper(self) -> Any: ...  # the configuration's `hyper` as data, see `as_data`

    def _replace(self, *, hyper: Any) -> Any: ...


class Algorithm(Protocol):
    """A system's module. `setup` is the result of `make`: everything static, and hashable."""

    CARD: Card
    Config: Any  # a dataclass type, an AlgorithmConfig

    def make(self, config: Any, spec: EnvSpec) -> Any: ...  # raises ConfigError

    def init(self, setup: Any, env: Environment, key: Array) -> Any: ...  # a TrainState

    def train_chunk(
        self, setup: Any, env: Environment, state: Any
    ) -> tuple[Any, dict[str, Array]]: ...  # metrics have an axis of updates

    def policy_params(self, state: Any) -> Any: ...  # the deployed part of `state.params`

    def initial_carry(self, setup: Any, batch_shape: tuple[int, ...]) -> Any: ...

    def act(
        self,
        setup: Any,
        params: Any,
        carry: Any,
        observation: Observation,
        key: Array,
        greedy: bool,
    ) -> tuple[Array, Any]: ...


def algorithm(module: ModuleType) -> Algorithm:
    """Return a module as an Algorithm. Raises ConfigError if it does not meet the contract."""
    functions = [name for name in vars(Algorithm) if not name.startswith("_")]
    names = [*Algorithm.__annotations__, *functions]
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        name = Path(module.__file__ or module.__name__).name
        raise ConfigError(
            f"{name} is not a system: it lacks {', '.join(missing)}; "
            f"a system has {', '.join(names)} (magpo.contract)"
        )
    _check_config(module)
    return cast(Algorithm, module)


def _check_config(module: ModuleType) -> None:
    """Raise ConfigError unless `Config` is a dataclass whose fields a run provides."""
    file, schema = Path(module.__file__ or module.__name__).name, module.Config
    found = [field.name for field in fields(schema)] if is_dataclass(schema) else []
    strange = [name for name in found if name not in PROVIDED]
    if strange or "hyper" not in found or not hasattr(schema, "needs_global_state"):
        raise ConfigError(
            f"{file}: Config must be a dataclass with `hyper` and `needs_global_state`; "
            f"its fields must be among {', '.join(PROVIDED)}"
            + (f"; it has {', '.join(strange)}" if strange else "")
        )
    if not hasattr(get_type_hints(schema)["hyper"], "__dataclass_fields__"):
        raise ConfigError(f"{file}: Config.hyper must be a class made by `hyperparameters`")


@dataclass_transform(frozen_default=True)
def hyperparameters(cls: type[H]) -> type[H]:
    """Make a frozen dataclass whose floats are the leaves of a pytree; its other fields are static.

    One compiled program serves all values of the floats; counts and choices are static.
    """
    made: Any = dataclass(frozen=True)(cls)
    names = float_names(made)
    static = [field.name for field in fields(made) if field.name not in names]
    jax.tree_util.register_dataclass(made, data_fields=names, meta_fields=static)
    return cast(type[H], made)


def float_names(hyper: Any) -> list[str]:
    """Return the names of the float fields of a class made by `hyperparameters`."""
    kinds = get_type_hints(hyper)
    return [f.name for f in fields(hyper) if float in (kinds[f.name], *get_args(kinds[f.name]))]


def as_data(hyper: H) -> H:
    """Return hyperparameters with their floats as () float32 arrays, infinite instead of None."""
    values = {name: getattr(hyper, name) for name in float_names(type(hyper))}
    data = {k: np.float32(np.inf if v is None else v) for k, v in values.items()}
    return cast(H, replace(cast(Any, hyper), **data))
