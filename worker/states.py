"""What gateways keep on this worker: bytes by tenant and id, for a while and within bounds.

On the event loop alone. The engine knows nothing of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

OVERHEAD_BYTES = 512  # of an entry beside its data
EXPIRE_S = 1.0  # how often all tenants are looked through for entries whose time is over


@dataclass(frozen=True)
class Bounds:
    """How long an entry is kept, in seconds, and how many bytes of its tenant and of all."""

    ttl_s: float
    most_tenant_bytes: int
    most_bytes: int


@dataclass(frozen=True)
class _Entry:
    data: bytes
    until: float

    @property
    def size(self) -> int:
        return len(self.data) + OVERHEAD_BYTES


@dataclass
class _Shelf:
    """What is held of one tenant, oldest first."""

    entries: dict[str, _Entry] = field(default_factory=dict)
    size: int = 0

    def drop(self, id_: str) -> int:
        """Returns how many bytes are free now."""
        entry = self.entries.pop(id_)
        self.size -= entry.size
        return entry.size

    def drop_oldest(self) -> int:
        return self.drop(next(iter(self.entries)))


class States:
    """Entries until their time is over or their room is needed. Tenants see none but their own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shelves: dict[str, _Shelf] = {}  # none is empty
        self.held = 0  # bytes
        self._expired_at = float("-inf")

    def store(self, tenant: str, id_: str, data: bytes, bounds: Bounds) -> bool:
        """Keeps an entry, in place of one of the same id. Where the tenant has too much its oldest
        make room, and where all have, those of who holds the most. False: it is larger than its
        tenant may hold."""
        entry = _Entry(data, self._clock() + bounds.ttl_s)
        self._expire()
        if entry.size > min(bounds.most_tenant_bytes, bounds.most_bytes):
            return False
        self.drop(tenant, id_)
        shelf = self._shelves.setdefault(tenant, _Shelf())
        shelf.entries[id_] = entry
        shelf.size += entry.size
        self.held += entry.size
        while shelf.size > bounds.most_tenant_bytes:
            self.held -= shelf.drop_oldest()
        while self.held > bounds.most_bytes:
            name, largest = max(self._shelves.items(), key=lambda item: item[1].size)
            self.held -= largest.drop_oldest()
            self._trim(name)
        return tenant in self._shelves and id_ in self._shelves[tenant].entries

    def fetch(self, tenant: str, id_: str) -> bytes | None:
        """The bytes of an entry; None where there is none, or its time is over."""
        self._expire()
        shelf = self._shelves.get(tenant)
        entry = shelf.entries.get(id_) if shelf else None
        return entry.data if entry is not None and entry.until > self._clock() else None

    def drop(self, tenant: str, id_: str) -> bool:
        """Whether there was such an entry."""
        shelf = self._shelves.get(tenant)
        if shelf is None or id_ not in shelf.entries:
            return False
        self.held -= shelf.drop(id_)
        self._trim(tenant)
        return True

    def _trim(self, tenant: str) -> None:
        if not self._shelves[tenant].entries:
            del self._shelves[tenant]

    def _expire(self) -> None:
        """Gives up what is over at the old end of each shelf, now and then."""
        now = self._clock()
        if now - self._expired_at < EXPIRE_S:
            return
        self._expired_at = now
        for tenant, shelf in list(self._shelves.items()):
            while shelf.entries and next(iter(shelf.entries.values())).until <= now:
                self.held -= shelf.drop_oldest()
            self._trim(tenant)
