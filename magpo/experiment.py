"""Run one experiment: seeds, chunks, evaluation, the best parameters, logging. Knows no algorithm.

Seeds are a vmap axis over a system's functions. A chunk, the updates between two evaluations, is
one compiled program; the loop over chunks is here, on the host. The device always has its next
chunk before the host reads the last one's figures, and the state is donated to it: what is
evaluated or kept as best is therefore a copy, made on the device before that (`snapshot`).
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

from magpo import cli, devices, envs, memory, processes, runs, saving
from magpo import config as configuration
from magpo.config import ConfigError, RunConfig
from magpo.console import Console
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
from magpo.saving import Saver, Start
from magpo.types import Array, Environment, spec

ABSOLUTE_EVALUATIONS = 10  # the absolute metric plays this many times `eval_episodes`


_signals: list[int] = []  # that asked this process to stop


class DivergenceError(RuntimeError):
    """A loss or a parameter is no longer a number; the message says which, when and where."""


class Best(NamedTuple):
    """Per seed: the evaluation with the highest mean episode return, the latest of equals."""

    score: Any  # (S,) mean episode return
    chunk: Any  # (S,) int32, chunks trained when it was evaluated
    params: Any  # (S, ...) the policy it evaluated


class Programs(NamedTuple):
    """Jitted functions; all arrays have a leading axis of seeds, except `index`, ()."""

    init: Any  # keys -> state
    train_chunk: Any  # state, donated -> state, metrics (S, U)
    snapshot: Any  # state -> a copy of the policy's parameters, whether all parameters are finite
    copy: Any  # state -> a copy, for a checkpoint
    evaluate: Any  # policy parameters, keys, index -> metrics (S, eval_episodes)
    keep_best: Any  # best, policy parameters, episode returns (S, eval_episodes), index -> best


@dataclass(frozen=True)
class Result:
    """What came of a run. The figures are in its folder too."""

    folder: Path
    measurements: list[Measurement]  # at step 0 and after every chunk, training metrics left out
    absolute: Measurement | None
    best: Best
    params: Any  # (S, ...) the policy at the end


class Shapes(NamedTuple):
    """What the programs take and give, as shapes, dtypes and shardings."""

    keys: Any
    state: Any
    params: Any  # of the policy
    best: Best


def main(system_module: ModuleType) -> None:
    """The command line of a system.

    Exit code: 0 done, 1 failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
    """
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        cli.hydra_main(system_module, _job)
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


def _job(system_module: ModuleType, config: RunConfig) -> None:
    """A run, maybe in a process of a launcher's, which would ignore SIGTERM."""
    of_main = signal.getsignal(signal.SIGTERM) is _stop
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    try:
        run(system_module, config)
    except KeyboardInterrupt:
        if of_main or not _signals:
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


def run(system_module: ModuleType, config: RunConfig, env: Environment | None = None) -> Result:
    """Train, evaluate and log one system on one task, all seeds side by side.

    `env` takes the place of the environment that `config.env` names. Raises ConfigError before
    anything is compiled, DivergenceError, LoggingError. Whatever ends it, the files hold all that
    was measured.
    """
    set_up_jax(config)
    if config.logger.neptune:
        require_neptune()
    env = env or make_env(config)
    _check_global_state(env, config)
    system = system_module.make(config.algorithm, env)
    programs = build_programs(system_module, system, env, config)
    shapes = shapes_of(programs, config)
    with ExitStack() as stack:
        folder = Path(processes.agreed(lambda: _claimed_folder(config, stack)))
        start = saving.start(folder, config, shapes.state, shapes.best) if config.resume else None
        if processes.is_first():
            stack.enter_context(runs.recorded(folder))
        return _run(programs, shapes, env, config, folder, start)


