"""The decode side of the hand-off: read the blocks, then prove that they were still the offer's.

    RESERVED ──> PULLING ──> FENCING ──> JOINED
        └───────────┴───────────┴──────> FAILED(why)

RESERVED: local blocks are set aside, the read waits for its turn. PULLING: one READ of the blocks
is under way. FENCING: the generations of the same blocks are read, after the blocks. They equal
the ticket's only if nobody else owned a block in between, since a generation is raised before
its block gets a new owner. Only then is the KV what was offered.

A pull that is cancelled or past its deadline still owns its local blocks until its transfer is
terminal; `poll` reports it then, and only then may they be reused.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from crossdock.kvtransfer.transport import (
    Generations,
    Handle,
    HandleState,
    PoolMemory,
    Transport,
)
from crossdock.proto.errors import TransferFailed
from crossdock.proto.v1.worker_pb2 import Ticket


class PullState(enum.StrEnum):
    RESERVED = "reserved"
    PULLING = "pulling"
    FENCING = "fencing"


@dataclass(frozen=True)
class PullLimits:
    """max_reading: pulls from one peer whose blocks are read at once; others wait their turn."""

    max_reading: int = 16


@dataclass(frozen=True)
class PullDone:
    """The end of one pull. Its local blocks are the caller's again.

    error: None exactly when the fence held and the sequence may join the batch. Times are of the
    puller's clock, 0.0 where the pull never got there.
    """

    sequence_id: str
    ticket_id: bytes
    error: str | None
    nbytes: int
    nblocks: int
    started_at: float
    pulled_at: float
    fenced_at: float


@dataclass
class _Pull:
    sequence_id: str
    ticket: Ticket
    remote_ids: list[int]
    local_ids: list[int]
    expected: Generations  # of remote_ids, by the ticket
    deadline: float
    lease_until: float
    started_at: float
    state: PullState = PullState.RESERVED
    handle: Handle | None = None
    stopped: str | None = None  # why it is to fail once its transfer is terminal
    reported_overdue: bool = False
    pulled_at: float = 0.0

    @property
    def due(self) -> float:
        return min(self.deadline, self.lease_until)

    def stop_if_due(self, now: float) -> None:
        if self.stopped is None and self.due <= now:
            self.stopped = "deadline passed" if self.deadline <= now else "lease is over"


@dataclass
class PullCounts:
    """Since start."""

    joined: int = 0
    failed: int = 0
    blocks: int = 0  # of the joined
    bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # of the failed


class Puller:
    """All pulls of one decode worker. Called by the engine thread alone; never blocks.

    Owner of a pull's local blocks from `start` until `poll` reports it.
    """

    def __init__(
        self,
        transport: Transport,
        memory: PoolMemory,
        clock: Callable[[], float],
        limits: PullLimits | None = None,
    ) -> None:
        self._transport = transport
        self._memory = memory
        self._clock = clock
        self._limits = limits or PullLimits()
        self._pulls: dict[str, _Pull] = {}
        self.counts = PullCounts()

    def start(
        self,
        sequence_id: str,
        ticket: Ticket,
        remote_block_ids: Sequence[int],
        local_block_ids: Sequence[int],
        deadline: float,
        lease_until: float | None = None,
    ) -> None:
        """Begins to read the ticket's block remote_block_ids[i] into local_block_ids[i].

        ticket: validated (see ticket.validate). remote_block_ids: those of its blocks that are
        not in this pool already, maybe none. deadline, lease_until: on the clock; without
        lease_until the lease runs from now. Raises TransferFailed, and then owns nothing.
        """
        if sequence_id in self._pulls:
            raise TransferFailed(f"pull of {sequence_id} refused: one is under way")
        expected = _expected(ticket, remote_block_ids)
        self._check_local(local_block_ids, len(remote_block_ids))
        now = self._clock()
        self._pulls[sequence_id] = _Pull(
            sequence_id=sequence_id,
            ticket=ticket,
            remote_ids=list(remote_block_ids),
            local_ids=list(local_block_ids),
            expected=expected,
            deadline=deadline,
            lease_until=now + ticket.lease_ms / 1000 if lease_until is None else lease_until,
            started_at=now,
        )
        self._begin_reads()

    def renewed(self, ticket_id: bytes, until: float) -> None:
        """The prefill worker has extended the lease. `until`, on the clock, counts from when it
        was asked."""
        for pull in self._pulls.values():
            if pull.ticket.ticket_id == ticket_id:
                pull.lease_until = max(pull.lease_until, until)

    def cancel(self, sequence_id: str) -> bool:
        """The sequence is not wanted any more. False: no pull of it is under way."""
        pull = self._pulls.get(sequence_id)
        if pull is None:
            return False
        pull.stopped = pull.stopped or "cancelled"
        return True

    def poll(self) -> list[PullDone]:
        """Takes every pull as far as it goes without waiting; returns those that ended."""
        done = [end for pull in list(self._pulls.values()) if (end := self._advance(pull))]
        self._begin_reads()
        return done

    def overdue(self) -> list[str]:
        """Pulls past their deadline or lease with a transfer not terminal yet, each named once.

        Their sequences have failed and can be answered; their blocks stay quarantined.
        """
        now = self._clock()
        late = [
            pull
            for pull in self._pulls.values()
            if pull.due <= now and pull.handle is not None and not pull.reported_overdue
        ]
        for pull in late:
            pull.reported_overdue = True
            pull.stop_if_due(now)
        return [pull.sequence_id for pull in late]

    def next_deadline(self) -> float | None:
        """When a pull next ends or becomes overdue by itself; None: nothing depends on time."""
        return min(
            (pull.due for pull in self._pulls.values() if not pull.reported_overdue), default=None
        )

    @property
    def active(self) -> int:
        return len(self._pulls)

    def states(self) -> dict[str, PullState]:
        return {pull.sequence_id: pull.state for pull in self._pulls.values()}

    def held(self) -> list[list[int]]:
        """The local blocks of each pull: what the pool's integrity check counts for them."""
        return [pull.local_ids for pull in self._pulls.values()]

    def _check_local(self, local_ids: Sequence[int], count: int) -> None:
        if len(local_ids) != count:
            raise TransferFailed(f"pull refused: {count} remote blocks, {len(local_ids)} local")
        if len(set(local_ids)) != count:
            raise TransferFailed("pull refused: a local block is named twice")
        if count and not (min(local_ids) >= 0 and max(local_ids) < self._memory.num_blocks):
            raise TransferFailed("pull refused: a local block id is out of range")

    def _begin_reads(self) -> None:
        """RESERVED -> PULLING, oldest first; nothing to read: straight to FENCING."""
        # Given-up reads are not counted: a peer that hangs must not take the turns of the others.
        reading = Counter(
            pull.ticket.incarnation
            for pull in self._pulls.values()
            if pull.state is PullState.PULLING and pull.stopped is None
        )
        now = self._clock()
        for pull in self._pulls.values():
            pull.stop_if_due(now)
            if pull.state is not PullState.RESERVED or pull.stopped is not None:
                continue
            if not pull.remote_ids:
                pull.pulled_at = now
                self._begin_fence(pull)
            elif reading[pull.ticket.incarnation] < self._limits.max_reading:
                pull.handle = self._transport.read_blocks(
                    pull.ticket.incarnation, pull.remote_ids, pull.local_ids
                )
                pull.state = PullState.PULLING
                reading[pull.ticket.incarnation] += 1

    def _begin_fence(self, pull: _Pull) -> None:
        """The release travels with the fence: pass or fail, these blocks are not read again."""
        pull.handle = self._transport.read_generations(
            pull.ticket.incarnation, pull.remote_ids, pull.ticket.ticket_id
        )
        pull.state = PullState.FENCING

    def _advance(self, pull: _Pull) -> PullDone | None:
        now = self._clock()
        pull.stop_if_due(now)
        handle = pull.handle
        if handle is None:
            return None if pull.stopped is None else self._end(pull, pull.stopped)
        if handle.state is HandleState.PENDING:
            return None
        if handle.state is HandleState.FAILED:
            what = "read" if pull.state is PullState.PULLING else "fence"
            return self._end(pull, pull.stopped or f"{what} failed: {handle.error}")
        if pull.state is PullState.PULLING:
            pull.pulled_at = now
            if pull.stopped is not None:
                return self._end(pull, pull.stopped)
            self._begin_fence(pull)
            return self._advance(pull)
        return self._end(pull, pull.stopped or _compare(pull, handle), fenced_at=now)

    def _end(self, pull: _Pull, error: str | None, fenced_at: float = 0.0) -> PullDone:
        """The one way out, to JOINED or FAILED."""
        del self._pulls[pull.sequence_id]
        if error is None:
            self.counts.joined += 1
            self.counts.blocks += len(pull.remote_ids)
            self.counts.bytes += len(pull.remote_ids) * self._memory.block_bytes
        else:
            self.counts.failed += 1
            reason = error.split(":", 1)[0]
            self.counts.reasons[reason] = self.counts.reasons.get(reason, 0) + 1
            if pull.state is not PullState.FENCING:
                # Spares the prefill side the wait for the lease's end. Best effort.
                self._transport.read_generations(pull.ticket.incarnation, [], pull.ticket.ticket_id)
        return PullDone(
            sequence_id=pull.sequence_id,
            ticket_id=pull.ticket.ticket_id,
            error=error,
            nbytes=len(pull.remote_ids) * self._memory.block_bytes if error is None else 0,
            nblocks=len(pull.remote_ids) if error is None else 0,
            started_at=pull.started_at,
            pulled_at=pull.pulled_at,
            fenced_at=fenced_at,
        )


def _expected(ticket: Ticket, remote_ids: Sequence[int]) -> Generations:
    """int64 [len(remote_ids)]: what the ticket says of those blocks."""
    by_id = dict(zip(ticket.block_ids, ticket.generations, strict=True))
    unknown = [block_id for block_id in remote_ids if block_id not in by_id]
    if unknown:
        raise TransferFailed(f"pull refused: blocks {unknown[:8]} are not of the ticket")
    if len(set(remote_ids)) != len(remote_ids):
        raise TransferFailed("pull refused: a remote block is named twice")
    return np.array([by_id[block_id] for block_id in remote_ids], dtype=np.int64)


def _compare(pull: _Pull, handle: Handle) -> str | None:
    """None where every generation read is the ticket's."""
    if not pull.remote_ids:
        return None
    found = handle.generations
    if found is None or len(found) != len(pull.expected):
        return "fence refused: the generations could not be read"
    changed = np.flatnonzero(found != pull.expected)
    if len(changed) == 0:
        return None
    first = int(changed[0])
    return (
        f"fence refused: {len(changed)} of {len(pull.expected)} blocks had a new owner, block "
        f"{pull.remote_ids[first]} is at generation {found[first]}, "
        f"the ticket says {pull.expected[first]}"
    )
