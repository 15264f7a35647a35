"""What gateways keep on this worker: bytes by tenant and id, for a while and within bounds.

On the event loop alone. The engine knows nothing of it.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

OVERHEAD_BYTES = 512  # of an entry beside its data
EXPIRE_S = 1.0  # how often all tenants are looked through for entries whose time is over


@dataclass(frozen=True)
class Bounds:
    """How long an entry is kept, in seconds, and how many bytes of its tenant and of all."""

    ttl_s: float
    most_tenant_bytes: int
    most_bytes: int


class Held(NamedTuple):
    """An entry with all that another worker needs to keep it on."""

    tenant: str
    id_: str
    data: bytes | None  # None: it was dropped
    bounds: Bounds  # for the time that is left


@dataclass(frozen=True)
class _Entry:
    data: bytes | None
    until: float
    bounds: Bounds

    @property
    def size(self) -> int:
        return len(self.data or b"") + OVERHEAD_BYTES


@dataclass
class _Shelf:
    """What is held of one tenant, oldest first."""

    entries: dict[str, _Entry] = field(default_factory=dict)
    dropped: dict[str, _Entry] = field(default_factory=dict)
    size: int = 0

    def put(self, id_: str, entry: _Entry) -> None:
        """In the place of nothing."""
        (self.dropped if entry.data is None else self.entries)[id_] = entry
        self.size += entry.size

    def take(self, id_: str) -> int:
        """Returns how many bytes are free now."""
        entry = self.entries.pop(id_, None) or self.dropped.pop(id_)
        self.size -= entry.size
        return entry.size

    def take_oldest(self) -> int:
        """What was dropped is remembered for as long as there is anything else to give up."""
        return self.take(next(iter(self.entries or self.dropped)))

    def all(self) -> Iterator[tuple[str, _Entry]]:
        yield from self.dropped.items()
        yield from self.entries.items()


class States:
    """Entries until their time is over or their room is needed. Tenants see none but their own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shelves: dict[str, _Shelf] = {}  # none is empty
        self._by_size: list[tuple[int, str]] = []  # heap: sizes, negative, as large as they were
        self.held = 0  # bytes
        self._expired_at = float("-inf")

    def store(self, tenant: str, id_: str, data: bytes, bounds: Bounds) -> bool:
        """Keeps an entry, in place of one of the same id. Where the tenant has too much its oldest
        make room, and where all have, those of who holds the most. False: it is larger than its
        tenant may hold, or was dropped."""
        self._expire()
        if self.dropped(tenant, id_):
            return False
        return self._put(tenant, id_, _Entry(data, self._clock() + bounds.ttl_s, bounds))

    def fetch(self, tenant: str, id_: str) -> bytes | None:
        """The bytes of an entry; None where there is none, or its time is over."""
        self._expire()
        shelf = self._shelves.get(tenant)
        entry = shelf.entries.get(id_) if shelf else None
        return entry.data if entry is not None and entry.until > self._clock() else None

    def drop(self, tenant: str, id_: str, bounds: Bounds) -> bool:
        """Whether there was such an entry. From now on there is none, also where it comes again,
        for as long as `bounds` say."""
        there = self.fetch(tenant, id_) is not None
        self._forget(tenant, id_)
        self._put(tenant, id_, _Entry(None, self._clock() + bounds.ttl_s, bounds))
        return there

    def dropped(self, tenant: str, id_: str) -> bool:
        """Whether it is remembered as dropped."""
        shelf = self._shelves.get(tenant)
        entry = shelf.dropped.get(id_) if shelf else None
        return entry is not None and entry.until > self._clock()

    def all(self) -> list[Held]:
        """Everything, what was dropped first."""
        now = self._clock()
        return [
            Held(tenant, id_, entry.data, replace(entry.bounds, ttl_s=entry.until - now))
            for tenant, shelf in self._shelves.items()
            for id_, entry in shelf.all()
            if entry.until > now
        ]

    def _put(self, tenant: str, id_: str, entry: _Entry) -> bool:
        bounds = entry.bounds
        if entry.size > min(bounds.most_tenant_bytes, bounds.most_bytes):
            return False
        self._forget(tenant, id_)
        shelf = self._shelves.setdefault(tenant, _Shelf())
        shelf.put(id_, entry)
        self.held += entry.size
        self._grown(tenant)
        while shelf.size > bounds.most_tenant_bytes:
            self.held -= shelf.take_oldest()
        while self.held > bounds.most_bytes:
            name = self._largest()
            self.held -= self._shelves[name].take_oldest()
            self._trim(name)
        shelf = self._shelves.get(tenant, shelf)
        return id_ in shelf.entries or id_ in shelf.dropped

    def _forget(self, tenant: str, id_: str) -> None:
        shelf = self._shelves.get(tenant)
        if shelf is not None and (id_ in shelf.entries or id_ in shelf.dropped):
            self.held -= shelf.take(id_)
            self._trim(tenant)

    def _trim(self, tenant: str) -> None:
        shelf = self._shelves[tenant]
        if not shelf.size:
            del self._shelves[tenant]

    def _grown(self, tenant: str) -> None:
        """No tenant has more than the heap says: it is told of growth at once, and finds out that
        one has less when that comes to its top."""
        heapq.heappush(self._by_size, (-self._shelves[tenant].size, tenant))
        if len(self._by_size) > 2 * len(self._shelves) + 100:
            self._by_size = [(-shelf.size, name) for name, shelf in self._shelves.items()]
            heapq.heapify(self._by_size)

    def _largest(self) -> str:
        """The tenant that holds the most."""
        while True:
            size, tenant = self._by_size[0]
            shelf = self._shelves.get(tenant)
            if shelf is None:
                heapq.heappop(self._by_size)
            elif -size != shelf.size:
                heapq.heapreplace(self._by_size, (-shelf.size, tenant))
            else:
                return tenant

    def _expire(self) -> None:
        """Gives up what is over at the old ends of each shelf, now and then."""
        now = self._clock()
        if now - self._expired_at < EXPIRE_S:
            return
        self._expired_at = now
        for tenant, shelf in list(self._shelves.items()):
            for kind in (shelf.entries, shelf.dropped):
                while kind and (oldest := next(iter(kind.items())))[1].until <= now:
                    self.held -= shelf.take(oldest[0])
            self._trim(tenant)
