"""The transfer of metrics from the device to the host."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from magpo.config.members import by_setting
from magpo.config.schema import RunConfig
from magpo.experiment.programs import Best
from magpo.report.console import Console
from magpo.report.measurements import Measurement, defined
from magpo.report.writer import Writer
from magpo.types import Array


class DivergenceError(RuntimeError):
    """A loss or parameter is no longer a number; the message names it, its update and member."""


class Recorder:
    """The reader that fetches metrics, passes them on, and stops a run that has diverged.

    A member has diverged once one of its losses is NaN or a parameter is not finite; its
    evaluations are NaN from then on. The run stops when every setting has such a member.
    """

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
        self.diverged = np.zeros(len(config.members), bool)
        if earlier:
            self.diverged = np.isnan(earlier[-1].evaluation["episode_return"]).any(-1)

    def record(
        self, index: int, finite: Array, evaluation: dict[str, Array], training: dict[str, Array]
    ) -> None:
        """Wait for a chunk and the evaluation after it, and record both.

        Raises DivergenceError once all settings have diverged.
        """
        metrics = _get(training)
        trained = time.perf_counter()
        scores = _get(evaluation)
        now = time.perf_counter()
        timing = {}
        if index > 0:  # the first evaluation's time includes the start-up
            timing["training_s"] = trained - self.last
            timing["evaluation_s"] = now - trained
            timing["steps_per_s"] = self.config.steps_per_chunk / timing["training_s"]
        self.last = now
        what = self._diverged(index, np.asarray(finite), metrics)
        scores = self._masked(scores)
        steps = (index * self.config.steps_per_chunk,) * len(self.config.members)
        measurement = Measurement(index, steps, now - self.began, scores, metrics, timing)
        self.writer.put(measurement)
        self.console.update(measurement)
        self.measurements.append(measurement._replace(training={}))
        if what is None:
            return
        settings = by_setting(self.config.members)
        if all(self.diverged[places].any() for _, places in settings):
            raise DivergenceError(what)
        self.console.warn(f"{what}; the other settings continue")

    def record_absolute(self, best: Best, parts: list[dict[str, Array]]) -> Measurement:
        """Wait for the evaluations that make up the absolute metric, and record it."""
        scores = _get(parts)
        joined = {name: np.concatenate([part[name] for part in scores], 1) for name in scores[0]}
        joined = self._masked(joined)
        steps = tuple(int(i) * self.config.steps_per_chunk for i in np.asarray(best.chunk))
        wall_s = time.perf_counter() - self.began
        measurement = Measurement(None, steps, wall_s, joined, {}, {})
        self.writer.put(measurement)
        return measurement

    def _diverged(
        self, index: int, finite: np.ndarray, metrics: dict[str, np.ndarray]
    ) -> str | None:
        """Mark diverged members; return a message about the first newly diverged one, or None."""
        config, before = self.config, self.diverged
        found = sorted(
            (update, place, name)
            for name, values in metrics.items()
            for place, update in np.argwhere(np.isnan(values) & defined(metrics, name))
            if not before[place]
        )
        self.diverged = before | ~finite
        self.diverged[[place for _, place, _ in found]] = True
        if found:
            update, place, _ = found[0]
            what = ", ".join(name for *at, name in found if at == [update, place])
            update += (index - 1) * config.updates_per_chunk + 1
        elif (self.diverged & ~before).any():
            place, what = np.argmax(self.diverged & ~before), "parameters"
            update = index * config.updates_per_chunk
        else:
            return None
        return (
            f"training diverged at update {update} of {config.num_updates}, "
            f"{config.members[place].name}: {what} not finite"
        )

    def _masked(self, evaluation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return an evaluation, (M, K) per metric, with NaN for diverged members."""
        if not self.diverged.any():
            return evaluation
        lost = self.diverged[:, None]
        return {k: np.where(lost, np.float32(np.nan), v) for k, v in evaluation.items()}


def _get(tree: Any) -> Any:
    """Return the arrays' values once they are computed; handle signals in the meantime."""
    while not all(array.is_ready() for array in jax.tree.leaves(tree)):
        time.sleep(0.002)
    return jax.device_get(tree)
