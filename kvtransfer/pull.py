"""The decode side of the hand-off: read the blocks, then prove that they were still the offer's.

    RESERVED ──> PULLING ──> FENCING ──> JOINED
        └───────────┴───────────┴──────> FAILED(why)

RESERVED: local blocks are set aside, nothing was read yet. PULLING: the blocks that are ready are
read, part by part while the prompt is still being computed. FENCING: the generations of the same
blocks are read, after the last of the blocks. They equal the ticket's only if nobody else owned a
block in between, since a generation is raised before its block gets a new owner. Only then is the
KV what was offered.

A pull that is cancelled or past its deadline while a transfer is under way still owns its local
blocks until that is terminal; `poll` reports it then, and only then may they be reused.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from crossdock.kvtransfer.checksum import checksums as checksums_of
from crossdock.kvtransfer.transport import Generations, Handle, HandleState, PoolMemory, Transport
from crossdock.proto import events
from crossdock.proto.errors import TransferFailed
from crossdock.proto.v1.worker_pb2 import PromptProgress, Ticket, TransferStats


@dataclass(frozen=True)
class PullDone:
    """The end of one pull. Its local blocks are the caller's again.

    error: None exactly when the fence held and the sequence may join the batch. released: the
    prefill side was told with the fence; else that is left to the caller. transfer: empty with an
    error. Times are of the puller's clock, 0.0 where the pull never got there.
    """

    pull_id: str
    error: str | None
    released: bool
    transfer: TransferStats
    started_at: float
    pulled_at: float
    fenced_at: float


@dataclass
class _Pull:
    pull_id: str
    progress: PromptProgress
    remote_ids: list[int]
    local_ids: list[int]
    places: list[int]  # of remote_ids among the ticket's blocks, ascending
    deadline: float  # of the reads that are asked for
    lease_until: float
    started_at: float
    num_posted: int = 0  # of remote_ids, read or being read
    late_blocks: int = 0
    read: Handle | None = None
    fencing: bool = False  # the fence is posted, or will be once the last read is done
    stopped: str | None = None  # why it is to fail once its transfer is terminal
    reported_overdue: bool = False
    # Noted as a read ends, mostly on the transport's thread; before `fence` is terminal.
    num_read: int = 0  # of remote_ids, terminal and well
    reading_s: float = 0.0
    pulled_at: float = 0.0
    fence: Handle | None = None

    @property
    def ticket(self) -> Ticket:
        return self.progress.ticket

    @property
    def num_ready(self) -> int:
        """Of remote_ids, how many hold their KV."""
        return bisect_left(self.places, self.progress.ready_blocks)

    @property
    def complete(self) -> bool:
        """The whole prompt is computed."""
        return self.progress.ready_blocks >= len(self.ticket.block_ids)

    @property
    def under_way(self) -> bool:
        """A transfer may still touch its local blocks, or is about to."""
        return self.read is not None or self.fencing

    @property
    def waits(self) -> bool:
        """All that is ready has been read, and the prompt is still being computed."""
        return not self.complete and self.num_read == self.num_ready

    @property
    def due(self) -> float:
        return self.lease_until if self.waits else min(self.deadline, self.lease_until)

    def stop_if_due(self, now: float) -> None:
        if self.stopped is None and self.due <= now:
            if self.waits:
                self.stopped = "no progress of the prompt"
            else:
                self.stopped = "deadline passed" if self.deadline <= now else "lease is over"


class Puller:
    """All pulls of one decode worker. Called by the engine thread alone; never blocks."""

    def __init__(
        self,
        transport: Transport,
        memory: PoolMemory,
        clock: Callable[[], float],
        max_reading: int = 16,
    ) -> None:
        """max_reading: pulls from one peer whose blocks are read at once; others wait."""
        self._transport = transport
        self._memory = memory
        self._clock = clock
        self._max_reading = max_reading
        self._pulls: dict[str, _Pull] = {}

    def start(
        self,
        pull_id: str,
        progress: PromptProgress,
        remote_block_ids: Sequence[int],
        local_block_ids: Sequence[int],
        deadline: float,
        lease_until: float | None = None,
    ) -> None:
        """Begins to read the block remote_block_ids[i] of a validated ticket, which `progress`
        brings, into local_block_ids[i]: those of its blocks that are not in this pool already, in
        its order. deadline, lease_until: on the clock; without lease_until the lease runs from
        now. Raises TransferFailed, and then owns nothing."""
        if pull_id in self._pulls:
            raise TransferFailed(f"pull {pull_id} refused: one is under way")
        ticket = progress.ticket
        places = _places(ticket, remote_block_ids)
        self._check_local(local_block_ids, len(remote_block_ids))
        now = self._clock()
        pull = self._pulls[pull_id] = _Pull(
            pull_id=pull_id,
            progress=progress,
            remote_ids=list(remote_block_ids),
            local_ids=list(local_block_ids),
            places=places,
            deadline=deadline,
            lease_until=now + ticket.lease_ms / 1000 if lease_until is None else lease_until,
            started_at=now,
        )
        self.more(pull_id, progress, pull.deadline, pull.lease_until)

    def more(
        self, pull_id: str, progress: PromptProgress, deadline: float, lease_until: float
    ) -> None:
        """More of the ticket's blocks are ready, to be read until `deadline`. Pulls that have ended
        meanwhile are ignored."""
        pull = self._pulls.get(pull_id)
        if pull is None:
            return
        pull.progress, pull.deadline, pull.lease_until = progress, deadline, lease_until
        if pull.complete:
            pull.late_blocks = len(pull.remote_ids) - pull.num_read
        self._begin_reads()

    def renewed(self, ticket_id: bytes, until: float) -> None:
        """The prefill worker has extended the lease. `until`, on the clock, counts from when it
        was asked."""
        for pull in self._pulls.values():
            if pull.ticket.ticket_id == ticket_id:
                pull.lease_until = max(pull.lease_until, until)

    def cancel(self, pull_id: str) -> bool:
        """The sequence is not wanted any more. False: no transfer of it is under way, so its local
        blocks are the caller's at once; True: they are when `poll` reports it."""
        pull = self._pulls.get(pull_id)
        if pull is None:
            return False
        pull.stopped = pull.stopped or "cancelled"
        if not pull.under_way:
            self._end(pull, pull.stopped)
            return False
        return True

    def preemptible(self) -> list[str]:
        """Pulls whose prompt is still being computed and that read nothing just now."""
        return [
            pull.pull_id
            for pull in self._pulls.values()
            if not (pull.complete or pull.under_way or pull.stopped)
        ]

    def poll(self) -> list[PullDone]:
        """Takes every pull as far as it goes without waiting; returns those that ended."""
        done = [end for pull in list(self._pulls.values()) if (end := self._advance(pull))]
        self._begin_reads()
        return done

    def overdue(self) -> list[str]:
        """Pulls past their deadline or lease with a transfer not terminal yet, each named once:
        their sequences have failed, their blocks stay quarantined."""
        now = self._clock()
        late = [
            pull
            for pull in self._pulls.values()
            if pull.due <= now and not pull.reported_overdue and pull.under_way
        ]
        for pull in late:
            pull.reported_overdue = True
            pull.stop_if_due(now)
        return [pull.pull_id for pull in late]

    def next_deadline(self) -> float | None:
        """When a pull next ends or becomes overdue by itself; None: nothing depends on time."""
        return min(
            (pull.due for pull in self._pulls.values() if not pull.reported_overdue), default=None
        )

    def _check_local(self, local_ids: Sequence[int], count: int) -> None:
        if len(local_ids) != count:
            raise TransferFailed(f"pull refused: {count} remote blocks, {len(local_ids)} local")
        if len(set(local_ids)) != count:
            raise TransferFailed("pull refused: a local block is named twice")
        if count and not (min(local_ids) >= 0 and max(local_ids) < self._memory.num_blocks):
            raise TransferFailed("pull refused: a local block id is out of range")

    def _begin_reads(self) -> None:
        """Posts what can be read now, oldest first, as far as there are turns."""
        if not self._pulls:
            return
        # Given-up reads are not counted: a peer that hangs must not take the turns of the others.
        reading = Counter(
            pull.ticket.incarnation
            for pull in self._pulls.values()
            if pull.read is not None and pull.stopped is None
        )
        now = self._clock()
        for pull in self._pulls.values():
            pull.stop_if_due(now)
            if pull.under_way or pull.stopped is not None:
                continue
            turn = reading[pull.ticket.incarnation] < self._max_reading
            if turn or pull.num_posted == pull.num_ready:
                self._begin_next(pull, now)
                reading[pull.ticket.incarnation] += pull.read is not None

    def _begin_next(self, pull: _Pull, now: float) -> None:
        """The next read, or the fence after the last; neither while the prompt is not as far."""
        ready = pull.num_ready
        if pull.num_posted < ready:
            part = slice(pull.num_posted, ready)
            pull.num_posted, pull.fencing = ready, pull.complete
            pull.read = self._transport.read_blocks(
                pull.ticket.incarnation, pull.remote_ids[part], pull.local_ids[part]
            )
            # What follows is settled now: `more` may come before the transport's thread is there.
            pull.read.when_done(partial(self._was_read, pull, ready, now, last=pull.complete))
        elif pull.complete:
            pull.fencing, pull.pulled_at = True, now
            self._fence(pull)

    def _was_read(self, pull: _Pull, num_read: int, posted_at: float, last: bool) -> bool:
        """Mostly on the transport's thread, since an engine step is long. Returns whether the fence
        was posted; else the engine is woken, as more blocks may be ready by now."""
        pull.num_read, pull.pulled_at = num_read, self._clock()
        pull.reading_s += pull.pulled_at - posted_at
        if last:
            self._fence(pull)
        return last

    def _fence(self, pull: _Pull) -> None:
        """The release travels with the fence: pass or fail, these blocks are not read again."""
        events.emit("pulled", pull.ticket.ticket_id.hex())
        pull.fence = self._transport.read_generations(
            pull.ticket.incarnation, pull.remote_ids, pull.ticket.ticket_id
        )

    def _advance(self, pull: _Pull) -> PullDone | None:
        now = self._clock()
        pull.stop_if_due(now)
        while pull.read is not None:
            if pull.read.state is HandleState.PENDING:
                return None
            if pull.read.state is HandleState.FAILED:
                return self._end(pull, pull.stopped or f"read failed: {pull.read.error}")
            pull.read = None
            if pull.stopped is None and not pull.fencing:
                self._begin_next(pull, now)
        if not pull.fencing:
            return None if pull.stopped is None else self._end(pull, pull.stopped)
        fence = pull.fence
        if fence is None or fence.state is HandleState.PENDING:
            return None
        if fence.state is HandleState.FAILED:
            return self._end(pull, pull.stopped or f"fence failed: {fence.error}")
        error = pull.stopped or _compare(pull, fence) or self._verify(pull)
        return self._end(pull, error, fenced_at=self._clock())

    def _verify(self, pull: _Pull) -> str | None:
        """None where every block read has the checksum that was sent, or none was sent."""
        sums = pull.progress.checksums
        if not sums:
            return None
        if len(sums) != len(pull.ticket.block_ids):
            return f"checksum refused: {len(sums)} for {len(pull.ticket.block_ids)} blocks"
        found = checksums_of(self._memory, pull.local_ids)
        for block_id, place, checksum in zip(pull.remote_ids, pull.places, found, strict=True):
            if checksum != sums[place]:
                return f"checksum refused: block {block_id} was read as other bytes than were sent"
        return None

    def _end(self, pull: _Pull, error: str | None, fenced_at: float = 0.0) -> PullDone:
        """The one way out, to JOINED or FAILED."""
        del self._pulls[pull.pull_id]
        transfer, block_bytes = TransferStats(), self._memory.block_bytes
        if error is None:
            events.emit("fenced", pull.ticket.ticket_id.hex())
            transfer = TransferStats(
                bytes=len(pull.remote_ids) * block_bytes,
                blocks=len(pull.remote_ids),
                late_bytes=pull.late_blocks * block_bytes,
                seconds=pull.reading_s,
            )
        return PullDone(
            pull_id=pull.pull_id,
            error=error,
            released=pull.fence is not None and pull.fence.state is HandleState.DONE,
            transfer=transfer,
            started_at=pull.started_at,
            pulled_at=pull.pulled_at,
            fenced_at=fenced_at,
        )


