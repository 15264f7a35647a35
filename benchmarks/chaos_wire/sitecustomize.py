"""Loaded by every process of a cluster under chaos: notes what requests live through.

With this folder on PYTHONPATH and CROSSDOCK_CHAOS naming another folder, a cluster appends one line
for each life-cycle event to `journal` there,

    <monotonic ns> <pid> <event> <request, sequence or worker> <detail>

so that the line outlives a process that is killed at the next instruction. Where a file
`armed-<event>` lies there too, the first process to reach the event takes it away, tells the socket
`trips`, and stands still in that very place until told to go on: whatever is done to it or to
another meanwhile strikes at that event.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

FOLDER = os.environ.get("CROSSDOCK_CHAOS", "")
HOLD_S = 1.0  # at most, if nobody says to go on

_journal = -1


def note(event: str, who: str, detail: str = "-") -> None:
    global _journal
    if _journal < 0:
        _journal = os.open(f"{FOLDER}/journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(_journal, f"{time.monotonic_ns()} {os.getpid()} {event} {who} {detail}\n".encode())


def reached(event: str, who: str, detail: str = "-") -> None:
    """Notes the event, and stays in it where that is asked for."""
    note(event, who, detail)
    try:
        os.unlink(f"{FOLDER}/armed-{event}")
    except FileNotFoundError:
        return
    go_on = f"{FOLDER}/go-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as trips, contextlib.suppress(OSError):
        trips.sendto(f"{os.getpid()} {event} {who} {go_on}".encode(), f"{FOLDER}/trips")
    end = time.monotonic() + HOLD_S
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(go_on)
            return
        time.sleep(0.001)


# -- where the events are found: the only part that knows the code ------------------------------


def _jobs(module: ModuleType) -> None:
    mark = module.Job.mark

    def marked(job: Any, event: str, *rest: Any) -> None:
        new = event not in job.times
        mark(job, event, *rest)
        if new and event != "pulled":  # told later than it was, once the fence has held
            ticket = getattr(job, "ticket", None)
            reached(event, job.id, ticket.ticket_id.hex() if ticket is not None else "-")

    module.Job.mark = marked


def _reads(module: ModuleType) -> None:
    for transport in list(vars(module).values()):
        if getattr(transport, "__module__", "") != module.__name__:
            continue
        if isinstance(transport, type) and "read_generations" in vars(transport):
            _fences(transport)


def _fences(transport: Any) -> None:
    read = transport.read_generations

    def fence(self: Any, incarnation: bytes, block_ids: Sequence[int], notify: bytes) -> Any:
        if len(block_ids) and notify:  # the blocks are here and their fence is not posted
            reached("pulled", notify.hex())
        return read(self, incarnation, block_ids, notify)

    transport.read_generations = fence


def _sequences(module: ModuleType) -> None:
    sequence = module.SequenceState
    init, hold, release = sequence.__init__, sequence.hold, sequence.release

    def received(self: Any, *args: Any, **fields: Any) -> None:
        init(self, *args, **fields)
        self.timeline.sequence = self
        reached("received", self.active.request.request_id)

    def held(self: Any, link: Any) -> None:
        hold(self, link)
        note("held", self.active.request.request_id, f"{self.sequence_id}@{link.name}")

    def gone(self: Any, name: str) -> None:
        if name in self.holders:
            note("let_go", self.active.request.request_id, f"{self.sequence_id}@{name}")
        release(self, name)

    sequence.__init__, sequence.hold, sequence.release = received, held, gone


def _timelines(module: ModuleType) -> None:
    mark, move = module.Timeline.mark, module.Timeline.move

    def marked(self: Any, event: str, now: float) -> None:
        mark(self, event, now)
        name = "delivered" if event == "first_token" else event
        reached(name, self.sequence.active.request.request_id)

    def moved(self: Any, event: str, now: float) -> None:
        move(self, event, now)
        if self.sequence.generated + 1 >= self.sequence.sampling.max_tokens:
            reached(event, self.sequence.active.request.request_id)

    module.Timeline.mark, module.Timeline.move = marked, moved


def _views(module: ModuleType) -> None:
    connected, disconnected = module.ClusterView.connected, module.ClusterView.disconnected

    def comes(self: Any, facts: Any, now: float) -> Any:
        note("connected", facts.name, facts.incarnation)
        return connected(self, facts, now)

    def goes(self: Any, name: str, incarnation: str) -> None:
        note("disconnected", name, incarnation)
        disconnected(self, name, incarnation)

    module.ClusterView.connected, module.ClusterView.disconnected = comes, goes


def _servers(module: ModuleType) -> None:
    start = module.WorkerServer.start

    async def started(self: Any) -> Any:
        endpoint = await start(self)
        note("worker", endpoint.name, f"{endpoint.role.value}@{endpoint.incarnation}")
        return endpoint

    module.WorkerServer.start = started


PLACES: dict[str, Callable[[ModuleType], None]] = {
    "crossdock.worker.job": _jobs,
    "crossdock.worker.server": _servers,
    "crossdock.kvtransfer.nixl": _reads,
    "crossdock.kvtransfer.local": _reads,
    "crossdock.router.dispatch.sequence": _sequences,
    "crossdock.router.dispatch.lifecycle": _timelines,
    "crossdock.router.placement.view": _views,
}


class _Finder:
    """Has the modules of PLACES changed as soon as they are loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in PLACES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec: importlib.machinery.ModuleSpec | None = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                PLACES[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if FOLDER:
    sys.meta_path.insert(0, _Finder())
