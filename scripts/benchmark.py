"""Benchmark of a system on a task: start-up, steps per second, FLOPs, memory.

    python scripts/benchmark.py magpo env=coordsum/3x10-30 num_envs=64
    python scripts/benchmark.py magpo env=rware/tiny-4ag seeds=[0,1,2] json=measurements.json
    python scripts/benchmark.py overhead=5 magpo env=coordsum/3x10-30 num_envs=64

Arguments that are not keys of this script are overrides of the run. One process uses the programs
of a real run, with chunks of one update; start-up is timed from the start of the process. FLOPs are
XLA's count for the unoptimised update, with each loop's body counted as often as it runs, also as a
share of the rate of a large float32 matmul on the same machine. Memory is the process's peak before
that matmul. The last shares are of the time of an update's XLA operations, summed over threads.

On a GPU, `kernels` describes one update: the number of kernels, their time, the idle time between
them, and the slowest ones. With lock=<file>, processes that start together compile side by side and
measure one after the other.

With overhead=<n>, the script trains n chunks of the run's own size, each with an evaluation and a
checkpoint, and times the writer thread. If that thread has its own core, the overhead is lower.
"""

import time

STARTED = time.perf_counter()

import fcntl  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections import Counter, defaultdict  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import replace  # noqa: E402
from json import dumps  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.extend.core import jaxpr_as_fun  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from magpo import (  # noqa: E402
    commands,
    contract,
    experiment,
    plugins,
)
from magpo import config as configuration  # noqa: E402
from magpo.config.schema import RunConfig  # noqa: E402
from magpo.contract import Algorithm  # noqa: E402
from magpo.envs.wrappers import AutoReset  # noqa: E402
from magpo.report import writer  # noqa: E402
from magpo.types import Array, Environment  # noqa: E402
from magpo.values import PositiveInt  # noqa: E402

IMPORTED = time.perf_counter()
wait: Any = jax.block_until_ready
REPEATS = 5  # of each timing; the median is reported


