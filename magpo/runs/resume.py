"""The saving of a run while it trains, and its continuation."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from magpo import __version__
from magpo import config as configuration
from magpo.config.schema import RunConfig
from magpo.errors import ConfigError
from magpo.hardware import processes
from magpo.hardware.devices import layout
from magpo.report.measurements import Measurement
from magpo.report.sinks import JsonLines
from magpo.report.writer import Writer
from magpo.runs import checkpoint, folders
from magpo.types import EnvSpec

# The keys, or groups of keys, on which the state's meaning depends: the members and the running
# episodes.
FIXED = (
    *("run.system", "run.env", "run.budget", "run.tuned", "run.published", "env", "network"),
    *("seeds", "vary", "vary_in_step", "num_envs", "rollout_length", "eval_episodes"),
)


class Start(NamedTuple):
    """The point where an earlier process left a run, after the evaluation of a chunk."""

    chunk: int
    state: Any  # (M, ...)
    best: Any  # (M, ...)
    measurements: list[Measurement]  # all until then, without training metrics
    log_bytes: int  # the length of metrics.jsonl at that point


def claimed(config: RunConfig, stack: ExitStack) -> Path:
    """Create the run's folder, or choose the one to resume, and lock it until `stack` closes.

    Raises ConfigError.
    """
    while found := folders.newest_unfinished(config) if config.resume == "auto" else None:
        with suppress(ConfigError):  # another job claimed it first
            stack.enter_context(folders.working(found))
            return found
    resumed = config.resume not in (None, "auto")
    folder = Path(str(config.resume)) if resumed else folders.create(config)
    stack.enter_context(folders.working(folder))
    return folder


def start(
    folder: Path, config: RunConfig, state: Any, best: Any, evaluation: Mapping[str, Any]
) -> Start | None:
    """Load the run's newest usable checkpoint, or return None if the run has none yet.

    The leaves of `state` and `best` have the shapes, dtypes and shardings to load; the leaves of
    `evaluation` have the shapes and dtypes of an evaluation's metrics. Raises ConfigError if no
    checkpoint of the run is usable, if the configuration has changed, or if a finished run has no
    checkpoint.
    """
    new = configuration.dump(config)

    def load(path: Path, meta: dict[str, Any]) -> Start:
        chunk, steps = meta["chunk"], meta["steps_per_chunk"]
        misfit = checkpoint.difference(meta, "state", state)
        if chunk > config.num_evaluations:
            misfit = f"{chunk} evaluations are done already"
        if steps != config.steps_per_chunk:
            misfit = f"an evaluation must follow {steps} steps, not {config.steps_per_chunk}"
        before, now = meta["config"] | {"with": meta["with"]}, new | {"with": _with(config)}
        if misfit and not configuration.differences(before, now):
            raise checkpoint.CheckpointError(f"{path}: {misfit}")
        _check_changes(folder, before, now, config, misfit)
        history = {n: np.zeros((chunk + 1, *x.shape), x.dtype) for n, x in evaluation.items()}
        template = {"best": best, "history": history | {"wall_s": np.zeros(chunk + 1)}}
        loaded = checkpoint.load(path, meta, "state", state)
        record = checkpoint.load(path, meta, "record", template)
        score, chunks, params = record["best"]
        trained = loaded.params
        last = record["history"]["episode_return"][-1]
        if (diverged := np.isnan(last).any(-1)).any():  # diverged members may have NaN parameters
            trained = jax.tree.map(lambda leaf: leaf[~diverged], trained)
        checkpoint.check_best(path, score, chunks, (params, trained))
        measured = _measurements(config, record["history"], evaluation)
        return Start(chunk, loaded, record["best"], measured, meta["log_bytes"])

    def take_over() -> None:
        root, about = folder / folders.CHECKPOINTS, folders.about(folder)
        if found is None:  # the run ended before its first checkpoint, and begins again
            if about["status"] == "finished":
                raise ConfigError(
                    f"resume={folder}: finished, and has no checkpoint to continue from"
                )
            old = configuration.plain_values(folder / folders.CONFIG)
            _check_changes(folder, old, new, config)
        with folders.writable(folder):
            folders.begin(folder, config, about)
            if config.keep:
                root.mkdir(exist_ok=True)
            checkpoint.set_aside(root, found.chunk if found else 0)

    found = folders.newest_checkpoint(folder, load)
    processes.agreed(take_over)
    return found


def _measurements(
    config: RunConfig, history: Mapping[str, Any], names: Iterable[str]
) -> list[Measurement]:
    """Return the evaluations in a checkpoint's history."""
    return [
        Measurement(
            chunk=index,
            env_steps=(index * config.steps_per_chunk,) * len(config.members),
            wall_s=float(at),
            evaluation={name: history[name][index] for name in names},
            training={},
            timing={},
        )
        for index, at in enumerate(history["wall_s"])
    ]


