"""Several processes that train one run together, on one machine or on many.

Each has its own devices and runs the same programs. Only the first process shows, logs and makes
decisions that depend on files or clocks, which it tells the others.
"""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from signal import SIGINT, SIGTERM
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from magpo.config.schema import DistributedConfig
from magpo.errors import ConfigError
from magpo.files import complain


def join(config: DistributedConfig) -> None:
    """Join the other processes, if there are any, before JAX computes anything.

    `config` names them; otherwise they are the tasks of this SLURM job step. Raises ConfigError.
    """
    in_slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1
    if jax.distributed.is_initialized() or not (config.coordinator or in_slurm):
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take over SIGTERM
    where = config.coordinator or "the first task of this SLURM step"
    complain(f"waiting, at most 5 minutes, for all processes: {where}")
    try:
        with _killable():
            jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"distributed: cannot join the other processes: {reason}") from error


@contextlib.contextmanager
def _killable() -> Iterator[None]:
    """Let signals end the process, because Python cannot handle them while JAX waits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = {number: signal.signal(number, signal.SIG_DFL) for number in (SIGINT, SIGTERM)}
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def is_first() -> bool:
    """Return whether this is the process that shows, logs and decides."""
    return bool(jax.process_index() == 0)


def everyone() -> set[int]:
    """Return the indices of all processes."""
    return set(range(jax.process_count()))


def agreed(decide: Callable[[], Any]) -> Any:
    """Return the first process's result of `decide`, or raise its ConfigError, on all processes.

    All processes must call this function in the thread that starts their computations. The result
    is sent as JSON, so a path arrives as a string.
    """
    if jax.process_count() == 1:
        return decide()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said["value"] = decide()
        except ConfigError as error:
            said["error"] = str(error)
    text = json.dumps(said, default=str).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    letters = np.frombuffer(text.ljust(length)[:length], np.uint8)
    said = json.loads(bytes(multihost_utils.broadcast_one_to_all(letters)))
    if "error" in said:
        raise ConfigError(said["error"])
    return said["value"]


def meet(where: str, timeout_s: int) -> bool:
    """Wait until all processes reach the point `where`; return whether they did so in time."""
    if not jax.distributed.is_initialized():
        return True
    from orbax.checkpoint.multihost import sync_global_processes

    try:
        sync_global_processes(f"magpo {where}", timeout=timeout_s, processes=everyone())
    except jax.errors.JaxRuntimeError:
        return False
    return True


def leave() -> None:
    """Synchronise before exiting: JAX aborts the remaining processes once one has gone."""
    if jax.distributed.is_initialized() and meet("leaves", timeout_s=20):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.distributed.shutdown()
