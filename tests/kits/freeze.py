"""A process that stands still, for tests of what others do meanwhile."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def freeze(pid: int, timeout_s: float = 30.0) -> None:
    """SIGSTOP; returns once every thread has stopped. Until one of them has taken the signal the
    others run on, which on a busy machine is long enough to answer what is asked next."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + timeout_s
    while not _stopped(pid):
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.001)


def _stopped(pid: int) -> bool:
    try:
        threads = [(thread / "stat").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
    except FileNotFoundError:  # one ended just now
        return False
    return all(thread.rpartition(")")[2].split()[0] == "T" for thread in threads)