def _check_changes(
    folder: Path, old: dict[str, Any], new: dict[str, Any], config: RunConfig, misfit: str = ""
) -> None:
    """Raise ConfigError if values differ that must not, or that cause a misfit."""
    changed = configuration.differences(old, new)
    fixed = [key for key in changed if key in FIXED or key.partition(".")[0] in FIXED]
    if fixed or misfit:
        listed = "; ".join(f"{key}: {changed[key]}" for key in fixed or changed)
        because = "" if fixed else f", because {misfit}"
        raise ConfigError(f"resume={folder}: cannot change: {listed}{because}")
    if refused := {k: text for k, text in changed.items() if k not in config.allow_changes}:
        listed = "; ".join(f"{key}: {text}" for key, text in refused.items())
        raise ConfigError(
            f"resume={folder}: changed settings: {listed}. To continue anyway: "
            f"allow_changes=[{','.join(changed)}]"
        )


def _with(config: RunConfig) -> dict[str, str]:
    """Return the versions and devices that must match for a bitwise-identical resume."""
    present = f"{layout(config).mesh.size} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        present += f" in {jax.process_count()} processes"
    return {"magpo": __version__, "jax": jax.__version__, "devices": present}


class Saver:
    """A saver that lets the writer thread save the run as often as `checkpoint_share` allows.

    Several processes have different clocks, so they save after every chunk and wait for it.
    """

    def __init__(
        self, config: RunConfig, folder: Path, writer: Writer, log: JsonLines | None, env: EnvSpec
    ) -> None:
        """Take `log` on the first process, None on the others."""
        self.config, self.writer, self.log, self.env = config, writer, log, env
        self.folder = folder
        self.about = folders.about(folder)
        self.next = 0.0
        self.idle = threading.Event()
        self.idle.set()
        self.latest: Callable[[], None] | None = None  # saves the offered state; None: saved
        self.offered = 0  # the chunk of the state offered last

    def offer(self, chunk: int, state: Any, best: Any, measurements: Sequence[Measurement]) -> None:
        """Take a copy of the state after a chunk; always save the one after the last chunk."""
        self.offered = chunk
        self.latest = partial(self._save, chunk, state, best, list(measurements))
        several = jax.process_count() > 1
        if several:
            self.idle.wait()
        due = self.idle.is_set() and time.monotonic() >= self.next
        if several or due or chunk == self.config.num_evaluations:
            self.save_latest()

    def save_latest(self) -> None:
        """Save the state offered last, unless it is saved already."""
        if self.latest is not None:
            self.idle.clear()
            self.writer.put(self.latest)
        self.latest = None

    def stop(self) -> None:
        """Save the latest state before an early end.

        Several processes may stop one chunk apart. Then they do not wait for a checkpoint that only
        some of them write, and the previous one stays the newest.
        """
        self.save_latest()
        if not processes.meet(f"stops after chunk {self.offered}", timeout_s=10):
            self.writer.abandon()

    def _save(self, chunk: int, state: Any, best: Any, measurements: list[Measurement]) -> None:
        start = time.monotonic()
        root = self.folder / folders.CHECKPOINTS
        try:
            log_bytes = 0
            if self.log:
                self.log.save()
                log_bytes = self.log.ends[chunk]
                if not (self.folder / folders.STATUS).exists():  # the folder was removed
                    folders.begin(self.folder, self.config, self.about)
            evaluations = [m.evaluation for m in measurements]
            history = {name: np.stack([e[name] for e in evaluations]) for name in evaluations[0]}
            history["wall_s"] = np.array([m.wall_s for m in measurements])
            meta = {
                "run": self.about["id"],
                "config": configuration.dump(self.config),
                "with": _with(self.config),
                "env": asdict(self.env),
                "steps_per_chunk": self.config.steps_per_chunk,
                "log_bytes": log_bytes,
            }
            parts = {"state": state, "record": {"best": best, "history": history}}
            checkpoint.save(root, chunk, parts, meta)
            if processes.is_first():
                checkpoint.prune(root, self.config.keep)
        finally:
            self.next = start + (time.monotonic() - start) / self.config.checkpoint_share
            self.idle.set()
