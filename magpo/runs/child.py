"""A run in a child process, to which the signals that stop this process are passed on."""

import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType

POLL_S = 1.0


def run(command: Sequence[str], watch: Callable[[], bool] | None = None) -> int:
    """Run a command and return its exit code.

    `watch` is called every second; once it returns True, the command is stopped. Signals that stop
    this process are passed on once each. The run has its own process group, because it saves at a
    first Ctrl-C and dies at a second one.
    """
    processes, received = list[subprocess.Popen[bytes]](), list[int]()

    def stop(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for process in processes:
            process.send_signal(signum)

    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    caught = [signum for signum in signals if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, stop) for signum in caught}
    try:
        processes.append(subprocess.Popen(command, process_group=0))
        if received:  # before the process existed
            processes[0].send_signal(received[0])
        while watch is not None and processes[0].poll() is None:
            with suppress(subprocess.TimeoutExpired):
                processes[0].wait(POLL_S)
            if not received and watch():
                processes[0].terminate()
                watch = None
        code = processes[0].wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return 128 + received[0] if received else code if code >= 0 else 128 - code
