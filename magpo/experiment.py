"""Run one experiment: members, chunks, evaluation, the best parameters, logging.

This file knows no algorithm. Members, each a seed with one setting of the varied hyperparameters,
are a vmap axis over a system's functions. A chunk, the updates between two evaluations, is one
compiled program; the loop over chunks is here, on the host. The device always has its next chunk
before the host reads the last one's metrics, and the state is donated to it: the evaluated and the
best parameters are therefore copies, made on the device before that (`snapshot`).
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magpo import cli, contract, devices, envs, footprint, processes, resume, runs
from magpo import config as configuration
from magpo.config import RunConfig
from magpo.console import Console
from magpo.contract import Algorithm
from magpo.errors import ConfigError
from magpo.evaluate import evaluate
from magpo.loggers import (
    JsonLines,
    LearningCurve,
    LoggingError,
    MarlEval,
    Measurement,
    Neptune,
    Run,
    Sink,
    TensorBoard,
    Writer,
    defined,
    require_neptune,
)
from magpo.resume import Saver, Start
from magpo.types import Array, Environment, spec

ABSOLUTE_EVALUATIONS = 10  # the absolute metric plays this many times `eval_episodes`


_signals: list[int] = []  # those that asked this process to stop


class DivergenceError(RuntimeError):
    """A loss or a parameter is no longer a number; the message says which, when and where."""


class Best(NamedTuple):
    """Each member's evaluation with the highest mean episode return, the latest of equals."""

    score: Any  # (M,) mean episode return
    chunk: Any  # (M,) int32, chunks trained when it was evaluated
    params: Any  # (M, ...) the policy it evaluated


class Programs(NamedTuple):
    """Jitted functions; all arrays have a leading axis of members, except `index`, ()."""

    init: Any  # keys, hyperparameters -> state
    train_chunk: Any  # state, donated -> state, metrics (M, U)
    snapshot: Any  # state -> a copy of the policy's parameters, whether all parameters are finite
    copy: Any  # state -> a copy, for a checkpoint
    evaluate: Any  # policy parameters, keys, index -> metrics (M, eval_episodes)
    keep_best: Any  # best, policy parameters, episode returns (M, eval_episodes), index -> best


class Inputs(NamedTuple):
    """The members' values that enter the programs, (M,) each."""

    train_keys: Array
    evaluation_keys: Array
    hyper: Any


@dataclass(frozen=True)
class Result:
    """The outcome of a run. Its folder holds the metrics too."""

    folder: Path
    measurements: list[Measurement]  # at step 0 and after every chunk, without training metrics
    absolute: Measurement | None
    best: Best
    params: Any  # (M, ...) the policy at the end


class Shapes(NamedTuple):
    """The shapes, dtypes and shardings that the programs take and return."""

    keys: Any
    hyper: Any
    state: Any
    params: Any  # of the policy
    best: Best