def _places(ticket: Ticket, remote_ids: Sequence[int]) -> list[int]:
    """Where those blocks stand in the ticket. Raises TransferFailed unless each does, in order."""
    by_id = {block_id: place for place, block_id in enumerate(ticket.block_ids)}
    unknown = [block_id for block_id in remote_ids if block_id not in by_id]
    if unknown:
        raise TransferFailed(f"pull refused: blocks {unknown[:8]} are not of the ticket")
    places = [by_id[block_id] for block_id in remote_ids]
    if any(after <= before for before, after in pairwise(places)):
        raise TransferFailed("pull refused: the remote blocks are not in the ticket's order")
    return places


def _compare(pull: _Pull, handle: Handle) -> str | None:
    """None where every generation read is the ticket's."""
    if not pull.remote_ids:
        return None
    expected: Generations = np.array(pull.ticket.generations, dtype=np.int64)[pull.places]
    found = handle.generations
    if found is None or len(found) != len(expected):
        return "fence refused: the generations could not be read"
    changed = np.flatnonzero(found != expected)
    if len(changed) == 0:
        return None
    first = int(changed[0])
    return (
        f"fence refused: {len(changed)} of {len(expected)} blocks had a new owner, "
        f"block {pull.remote_ids[first]} is at generation {found[first]}, "
        f"the ticket says {expected[first]}"
    )
