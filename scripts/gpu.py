"""Checks and measurements of the library on a GPU, in at most nine minutes.

    python scripts/gpu.py results/gpu minutes=9        # or: make gpu

The script writes into the folder:
about.json       the GPU, its driver and the versions of the packages
checks.csv       tests on the GPU; a run killed and resumed, bit for bit like an uninterrupted one;
                 a first update, compared with the CPU's
speed.csv        scripts/benchmark.py on systems, tasks, members, precision
kernels.json     the kernels of one update, for each row of speed.csv
curve_*.csv      ten seeds of coordsum/3x10-30, trained for the remaining time

Four programs compile side by side, without XLA's autotuning: with it, fourteen on one H200 were not
compiled after eight minutes, and one program compiled in 47 s instead of 28 s and ran 5 % faster.
Measurements have the GPU to themselves. A second call repeats the checks and continues measuring
and training where time ran out. only_numerics=true only prints how far a first update is from the
CPU's.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from magpo import commands, config, contract, experiment, plugins, tables
from magpo.types import spec
from magpo.values import PositiveFloat

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
TASKS = ("coordsum/3x10-30", "lbf/2s-8x8-2p-2f-coop", "smax/2s3z")
SEEDS = {number: f"seeds={list(range(number))}".replace(" ", "") for number in (10, 40)}
ROWS = [
    *((system, f"env={task}") for task in TASKS for system in ("magpo", "mappo", "sable")),
    *((system, f"env={TASKS[0]}", SEEDS[n]) for system in ("magpo", "mappo") for n in SEEDS),
    ("magpo", f"env={TASKS[0]}", "precision=bfloat16"),
]
SHORT_RUN = [
    *("magpo", "env=lbf/2s-8x8-2p-2f-coop", "num_envs=16", "total_steps=65536"),
    *("num_evaluations=8", "keep=1", "absolute_metric=false"),
]
AT_ONCE, COMPILATION_S, CHECKS_S = 4, 90.0, 240.0  # at most
FULL = {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}  # as in runs; JAX's default is lower
CHECKS = {
    "tests": [
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "4"),
        *("tests/networks", "tests/systems/test_losses.py"),
        *("tests/experiment/test_resume.py", "tests/experiment/test_experiment.py"),
    ],
    "resumed": [sys.executable, str(SCRIPTS / "crash_test.py"), "kills=2", *SHORT_RUN],
    "numerics": [sys.executable, str(SCRIPTS / "gpu.py"), ".", "only_numerics=true"],
}


def numerics(system: str) -> str:
    """Return a line that says how far a first update on this device is from the CPU's.

    PPO's updates amplify rounding, so the line also says how far the CPU's update moves if its
    parameters start 1e-7 apart.
    """
    run = config.load(system, [f"env={TASKS[0]}", "num_envs=16", "tuned=false"])
    experiment.set_up_jax(run)
    algorithm = contract.algorithm(plugins.system(system))
    env = experiment.make_env(run)
    setup = algorithm.make(run.algorithm, spec(env))
    update = jax.jit(lambda state: algorithm.train_chunk(setup, env, state)[0].params)
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    with jax.default_device(cpu):
        state = jax.jit(lambda key: algorithm.init(setup, env, key))(jax.random.key(0))
    state = jax.device_put(state, cpu)
    nudged = state._replace(params=jax.tree.map(lambda x: x * (1 + 1e-7), state.params))
    expected = update(state)
    moved = _distance(expected, state.params)
    here = _distance(update(jax.device_put(state, device)), expected) / moved
    noise = _distance(update(nudged), expected) / moved
    return f"{system}: {here:.2f} of the update's length apart, {noise:.2f} by rounding alone"


def _distance(a: Any, b: Any) -> float:
    """Return the Euclidean distance of two pytrees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(np.sqrt(sum(np.sum((np.asarray(x) - np.asarray(y)) ** 2) for x, y in pairs)))


def call(command: list[str], log: Path, deadline: float, **variables: str) -> int | None:
    """Run a command until the deadline; return its exit code, or None if it was stopped."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    if time.monotonic() > deadline:
        return None
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **variables}
    flags = os.environ.get("XLA_FLAGS", ""), "--xla_gpu_autotune_level=0"
    environment["XLA_FLAGS"] = " ".join(flags)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            return None


def about() -> dict[str, Any]:
    """Return the GPU, its driver and the versions of the packages."""
    card = ""
    if program := shutil.which("nvidia-smi"):
        query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    names = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "numpy")
    found = {name: _version(name) for name in names}
    return {"card": card, "python": sys.version.split()[0], **found}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def check(name: str, folder: Path, deadline: float) -> dict[str, Any]:
    """Run one of CHECKS; return its exit code and the last of its output."""
    log = folder / "logs" / f"{name}.txt"
    results = f"results_dir={folder / 'runs' / name}"
    command = [*CHECKS[name], *([results] if name == "resumed" else [])]
    code = call(command, log, deadline, JAX_PLATFORMS="cuda,cpu", **FULL)
    lines = log.read_text().splitlines() or [""]
    said = "; ".join(lines[-3:]) if name == "numerics" else lines[-1]
    return {"check": name, "exit_code": "stopped" if code is None else code, "said": said}


def log_of(row: tuple[str, ...], folder: Path) -> Path:
    """Return the file that receives the output of a row's process."""
    name = "_".join(row).translate(str.maketrans("/=,[]", "-----"))
    return folder / "logs" / f"{name}.txt"