def main(module: ModuleType) -> None:
    """Run the command line of a system.

    Exit code: 0 done, 1 failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
    """
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        cli.hydra_main(module, _job)
        return
    except (DivergenceError, LoggingError) as error:
        print("error:", error, file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 128 + (_signals or [signal.SIGINT])[0]
    processes.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an orderly exit would first wait for the chunk that is under way


def _job(module: ModuleType, config: RunConfig) -> None:
    """Run in this process, or in a launcher's, which would ignore SIGTERM."""
    main_catches = signal.getsignal(signal.SIGTERM) is _stop
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    try:
        run(module, config)
    except KeyboardInterrupt:
        if main_catches or not _signals:
            raise
        sys.exit(128 + _signals[0])


def _stop(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)  # a second one kills
    _signals.append(signum)
    raise KeyboardInterrupt


def _check_interrupted() -> None:
    """Raise a KeyboardInterrupt that Python lost, having raised it inside a garbage collection."""
    if _signals:
        raise KeyboardInterrupt


def run(module: ModuleType, config: RunConfig, env: Environment | None = None) -> Result:
    """Train, evaluate and log one system on one task, all members side by side.

    `env` takes the place of the environment that `config.env` names. Raises ConfigError before
    anything is compiled, DivergenceError, LoggingError. Whatever ends the run, its files hold
    everything measured so far.
    """
    algorithm = contract.algorithm(module)
    set_up_jax(config)
    if config.logger.neptune:
        require_neptune()
    env = env or make_env(config)
    _check_global_state(env, config)
    setup = make_setup(algorithm, env, config)
    programs = build_programs(algorithm, setup, env, config)
    shapes = shapes_of(algorithm, programs, config)
    with ExitStack() as stack:
        folder = Path(processes.agreed(lambda: _claimed_folder(config, stack)))
        start = resume.start(folder, config, shapes.state, shapes.best) if config.resume else None
        if processes.is_first():
            stack.enter_context(runs.recorded(folder))
        return _run(programs, shapes, env, config, folder, start)


def make_env(config: RunConfig) -> Environment:
    """Make the run's environment, with a global state if the system needs it. Raises
    ConfigError."""
    needed = config.algorithm.needs_global_state
    try:
        return envs.make(config.env.name, global_state=needed, **config.env.options)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def make_setup(algorithm: Algorithm, env: Environment, config: RunConfig) -> Any:
    """Make the setup that all members share; the system checks every setting for the task first.
    Raises ConfigError."""
    configs = map(config.algorithm_of, config.settings)
    setup, *_ = [algorithm.make(of_setting, spec(env)) for of_setting in configs]
    return setup


def _check_global_state(env: Environment, config: RunConfig) -> None:
    """Raise ConfigError if a caller's environment does not provide exactly the global state this
    system needs."""
    needed = config.algorithm.needs_global_state
    if needed != (env.observation_spec.global_state is not None):
        raise ConfigError(
            f"{config.system} as configured needs an environment with global_state={needed}: "
            f"magpo.envs.make(..., global_state={needed})"
        )


def _claimed_folder(config: RunConfig, stack: ExitStack) -> Path:
    """Create the run's folder, or claim the one being resumed, and lock it."""
    if config.resume not in (None, "auto"):
        folder = Path(str(config.resume))
        stack.enter_context(runs.working(folder))
        return folder
    while True:
        found = runs.newest_unfinished(config) if config.resume else None
        folder = found or runs.create(config)
        try:
            stack.enter_context(runs.working(folder))
        except ConfigError:
            if found is None:
                raise
            continue  # another job was faster
        return folder


def _run(
    programs: Programs,
    shapes: Shapes,
    env: Environment,
    config: RunConfig,
    folder: Path,
    start: Start | None,
) -> Result:
    suite, _, task = env.name.partition("/")
    info = Run(
        folder, config.system, suite, task, config.members, env.headline, config.steps_per_update
    )
    log = JsonLines(info, start.log_bytes if start else 0) if processes.is_first() else None
    sinks: list[Sink] = [log, *_other_sinks(info, config, start)] if log else []
    console = Console(info, config, ABSOLUTE_EVALUATIONS if config.absolute_metric else 0)
    if log and start and log.size < start.log_bytes:
        console.warn(f"{log.path} is shorter than it was: records are missing")
    earlier = start.measurements if start else []
    for measurement in earlier:
        console.resume(measurement)
    try:
        with Writer(sinks, console.warn) as writer:
            console.header(env, shapes.params, shapes.state.params)
            traced = programs.train_chunk.trace(shapes.state)
            needed = footprint.estimate(traced, shapes.state, devices.layout(config).mesh)
            console.footprint(needed, footprint.available())
            with console.compiling(programs._fields) as done:
                programs = compile_programs(programs, shapes, config, done.append)
            recorder = _Recorder(config, writer, console, earlier)
            saver = Saver(config, folder, writer, log, spec(env))
            try:
                with console.training():
                    result = _train(programs, config, recorder, saver, start)
            except (KeyboardInterrupt, SystemExit):  # the latter a launcher's, out of its handler
                saver.stop()
                raise
    except (KeyboardInterrupt, DivergenceError):
        console.line(f"stopped; everything up to here is in {folder}", "yellow")
        raise
    console.finished(result.measurements[-1], _of_best(result), result.absolute)
    return result


def _other_sinks(info: Run, config: RunConfig, start: Start | None) -> list[Sink]:
    """Make all sinks but metrics.jsonl, and give them a resumed run's earlier measurements."""
    sinks: list[Sink] = [MarlEval(info), *([LearningCurve(info)] if config.logger.plot else [])]
    for measurement in start.measurements if start else ():
        for sink in sinks:
            sink.write(measurement)
    if config.logger.tensorboard:
        resumed_at = start.measurements[-1].env_steps[0] if start else -1
        sinks.append(TensorBoard(info, resumed_at if config.resume else None))
    if config.logger.neptune:
        configs = [configuration.dump_setting(config, m.setting) for m in config.members]
        sinks.append(Neptune(info, config.logger.neptune_project, config.logger.tags, configs))
    return sinks


def set_up_jax(config: RunConfig) -> None:
    """Set platform, precision and compilation cache, and join other processes, before JAX computes.

    JAX takes a TPU or a GPU by itself if there is one: only the CPU has to be asked for. Raises
    ConfigError for a platform that this machine, or this process, does not have.
    """
    # XLA's CPU backend calls LAPACK from threads of its own (the Cholesky solves of brax's
    # `generalized` backend). On a busy machine, OpenBLAS's own threads would slow those down.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    settings: Any = jax.config
    if config.platform == "cpu":
        settings.update("jax_platforms", "cpu")
    settings.update("jax_default_matmul_precision", config.precision)
    if settings.jax_compilation_cache_dir is None:  # else JAX_COMPILATION_CACHE_DIR was set
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magpo" / "xla"
        settings.update("jax_compilation_cache_dir", str(cache))
        settings.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    processes.join(config.distributed)
    try:
        present = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names one that is missing
        reason = str(error).partition("\n")[0] or "no such device here"
        raise ConfigError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}: {reason}") from error
    if config.platform not in ("auto", present):
        raise ConfigError(
            f"platform={config.platform}: JAX finds none here; allowed: auto, {present}"
        )