def make_env(config: RunConfig) -> Environment:
    """The run's environment, with a global state where the system asks for it by a property
    `global_state` of its Config. Raises ConfigError."""
    try:
        return envs.make(
            config.env.name, global_state=_needs_global_state(config), **config.env.options
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _needs_global_state(config: RunConfig) -> bool:
    return getattr(config.algorithm, "global_state", False)


def _check_global_state(env: Environment, config: RunConfig) -> None:
    """Raise ConfigError where an environment of the caller's has none, or one too many."""
    needed = _needs_global_state(config)
    if needed != (env.observation_spec.global_state is not None):
        raise ConfigError(
            f"{config.system} as configured needs an environment with global_state={needed}: "
            f"magpo.envs.make(..., global_state={needed})"
        )


def _claimed_folder(config: RunConfig, stack: ExitStack) -> Path:
    """The run's, a new one or that of the run to be resumed, where nobody else then works."""
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
        folder, config.system, suite, task, config.seeds, env.headline, config.steps_per_update
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
            needed = memory.estimate(traced, shapes.state, devices.layout(config).mesh)
            console.memory(needed, memory.available())
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
    """All but metrics.jsonl, with what they need of a resumed run's past."""
    sinks: list[Sink] = [MarlEval(info), *([LearningCurve(info)] if config.logger.plot else [])]
    for measurement in start.measurements if start else ():
        for sink in sinks:
            sink.write(measurement)
    if config.logger.tensorboard:
        resumed_at = start.measurements[-1].env_steps[0] if start else -1
        sinks.append(TensorBoard(info, resumed_at if config.resume else None))
    if config.logger.neptune:
        values = configuration.dump(config)
        sinks.append(Neptune(info, config.logger.neptune_project, config.logger.tags, values))
    return sinks


def set_up_jax(config: RunConfig) -> None:
    """Platform, precision, compilation cache, other processes; before JAX computes anything.

    By itself JAX takes a TPU or a GPU where there is one: only the CPU has to be asked for. Raises
    ConfigError for a platform that this machine, or this process, does not have.
    """
    # XLA's CPU backend calls LAPACK (orthogonal initialisers) from threads of its own. On a busy
    # machine, OpenBLAS's threads below those turn milliseconds into seconds.
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
    except (RuntimeError, AssertionError) as error:  # the environment names one that is missing
        reason = str(error).partition("\n")[0] or "no such device here"
        raise ConfigError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}: {reason}") from error
    if config.platform not in ("auto", present):
        raise ConfigError(
            f"platform={config.platform}: JAX finds none here; allowed: auto, {present}"
        )


def build_programs(
    system_module: ModuleType, system: Any, env: Environment, config: RunConfig
) -> Programs:
    """The run's programs, for all seeds at once, not yet compiled."""

    def snapshot(state: Any) -> tuple[Any, Array]:
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]
        # A copy: the state's own buffers are overwritten by the next chunk.
        return jax.tree.map(jnp.copy, system_module.policy_params(state)), jnp.stack(finite).all()

    def evaluate_seed(params: Any, key: Array, index: Array) -> dict[str, Array]:
        key = jax.random.fold_in(key, index)
        return evaluate(system_module, system, env, params, key, config.eval_episodes)

    def keep_best(best: Best, params: Any, returns: Array, index: Array) -> Best:
        new = Best(returns.mean(), index, params)
        better = new.score >= best.score
        return Best(*(jax.tree.map(partial(jnp.where, better), new, best)))

    lay = devices.layout(config)
    # One seed after the other: batches of QR decompositions (orthogonal initialisers) that run side
    # by side wait for each other's threads for ever in XLA's CPU backend on few cores.
    init = lay.per_device(
        partial(jax.lax.map, partial(system_module.init, system)), devices.EACH_SEED
    )
    state = lay.of_state(jax.eval_shape(init, _key_shapes(config)))
    seeds, figures = lay.of_seeds(), lay.of_figures()
    best = Best(figures, figures, seeds)
    return Programs(
        init=jax.jit(init, in_shardings=seeds, out_shardings=state),
        train_chunk=jax.jit(
            lay.each_seed(partial(system_module.train_chunk, system)),
            in_shardings=(state,),
            out_shardings=(state, figures),
            donate_argnums=0,
        ),
        snapshot=jax.jit(
            lay.each_seed(snapshot), in_shardings=(state,), out_shardings=(seeds, figures)
        ),
        copy=jax.jit(partial(jax.tree.map, jnp.copy), in_shardings=(state,), out_shardings=state),
        evaluate=jax.jit(
            lay.each_seed(evaluate_seed, num_shared=1),
            in_shardings=(seeds, seeds, None),
            out_shardings=figures,
        ),
        keep_best=jax.jit(
            jax.vmap(keep_best, in_axes=(0, 0, 0, None)),
            in_shardings=(best, seeds, figures, None),
            out_shardings=best,
        ),
    )


def shapes_of(programs: Programs, config: RunConfig) -> Shapes:
    """What `programs` take and give."""
    lay = devices.layout(config)
    seeds, figures = lay.of_seeds(), lay.of_figures()
    keys = devices.laid(_key_shapes(config), seeds)
    state = programs.init.eval_shape(keys)
    params, _ = programs.snapshot.eval_shape(state)
    return Shapes(
        keys=keys,
        state=devices.laid(state, lay.of_state(state)),
        params=devices.laid(params, seeds),
        best=devices.laid(_no_best(config, params), Best(figures, figures, seeds)),
    )


