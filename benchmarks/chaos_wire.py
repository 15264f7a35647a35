"""Loaded by every process of a cluster under chaos: notes what requests live through.

With this folder on PYTHONPATH, CROSSDOCK_EVENT_LISTENER=chaos_wire:reached and CROSSDOCK_CHAOS
naming another folder, a cluster appends one line for each life-cycle event to `journal` there,

    <monotonic ns> <pid> <event> <request, sequence, ticket or worker> <detail>

so that the line outlives a process that is killed at the next instruction. Where a file
`armed-<event>` lies there too, the first process to reach the event takes it away, tells the socket
`trips`, and stands still in that very place until told to go on: whatever is done to it or to
another meanwhile strikes at that event.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

FOLDER = os.environ.get("CROSSDOCK_CHAOS", "")
HOLD_S = 1.0  # at most, if nobody says to go on

_journal = -1


def note(event: str, who: str, detail: str) -> None:
    """Appends the event's line to the journal."""
    global _journal
    if _journal < 0:
        _journal = os.open(f"{FOLDER}/journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(_journal, f"{time.monotonic_ns()} {os.getpid()} {event} {who} {detail}\n".encode())


def reached(event: str, who: str, detail: str) -> None:
    """Notes the event, and stays in it where that is asked for."""
    note(event, who, detail)
    try:
        os.unlink(f"{FOLDER}/armed-{event}")
    except FileNotFoundError:
        return
    go_on = f"{FOLDER}/go-{os.getpid()}-{time.monotonic_ns()}"
    end = time.monotonic() + HOLD_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as trips, contextlib.suppress(OSError):
        trips.sendto(f"{os.getpid()} {event} {who} {end} {go_on}".encode(), f"{FOLDER}/trips")
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(go_on)
            return
        time.sleep(0.001)