def build_programs(
    algorithm: Algorithm, setup: Any, env: Environment, config: RunConfig
) -> Programs:
    """Build the run's programs, for all members at once, not yet compiled."""

    def init(key: Array, hyper: Any) -> Any:
        return algorithm.init(setup, env, key)._replace(hyper=hyper)

    def snapshot(state: Any) -> tuple[Any, Array]:
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]
        # A copy: the state's own buffers are overwritten by the next chunk.
        return jax.tree.map(jnp.copy, algorithm.policy_params(state)), jnp.stack(finite).all()

    def evaluate_member(params: Any, key: Array, index: Array) -> dict[str, Array]:
        key = jax.random.fold_in(key, index)
        return evaluate(algorithm, setup, env, params, key, config.eval_episodes)

    def keep_best(best: Best, params: Any, returns: Array, index: Array) -> Best:
        new = Best(returns.mean(), index, params)
        better = new.score >= best.score
        return Best(*(jax.tree.map(partial(jnp.where, better), new, best)))

    lay = devices.layout(config)
    init_all = lay.each_member(init)
    state_shapes = jax.eval_shape(init_all, _key_shapes(config), config.member_hyper())
    state = lay.of_state(state_shapes, algorithm.CARD.per_environment)
    members, metrics = lay.of_members(), lay.of_metrics()
    best = Best(metrics, metrics, members)
    return Programs(
        init=jax.jit(init_all, in_shardings=(members, members), out_shardings=state),
        train_chunk=jax.jit(
            lay.each_member(partial(algorithm.train_chunk, setup, env)),
            in_shardings=(state,),
            out_shardings=(state, metrics),
            donate_argnums=0,
        ),
        snapshot=jax.jit(
            lay.each_member(snapshot), in_shardings=(state,), out_shardings=(members, metrics)
        ),
        copy=jax.jit(partial(jax.tree.map, jnp.copy), in_shardings=(state,), out_shardings=state),
        evaluate=jax.jit(
            lay.each_member(evaluate_member, num_shared=1),
            in_shardings=(members, members, None),
            out_shardings=metrics,
        ),
        keep_best=jax.jit(
            jax.vmap(keep_best, in_axes=(0, 0, 0, None)),
            in_shardings=(best, members, metrics, None),
            out_shardings=best,
        ),
    )


def shapes_of(algorithm: Algorithm, programs: Programs, config: RunConfig) -> Shapes:
    """Return the shapes that `programs` take and return."""
    lay = devices.layout(config)
    members, metrics = lay.of_members(), lay.of_metrics()
    keys = devices.laid(_key_shapes(config), members)
    hyper = devices.laid(config.member_hyper(), members)
    state = programs.init.eval_shape(keys, hyper)
    params, _ = programs.snapshot.eval_shape(state)
    return Shapes(
        keys=keys,
        hyper=hyper,
        state=devices.laid(state, lay.of_state(state, algorithm.CARD.per_environment)),
        params=devices.laid(params, members),
        best=devices.laid(_no_best(config, params), Best(metrics, metrics, members)),
    )


