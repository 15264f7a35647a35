"""What to do next so that the cluster becomes what the spec says. Pure: the clock is passed in.

A member (worker or gateway) lives

    STARTING ─> READY ─> DRAINING ─> gone
        │        │ └──> FLIPPING ─> READY, as a member of another pool
        └────────┴──────────┴──────> LOST ─> gone, and another is started in its place

Rules, in the order they are applied:
- what was lost, has drained or has passed its drain deadline is stopped, and what an earlier
  controller told to leave goes on leaving;
- what one pool has too many of and an alike one lacks changes its role, and is of that pool from
  then on;
- what the spec no longer wants is drained, the newest first, what is not ready yet before all;
- what is missing is started, at once after a first loss, with growing pauses in a crash loop;
- where a revision changed, one worker more than wanted is started in the whole cluster at a time,
  in the pool that is furthest behind, and an old one is drained when it is ready;
- what needs a slot (a gateway's ports) starts where nobody holds any of it; if every slot is held
  by old ones, those that hold the least contended one are drained first;
- no ready worker is drained while its role would have fewer ready workers of its model than
  wanted, and of a model that is to go the decode workers are drained last.
"""

from __future__ import annotations

import enum
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from crossdock.proto.settings import overlap
from crossdock.proto.types import Role

MAX_BACKOFF_S = 30.0
GATEWAY_ROLE = "gateway"
Duty = tuple[str, str]  # model and role


class State(enum.StrEnum):
    """Of a member, from its launch to its end."""

    STARTING = "starting"
    READY = "ready"
    FLIPPING = "flipping"  # finishes the work of its old role, and goes on in another
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True)
class Target:
    """What one pool should be. `slots`: the addresses that each of its members takes for itself
    alone (a gateway's), as many as `replicas`; none where members take none."""

    pool: str
    role: str
    replicas: int
    revision: str
    slots: tuple[frozenset[str], ...] = ()
    model: str = ""  # of its workers, where there are several
    kind: str = ""  # workers of equal kinds can take each other's role; "": of no other

    @property
    def duty(self) -> Duty:
        """What others could do in its members' place."""
        return self.model, self.role


@dataclass(eq=False)
class Member:
    """One worker or gateway."""

    name: str
    pool: str
    role: str
    revision: str
    state: State
    drained: bool = False
    drain_deadline: float = float("inf")
    why: str = ""
    holds: frozenset[str] = frozenset()  # of any slot, until it has gone
    model: str = ""  # that it serves, where there are several

    @property
    def duty(self) -> Duty:
        """What others could do in its place."""
        return self.model, self.role

    @property
    def live(self) -> bool:
        """Whether it counts towards its pool."""
        return self.state in (State.STARTING, State.READY, State.FLIPPING)


@dataclass(frozen=True)
class Losses:
    """Losses of one pool in a row, each sooner after a start than the start took."""

    count: int = 0
    last: float = float("-inf")  # the time of the newest
    places: tuple[str, ...] = ()  # names that were lost and not started again
    hopeless: str = ""  # why no member of the pool's revision can start

    @property
    def start_allowed_at(self) -> float:
        """When the next start is allowed, on the caller's clock."""
        if self.count <= 1:
            return float("-inf")
        return self.last + min(MAX_BACKOFF_S, 2.0 ** (self.count - 2))


class Do(enum.StrEnum):
    """What the controller does to a member."""

    START = "start"
    FLIP = "flip"
    DRAIN = "drain"
    STOP = "stop"


@dataclass(frozen=True)
class Action:
    """One thing to do, to whom and why."""

    do: Do
    name: str
    pool: str
    reason: str
    revision: str = ""
    slot: int = 0  # of a START: which of the target's
    becomes: str = ""  # of a FLIP: its name in `pool` from now on

    def __str__(self) -> str:
        into = f" into {self.becomes}" if self.becomes else ""
        return f"{self.do} {self.name}{into}: {self.reason}"


def reconcile(
    targets: Sequence[Target], members: Sequence[Member], losses: Mapping[str, Losses], now: float
) -> list[Action]:
    """The actions due now. `losses` is by pool. Called again whenever something changed."""
    plan = _Plan(targets, members, losses, now)
    plan.finish_departures()
    plan.flip()
    for target in plan.targets:
        plan.remove_excess(target)
    for target in plan.targets:
        plan.fill(target)
    plan.roll()
    return plan.actions


