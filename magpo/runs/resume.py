"""Save a run while it trains, and continue it from there."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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
from magpo.runs.checkpoint import CheckpointError
from magpo.types import EnvSpec

# The keys, or groups of keys, on which the state's meaning depends: what a member is, and what the
# episodes under way are.
FIXED = (
    *("run.system", "run.env", "run.budget", "run.tuned", "env", "network"),
    *("seeds", "vary", "num_envs", "rollout_length", "eval_episodes"),
)


class Start(NamedTuple):
    """The place where an earlier process left a run: a chunk was trained and evaluated."""

    chunk: int
    state: Any  # (M, ...)
    best: Any  # (M, ...)
    measurements: list[Measurement]  # all so far, without training metrics
    log_bytes: int  # the length of metrics.jsonl by then


def claimed(config: RunConfig, stack: ExitStack) -> Path:
    """Create the run's folder, or choose the one to resume, and lock it until `stack` closes.

    Raises ConfigError.
    """
    if config.resume not in (None, "auto"):
        folder = Path(str(config.resume))
        stack.enter_context(folders.working(folder))
        return folder
    while True:
        found = folders.newest_unfinished(config) if config.resume else None
        folder = found or folders.create(config)
        try:
            stack.enter_context(folders.working(folder))
        except ConfigError:
            if found is None:
                raise
            continue  # another job was faster
        return folder


def start(
    folder: Path, config: RunConfig, state: Any, best: Any, evaluation: Mapping[str, Any]
) -> Start | None:
    """Load the run's newest usable checkpoint, or return None if the run has none yet.

    The leaves of `state` and `best` have the shapes, dtypes and shardings to load, those of
    `evaluation` the shapes and dtypes of an evaluation's metrics. Raises ConfigError if none of the
    run's checkpoints is usable, if the configuration changed, or if a finished run has no
    checkpoint.
    """

    def load(path: Path, meta: dict[str, Any]) -> Start:
        _check_same(folder, path, meta, config, checkpoint.difference(meta, "state", state))
        chunk = meta["chunk"]
        history = {n: np.zeros((chunk + 1, *x.shape), x.dtype) for n, x in evaluation.items()}
        template = {"best": best, "history": history | {"wall_s": np.zeros(chunk + 1)}}
        loaded = checkpoint.load(path, meta, "state", state)
        record = checkpoint.load(path, meta, "record", template)
        score, chunks, params = record["best"]
        checkpoint.check_best(path, score, chunks, (params, loaded.params))
        measured = _measurements(config, **record["history"])
        return Start(chunk, loaded, record["best"], measured, meta["log_bytes"])

    loaded = folders.newest_checkpoint(folder, load)
    if loaded is None:
        processes.agreed(lambda: _begin_again(folder, config))
    else:
        processes.agreed(lambda: _take_over(folder, config, loaded.chunk))
    return loaded


def _take_over(folder: Path, config: RunConfig, chunk: int) -> None:
    """Write what the run continues with. Raises ConfigError if the folder cannot be written."""
    root = folder / folders.CHECKPOINTS
    with folders.writable(folder):
        folders.write_config(folder, config)
        if config.keep:
            root.mkdir(exist_ok=True)
        checkpoint.set_aside(root, chunk)


def _begin_again(folder: Path, config: RunConfig) -> None:
    """Prepare a run that ended before its first checkpoint to start again."""
    if folders.about(folder)["status"] == "finished":
        raise ConfigError(f"resume={folder}: finished, and has no checkpoint to continue from")
    old = configuration.plain_values(folder / folders.CONFIG)
    _check_changes(folder, old, configuration.dump(config), config)
    _take_over(folder, config, chunk=0)


def _check_same(
    folder: Path, path: Path, meta: dict[str, Any], config: RunConfig, misfit: str
) -> None:
    """Raise ConfigError if the run cannot, or may not, continue with this configuration, and
    CheckpointError if it is the same, and the checkpoint of another."""
    new = configuration.dump(config) | {"with": _with(config)}
    old = meta["config"] | {"with": meta["with"]}
    if meta["chunk"] > config.num_evaluations:
        misfit = f"it has had {meta['chunk']} evaluations"
    if (steps := meta["steps_per_chunk"]) != config.steps_per_chunk:
        misfit = f"an evaluation must follow {steps} steps, not {config.steps_per_chunk}"
    if misfit and not configuration.differences(old, new):
        raise CheckpointError(f"{path}: {misfit}")
    _check_changes(folder, old, new, config, misfit)


def _check_changes(
    folder: Path, old: dict[str, Any], new: dict[str, Any], config: RunConfig, misfit: str = ""
) -> None:
    """Raise ConfigError if a value differs that may not, or with which there is a misfit."""
    changed = configuration.differences(old, new)
    fixed = [key for key in changed if key in FIXED or key.partition(".")[0] in FIXED]
    if fixed or misfit:
        listed = "; ".join(f"{key}: {changed[key]}" for key in fixed or changed)
        because = "" if fixed else f", because {misfit}"
        raise ConfigError(f"resume={folder}: cannot change: {listed}{because}")
    if refused := {k: text for k, text in changed.items() if k not in config.allow_changes}:
        listed = "; ".join(f"{key}: {text}" for key, text in refused.items())
        raise ConfigError(
            f"resume={folder}: not as it was: {listed}. To continue all the same: "
            f"allow_changes=[{','.join(changed)}]"
        )


def _with(config: RunConfig) -> dict[str, str]:
    """Return the versions and devices that must match for a bitwise-identical resume."""
    present = f"{layout(config).mesh.size} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        present += f" in {jax.process_count()} processes"
    return {"magpo": __version__, "jax": jax.__version__, "devices": present}


def _measurements(
    config: RunConfig, /, wall_s: np.ndarray, **history: np.ndarray
) -> list[Measurement]:
    """Return the measurements of a checkpoint's record, without training metrics."""
    return [
        Measurement(
            chunk=index,
            env_steps=(index * config.steps_per_chunk,) * len(config.members),
            wall_s=float(at),
            evaluation={name: values[index] for name, values in history.items()},
            training={},
            timing={},
        )
        for index, at in enumerate(wall_s)
    ]