def compile_programs(
    programs: Programs,
    shapes: Shapes,
    config: RunConfig,
    done: Callable[[str], None] = lambda name: None,
) -> Programs:
    """Compile all programs and tell `done` the name of each that is compiled.

    While one compiles, the next is traced. Compiling side by side as well would save no time,
    because XLA uses all cores by itself, but take half as much memory again.
    """
    index = np.int32(0)
    returns = np.zeros((len(config.members), config.eval_episodes), np.float32)
    arguments = {  # the longest first
        "train_chunk": (shapes.state,),
        "evaluate": (shapes.params, shapes.keys, index),
        "init": (shapes.keys, shapes.hyper),
        "snapshot": (shapes.state,),
        "copy": (shapes.state,),
        "keep_best": (shapes.best, shapes.params, returns, index),
    }

    options: dict[str, Any] = {}
    if jax.default_backend() == "cpu":  # half the compiler's memory, and a tenth faster to run
        if jax.__version_info__ < (0, 11):  # later ones have no other emitters
            options["xla_cpu_use_fusion_emitters"] = False
        options["xla_cpu_experimental_ynn_fusion_type"] = ""
    # `init` runs once and is not worth optimising, which takes most of its compilation.
    once = {"init": {"xla_backend_optimization_level": 0}}

    def finish(name: str, lowered: Any) -> Any:
        compiled = lowered.compile(options | once.get(name, {}))
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # the compiler's memory, hundreds of MB, back to the system
        done(name)
        return compiled

    pool, futures = ThreadPoolExecutor(1), {}
    for name, shaped in arguments.items():
        _check_interrupted()
        futures[name] = pool.submit(finish, name, getattr(programs, name).lower(*shaped))
    pool.shutdown(wait=False)  # waiting here could not be interrupted
    return Programs(**{name: future.result() for name, future in futures.items()})


def member_inputs(config: RunConfig) -> Inputs:
    """Return each member's random keys and hyperparameters.

    The keys come from its seed alone, so that a member trains as the run of its setting alone does.
    """
    sharding = devices.layout(config).of_members()
    make: Any = jax.jit(
        lambda seeds, hyper: Inputs(*jax.vmap(_split_seed)(seeds), hyper), out_shardings=sharding
    )
    inputs: Inputs = make(_seeds(config), config.member_hyper())
    return inputs


def _split_seed(seed: Array) -> tuple[Array, Array]:
    train_key, evaluation_key = jax.random.split(jax.random.key(seed))
    return train_key, evaluation_key


def _seeds(config: RunConfig) -> np.ndarray:
    """Return each member's seed, (M,)."""
    return np.array([member.seed for member in config.members], np.uint32)


def _key_shapes(config: RunConfig) -> Any:
    return jax.eval_shape(jax.vmap(jax.random.key), _seeds(config))


def _no_best(config: RunConfig, params: Any) -> Best:
    number = len(config.members)
    return Best(np.full(number, -np.inf, np.float32), np.zeros(number, np.int32), params)


