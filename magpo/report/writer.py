"""The thread that drives a run's sinks."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from magpo.report.measurements import Measurement
from magpo.report.sinks import Sink


class LoggingError(RuntimeError):
    """The error at the end of a run if metrics or checkpoints are missing; it says which."""


class Writer:
    """The thread that does all file I/O, behind a bounded queue.

    Files that are rewritten whole are saved while training runs, in at most about 1 % of its time,
    and once more at the end. A failure never stops the run: `warn` gets one warning, saving is
    tried again, and leaving the context raises LoggingError for data that is still missing.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        warn: Callable[[str], None] = lambda text: None,
        queue_size: int = 16,
    ) -> None:
        self.sinks = sinks
        self.warn = warn
        self._queue: queue.Queue[Any] = queue.Queue(queue_size)
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

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._abandoned:
            return
        self._queue.put(None)
        try:
            self._thread.join()
        except KeyboardInterrupt:  # finish the files first; a second Ctrl-C kills
            self._thread.join()
            raise
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
            if (start := time.monotonic()) >= due:
                self._all("save")
                due = time.monotonic() + 100 * (time.monotonic() - start)
        self._all("save")
        self._all("close")

    def _all(self, method: str) -> None:
        """Call a method, "save" or "close", of all sinks that have it."""
        for sink in self.sinks:
            self._try(self._unsaved, type(sink).__name__, getattr(sink, method, lambda: None))

    def _try(self, errors: dict[str, Exception], name: str, attempt: Callable[[], object]) -> None:
        try:
            attempt()
            if errors is self._unsaved:
                errors.pop(name, None)
        except Exception as error:
            errors[name] = error
            if name not in self._warned and not self._abandoned:
                self._warned.add(name)
                self.warn(f"{name}: {error}; training continues")
