"""The faults of a chaos run: SIGKILL, SIGSTOP with SIGCONT, and clients that go away, each aimed at
one life-cycle event of a request under way (see chaos_wire)."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from chaos_journal import EVENTS, ROLES, Journal, Worker

TRIP_S = 30.0  # for an event to come to pass once it is waited for
TRIES = 5
TO_STRIKE_S = 0.1
GAP_S = 0.15  # from one fault to the next, at least
AHEAD = 4  # so many are looked at: while one role comes back, the other is hurt


class Kind(enum.StrEnum):
    KILL = "kill"
    PAUSE = "pause"
    ABORT = "abort"


@dataclass(frozen=True)
class Planned:
    """One fault: what, at which event, to a worker of which role (an abort has none)."""

    kind: Kind
    event: str
    role: str = ""
    delay_s: float = 0.0  # 0: while the request stands still in the event
    pause_s: float = 0.0
    twice: bool = False  # the other worker of the role is killed right after


@dataclass
class Struck:
    """A fault that happened."""

    planned: Planned
    at: float
    request: str  # that it was aimed at
    worker: str = ""
    spare: bool = True  # another worker of the role was up, and stayed up at first
    aimed: bool = True  # False: the second of two in quick succession

    @property
    def stood_in(self) -> str:
        """The event in which its request stood still, empty where it had gone on."""
        return self.planned.event if self.aimed and not self.planned.delay_s else ""


def plan(rng: random.Random, rounds: float) -> list[Planned]:
    """In every round, at every event: each role killed and paused at it, the client gone at it and
    soon after. Beyond that each role is killed soon after ten events, both workers after two. Of a
    part of a round so many of these, by chance."""

    def soon() -> float:
        return rng.choice((0.01, 0.05, 0.2)) * rng.random()

    made: list[Planned] = []
    whole = math.ceil(rounds)
    for _ in range(whole):
        for event in EVENTS:
            over = event in ("last_token", "finished")  # nobody is left to go away soon after it
            delays = (0.0, 0.0 if over else soon())
            made += [Planned(Kind.ABORT, event, delay_s=delay) for delay in delays]
            for role in ROLES:
                made.append(Planned(Kind.KILL, event, role))
                length = rng.uniform(0.5, rng.choice((1.5, 1.5, 6.0)))
                made.append(Planned(Kind.PAUSE, event, role, pause_s=length))
        for role in ROLES:
            for index, event in enumerate(rng.sample(EVENTS, 10)):
                made.append(Planned(Kind.KILL, event, role, delay_s=soon(), twice=index < 2))
    rng.shuffle(made)
    return made[: round(len(made) * rounds / whole)]


@dataclass
class Faults:
    """Carries a plan out on the cluster behind a journal, one fault after another.

    `abort(request)` has the client of a request go away; False when it is answered already.
    """

    folder: Path
    journal: Journal
    rng: random.Random
    abort: Callable[[str], bool]
    struck: list[Struck] = field(default_factory=list)
    missed: list[Planned] = field(default_factory=list)
    _paused: set[int] = field(default_factory=set)
    _killed: set[int] = field(default_factory=set)
    _pauses: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, planned: list[Planned], until: float) -> None:
        """Returns when all have struck or `until` has come. A fault waits until its role has two
        workers up."""
        left = [(each, TRIES) for each in planned]
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as trips:
            trips.bind(str(self.folder / "trips"))
            trips.setblocking(False)
            while left and time.monotonic() < until:
                self.journal.refresh()
                ahead = left[:AHEAD]
                chosen = next((each for each in ahead if self._able(each[0].role)), None)
                if chosen is None:
                    await asyncio.sleep(0.02)
                    continue
                left.remove(chosen)
                fault, tries = chosen
                if await self._strike(fault, trips, loop):
                    await asyncio.sleep(GAP_S)
                elif tries > 1:
                    left.append((fault, tries - 1))
                else:
                    self.missed.append(fault)
        self.missed += [fault for fault, _ in left]
        if self._pauses:
            await asyncio.wait(self._pauses)

    # -- one fault -----------------------------------------------------------------------------

    async def _strike(
        self, fault: Planned, trips: socket.socket, loop: asyncio.AbstractEventLoop
    ) -> bool:
        armed = self.folder / f"armed-{fault.event}"
        armed.touch()
        try:
            async with asyncio.timeout(TRIP_S):
                message = await loop.sock_recv(trips, 1000)
        except TimeoutError:
            try:
                armed.unlink()
            except FileNotFoundError:  # it came to pass in the last moment
                message = await asyncio.wait_for(loop.sock_recv(trips, 1000), TRIP_S)
            else:
                return False
        pid, _, who, until, go_on = message.decode().split(" ")
        self.journal.refresh()
        request = self.journal.request_of(who)
        if fault.delay_s:
            Path(go_on).touch()
            await asyncio.sleep(fault.delay_s)
        elif time.monotonic() > float(until) - TO_STRIKE_S:
            return False  # heard of too late: it may have gone on
        try:
            return await self._hit(fault, int(pid), request)
        finally:
            Path(go_on).touch()

    async def _hit(self, fault: Planned, pid: int, request: str) -> bool:
        if fault.kind is Kind.ABORT:
            at = time.monotonic()
            if not self.abort(request):
                return False
            self.struck.append(Struck(fault, at, request))
            await asyncio.sleep(0.005)  # its goodbye leaves before the cluster goes on
            return True
        if not self._able(fault.role):
            return False  # one was lost meanwhile
        victim = self._victim(fault.role, pid, request)
        if fault.kind is Kind.PAUSE:
            self._pause(fault, victim, request)
            return True
        hit = self._kill(fault, victim, request)
        if fault.twice:
            await asyncio.sleep(self.rng.uniform(0.0, 0.5))
            if others := self._up(fault.role):
                hit.spare = False
                self._kill(fault, others[0], request, spare=False, aimed=False)
        return True

    def _kill(
        self,
        fault: Planned,
        victim: Worker,
        request: str,
        spare: bool = True,
        aimed: bool = True,
    ) -> Struck:
        self._killed.add(victim.pid)
        hit = Struck(fault, time.monotonic(), request, victim.name, spare, aimed)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
        self.struck.append(hit)
        return hit

    def _pause(self, fault: Planned, victim: Worker, request: str) -> None:
        hit = Struck(fault, time.monotonic(), request, victim.name)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGSTOP)
        self._paused.add(victim.pid)
        self.struck.append(hit)
        task = asyncio.create_task(self._go_on(victim.pid, fault.pause_s))
        self._pauses.add(task)
        task.add_done_callback(self._pauses.discard)

    async def _go_on(self, pid: int, pause_s: float) -> None:
        try:
            await asyncio.sleep(pause_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self._paused.discard(pid)

    # -- to whom -------------------------------------------------------------------------------

    def _up(self, role: str) -> list[Worker]:
        gone = self._killed | self._paused
        return [worker for worker in self.journal.ready(role) if worker.pid not in gone]

    def _able(self, role: str) -> bool:
        """Aborts want both roles served, signals two workers of the role."""
        return len(self._up(role)) > 1 if role else all(self._up(each) for each in ROLES)

    def _victim(self, role: str, pid: int, request: str) -> Worker:
        """The process that stands in the event, else who holds something of the request."""
        up = self._up(role)
        life = self.journal.lives.get(request)
        holders = life.holders(time.monotonic()) if life is not None else set()
        here = [worker for worker in up if worker.pid == pid]
        return (here or [w for w in up if w.name in holders] or [self.rng.choice(up)])[0]
