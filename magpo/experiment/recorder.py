"""Metrics from the device to the host."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from magpo.config.schema import RunConfig
from magpo.experiment.programs import Best
from magpo.report.console import Console
from magpo.report.measurements import Measurement, defined
from magpo.report.writer import Writer
from magpo.types import Array


class DivergenceError(RuntimeError):
    """A loss or a parameter is no longer a number; the message says which, when and where."""


class Recorder:
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
        found = sorted(
            (update, place, name)
            for name, values in metrics.items()
            for place, update in np.argwhere(np.isnan(values) & defined(metrics, name))
        )
        if found:
            update, place, _ = found[0]
            what = ", ".join(name for *at, name in found if at == [update, place])
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
    """Return the arrays' values once they are computed, and let signals through meanwhile."""
    while not all(array.is_ready() for array in jax.tree.leaves(tree)):
        time.sleep(0.002)
    return jax.device_get(tree)