class _Recorder:
    """Reads metrics off the device, hands them on, and stops the run at the first NaN."""

    def __init__(
        self,
        config: RunConfig,
        writer: Writer,
        console: Console,
        earlier: Sequence[Measurement] = (),
    ) -> None:
        self.config, self.writer, self.console = config, writer, console
        self.measurements = list(earlier)
        self.last = time.perf_counter()
        self.began = self.last - (earlier[-1].wall_s if earlier else 0.0)

    def record(
        self, index: int, finite: Array, evaluation: dict[str, Array], training: dict[str, Array]
    ) -> None:
        """Wait for a chunk and the evaluation after it. Raises DivergenceError."""
        metrics = _get(training)
        trained = time.perf_counter()
        scores = _get(evaluation)
        now = time.perf_counter()
        timing = {}
        if index > 0:  # the first evaluation shares its time with what starts up
            timing["training_s"] = trained - self.last
            timing["evaluation_s"] = now - trained
            timing["steps_per_s"] = self.config.steps_per_chunk / timing["training_s"]
        self.last = now
        steps = (index * self.config.steps_per_chunk,) * len(self.config.members)
        measurement = Measurement(index, steps, now - self.began, scores, metrics, timing)
        self.writer.put(measurement)
        self.console.update(measurement)
        self.measurements.append(measurement._replace(training={}))
        self._check(index, np.asarray(finite), metrics)

    def record_absolute(self, best: Best, parts: list[dict[str, Array]]) -> Measurement:
        """Wait for the evaluations that make up the absolute metric."""
        scores = _get(parts)
        joined = {name: np.concatenate([part[name] for part in scores], 1) for name in scores[0]}
        steps = tuple(int(i) * self.config.steps_per_chunk for i in np.asarray(best.chunk))
        wall_s = time.perf_counter() - self.began
        measurement = Measurement(None, steps, wall_s, joined, {}, {})
        self.writer.put(measurement)
        return measurement

    def _check(self, index: int, finite: np.ndarray, metrics: dict[str, np.ndarray]) -> None:
        config = self.config
        nan = {name: np.isnan(values) & defined(metrics, name) for name, values in metrics.items()}
        anywhere = np.any(list(nan.values()), axis=0) if nan else np.zeros((1, 1), bool)  # (M, U)
        if anywhere.any():
            update, place = np.argwhere(anywhere.T)[0]
            what = ", ".join(name for name in nan if nan[name][place, update])
            update += (index - 1) * config.updates_per_chunk + 1
        elif not finite.all():
            place, what, update = np.argmin(finite), "parameters", index * config.updates_per_chunk
        else:
            return
        raise DivergenceError(
            f"training diverged at update {update} of {config.num_updates}, "
            f"{config.members[place].name}: {what} not finite"
        )


def _get(tree: Any) -> Any:
    """Return the arrays' values once they are computed; answer signals while waiting."""
    pause = 1e-4
    while not all(array.is_ready() for array in jax.tree.leaves(tree)):
        _check_interrupted()
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    _check_interrupted()
    return jax.device_get(tree)


def _train(
    programs: Programs, config: RunConfig, recorder: _Recorder, saver: Saver, start: Start | None
) -> Result:
    """Train, evaluate and save chunk after chunk. `programs` are compiled."""
    train_keys, evaluation_keys, hyper = member_inputs(config)
    # A resumed run takes its hyperparameters from its configuration: they may have been changed.
    state = start.state._replace(hyper=hyper) if start else programs.init(train_keys, hyper)
    best = start.best if start else None
    recorded = start.chunk if start else -1
    training: dict[str, Array] = {}
    for index in range(max(recorded, 0), config.num_evaluations + 1):
        params, finite = programs.snapshot(state)
        if index > recorded:
            evaluation = programs.evaluate(params, evaluation_keys, np.int32(index))
            best = best or _no_best(config, params)
            best = programs.keep_best(best, params, evaluation["episode_return"], np.int32(index))
            measured = (finite, evaluation, training)
        copy = programs.copy(state) if index > max(recorded, 0) and config.keep else None
        if index < config.num_evaluations:
            state, training = programs.train_chunk(state)  # before the host waits for `measured`
        if index > recorded:
            recorder.record(index, *measured)
        if copy is not None and best is not None:
            saver.offer(index, copy, best, recorder.measurements)
    assert best is not None
    absolute = None
    if config.absolute_metric:
        indices = range(index + 1, index + 1 + ABSOLUTE_EVALUATIONS)
        parts = [programs.evaluate(best.params, evaluation_keys, np.int32(i)) for i in indices]
        absolute = recorder.record_absolute(best, parts)
    return Result(saver.folder, recorder.measurements, absolute, best, params)


def _of_best(result: Result) -> Measurement:
    """Return the evaluations behind `result.best` as one measurement; its steps differ by
    member."""
    chosen = [result.measurements[i] for i in np.asarray(result.best.chunk)]
    scores = {
        name: np.stack([m.evaluation[name][place] for place, m in enumerate(chosen)])
        for name in chosen[0].evaluation
    }
    steps = tuple(m.env_steps[place] for place, m in enumerate(chosen))
    return result.measurements[-1]._replace(env_steps=steps, evaluation=scores)
