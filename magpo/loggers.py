"""The sinks of a run's metrics: metrics.jsonl, marl_eval.json, learning_curve.png, and on request
TensorBoard and Neptune.

A sink's `write(measurement)` is called for every evaluation in order and raises only if the
measurement is lost; its `save()` brings its file up to date, including everything that an earlier
attempt left unwritten. One thread, `Writer`, drives all sinks: no disk ever delays training.
"""

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np

from magpo.errors import ConfigError
from magpo.members import Member, Setting, label


class LoggingError(RuntimeError):
    """Metrics or checkpoints could not be written, up to the end; the message says which."""


class Run(NamedTuple):
    """The facts about a run that its records and pictures repeat."""

    folder: Path  # its name is the run's id
    system: str
    suite: str
    task: str
    members: tuple[Member, ...]
    headline: str  # the metric the suite's papers report
    steps_per_update: int  # environment steps, per member

    def by_setting(self) -> list[tuple[Setting, list[int]]]:
        """Return each setting with the places of its members, one for each seed."""
        places: list[tuple[Setting, list[int]]] = []
        for place, member in enumerate(self.members):
            if not places or places[-1][0] != member.setting:
                places.append((member.setting, []))
            places[-1][1].append(place)
        return places


class Measurement(NamedTuple):
    """One evaluation and the training since the last one. K episodes, U updates."""

    chunk: int | None  # chunks trained so far; None: the absolute metric
    env_steps: tuple[int, ...]  # (M,) environment steps behind the evaluated parameters
    wall_s: float  # since training began, compilation not counted
    evaluation: dict[str, np.ndarray]  # (M, K) each
    training: dict[str, np.ndarray]  # (M, U) each; empty if nothing was trained
    timing: dict[str, float]


class Sink(Protocol):
    def write(self, measurement: Measurement) -> None: ...

    def save(self) -> None: ...


