"""Processes of this machine as /proc shows them: so that none of ours stays behind."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from crossdock.proto import ending


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


def parent_of(pid: int) -> int | None:
    """None where it has ended."""
    stat = _stat(pid)
    return stat[0] if stat is not None else None


def keep_orphans() -> None:
    """From now on a descendant whose parent dies becomes this process's child, not init's, and so
    stays among its `descendants`."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def alive(process: ProcessId) -> bool:
    """Whether it runs still; another process under its number does not count."""
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


def record_crashes(folder: str) -> None:
    """From now on a fatal signal to this process leaves its name in a file of `folder`, and
    `ending.end` its reason."""
    path = Path(folder) / f"{os.getpid()}.crash"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    faulthandler.enable(file)
    ending.keep(file)


def end_of(pid: int, folder: str) -> str:
    """What ended a process: a signal, or what it said of it itself; empty where it is not known.

    SIGKILL alone leaves no time to write its name.
    """
    try:
        found = (Path(folder) / f"{pid}.crash").read_text(errors="replace")
    except OSError:
        return ""  # of another host, or it never got so far
    what = found.partition("\n")[0].removeprefix("Fatal Python error: ")
    names = {signal.strsignal(number): number.name for number in signal.Signals}
    return names.get(what, what) or "SIGKILL, as the kernel sends it when memory runs out"


def _stat(pid: int) -> tuple[int, str] | None:
    """Parent and start time; None for one that is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent, *rest = text.rpartition(")")[2].split()
    return None if state == "Z" else (int(parent), rest[17])
