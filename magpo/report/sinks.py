"""Sinks, which receive a run's measurements: its files, and TensorBoard."""

import contextlib
import json
import os
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from magpo.config.members import label
from magpo.files import UNREADABLE, write_aside
from magpo.report.measurements import Measurement, Run, plain, scalars


class Sink(Protocol):
    """A logger, called from one thread beside training; its first error becomes a warning.

    A sink may also have a `close()`, which is called at the end.
    """

    def write(self, measurement: Measurement) -> None: ...  # every evaluation, in order

    def save(self) -> None: ...  # bring the files up to date, and retry what failed


class JsonLines:
    """metrics.jsonl: one value per line, in the order of `scalars`.

    If another program removes, replaces or changes the file, all rows are written again, and the
    changed file stays beside it. The rows are therefore also kept in memory, compressed.
    """

    def __init__(
        self, run: Run, keep_bytes: int = 0, warn: Callable[[str], None] = lambda text: None
    ) -> None:
        """Keep the first `keep_bytes` of a resumed run's file, and append to them."""
        self.run, self.warn = run, warn
        self.path = run.folder / "metrics.jsonl"
        self.file = self.path.open("a+b", buffering=0)
        kept = self.path.read_bytes()[:keep_bytes]
        damaged = sum(not _is_record(line) for line in kept.splitlines())
        if damaged or len(kept) < keep_bytes:
            missing = keep_bytes - len(kept)
            self.warn(f"{self.path}: damaged lines: {damaged}, missing bytes: {missing}")
        self.size = self.end = kept.rfind(b"\n") + 1  # bytes in the file, and of all rows
        self.file.truncate(self.size)
        self.rows = [zlib.compress(kept[: self.size], 1)]
        self.unwritten = bytearray()
        self.ends: dict[int | None, int] = {}  # bytes at the end of each chunk

    def write(self, measurement: Measurement) -> None:
        run, rows = self.run, bytearray()
        for place, env_steps, name, value in scalars(run, measurement):
            record = {
                "run": run.name,
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
            rows += json.dumps(record).encode() + b"\n"
        self.rows.append(zlib.compress(rows, 1))
        self.unwritten += rows
        self.end += len(rows)
        self.ends[measurement.chunk] = self.end
        with contextlib.suppress(OSError):  # a full disk: `save` tries again, and raises
            self._append()

    def _append(self) -> None:
        """Write all unwritten rows, including those that did not fit on a full disk before."""
        if not self._is_as_left():
            self.warn(f"{self.path} was changed by another program: all records are written again")
            self.warn = lambda text: None
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self.path.replace(self.path.with_suffix(".jsonl.changed"))
            self.file.close()
            self.file = self.path.open("a+b", buffering=0)
            self.unwritten, self.size = bytearray().join(map(zlib.decompress, self.rows)), 0
        while self.unwritten:
            written = self.file.write(self.unwritten)
            del self.unwritten[:written]
            self.size += written

    def _is_as_left(self) -> bool:
        """Return whether the path still leads to the open file, and its size is unchanged."""
        with contextlib.suppress(FileNotFoundError):
            there, ours = self.path.stat(), os.fstat(self.file.fileno())
            return os.path.samestat(there, ours) and there.st_size == self.size
        return False

    def save(self) -> None:
        self._append()
        os.fsync(self.file.fileno())


def _is_record(line: bytes) -> bool:
    try:
        return bool(json.loads(line)["name"])
    except UNREADABLE:
        return False


class MarlEval:
    """marl_eval.json: every episode of every evaluation, in the format that id-marl-eval reads.

    Each setting of a run that varies some is a separate algorithm: "magpo delta=1.2".
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.entries: list[dict[str, Any]] = [{} for _ in run.members]

    def write(self, measurement: Measurement) -> None:
        for place, entry in enumerate(self.entries):
            metrics = {k: [plain(x) for x in v[place]] for k, v in measurement.evaluation.items()}
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
        from magpo.report import curve  # imports matplotlib, so only when a curve is drawn

        if self.measurements:
            path = self.run.folder / "learning_curve.png"
            write_aside(path, lambda aside: curve.draw(aside, self.run, self.measurements))


class TensorBoard:
    """tensorboard/[delta=1.2,]seed_<seed>/: event files, one folder per member."""

    def __init__(self, run: Run, resumed_at: int | None = None) -> None:
        """Hide the values that an earlier process wrote after `resumed_at` environment steps."""
        from tensorboardX import SummaryWriter

        self.run = run
        again = {}
        if resumed_at is not None:  # suffix: otherwise two files of one second clash
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

    def close(self) -> None:
        """Write what is still queued, because `flush` does not wait for it."""
        for writer in self.writers:
            writer.close()
