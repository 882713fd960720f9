"""One experiment: its set-up, its loop, and the command line of a system."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from magpo import config as configuration
from magpo import contract, envs, plugins, published
from magpo.config import cli
from magpo.config.members import Member, Setting, by_setting
from magpo.config.schema import RunConfig, dump, flat
from magpo.errors import ConfigError
from magpo.experiment import checks, interrupts
from magpo.experiment.programs import (
    Best,
    Programs,
    build_programs,
    compile_programs,
    make_env,
    make_setup,
    member_inputs,
    no_best,
)
from magpo.experiment.recorder import DivergenceError, Recorder
from magpo.files import complain, flush_output
from magpo.hardware import devices, processes
from magpo.report.console import Console
from magpo.report.measurements import ABSOLUTE_EVALUATIONS, Measurement, Run
from magpo.report.sinks import JsonLines, LearningCurve, MarlEval, Sink, TensorBoard
from magpo.report.trackers import TRACKERS, Tracker
from magpo.report.writer import LoggingError, Writer
from magpo.runs import folders, listing, resume
from magpo.runs.resume import Saver, Start
from magpo.types import Array, Environment, spec


@dataclass(frozen=True)
class Result:
    """The outcome of a run. M members: each setting with each seed, seeds changing fastest."""

    folder: Path  # the run's, with its configuration, metrics and checkpoints
    measurements: list[Measurement]  # at step 0 and after every chunk, without training metrics
    absolute: Measurement | None  # the best policies played again; None if absolute_metric=false
    best: Best  # (M, ...) the policies with the highest mean return in an evaluation
    params: Any  # (M, ...) the policies at the end
    members: tuple[Member, ...]  # (M,) their seeds and settings
    headline: str  # the metric that the suite's papers report: "win_rate"

    @property
    def scores(self) -> list[tuple[Setting, float]]:
        """Each setting with its mean headline metric over seeds: the absolute metric if it was
        played, otherwise the last evaluation; NaN if one of its seeds diverged."""
        last = self.absolute or self.measurements[-1]
        values = last.evaluation[self.headline].mean(-1, dtype=np.float64)
        return [(s, float(values[places].mean())) for s, places in by_setting(self.members)]

    @property
    def objective(self) -> float:
        """The highest of `scores`, which a search maximises; NaN if all settings diverged."""
        return max((score for _, score in self.scores), key=lambda x: -np.inf if x != x else x)


def run(
    module: ModuleType,
    config: RunConfig,
    env: Environment | None = None,
    sinks: Sequence[Callable[[Run], Sink]] = (),
    must_fit: bool = False,
) -> Result:
    """Train, evaluate and log one system on one task, all members side by side.

    `env` replaces the environment that `config.env` names. `sinks` make loggers of your own, beside
    those of `config.logger`; in a resumed run these first receive its earlier evaluations. With
    `must_fit`, the run fails instead of warning if training needs more memory than there is.

    Raises ConfigError before anything is compiled (with `must_fit`, before anything is trained),
    DivergenceError, or LoggingError. Whatever ends the run, its files hold all measurements so far.
    """
    algorithm = contract.algorithm(module)
    devices.set_up_jax(config)
    for client in TRACKERS:
        found = getattr(find_spec(client), "origin", None)  # also None for a mere folder
        if getattr(config.logger, client) and not found:
            raise ConfigError(
                f"logger.{client}: needs the {client} client: pip install 'magpo[{client}]'"
            )
    env = env or make_env(config)
    _check_env(env, config)
    setup = make_setup(algorithm, env, config)
    programs, arguments = build_programs(algorithm, setup, env, config)
    (state,) = arguments.train_chunk
    devices.check_memory(config, state)
    best, params, *_ = arguments.keep_best
    checks.check_act(algorithm, setup, env, params)
    programs.train_chunk.trace(state)  # checks what it returns; compiling reuses it
    with ExitStack() as stack:
        folder = Path(processes.agreed(lambda: resume.claimed(config, stack)))
        start = Start(chunk=-1, state=None, best=None, measurements=[], log_bytes=0)
        if config.resume:
            evaluation = programs.evaluate.eval_shape(*arguments.evaluate)
            start = resume.start(folder, config, state, best, evaluation) or start
        if processes.is_first():
            stack.enter_context(folders.recorded(folder))
        return _run(programs, arguments, env, config, folder, start, sinks, must_fit)


def _train(
    programs: Programs,
    config: RunConfig,
    headline: str,
    recorder: Recorder,
    saver: Saver,
    start: Start,
) -> Result:
    """Train, evaluate and save chunk after chunk. `programs` are compiled."""
    train_keys, evaluation_keys, hyper = member_inputs(config)
    number, last, training = len(config.members), config.num_evaluations, dict[str, Array]()
    first, best = start.chunk + 1, start.best
    if start.state is None:
        state = programs.init(train_keys, hyper)
    else:  # with the configuration's hyperparameters, which may have changed
        state = start.state._replace(hyper=hyper)
    if 0 < first <= last:
        state, training = programs.train_chunk(state)
    for index in range(first, last + 1):
        params, finite = programs.snapshot(state)
        chunk = np.full(number, index, np.int32)
        evaluation = programs.evaluate(params, evaluation_keys, chunk)
        returns = evaluation["episode_return"]
        best = programs.keep_best(best or no_best(config, params), params, returns, chunk)
        copy = programs.copy(state) if index > 0 and config.keep else None
        measured = finite, evaluation, training
        if index < last:  # the device continues while the host waits for measurements
            state, training = programs.train_chunk(state)
        recorder.record(index, *measured)
        if copy is not None:
            saver.offer(index, copy, best, recorder.measurements)
    assert best is not None
    absolute = None
    if config.absolute_metric:
        chunks = (np.full(number, last + 1 + i, np.int32) for i in range(ABSOLUTE_EVALUATIONS))
        parts = [programs.evaluate(best.params, evaluation_keys, chunk) for chunk in chunks]
        absolute = recorder.record_absolute(best, parts)
    params, _ = programs.snapshot(state)
    best, params = devices.gathered((best, params))
    return Result(
        folder=saver.folder,
        measurements=recorder.measurements,
        absolute=absolute,
        best=best,
        params=params,
        members=config.members,
        headline=headline,
    )


def _run(
    programs: Programs,
    arguments: Programs,
    env: Environment,
    config: RunConfig,
    folder: Path,
    start: Start,
    own_sinks: Sequence[Callable[[Run], Sink]],
    must_fit: bool,
) -> Result:
    suite, _, task = env.name.partition("/")
    info = Run(
        folder=folder,
        system=config.system,
        suite=suite,
        task=task,
        members=config.members,
        headline=env.headline,
        steps_per_update=config.steps_per_update,
        name=folders.about(folder)["name"],
        published=published.find(flat(dump(config))),
    )
    console = Console(info, config)
    sinks: list[Sink] = []  # of the first process only
    processes.agreed(lambda: sinks.extend(_sinks(info, config, start, own_sinks, console.warn)))
    log = next((sink for sink in sinks if isinstance(sink, JsonLines)), None)
    for measurement in start.measurements:
        console.resume(measurement)
    try:
        with Writer(sinks, console.warn) as writer:
            console.header(env, arguments.evaluate[0], arguments.train_chunk[0].params)
            with console.compiling():
                programs = compile_programs(programs, arguments)
            if needed := devices.memory_needed(programs.train_chunk):
                available = devices.memory_available(config)
                console.footprint(needed, available)
                if processes.is_first():
                    folders.note(folder, "memory_bytes", str(needed))
                if must_fit and needed > available:
                    raise ConfigError(
                        f"{len(config.members)} members need {needed:,} bytes on each device, "
                        f"which has {available:,}: train fewer at once"
                    )
            recorder = Recorder(config, writer, console, start.measurements)
            saver = Saver(config, folder, writer, log, spec(env))
            try:
                with console.progress:
                    result = _train(programs, config, env.headline, recorder, saver, start)
            except (KeyboardInterrupt, SystemExit):  # SystemExit comes from a launcher's handler
                saver.stop()
                raise
    except (KeyboardInterrupt, DivergenceError) as stop:
        console.line(f"stopped; all measurements so far are in {folder}", "yellow")
        if isinstance(stop, KeyboardInterrupt):
            command = listing.resume_command(config.system, folder, config.imports)
            console.line(f"continue with: {command}", "yellow")
        raise
    console.finished(result.measurements, np.asarray(result.best.chunk), result.absolute)
    return result


def _sinks(
    info: Run,
    config: RunConfig,
    start: Start,
    own: Sequence[Callable[[Run], Sink]],
    warn: Callable[[str], None],
) -> list[Sink]:
    """Make all sinks, and give them a resumed run's earlier measurements. Raises ConfigError if
    their files cannot be written."""
    plot: list[Callable[[Run], Sink]] = [LearningCurve] if config.logger.plot else []
    with folders.writable(info.folder):
        log = JsonLines(info, start.log_bytes, warn)
        sinks: list[Sink] = [make(info) for make in (MarlEval, *plot, *own)]
        for measurement in start.measurements:
            for sink in sinks:
                sink.write(measurement)
        if config.logger.tensorboard:
            resumed_at = start.chunk * config.steps_per_chunk if config.resume else None
            sinks.append(TensorBoard(info, resumed_at))
    return [log, *sinks, *_trackers(info, config, start)]


def _trackers(info: Run, config: RunConfig, start: Start) -> list[Tracker]:
    run_id = folders.about(info.folder)["id"] or info.name  # runs of an early version have none
    configs = [configuration.dump_setting(config, m.setting) for m in config.members]
    return [
        make(info, run_id, config.logger, configs, start.measurements)
        for client, make in TRACKERS.items()
        if getattr(config.logger, client)
    ]


def _check_env(env: Environment, config: RunConfig) -> None:
    """Raise ConfigError unless a user's environment does what `magpo.types` says, and provides
    exactly the global state this system needs."""
    if not type(env).__module__.startswith("magpo.envs."):
        try:
            envs.check(env)
        except ValueError as error:
            raise ConfigError(str(error).replace("\n", "; ")) from error
    needed = config.algorithm.needs_global_state
    if needed != (spec(env).num_state_features is not None):
        raise ConfigError(
            f"{config.system} as configured needs an environment with global_state={needed}: "
            f"magpo.envs.make(..., global_state={needed})"
        )


def main(system: ModuleType | str, must_fit: bool = False) -> None:
    """Run the command line of a system, given as its module or as the path of its file.

    `must_fit` is that of `run`. Exit code: 0 done, 1 failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
    """
    signal.signal(signal.SIGINT, interrupts.stop)
    signal.signal(signal.SIGTERM, interrupts.stop)
    gc.set_threshold(50_000, 20, 100)  # tracing makes many objects, and little garbage
    try:
        module = plugins.module_of(system) if isinstance(system, str) else system
        cli.main(module, partial(_job, must_fit=must_fit))
        flush_output()
    except BaseException as error:
        code = 1
        if interrupts.received or isinstance(error, KeyboardInterrupt):  # libraries may wrap it
            code = 128 + (interrupts.received or [signal.SIGINT])[0]
        elif isinstance(error, DivergenceError | LoggingError):
            complain(f"error: {error}")
        elif not isinstance(error, BrokenPipeError):  # --help | head
            raise
        processes.leave()
        flush_output()
        os._exit(code)  # an orderly exit would first wait for the current chunk


def _job(module: ModuleType, config: RunConfig, must_fit: bool = False) -> float:
    """Run one job and return its objective, for Hydra's sweepers. SIGTERM stops it in a launcher's
    processes, too, which would otherwise ignore it."""
    main_catches = signal.getsignal(signal.SIGTERM) is interrupts.stop
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupts.stop)
    try:
        return run(module, config, must_fit=must_fit).objective
    except KeyboardInterrupt:
        if main_catches or not interrupts.received:
            raise
        interrupts.answered()
        sys.exit(128 + interrupts.received[0])
    finally:
        flush_output()