def converged(targets: Sequence[Target], members: Sequence[Member]) -> bool:
    """Whether there is nothing left to do or to wait for."""
    wanted = Counter({(t.pool, t.revision): t.replicas for t in targets if t.replicas})
    ready = Counter((m.pool, m.revision) for m in members)
    return all(m.state is State.READY for m in members) and wanted == ready


@dataclass
class _Plan:
    targets: Sequence[Target]
    members: Sequence[Member]
    losses: Mapping[str, Losses]
    now: float
    actions: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        listed = {target.pool for target in self.targets}
        leftover = {m.pool: m for m in self.members if m.pool not in listed}
        gone = [Target(pool, m.role, 0, "", model=m.model) for pool, m in leftover.items()]
        self.targets = [*self.targets, *gone]
        self.live = {
            target.pool: [m for m in self.members if m.pool == target.pool and m.live]
            for target in self.targets
        }
        self.draining = {m.name: m.pool for m in self.members if m.state is State.DRAINING}
        self.held = {m.name: m.holds for m in self.members}
        self.ready = Counter(m.duty for m in self.members if m.state is State.READY)
        self.wanted: Counter[Duty] = Counter()
        for target in self.targets:
            self.wanted[target.duty] += target.replicas
        self.used = {m.name for m in self.members if m.state is not State.LOST}

    def finish_departures(self) -> None:
        for member in self.members:
            if member.state is State.LOST:
                self._stop(member, f"lost ({member.why})" if member.why else "lost")
            elif member.state is State.DRAINING and member.drained:
                self._stop(member, "drained")
            elif member.state is State.DRAINING and member.drain_deadline == float("inf"):
                self.actions.append(Action(Do.DRAIN, member.name, member.pool, "was leaving"))
            elif member.state is State.DRAINING and self.now >= member.drain_deadline:
                self._stop(member, "drain deadline passed with work left")

    def flip(self) -> None:
        """Moves ready members between pools of one kind, where nothing of either is to be
        replaced."""
        for target in self.targets:
            for other in self.targets:
                alike = target.kind and target.kind == other.kind and target is not other
                if not alike or self._split(target)[0] or self._split(other)[0]:
                    continue
                lacks = target.replicas - len(self.live[target.pool])
                spare = len(self.live[other.pool]) - other.replicas
                ready = [m for m in self.live[other.pool] if m.state is State.READY]
                newest_first = sorted(ready, key=_index, reverse=True)
                for member in newest_first[: max(0, min(lacks, spare))]:
                    if self._spare(member):
                        self._flip(member, target, other)

    def remove_excess(self, target: Target) -> None:
        old, current = self._split(target)
        for member in old:
            if member.state is State.STARTING:
                self._retire(member, "not ready yet and of an old revision")
        excess = len(self.live[target.pool]) - target.replicas
        for member in [m for m in old if m.state is State.READY][: max(0, excess)]:
            if self._spare(member):
                why = "replaced by a new revision" if current else "more than wanted"
                self._retire(member, f"{why} ({target.replicas})")
        excess = len(current) - target.replicas
        settled = [m for m in current if m.state is not State.FLIPPING]
        newest_first = sorted(settled, key=lambda m: (m.state is State.READY, -_index(m)))
        for member in newest_first[: max(0, excess)]:
            if member.state is State.STARTING or self._spare(member):
                self._retire(member, f"more than wanted ({target.replicas})")

    def fill(self, target: Target) -> None:
        """Starts what is missing altogether."""
        _, current = self._split(target)
        missing = target.replicas - max(len(current), len(self.live[target.pool]))
        if missing > 0 and self._start_allowed(target):
            for _ in range(missing):
                self._start(target, f"{target.replicas} wanted")

    def roll(self) -> None:
        """Starts one member of a new revision, or makes room for it."""
        behind = [t for t in self.targets if self._split(t)[0] and t.replicas]
        for target in behind:
            if self._free_slot(target) is None:
                self._free_a_slot(target)
        surging = any(
            len(self.live[t.pool]) > t.replicas
            and any(m.state is State.STARTING for m in self.live[t.pool])
            for t in self.targets
        )
        # More than wanted may still be there where a floor keeps old ones: going on frees them.
        ready_to_roll = [
            t
            for t in behind
            if self._free_slot(t) is not None
            and len(self._split(t)[1]) < t.replicas <= len(self.live[t.pool])
            and self._start_allowed(t)
        ]
        if ready_to_roll and not surging:
            target = min(ready_to_roll, key=lambda t: (len(self._split(t)[1]) / t.replicas, t.pool))
            self._start(target, "new revision, before an old one goes")

    def _free_slot(self, target: Target) -> int | None:
        """The first slot of which nobody holds anything; 0 where members need none."""
        held = frozenset().union(*self.held.values())
        free = (i for i, slot in enumerate(target.slots) if not _clash(slot, held))
        return next(free, None) if target.slots else 0

    def _free_a_slot(self, target: Target) -> None:
        old, current = self._split(target)
        holders = [[m for m in old if _clash(m.holds, slot)] for slot in target.slots]
        fewest = min(filter(None, holders), key=len, default=[])
        settled = (
            all(m.state is State.READY for m in current)
            and target.pool not in self.draining.values()
        )
        if fewest and settled:
            self._retire(fewest[0], "of an old revision; its replacement takes its ports")

    def _split(self, target: Target) -> tuple[list[Member], list[Member]]:
        """Live members of old revisions, and of the wanted one."""
        live = self.live[target.pool]
        old = [m for m in live if m.revision != target.revision]
        return old, [m for m in live if m.revision == target.revision]

    def _start_allowed(self, target: Target) -> bool:
        return self.now >= self.losses.get(target.pool, Losses()).start_allowed_at

    def _spare(self, member: Member) -> bool:
        """Whether its role keeps enough ready workers of its model without it."""
        wanted = self.wanted[member.duty]
        if wanted:
            return self.ready[member.duty] > wanted
        others = [
            (model, role)
            for (model, role), count in self.wanted.items()
            if count and model == member.model and role != GATEWAY_ROLE
        ]
        if not others:  # its model is to go: what is prefilled still is handed to somebody
            return member.role != Role.DECODE or not self._prefills(member.model)
        return all(self.ready[duty] for duty in others) or self.ready[member.duty] > 1

    def _prefills(self, model: str) -> bool:
        there = [m for m in self.members if m.model == model and m.state is not State.LOST]
        return any(m.role == Role.PREFILL for m in there)

    def _start(self, target: Target, reason: str) -> None:
        slot = self._free_slot(target)
        if slot is None:
            return
        name = self._next_name(target)
        self.held[name] = target.slots[slot] if target.slots else frozenset()
        self.live[target.pool].append(
            Member(name, target.pool, target.role, target.revision, State.STARTING)
        )
        self.actions.append(Action(Do.START, name, target.pool, reason, target.revision, slot))

    def _next_name(self, target: Target) -> str:
        lost = self.losses.get(target.pool, Losses()).places
        fresh = (f"{target.pool}-{index}" for index in itertools.count())
        name = next(n for n in itertools.chain(lost, fresh) if n not in self.used)
        self.used.add(name)
        return name

    def _flip(self, member: Member, target: Target, other: Target) -> None:
        self.live[member.pool].remove(member)
        self.ready[member.duty] -= 1
        name = self._next_name(target)
        about = (name, target.pool, target.role, target.revision)
        self.live[target.pool].append(Member(*about, State.FLIPPING, model=target.model))
        reason = f"{target.replicas} wanted here, {other.replicas} in {other.pool}"
        self.actions.append(
            Action(Do.FLIP, member.name, target.pool, reason, target.revision, becomes=name)
        )

    def _retire(self, member: Member, reason: str) -> None:
        """Drains a ready member, stops one that never took work."""
        self.live[member.pool].remove(member)
        if member.state is State.STARTING:
            self._stop(member, reason)
            return
        self.ready[member.duty] -= 1
        self.actions.append(Action(Do.DRAIN, member.name, member.pool, reason))

    def _stop(self, member: Member, reason: str) -> None:
        del self.held[member.name]
        self.draining.pop(member.name, None)
        self.actions.append(Action(Do.STOP, member.name, member.pool, reason))


def _clash(addresses: Set[str], others: Set[str]) -> bool:
    return any(overlap(one, other) for one in addresses for other in others)


def _index(member: Member) -> int:
    """7 of "prefill-7"."""
    return int(member.name.rpartition("-")[2])
