"""A run's compiled programs, for all of its members at once."""

import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from magpo import contract, envs
from magpo.config.schema import RunConfig
from magpo.contract import Algorithm
from magpo.evaluate import evaluate
from magpo.experiment import checks
from magpo.hardware import devices
from magpo.types import Array, Environment, spec


class Best(NamedTuple):
    """Each member's evaluation with the highest mean episode return, the latest of equals."""

    score: Any  # (M,) mean episode return
    chunk: Any  # (M,) int32, chunks trained when it was evaluated
    params: Any  # (M, ...) the policy it evaluated


class Programs(NamedTuple):
    """The jitted functions, or the shapes of their arguments, in the order of compilation.

    The one that compiles longest is first. All arrays have a leading axis of members.
    """

    train_chunk: Any  # state, donated -> state, metrics (M, U)
    evaluate: Any  # policy parameters, keys, index (M,) -> metrics (M, eval_episodes)
    init: Any  # keys, hyperparameters -> state
    snapshot: Any  # state -> a copy of the policy's parameters; whether all parameters are finite
    copy: Any  # state -> a copy, for a checkpoint
    keep_best: Any  # best, policy parameters, episode returns (M, eval_episodes), index -> best


class Inputs(NamedTuple):
    """The programs' inputs per member, (M,) each."""

    train_keys: Array
    evaluation_keys: Array
    hyper: Any


def make_env(config: RunConfig) -> Environment:
    """Make the run's environment, with a global state if the system needs one.

    Raises ConfigError.
    """
    needed = config.algorithm.needs_global_state
    return envs.make(config.env.name, global_state=needed, **config.env.options)


def make_setup(algorithm: Algorithm, env: Environment, config: RunConfig) -> Any:
    """Make the setup that all members share, after the system has checked every setting.

    Raises ConfigError.
    """
    configs = map(config.algorithm_of, config.settings)
    setup, *_ = [algorithm.make(of_setting, spec(env)) for of_setting in configs]
    own = getattr(setup, "config", setup)
    if not hasattr(own, "hyper"):
        return setup
    # A system that reads floats here instead of in the state would train all members with the same
    # values: NaN makes this error visible.
    unset = dict.fromkeys(contract.float_names(type(own.hyper)), float("nan"))
    own = replace(own, hyper=replace(own.hyper, **unset))
    return replace(setup, config=own) if hasattr(setup, "config") else own


def build_programs(
    algorithm: Algorithm, setup: Any, env: Environment, config: RunConfig
) -> tuple[Programs, Programs]:
    """Build the run's programs, for all members at once, without compiling them.

    Returns the programs and a second tuple with the shapes, dtypes and shardings of their
    arguments. Raises ConfigError if the system returns something that the loop cannot use.
    """

    def init(key: Array, hyper: Any) -> Any:
        state = algorithm.init(setup, env, key)
        checks.check_state(algorithm, state)
        return state._replace(hyper=hyper)

    def train_chunk(state: Any) -> Any:
        returned = algorithm.train_chunk(setup, env, state)
        checks.check_chunk(algorithm, returned, state, config.updates_per_chunk)
        return returned

    def snapshot(state: Any) -> tuple[Any, Array]:
        finite = jnp.isfinite(ravel_pytree(state.params)[0]).all()
        # A copy, because the next chunk overwrites the state's own buffers.
        return jax.tree.map(jnp.copy, algorithm.policy_params(state)), finite

    def evaluate_member(params: Any, key: Array, index: Array) -> dict[str, Array]:
        key = jax.random.fold_in(key, index)
        return evaluate(algorithm, setup, env, params, key, config.eval_episodes)

    lay = devices.layout(config)
    members, metrics = lay.of_members(), lay.of_metrics()
    init_all, snapshot_all = lay.each_member(init), lay.each_member(snapshot)
    inputs = jax.eval_shape(partial(member_inputs, config))
    keys, _, hyper = devices.laid(inputs, members)
    state = jax.eval_shape(init_all, keys, hyper)
    of_state = lay.of_state(state, algorithm.CARD.per_environment)
    state = devices.laid(state, of_state)
    params = devices.laid(jax.eval_shape(snapshot_all, state)[0], members)
    of_best = Best(metrics, metrics, members)
    best = devices.laid(no_best(config, params), of_best)
    returns = np.zeros((len(config.members), config.eval_episodes), np.float32)
    index, returns = devices.laid((best.chunk, returns), metrics)
    programs = Programs(
        train_chunk=jax.jit(
            lay.each_member(train_chunk), out_shardings=(of_state, metrics), donate_argnums=0
        ),
        evaluate=jax.jit(lay.each_member(evaluate_member), out_shardings=metrics),
        init=jax.jit(init_all, out_shardings=of_state),
        snapshot=jax.jit(snapshot_all, out_shardings=(members, metrics)),
        copy=jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=of_state),
        keep_best=jax.jit(jax.vmap(_keep_best), out_shardings=of_best),
    )
    arguments = Programs(
        train_chunk=(state,),
        evaluate=(params, keys, index),
        init=(keys, hyper),
        snapshot=(state,),
        copy=(state,),
        keep_best=(best, params, returns, index),
    )
    return programs, arguments