def compile_programs(
    programs: Programs,
    shapes: Shapes,
    config: RunConfig,
    done: Callable[[str], None] = lambda name: None,
) -> Programs:
    """Compile all programs and tell `done` the name of each that is compiled.

    While one compiles, the next is traced. Compiling side by side as well would save no time, for
    XLA uses all cores by itself, but take half as much memory again.
    """
    index = np.int32(0)
    returns = np.zeros((len(config.seeds), config.eval_episodes), np.float32)
    arguments = {  # the longest first
        "train_chunk": (shapes.state,),
        "evaluate": (shapes.params, shapes.keys, index),
        "init": (shapes.keys,),
        "snapshot": (shapes.state,),
        "copy": (shapes.state,),
        "keep_best": (shapes.best, shapes.params, returns, index),
    }

    options: dict[str, Any] = {}
    if jax.default_backend() == "cpu":  # half the compiler's memory, and a tenth faster to run
        options["xla_cpu_use_fusion_emitters"] = False
        options["xla_cpu_experimental_ynn_fusion_type"] = ""
    # What runs once is not worth optimising: that takes most of its compilation.
    once = {"init": {"xla_backend_optimization_level": 0}}

    def finish(name: str, lowered: Any) -> Any:
        compiled = lowered.compile(options | once.get(name, {}))
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # the compiler's memory, hundreds of MB, back to the system
        done(name)
        return compiled

    pool, futures = ThreadPoolExecutor(1), {}
    for name, given in arguments.items():
        _check_interrupted()
        futures[name] = pool.submit(finish, name, getattr(programs, name).lower(*given))
    pool.shutdown(wait=False)  # waiting here could not be interrupted
    return Programs(**{name: future.result() for name, future in futures.items()})


def seed_keys(config: RunConfig) -> tuple[Array, Array]:
    """Each seed's random key for training and for evaluation, (S,) each."""
    sharding = devices.layout(config).of_seeds()
    split: Any = jax.jit(jax.vmap(_split_seed), out_shardings=sharding)
    train_keys, evaluation_keys = split(np.array(config.seeds, np.uint32))
    return train_keys, evaluation_keys


def _split_seed(seed: Array) -> tuple[Array, Array]:
    train_key, evaluation_key = jax.random.split(jax.random.key(seed))
    return train_key, evaluation_key


def _key_shapes(config: RunConfig) -> Any:
    return jax.eval_shape(jax.vmap(jax.random.key), np.array(config.seeds, np.uint32))


def _no_best(config: RunConfig, params: Any) -> Best:
    num_seeds = len(config.seeds)
    return Best(np.full(num_seeds, -np.inf, np.float32), np.zeros(num_seeds, np.int32), params)


class _Recorder:
    """Reads figures off the device, hands them on, and stops the run where one is NaN."""

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
        figures = _get(training)
        trained = time.perf_counter()
        scores = _get(evaluation)
        now = time.perf_counter()
        timing = {}
        if index > 0:  # the first evaluation shares its time with what starts up
            timing["training_s"] = trained - self.last
            timing["evaluation_s"] = now - trained
            timing["steps_per_s"] = self.config.steps_per_chunk / timing["training_s"]
        self.last = now
        steps = (index * self.config.steps_per_chunk,) * len(self.config.seeds)
        measurement = Measurement(index, steps, now - self.began, scores, figures, timing)
        self.writer.put(measurement)
        self.console.update(measurement)
        self.measurements.append(measurement._replace(training={}))
        self._check(index, np.asarray(finite), figures)

    def record_absolute(self, best: Best, parts: list[dict[str, Array]]) -> Measurement:
        scores = _get(parts)
        whole = {name: np.concatenate([part[name] for part in scores], 1) for name in scores[0]}
        steps = tuple(int(i) * self.config.steps_per_chunk for i in np.asarray(best.chunk))
        wall_s = time.perf_counter() - self.began
        measurement = Measurement(None, steps, wall_s, whole, {}, {})
        self.writer.put(measurement)
        return measurement

    def _check(self, index: int, finite: np.ndarray, figures: dict[str, np.ndarray]) -> None:
        config = self.config
        nan = {name: np.isnan(values) & defined(figures, name) for name, values in figures.items()}
        anywhere = np.any(list(nan.values()), axis=0) if nan else np.zeros((1, 1), bool)  # (S, U)
        if anywhere.any():
            update, s = np.argwhere(anywhere.T)[0]
            what = ", ".join(name for name in nan if nan[name][s, update])
            update += (index - 1) * config.updates_per_chunk + 1
        elif not finite.all():
            what, s, update = "parameters", np.argmin(finite), index * config.updates_per_chunk
        else:
            return
        raise DivergenceError(
            f"training diverged at update {update} of {config.num_updates}, "
            f"seed {config.seeds[s]}: {what} not finite"
        )


def _get(tree: Any) -> Any:
    """The arrays' values, once they are computed; a signal is answered while waiting."""
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
    """The loop over chunks. `programs` are compiled."""
    train_keys, evaluation_keys = seed_keys(config)
    state = start.state if start else programs.init(train_keys)
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
    """The evaluations behind `result.best`, as one measurement; its steps differ by seed."""
    chosen = [result.measurements[i] for i in np.asarray(result.best.chunk)]
    scores = {
        name: np.stack([m.evaluation[name][s] for s, m in enumerate(chosen)])
        for name in chosen[0].evaluation
    }
    steps = tuple(m.env_steps[s] for s, m in enumerate(chosen))
    return result.measurements[-1]._replace(env_steps=steps, evaluation=scores)
