"""The prefill side of the hand-off: blocks pinned for a reader, each under a lease.

    ANNOUNCED ──> OFFERED ──> RELEASED   the reader's fence notification, or its Release call
                     ├──────> EXPIRED    nobody came back before the lease's end
                     └──────> REVOKED    the owner went away, or its sequence was cancelled

A ticket may be announced while its prompt is still being computed: readers take the blocks that
are ready, which the sequence still owns. Once all are, the offer holds one reference on each.
Whichever exit comes first gives them back, once, through one function. What arrives later for that
ticket finds nothing and is no error.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from crossdock.kvtransfer.ticket import make_ticket
from crossdock.proto.v1.worker_pb2 import Ticket


class Exit(enum.StrEnum):
    """How a lease ended."""

    RELEASED = "released"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True)
class OfferSettings:
    """What the tickets of one worker have in common. Times in seconds."""

    worker: str
    address: str
    incarnation: bytes
    layout_hash: bytes
    cluster_key: bytes
    lease_s: float = 30.0
    max_renewal_s: float = 300.0  # no reader pins blocks for longer in one go


@dataclass
class Lease:
    """One open offer. Owner: Offers, which holds a reference on every block of it."""

    ticket_id: bytes
    sequence_id: str
    owner: str
    block_ids: tuple[int, ...]
    offered_at: float
    deadline: float


class Offers:
    """All open offers of one prefill worker. Called by the engine thread alone. `on_free` gives an
    offer's references on these blocks back to the block pool."""

    def __init__(
        self,
        clock: Callable[[], float],
        settings: OfferSettings,
        on_free: Callable[[list[int]], None],
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._on_free = on_free
        self._leases: dict[bytes, Lease] = {}
        self.exits: dict[Exit, int] = dict.fromkeys(Exit, 0)  # leases since start, by their end

    def announce(
        self,
        block_ids: Sequence[int],
        generations: Sequence[int],
        num_tokens: int,
        prompt_hash: bytes,
    ) -> Ticket:
        """The signed ticket for blocks that the caller holds, and goes on to hold: no lease begins.
        generations: of the blocks, as they are now. prompt_hash: see make_ticket."""
        settings = self._settings
        return make_ticket(
            key=settings.cluster_key,
            prefill_worker=settings.worker,
            prefill_address=settings.address,
            incarnation=settings.incarnation,
            block_ids=block_ids,
            generations=generations,
            num_tokens=num_tokens,
            prompt_hash=prompt_hash,
            layout_hash=settings.layout_hash,
            lease_s=settings.lease_s,
        )

    def offer(self, ticket: Ticket, sequence_id: str, owner: str) -> None:
        """Takes over one reference on each block of an announced ticket; its lease begins. owner:
        the gateway whose request this is; losing it revokes the offer."""
        now = self._clock()
        self._leases[ticket.ticket_id] = Lease(
            ticket_id=ticket.ticket_id,
            sequence_id=sequence_id,
            owner=owner,
            block_ids=tuple(ticket.block_ids),
            offered_at=now,
            deadline=now + self._settings.lease_s,
        )

    def renew(self, ticket_ids: Iterable[bytes], lease_s: float) -> list[bytes]:
        """Extends leases to `lease_s` from now, never shortens one; returns the ids not open."""
        until = self._clock() + max(0.0, min(lease_s, self._settings.max_renewal_s))
        unknown = []
        for ticket_id in ticket_ids:
            lease = self._leases.get(ticket_id)
            if lease is None:
                unknown.append(ticket_id)
            else:
                lease.deadline = max(lease.deadline, until)
        return unknown

    def release(self, ticket_ids: Iterable[bytes]) -> int:
        """The reader is done with these. Returns how many were open."""
        before = self.exits[Exit.RELEASED]
        for ticket_id in ticket_ids:
            if ticket_id in self._leases:
                self._leave(ticket_id, Exit.RELEASED)
        return self.exits[Exit.RELEASED] - before

    def revoke_owner(self, owner: str) -> int:
        """The gateway is gone, and with it whoever would have asked for these blocks."""
        return self._revoke(lease for lease in self._leases.values() if lease.owner == owner)

    def revoke_sequence(self, sequence_id: str, owner: str) -> int:
        """That gateway's request is over. Returns how many leases ended."""
        whose = sequence_id, owner
        return self._revoke(x for x in self._leases.values() if (x.sequence_id, x.owner) == whose)

    def reap(self) -> list[Lease]:
        """Ends every lease whose time is over. Called on a timer, work or no work."""
        now = self._clock()
        expired = [lease for lease in self._leases.values() if lease.deadline <= now]
        for lease in expired:
            self._leave(lease.ticket_id, Exit.EXPIRED)
        return expired

    def next_deadline(self) -> float | None:
        """When `reap` next has something to do, on the clock; None: no lease is open."""
        return min((lease.deadline for lease in self._leases.values()), default=None)

    def open(self) -> list[Lease]:
        """The open leases, oldest first."""
        return list(self._leases.values())

    def held(self) -> list[tuple[int, ...]]:
        """The block ids of each open lease: what the pool's integrity check counts for them."""
        return [lease.block_ids for lease in self._leases.values()]

    def __len__(self) -> int:
        return len(self._leases)

    def _revoke(self, leases: Iterable[Lease]) -> int:
        revoked = list(leases)
        for lease in revoked:
            self._leave(lease.ticket_id, Exit.REVOKED)
        return len(revoked)

    def _leave(self, ticket_id: bytes, how: Exit) -> None:
        """The one way out of OFFERED."""
        lease = self._leases.pop(ticket_id)
        self.exits[how] += 1
        self._on_free(list(lease.block_ids))