class Saver:
    """Lets the writer thread save the run, as often as `checkpoint_share` allows.

    Several processes have clocks of their own: they save after every chunk, and wait for it.
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
        self.latest: Callable[[], None] | None = None  # saves the offered state; None: it is saved
        self.offered = 0  # the chunk of the state offered last

    def offer(self, chunk: int, state: Any, best: Any, measurements: Sequence[Measurement]) -> None:
        """Take a copy of the state after a chunk; the last chunk's is saved whatever it costs."""
        self.offered = chunk
        self.latest = partial(self._save, chunk, state, best, list(measurements))
        if jax.process_count() > 1:
            self.idle.wait()
            due = True
        else:
            due = self.idle.is_set() and time.monotonic() >= self.next
        if due or chunk == self.config.num_evaluations:
            self.save_latest()

    def save_latest(self) -> None:
        """Save the state that was offered last, unless it is saved."""
        if self.latest is not None and self.config.keep:
            self.idle.clear()
            self.writer.put(self.latest)
        self.latest = None

    def stop(self) -> None:
        """Save the latest state before an early end.

        Several processes may be stopped one chunk apart: then they do not wait for a checkpoint
        that only some of them write, and the one before it stays the newest.
        """
        self.save_latest()
        if not processes.meet(f"stops after chunk {self.offered}", timeout_s=10):
            self.writer.abandon()

    def _save(self, chunk: int, state: Any, best: Any, measurements: list[Measurement]) -> None:
        start = time.monotonic()
        root = self.folder / folders.CHECKPOINTS
        try:
            evaluations = [m.evaluation for m in measurements]
            history = {name: np.stack([e[name] for e in evaluations]) for name in evaluations[0]}
            history["wall_s"] = np.array([m.wall_s for m in measurements])
            meta = {
                "run": self.about["id"],
                "config": configuration.dump(self.config),
                "with": _with(self.config),
                "env": asdict(self.env),
                "steps_per_chunk": self.config.steps_per_chunk,
                "log_bytes": self._save_log(chunk) if self.log else 0,
            }
            parts = {"state": state, "record": {"best": best, "history": history}}
            checkpoint.save(root, chunk, parts, meta)
            if processes.is_first():
                checkpoint.prune(root, self.config.keep)
        finally:
            self.next = start + (time.monotonic() - start) / self.config.checkpoint_share
            self.idle.set()

    def _save_log(self, chunk: int) -> int:
        """Bring metrics.jsonl up to date, in a restored folder if it was removed; return after how
        many of its bytes this chunk ends."""
        assert self.log is not None
        if folders.mend(self.folder, self.config, self.about):
            self.writer.warn(f"{self.folder} was removed: made again")
        self.log.save()
        return self.log.ends[chunk]
