"""Signals that ask a run to stop."""

import math
import os
import signal
import sys
import time
from _thread import start_new_thread  # a signal handler might find threading's locks taken
from types import FrameType

PATIENCE_S = 60.0  # for a process that runs no Python any more: its end takes far less
received: list[int] = []  # the signals that asked this process to stop
_deadline = math.inf


def stop(signum: int, frame: FrameType | None) -> None:
    """Handle a signal: raise KeyboardInterrupt, and raise it again if it was lost.

    Python drops exceptions raised during garbage collection, and libraries may catch them.
    """
    global _deadline
    signal.signal(signum, signal.SIG_DFL)  # a second signal kills
    received.append(signum)
    sys.unraisablehook = lambda lost: None
    if hasattr(signal, "setitimer"):  # not on Windows
        _deadline = time.monotonic() + PATIENCE_S
        start_new_thread(_end_at_deadline, ())
        signal.signal(signal.SIGALRM, _again)
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    raise KeyboardInterrupt


def answered() -> None:
    """Stop raising KeyboardInterrupt, because the run has ended."""
    global _deadline
    if _deadline < math.inf:
        signal.setitimer(signal.ITIMER_REAL, 0)
    _deadline = math.inf


def _again(signum: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt unless one is being handled; then allow more time for the files."""
    global _deadline
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    if error is None:
        raise KeyboardInterrupt
    _deadline = time.monotonic() + PATIENCE_S


def _end_at_deadline() -> None:
    while _deadline < math.inf:
        if time.monotonic() > _deadline:
            os._exit(128 + received[0])
        time.sleep(0.2)
