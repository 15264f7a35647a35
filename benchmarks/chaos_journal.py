"""What a cluster under chaos wrote down (see chaos_wire): who is there, who holds what, and which
life-cycle state each request was in at any moment."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from crossdock.proto.types import LIFE_CYCLE

# "delivered": token 0 has reached the gateway, which passes it on. It was drawn at "first_token".
DELIVERED = "delivered"
STATES = ("received", *LIFE_CYCLE)
EVENTS = (*STATES, DELIVERED)
ROLES = ("prefill", "decode")


@dataclass
class Worker:
    """One life of one worker process."""

    name: str
    role: str
    pid: int
    incarnation: str
    connected: list[float] = field(default_factory=list)  # to the gateway, since when
    disconnected: list[float] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        return len(self.connected) > len(self.disconnected)


@dataclass
class Life:
    """One request as the cluster saw it."""

    events: list[tuple[float, str]] = field(default_factory=list)
    held: list[tuple[float, str]] = field(default_factory=list)  # by "sequence@worker"
    released: list[tuple[float, str]] = field(default_factory=list)

    def state(self, at: float) -> str:
        """The newest event until then, empty before the first."""
        past = bisect.bisect_right(self.events, (at, "\uffff"))
        return self.events[past - 1][1] if past else ""

    def holders(self, at: float) -> set[str]:
        """Names of the workers that had something of it."""
        held = [who for since, who in self.held if since <= at]
        for until, who in self.released:
            if until <= at and who in held:
                held.remove(who)
        return {who.partition("@")[2] for who in held}


class Journal:
    """Reads on where it stopped, as long as the cluster writes."""

    def __init__(self, path: Path) -> None:
        self.workers: dict[str, Worker] = {}  # by incarnation
        self.lives: dict[str, Life] = {}  # by request
        self._path = path
        self._read = 0
        self._rest = b""
        self._request: dict[str, str] = {}  # of a sequence
        self._sequence: dict[str, str] = {}  # of a ticket

    def refresh(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._read)
            text = self._rest + file.read()
            self._read = file.tell()
        *lines, self._rest = text.split(b"\n")
        self.take(line.decode() for line in lines)

    def take(self, lines: Iterable[str]) -> None:
        for line in lines:
            nanoseconds, pid, event, who, detail = line.split(" ")
            self._take(int(nanoseconds) / 1e9, int(pid), event, who, detail)

    def ready(self, role: str) -> list[Worker]:
        return [each for each in self.workers.values() if each.role == role and each.ready]

    def by_pid(self, pid: int) -> Worker | None:
        return next((each for each in reversed(self.workers.values()) if each.pid == pid), None)

    def request_of(self, who: str) -> str:
        """The request of a request, a sequence or a ticket."""
        who = self._sequence.get(who, who)
        return self._request.get(who, who)

    def held_by(self, worker: str, at: float) -> list[str]:
        """Requests that this worker had something of."""
        return [name for name, life in self.lives.items() if worker in life.holders(at)]

    def _take(self, at: float, pid: int, event: str, who: str, detail: str) -> None:
        if event == "started":
            role, _, incarnation = detail.partition("@")
            self.workers[incarnation] = Worker(who, role, pid, incarnation)
            return
        if event in ("connected", "disconnected"):
            if worker := self.workers.get(detail):
                getattr(worker, event).append(at)
            return
        if event in ("held", "released"):
            self._request[detail.partition("@")[0]] = who
            getattr(self._life(who), event).append((at, detail))
            return
        if detail != "-":
            self._sequence[detail] = who  # of the ticket that it brought
        if event == "received":
            self._life(who)
        if event in EVENTS and (life := self.lives.get(self.request_of(who))):
            bisect.insort(life.events, (at, event))

    def _life(self, request: str) -> Life:
        return self.lives.setdefault(request, Life())