def defined(training: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Return where a training metric has a value, (M, U) bool: a mean over no episode has none."""
    if name.startswith("rollout/") and name != "rollout/episodes":
        return training["rollout/episodes"] > 0
    return np.ones(training[name].shape, bool)


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Replace a file atomically: neither a reader nor a crash ever meets half of it."""
    aside = path.with_name(f".{path.name}.tmp")
    write(aside)
    os.replace(aside, path)


def _plain(value: np.float32) -> float | None:
    """Return the shortest decimal that is this float32; None for values that JSON cannot hold."""
    return float(str(value)) if np.isfinite(value) else None


class Scalar(NamedTuple):
    """A value of one member."""

    place: int  # the member's
    env_steps: int
    name: str
    value: float | None


def scalars(run: Run, measurement: Measurement) -> Iterator[Scalar]:
    """Yield a measurement's values: those of the updates, then of the evaluation that follows them.

    `eval/*` and `absolute/*` are means over episodes. `time/steps_per_s` counts one member's steps.
    """
    training = measurement.training
    masks = {name: defined(training, name) for name in training}
    num_updates = next(iter(training.values())).shape[1] if training else 0
    for update in range(num_updates):
        for place, last_step in enumerate(measurement.env_steps):
            steps = last_step - (num_updates - 1 - update) * run.steps_per_update
            for name in training:
                if masks[name][place, update]:
                    yield Scalar(place, steps, name, _plain(training[name][place, update]))
    kind = "absolute" if measurement.chunk is None else "eval"
    for place, steps in enumerate(measurement.env_steps):
        for name, value in measurement.evaluation.items():
            yield Scalar(place, steps, f"{kind}/{name}", _plain(value[place].mean()))
        for name, seconds in measurement.timing.items():
            yield Scalar(place, steps, f"time/{name}", round(seconds, 4))


class JsonLines:
    """metrics.jsonl: one value a line, in the order of `scalars`."""

    def __init__(self, run: Run, keep_bytes: int = 0) -> None:
        """Append after the first `keep_bytes` of the file, those that a resumed run keeps."""
        self.run = run
        self.path = run.folder / "metrics.jsonl"
        self.file = self.path.open("a+b", buffering=0)
        kept = self.path.read_bytes()[:keep_bytes]
        self.size = kept.rfind(b"\n") + 1  # bytes surely on file, whole lines
        self.unwritten = bytearray()
        self.ends: dict[int | None, int] = {}  # bytes, by chunk

    def write(self, measurement: Measurement) -> None:
        run = self.run
        for place, env_steps, name, value in scalars(run, measurement):
            record = {
                "run": run.folder.name,
                "system": run.system,
                "env": run.suite,
                "task": run.task,
                "seed": run.members[place].seed,
                **run.members[place].setting,
                "env_steps": env_steps,
                "wall_s": round(measurement.wall_s, 3),
                "name": name,
                "value": value,
            }
            self.unwritten += json.dumps(record).encode() + b"\n"
        self.ends[measurement.chunk] = self.size + len(self.unwritten)
        with contextlib.suppress(OSError):  # a full disk: tried again, and raised, by `save`
            self._append()

    def _append(self) -> None:
        """Write the lines of this attempt and those that an earlier one, on a full disk, left."""
        removed = not self.path.exists()
        if not (removed or self.unwritten):
            return  # what a resumed run will write anew stays until then
        if removed:  # the open file still has it all
            self.file.seek(0)
            self.unwritten[:0] = self.file.read(self.size)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file.close()
            self.file, self.size = self.path.open("a+b", buffering=0), 0
        self.file.truncate(self.size)
        while self.unwritten:
            written = self.file.write(self.unwritten)
            del self.unwritten[:written]
            self.size += written

    def save(self) -> None:
        self._append()
        os.fsync(self.file.fileno())


class MarlEval:
    """marl_eval.json: every episode of every evaluation, in the format id-marl-eval reads.

    Each setting of a run that varies is an algorithm of its own: "magpo delta=1.2".
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.entries: list[dict[str, Any]] = [{} for _ in run.members]

    def write(self, measurement: Measurement) -> None:
        for place, entry in enumerate(self.entries):
            metrics = {k: [_plain(x) for x in v[place]] for k, v in measurement.evaluation.items()}
            if measurement.chunk is None:
                entry["absolute_metrics"] = metrics
            else:
                steps, elapsed = measurement.env_steps[place], round(measurement.wall_s, 3)
                head = {"step_count": steps, "elapsed_time": elapsed}
                entry[f"step_{measurement.chunk}"] = head | metrics

    def save(self) -> None:
        algorithms: dict[str, dict[str, Any]] = {}
        for (seed, setting), entry in zip(self.run.members, self.entries, strict=True):
            name = f"{self.run.system} {label(setting)}".strip()
            algorithms.setdefault(name, {})[f"seed_{seed}"] = entry
        text = json.dumps({self.run.suite: {self.run.task: algorithms}})
        path = self.run.folder / "marl_eval.json"
        write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


class LearningCurve:
    """learning_curve.png: the headline metric over environment steps."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.measurements: list[Measurement] = []

    def write(self, measurement: Measurement) -> None:
        self.measurements.append(measurement._replace(training={}))

    def save(self) -> None:
        from magpo import curve  # imports matplotlib: only if, and when, a curve is drawn

        if self.measurements:
            path = self.run.folder / "learning_curve.png"
            write_aside(path, lambda aside: curve.draw(aside, self.run, self.measurements))


class TensorBoard:
    """tensorboard/[delta=1.2,]seed_<seed>/: event files, one folder a member."""

    def __init__(self, run: Run, resumed_at: int | None = None) -> None:
        """Hide the values that an earlier process wrote after `resumed_at` environment steps."""
        from tensorboardX import SummaryWriter

        self.run = run
        again = {}
        if resumed_at is not None:  # suffix: else two files of one second have the same name
            again = {"purge_step": resumed_at + 1, "filename_suffix": f".{resumed_at}"}
        root = run.folder / "tensorboard"
        names = [f"{label(m.setting, ',')},seed_{m.seed}".lstrip(",") for m in run.members]
        self.writers = [SummaryWriter(str(root / name), **again) for name in names]

    def write(self, measurement: Measurement) -> None:
        for place, env_steps, name, value in scalars(self.run, measurement):
            if value is not None:
                self.writers[place].add_scalar(name, value, env_steps)

    def save(self) -> None:
        for writer in self.writers:
            writer.flush()


def require_neptune() -> None:
    """Raise ConfigError if Neptune's client is not installed."""
    if find_spec("neptune") is None:
        raise ConfigError("logger.neptune: needs the neptune client: install magpo[neptune]")


class Neptune:
    """A Neptune run for each member, in a group with the run's name; offline without a token."""

    def __init__(
        self, run: Run, project: str | None, tags: Sequence[str], configs: Sequence[dict[str, Any]]
    ) -> None:
        """Take the configuration of each member."""
        self.run, self.project, self.tags, self.configs = run, project, list(tags), configs
        self.runs: list[Any] = []
        self.refused: Exception | None = None

    def _begin(self, member: Member, config: dict[str, Any]) -> Any:
        import neptune

        os.environ.setdefault("NEPTUNE_DATA_DIRECTORY", str(self.run.folder / "neptune"))
        captured = ("stdout", "stderr", "hardware_metrics", "traceback")
        one = neptune.init_run(
            project=self.project,
            mode="async" if "NEPTUNE_API_TOKEN" in os.environ else "offline",
            name=" ".join([self.run.system, f"{self.run.suite}/{self.run.task}", member.name]),
            tags=self.tags,
            source_files=[],
            git_ref=False,
            **{f"capture_{what}": False for what in captured},
        )
        one["sys/group_tags"].add([self.run.folder.name])
        one["config"] = neptune.utils.stringify_unsupported({**config, "seed": member.seed})
        return one

    def write(self, measurement: Measurement) -> None:
        if self.refused is not None:  # once is enough: to be refused can take minutes
            raise self.refused
        try:
            self.runs = self.runs or list(map(self._begin, self.run.members, self.configs))
        except Exception as error:
            self.refused = error
            raise
        for place, env_steps, name, value in scalars(self.run, measurement):
            if value is not None:
                self.runs[place][name].append(value, step=env_steps)

    def save(self) -> None:
        """Do nothing: the client sends by itself."""

    def close(self) -> None:
        for one in self.runs:
            one.stop()


class Writer:
    """The thread that does all file I/O, behind a bounded queue.

    Files that are rewritten whole are saved again while training runs, for at most about 1 % of
    its time, and once more at the end. A failure never stops the run: `warn` is told once, the
    attempt is repeated, and leaving the context raises LoggingError for data that is still missing.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        warn: Callable[[str], None] = lambda text: None,
        queue_size: int = 16,
    ) -> None:
        self.sinks = sinks
        self.warn = warn
        self._queue: queue.Queue[Measurement | Callable[[], object] | None]
        self._queue = queue.Queue(queue_size)
        self._lost: dict[str, Exception] = {}  # measurements, by sink
        self._unsaved: dict[str, Exception] = {}  # files, by sink, until a later attempt succeeds
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="magpo-writer", daemon=True)
        self._abandoned = False

    def put(self, item: Measurement | Callable[[], object]) -> None:
        """Queue a measurement to write, or a job to do after everything queued before."""
        self._queue.put(item)

    def abandon(self) -> None:
        """Exit without waiting for pending writes or reporting their errors."""
        self._abandoned = True

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._abandoned:
            return
        self._queue.put(None)
        self._thread.join()
        if kind is None and (errors := self._unsaved | self._lost):
            lost = "; ".join(f"{name}: {error}" for name, error in errors.items())
            raise LoggingError(f"not everything could be written: {lost}")

    def _work(self) -> None:
        due = time.monotonic() + 10
        while (item := self._queue.get()) is not None:
            if isinstance(item, Measurement):
                for sink in self.sinks:
                    self._try(self._lost, type(sink).__name__, partial(sink.write, item))
            else:
                self._try(self._unsaved, "checkpoint", item)
            if time.monotonic() >= due:
                due = time.monotonic() + 100 * self._save()
        self._save()
        for sink in self.sinks:
            if close := getattr(sink, "close", None):
                self._try(self._unsaved, type(sink).__name__, close)

    def _save(self) -> float:
        """Save all sinks; return the seconds it took."""
        start = time.monotonic()
        for sink in self.sinks:
            self._try(self._unsaved, type(sink).__name__, sink.save)
        return time.monotonic() - start

    def _try(self, errors: dict[str, Exception], name: str, attempt: Callable[[], object]) -> None:
        try:
            attempt()
            if errors is self._unsaved:
                errors.pop(name, None)
        except Exception as error:
            errors[name] = error
            if name not in self._warned and not self._abandoned:
                self._warned.add(name)
                self.warn(f"{name}: {error}; training goes on")
