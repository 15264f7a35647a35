"""Processes of this machine as /proc shows them: so that none of ours stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessId:
    """A process, told apart from a later one by the same number."""

    pid: int
    start_time: str


def descendants(root: int) -> list[ProcessId]:
    """All processes below `root`, children before their own."""
    children: defaultdict[int, list[ProcessId]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
            parent, start_time = stat
            children[parent].append(ProcessId(int(entry.name), start_time))
    found: list[ProcessId] = []
    queue = [root]
    while queue:
        below = children[queue.pop()]
        found += below
        queue += [process.pid for process in below]
    return found


def alive(process: ProcessId) -> bool:
    stat = _stat(process.pid)
    return stat is not None and stat[1] == process.start_time


def end_all(processes: Iterable[ProcessId], grace_s: float) -> None:
    """Waits until all are gone; kills those that are not after `grace_s`."""
    left = list(processes)
    deadline = time.monotonic() + grace_s
    while (left := [p for p in left if alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _stat(pid: int) -> tuple[int, str] | None:
    """Parent and start time; None for one that is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent, *rest = text.rpartition(")")[2].split()
    return None if state == "Z" else (int(parent), rest[17])