def median_seconds(function: Callable[[], Any]) -> float:
    """Return the time of a call and its work on the device, after one call as a warm-up."""
    wait(function())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        wait(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def scans(jaxpr: Any) -> Iterator[tuple[int, Any]]:
    """Yield length and body of each scan in a jaxpr that is not inside another scan."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params["length"], equation.params["jaxpr"]
        else:
            for parameter in equation.params.values():
                for inner in parameter if isinstance(parameter, tuple | list) else [parameter]:
                    if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                        yield from scans(getattr(inner, "jaxpr", inner))


def flops(closed_jaxpr: Any) -> tuple[float, float]:
    """Return FLOPs with each scan's body counted as often as it runs, and once, as XLA does."""
    lowered = jax.jit(jaxpr_as_fun(closed_jaxpr)).lower(*closed_jaxpr.in_avals)
    once = total = (lowered.cost_analysis() or {}).get("flops", 0.0)
    for length, body in scans(closed_jaxpr.jaxpr):
        body_total, body_once = flops(body)
        total += length * body_total - body_once
    return total, once


def matmul_rate(size: int = 2048) -> float:
    """Return the FLOP/s of a large float32 matmul: this machine's practical peak."""
    matmul, a = jax.jit(jnp.matmul), jnp.ones((size, size))
    return 2 * size**3 / median_seconds(lambda: matmul(a, a))


def profile(compiled: Any, run: Callable[[], Any]) -> dict[str, Any]:
    """Return each kind of operation's share of a program's time, and on a GPU its kernels.

    Loops and calls are left out: their bodies' operations count.
    """
    kinds = {}
    for line in compiled.as_text().splitlines():
        match = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = .*? ([\w-]+)\(", line)
        if match:
            scope = re.search(r'op_name="([^"]*)"', line)
            kinds[match[1]] = match[2], scope[1].rpartition("/")[2] if scope else ""
    spent: Counter[str] = Counter()
    kernels: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            wait(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        for plane in data.planes:
            on_gpu = plane.name.startswith("/device:GPU")
            for line in plane.lines:
                if on_gpu and line.name.startswith("Stream"):
                    kernels += line.events
            for event in (event for line in plane.lines for event in line.events):
                opcode, origin = kinds.get(event.name, ("", ""))
                if opcode in ("", "while", "call", "conditional"):
                    continue
                if "reduce" in origin or "reduce" in event.name:
                    spent["reductions"] += event.duration_ns
                elif opcode == "dot" or "dot" in origin or "->" in origin or "ynn" in event.name:
                    spent["matmuls"] += event.duration_ns
                else:
                    spent["elementwise"] += event.duration_ns
        found: dict[str, Any] = {
            f"share_of_{kind}": time_ns / spent.total() for kind, time_ns in spent.items()
        }
        return found | ({"kernels": launches(kernels)} if kernels else {})


def launches(kernels: list[Any]) -> dict[str, Any]:
    """Return the number of a GPU's kernels, their time, the idle time, and the slowest kernels."""
    start = min(kernel.start_ns for kernel in kernels)
    end = max(kernel.start_ns + kernel.duration_ns for kernel in kernels)
    spent: Counter[str] = Counter()
    for kernel in kernels:
        spent[kernel.name] += kernel.duration_ns
    times = Counter(kernel.name for kernel in kernels)
    longest = {name: [round(ns / 1e6, 2), times[name]] for name, ns in spent.most_common(25)}
    return {
        "number": len(kernels),
        "busy_ms": spent.total() / 1e6,
        "idle_ms": (end - start - spent.total()) / 1e6,
        "longest_ms_and_times": longest,
    }


def random_steps(env: Environment, num_envs: int, length: int) -> Callable[[], Any]:
    """Compile steps of the environment alone, with restarts, under random legal actions."""
    batch = AutoReset(env, num_envs)

    def run(state: Any, timestep: Any, key: Array) -> Any:
        def step(loop: Any, key: Array) -> tuple[Any, Array]:
            state, mask = loop
            if env.action_kind == "discrete":
                action = jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf))
            else:
                action = jax.random.uniform(key, mask.shape, minval=-1.0)
            state, timestep = batch.step(state, action)
            return (state, timestep.observation.action_mask), timestep.reward.sum()

        loop = state, timestep.observation.action_mask
        return jax.lax.scan(step, loop, jax.random.split(key, length))

    start = *jax.jit(batch.reset)(jax.random.key(0)), jax.random.key(1)
    compiled = jax.jit(run).lower(*start).compile()
    return lambda: compiled(*start)


def measure(algorithm: Algorithm, config: RunConfig, lock: Path | None) -> dict[str, Any]:
    """Return all measurements, by name and unit."""
    experiment.set_up_jax(config)
    env = experiment.make_env(config)
    setup = experiment.make_setup(algorithm, env, config)
    programs, arguments = experiment.build_programs(algorithm, setup, env, config)
    started = time.perf_counter()
    compiled = experiment.compile_programs(programs, arguments)
    compile_s = time.perf_counter() - started
    inputs = experiment.member_inputs(config)
    state, _ = wait(compiled.train_chunk(compiled.init(inputs.train_keys, inputs.hyper)))
    first_update_s = time.perf_counter() - STARTED

    of_package: Any = algorithm  # its systems have a `rollout`, which the contract lacks
    all_rollouts = jax.jit(jax.vmap(lambda state: of_package.rollout(setup, env, state)))
    rollout = all_rollouts.lower(state).compile()
    play = random_steps(env, config.num_envs, config.rollout_length)
    shaped: Any = jax.ShapeDtypeStruct  # without shardings: FLOPs are counted on one device
    one_device = jax.tree.map(lambda x: shaped(x.shape, x.dtype), state)
    train_chunk = jax.vmap(lambda state: algorithm.train_chunk(setup, env, state))
    total_flops, _ = flops(jax.make_jaxpr(train_chunk)(one_device))

    with alone(lock):
        update_s = []
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            state, _ = wait(compiled.train_chunk(state))
            update_s.append(time.perf_counter() - start)
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        rollout_s, play_s = median_seconds(lambda: rollout(state)), median_seconds(play)
        peak_rate = matmul_rate()
        profiled = profile(compiled.train_chunk, lambda: compiled.train_chunk(state))

    steps = config.steps_per_update * len(config.members)
    median_update_s = statistics.median(update_s[1:])
    measured = {
        "import_s": IMPORTED - STARTED,
        "compile_s": compile_s,
        "first_update_s": first_update_s,
        "update_s": median_update_s,
        "steps_per_s": steps / median_update_s,
        "rollout_steps_per_s": steps / rollout_s,
        "env_steps_per_s": config.steps_per_update / play_s,
        "matmul_gflop_per_s": peak_rate / 1e9,
        "peak_memory_gb": peak / 1e9,
    }
    if total_flops:  # XLA counts none for a GPU
        measured |= {
            "update_gflop": total_flops / 1e9,
            "update_gflop_per_s": total_flops / median_update_s / 1e9,
            "share_of_matmul_rate": total_flops / median_update_s / peak_rate,
        }
    measured |= {"peak_device_memory_gb": device / 1e9} if device else {}
    return measured | profiled


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Report that all is compiled and hold the lock, if one is given."""
    if lock is None:
        yield
        return
    print("compiled", flush=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure_overhead(module: ModuleType, config: RunConfig) -> dict[str, float]:
    """Return the time that checkpoints and logs take, also as a share of the run's."""
    spent: dict[str, float] = defaultdict(float)
    attempt = writer.Writer._try

    def timed(writer: Any, errors: Any, name: str, job: Callable[[], object]) -> None:
        start = time.perf_counter()
        attempt(writer, errors, name, job)
        spent["checkpoint" if name == "checkpoint" else "logging"] += time.perf_counter() - start

    with mock.patch.object(writer.Writer, "_try", timed), tempfile.TemporaryDirectory() as folder:
        result = experiment.run(module, replace(config, results_dir=folder))
        (written,) = Path(result.folder, "checkpoints").glob("*")
        size = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
    run_s = result.measurements[-1].wall_s
    return {
        "run_s": run_s,
        "chunk_s": run_s / config.num_evaluations,
        "checkpoint_s": spent["checkpoint"] / config.num_evaluations,
        "checkpoint_mb": size / 1e6,
        "share_of_checkpoints": spent["checkpoint"] / run_s,
        "share_of_logging": spent["logging"] / run_s,
    }


def main(
    system: str,
    *overrides: str,
    overhead: PositiveInt | None = None,  # chunks
    lock: Path | None = None,
    json: Path | None = None,
) -> None:
    """Measure, print and write the measurements."""
    config = configuration.load(system, overrides)
    module = plugins.system(system)
    chunks, steps = 1, config.steps_per_update
    if overhead:
        chunks, steps = overhead, overhead * config.steps_per_chunk
    short = [f"total_steps={steps}", f"num_evaluations={chunks}"]
    if overhead:
        short += ["absolute_metric=false", "keep=1", "checkpoint_share=1"]
    config = configuration.load(system, [*overrides, *short])
    if overhead:
        measured = measure_overhead(module, config)
    else:
        measured = measure(contract.algorithm(module), config, lock)

    number, noun = len(config.members), "members" if config.vary else "seeds"
    members = f", {number} {noun}" if number > 1 else ""
    table = Table(title=f"{config.system} on {config.env.name}{members}", title_justify="left")
    table.add_column("measurement")
    table.add_column("value", justify="right")
    for name, value in measured.items():
        if name == "kernels":
            continue
        table.add_row(name, f"{value:,.0f}" if value >= 1000 else f"{value:.3g}")
    Console().print(table)
    if json:
        about: dict[str, Any] = {"system": config.system, "task": config.env.name}
        about |= {"overrides": overrides, "device": jax.devices()[0].device_kind}
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(dumps(about | measured, indent=2) + "\n")


if __name__ == "__main__":
    commands.run(__doc__, main)