def compiling(future: Future[Any], log: Path) -> bool:
    """Return whether a row's process is not yet ready to measure."""
    return not future.done() and not (log.exists() and "compiled" in log.read_text())


def speed(row: tuple[str, ...], folder: Path, deadline: float) -> dict[str, Any] | None:
    """Measure one of ROWS, or read its measurements; return None if time ran out or it failed."""
    log = log_of(row, folder)
    file = folder / "rows" / f"{log.stem}.json"
    if not file.exists():
        command = [sys.executable, str(SCRIPTS / "benchmark.py"), *row, "num_envs=128"]
        command += [f"lock={folder / 'lock'}", f"json={file}"]
        call(command, log, deadline)
    if not file.exists():
        return None
    measured: dict[str, Any] = json.loads(file.read_text())
    return {"command": " ".join(row), **measured}


def measure(
    rows: Sequence[tuple[str, ...]], pool: ThreadPoolExecutor, folder: Path, deadline: float
) -> list[dict[str, Any]]:
    """Compile rows side by side, then measure the compiled ones one after the other."""
    until = time.monotonic() + COMPILATION_S
    logs = [log_of(row, folder) for row in rows]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        futures = [pool.submit(speed, row, folder, deadline) for row in rows]
        while time.monotonic() < until and any(map(compiling, futures, logs)):
            time.sleep(1)
    return [found for future in futures if (found := future.result())]


def train(system: str, folder: Path, deadline: float) -> None:
    """Train ten seeds on coordsum/3x10-30 until the deadline, or continue their training."""
    results = folder / "runs" / "seeds"
    command = [sys.executable, "-m", f"magpo.systems.{system}", f"env={TASKS[0]}", SEEDS[10]]
    command += [f"results_dir={results}", "resume=auto"]
    call(command, folder / "logs" / f"train_{system}.txt", deadline)
    for log in results.glob(f"{system}/*/*/*/metrics.jsonl"):
        table = str(folder / f"curve_{system}.csv")
        collect = [sys.executable, str(SCRIPTS / "curves.py"), table, f"run={log.parent}"]
        subprocess.run(collect, check=False)


def main(folder: Path, minutes: PositiveFloat = 9.0, *, only_numerics: bool = False) -> None:
    """Check, measure and train, or only compare numerics, in this process."""
    if only_numerics:
        for system in ("magpo", "mappo", "sable"):
            print(numerics(system), flush=True)
        return
    folder, started = folder.resolve(), time.monotonic()
    deadline = started + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").write_text(json.dumps(about(), indent=2) + "\n")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        until = min(deadline, started + CHECKS_S)
        checked = list(pool.map(lambda name: check(name, folder, until), CHECKS))
        tables.write(folder / "checks.csv", checked)
        measured = []
        for first in range(0, len(ROWS), AT_ONCE):
            measured += measure(ROWS[first : first + AT_ONCE], pool, folder, deadline)
    kernels = {row["command"]: row.pop("kernels", None) for row in measured}
    (folder / "kernels.json").write_text(json.dumps(kernels, indent=1) + "\n")
    columns = ["update_s", "steps_per_s", "rollout_steps_per_s", "env_steps_per_s", "compile_s"]
    columns += ["update_gflop", "share_of_matmul_rate", "peak_device_memory_gb"]
    table = [
        {"command": row["command"], "device": row["device"]}
        | {name: f"{row[name]:.4g}" if name in row else "" for name in columns}
        | {
            key: (kernels[row["command"]] or {}).get(key, "")
            for key in ("number", "busy_ms", "idle_ms")
        }
        for row in measured
    ]
    if table:
        tables.write(folder / "speed.csv", table)
    print(f"checked and measured after {time.monotonic() - started:.0f} s", flush=True)
    for system, share in (("magpo", 0.6), ("mappo", 1.0)):
        train(system, folder, time.monotonic() + share * (deadline - time.monotonic()))
    for file in sorted(folder.glob("*.csv")):
        print(f"== {file.name}\n{file.read_text()}")


if __name__ == "__main__":
    commands.run(__doc__, main)
