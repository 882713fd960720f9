"""Scores of one suite, and their aggregates over tasks and seeds with bootstrap intervals.

A seed's score on a task is its absolute metric, the mean over 320 episodes by default. If a seed of
a system lacks it on a task, the scores of all its seeds there are their last common evaluation.
Scores are normalised by the task's bounds.

The bootstrap resamples seeds, not episodes: within each task it draws as many seeds as there are,
with replacement. Intervals reach from the 2.5th to the 97.5th percentile of `reps` such samples.

The aggregates are rliable's (Agarwal et al., 2021). Its own bootstrap is not used: rliable.library
needs `arch`, which fails to import beside pandas 3.
"""

import importlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from magpo.errors import ConfigError
from magpo.plot.read import Line

# The tasks' own bounds, by metric, or by suite and metric.
BOUNDS = {"win_rate": (0.0, 1.0), "percent_eaten": (0.0, 100.0), "lbf episode_return": (0.0, 1.0)}
ROUNDING = 1e-3  # how far float32 sums may lie outside the bounds
AGGREGATES = ("median", "iqm", "mean", "optimality_gap")
THRESHOLDS = np.linspace(0, 1, 101)  # of performance profiles
Scores = Mapping[str, Mapping[str, np.ndarray]]  # by label and task, (S,)


class Bounds(NamedTuple):
    """The values of a task's metric that are normalised to 0 and 1."""

    low: float
    high: float
    own: bool  # whether they are the task's own, not the extremes of the runs


class Interval(NamedTuple):
    """Estimates and the edges of their 95 % intervals, all of the same shape."""

    point: np.ndarray
    low: np.ndarray
    high: np.ndarray


def bounds(lines: Sequence[Line]) -> dict[str, Bounds]:
    """Return one suite's bounds by task.

    Win rates and LBF's return have their own, unless options such as LBF's `normalize_reward=false`
    put values outside them. For other metrics the bounds are the minimum and maximum over all
    systems, seeds and evaluations.
    """
    extremes = defaultdict[str, list[float]](list)
    for line in lines:
        extremes[line.task] += line.extremes
    found = {}
    for task, values in extremes.items():
        suite, metric = lines[0].suite, lines[0].metric
        own = BOUNDS.get(f"{suite} {metric}") or BOUNDS.get(metric)
        found[task] = Bounds(min(values), max(values), own=False)
        if own and own[0] - ROUNDING <= min(values) and max(values) <= own[1] + ROUNDING:
            found[task] = Bounds(*own, own=True)
    return found


def normalise(values: np.ndarray, bounds: Bounds) -> np.ndarray:
    """Return values scaled so that the bounds are 0 and 1; 0 if the bounds are equal, because then
    no run improved."""
    return (values - bounds.low) / ((bounds.high - bounds.low) or 1.0)


def normalised(lines: Sequence[Line]) -> Scores:
    """Return one suite's normalised scores."""
    of, scores = bounds(lines), defaultdict[str, dict[str, np.ndarray]](dict)
    for line in lines:
        scores[line.label][line.task] = normalise(line.score, of[line.task])
    return scores


def matrix(scores: Mapping[str, np.ndarray], tasks: Sequence[str]) -> np.ndarray:
    """Return the (N, M) scores of M tasks, for rliable; N is the fewest seeds of a task."""
    num_seeds = min(len(scores[task]) for task in tasks)
    return np.stack([scores[task][:num_seeds] for task in tasks], axis=1)


def estimate(statistic: Callable[..., Any], matrices: Sequence[np.ndarray], reps: int) -> Interval:
    """Return a statistic of matrices (N, M) or (N, M, K) with its interval."""
    generator, draws = np.random.default_rng(0), []
    for _ in range(reps):
        drawn = []
        for x in matrices:
            seeds = generator.integers(len(x), size=x.shape[:2])  # separately for each task
            drawn.append(x[seeds, np.arange(x.shape[1])])
        draws.append(statistic(*drawn))
    return Interval(np.asarray(statistic(*matrices)), *np.percentile(draws, [2.5, 97.5], axis=0))


def rliable_metrics() -> Any:
    """Return rliable's metrics. Raises ConfigError if rliable is not installed."""
    try:
        return importlib.import_module("rliable.metrics")
    except ImportError:
        raise ConfigError("rliable is not installed: pip install 'magpo[plot]'") from None


def aggregates(scores: Scores, reps: int) -> dict[str, Interval]:
    """Return each system's AGGREGATES, (4,), over the tasks it has."""
    metrics = [getattr(rliable_metrics(), f"aggregate_{name}") for name in AGGREGATES]
    return of_each(lambda x: [metric(x) for metric in metrics], scores, reps)


def profiles(scores: Scores, reps: int) -> dict[str, Interval]:
    """Return the share of each system's scores above each of THRESHOLDS, (101,)."""

    def above(x: np.ndarray) -> np.ndarray:
        return 1 - np.searchsorted(np.sort(x, axis=None), THRESHOLDS, side="right") / x.size

    return of_each(above, scores, reps)


def of_each(statistic: Callable[..., Any], scores: Scores, reps: int) -> dict[str, Interval]:
    """Return a statistic of each system's (N, M) scores on the tasks it has."""
    return {
        label: estimate(statistic, [matrix(tasks, list(tasks))], reps)
        for label, tasks in scores.items()
    }


def over_steps(lines: Sequence[Line], reps: int) -> dict[str, tuple[np.ndarray, Interval]]:
    """Return each system's environment steps, (K,), and its evaluations' IQM at each of them.

    A system's steps are those at which any of its tasks was evaluated, up to the end of its
    shortest task. Between a task's own evaluations its curves are interpolated linearly.
    """
    of, by_label = bounds(lines), defaultdict[str, list[Line]](list)
    for line in lines:
        by_label[line.label].append(line)
    found = {}
    for label, same in by_label.items():
        first, last = max(line.steps[0] for line in same), min(line.steps[-1] for line in same)
        steps = np.unique(np.concatenate([line.steps for line in same]))
        steps = steps[(first <= steps) & (steps <= last)]
        curves = {
            line.task: np.stack(
                [
                    np.interp(steps, line.steps, normalise(seed, of[line.task]))
                    for seed in line.values.T
                ]
            )
            for line in same
        }  # (S, K) each
        found[label] = steps, estimate(iqm_of_each, [matrix(curves, list(curves))], reps)
    return found


def iqm_of_each(x: np.ndarray) -> np.ndarray:
    """Return the IQM, (K,), of (N, M, K) scores; rliable's function takes one step at a time."""
    ordered = np.sort(x.reshape(-1, x.shape[-1]), axis=0)
    cut = len(ordered) // 4
    return np.asarray(ordered[cut : len(ordered) - cut].mean(0))


def improvement(scores: Scores, reps: int) -> dict[tuple[str, str], Interval]:
    """Return P(X > Y), (), of each pair of systems over the tasks that both have."""
    found = {}
    for x, y in combinations(scores, 2):
        if tasks := [task for task in scores[x] if task in scores[y]]:
            pair = [matrix(scores[label], tasks) for label in (x, y)]
            found[x, y] = estimate(beats, pair, reps)
    return found


def beats(x: np.ndarray, y: np.ndarray) -> float:
    """Return rliable's probability_of_improvement, without the p-values, which take nearly all of
    its time."""
    # (N_x, N_y, M); a tie counts as half.
    above = (x[:, None] > y).mean() + (x[:, None] == y).mean() / 2
    return float(above)