def _keep_best(best: Best, params: Any, returns: Array, index: Array) -> Best:
    """Return the better of a member's best policy and the new one, unless the new one diverged."""
    new = Best(returns.mean(), index, params)
    better = (new.score >= best.score) & jnp.isfinite(ravel_pytree(params)[0]).all()
    return Best(*jax.tree.map(partial(jnp.where, better), new, best))


def compile_programs(programs: Programs, arguments: Programs) -> Programs:
    """Compile all programs, for arguments of these shapes.

    While one program compiles, the next is traced. Compiling them side by side would take half as
    much memory again and save no time, because XLA uses all cores anyway.
    """
    options: dict[str, Any] = {}
    if jax.default_backend() == "cpu":  # without these fusions it compiles faster, runs as fast
        options["xla_cpu_experimental_ynn_fusion_type"] = ""
        if "optimization_level" not in os.environ.get("XLA_FLAGS", ""):
            options["xla_backend_optimization_level"] = 2  # compiles faster, runs as fast
    # `init` runs once, so the optimisations that take most of its compile time do not pay off.
    once = options | {"xla_backend_optimization_level": 0}

    def compiled(lowered: Any, options: dict[str, Any]) -> Any:
        program = lowered.compile(options)
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # return the compiler's memory, hundreds of MB, to the system
        return program

    pool, futures = ThreadPoolExecutor(1), []
    for program, shaped in zip(programs, arguments, strict=True):
        chosen = once if program is programs.init else options
        futures.append(pool.submit(compiled, program.lower(*shaped), chosen))
    pool.shutdown(wait=False)  # waiting here could not be interrupted
    return Programs(*(future.result() for future in futures))


def member_inputs(config: RunConfig) -> Inputs:
    """Return each member's random keys and hyperparameters.

    A member's keys depend on its seed alone, so the member trains as in a run of its own.
    """

    def make(seeds: Array, hyper: Any) -> Inputs:
        keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds)  # (M, 2)
        return Inputs(train_keys=keys[:, 0], evaluation_keys=keys[:, 1], hyper=hyper)

    seeds = np.array([member.seed for member in config.members], np.uint32)
    make_all: Any = jax.jit(make, out_shardings=devices.layout(config).of_members())
    inputs: Inputs = make_all(seeds, config.member_hyper())
    return inputs


def no_best(config: RunConfig, params: Any) -> Best:
    """Return the `Best` before the first evaluation, with scores of -inf."""
    number = len(config.members)
    return Best(np.full(number, -np.inf, np.float32), np.zeros(number, np.int32), params)
