"""Signals that ask a run to stop."""

import signal
from types import FrameType

received: list[int] = []  # those that asked this process to stop


def stop(signum: int, frame: FrameType | None) -> None:
    """Handle a signal."""
    signal.signal(signum, signal.SIG_DFL)  # a second one kills
    received.append(signum)
    raise KeyboardInterrupt


def check() -> None:
    """Raise a KeyboardInterrupt that Python lost, having raised it inside a garbage collection."""
    if received:
        raise KeyboardInterrupt
