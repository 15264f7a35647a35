"""A channel to one peer and the communicator beside it: made together, ended together.

Rank 0, the reader, dialed; rank 1 owns the blocks. A read is one group on both sides. The owner
posts its sends when their turn has come and says so (SENDING); only then does the reader post its
receives. So NCCL's kernels, which occupy the GPU while they wait, wait for one message at most, and
a request that is refused or lost before that has touched nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from crossdock.kvtransfer.nccl.channel import Channel, Kind
from crossdock.kvtransfer.nccl.communicator import (
    UNIQUE_ID_BYTES,
    Communicator,
    Communicators,
    Operation,
    Span,
)
from crossdock.kvtransfer.transport import Generations, Handle
from crossdock.proto.errors import TransferFailed

Rank = Literal[0, 1]
READER: Rank = 0
OWNER: Rank = 1

HANDSHAKE_S = 5.0
REQUEST_S = 60.0  # far longer than any pull waits: only what hangs is still there then


@dataclass(eq=False)
class Request:
    """What this side has asked of the peer. Ends by `done` or with its link."""

    handle: Handle
    done: Callable[[Generations | None], None]
    spans: Sequence[Span] = ()  # that the blocks asked for are received into
    due: float = 0.0


@dataclass(eq=False)
class _Group:
    """Spans of one read, on either side. `request` is the reader's number of it."""

    request: int
    spans: Sequence[Span]
    due: float
    operation: Operation | None = None


class Link:
    """One connected peer: its channel, its communicator, and the requests under way on both."""

    def __init__(
        self,
        channel: Channel,
        rank: Rank,
        communicators: Communicators,
        opened_at: float,
    ) -> None:
        self.channel, self.rank = channel, rank
        self.requests: dict[int, Request] = {}  # the reader's, by number, oldest first
        self._communicators = communicators
        self._communicator: Communicator | None = None
        self._wanted = False  # the reader needs the communicator
        self._opened_at = opened_at
        self._meet_by: float | None = None  # while the communicator's ranks have not met
        self._queued: deque[_Group] = deque()
        self._posted: deque[_Group] = deque()
        self._numbers = 0

    # What the reader does.

    def ask(self, request: Request, kind: Kind, body: bytes, now: float) -> None:
        """Sends a request; it is due REQUEST_S seconds after `now`."""
        self._numbers += 1
        self.channel.send(kind, self._numbers, body)
        request.due = now + REQUEST_S
        self.requests[self._numbers] = request
        self._wanted = self._wanted or kind is Kind.READ

    def answered(self, number: int) -> Request:
        """The request that has its answer. Raises TransferFailed where there is none."""
        request = self.requests.get(number)
        if request is None or request.spans:
            raise TransferFailed(f"the peer answers request {number}, which waits for nothing")
        return self.requests.pop(number)

    def refused(self, number: int) -> Request:
        """Takes out a request that was refused. Raises TransferFailed where it had begun."""
        request = self.requests.get(number)
        if request is None or self._under_way(number):
            raise TransferFailed(f"the peer refuses request {number}, which it has answered")
        return self.requests.pop(number)

    def receive(self, number: int) -> None:
        """The peer sends the blocks of that request now."""
        request = self.requests.get(number)
        if request is None or self._under_way(number):
            raise TransferFailed(f"the peer sends for request {number}, which waits for nothing")
        self._queued.append(_Group(number, request.spans, request.due))

    # What the owner does.

    def meet(self, unique_id: bytes, now: float) -> None:
        """Joins the communicator that the peer offers. Raises TransferFailed for a second one."""
        if self._communicator is not None:
            raise TransferFailed("the peer wants a second communicator")
        if len(unique_id) != UNIQUE_ID_BYTES:
            raise TransferFailed(f"the peer names its communicator in {len(unique_id)} bytes")
        self._join(unique_id, now)

    def give(self, number: int, spans: Sequence[Span], now: float) -> None:
        """Queues the sends of one of the peer's requests; spans are (address, bytes)."""
        self._queued.append(_Group(number, spans, now + REQUEST_S))

    # Both.

    @property
    def idle(self) -> bool:
        """Nothing is asked, queued or posted in either direction."""
        return not (self.requests or self._queued or self._posted)

    @property
    def moving(self) -> bool:
        """Whether there is something to look at again soon."""
        busy = self._queued or self._posted or self._meet_by is not None
        return self._communicator is not None and bool(busy)

    @property
    def due(self) -> float | None:
        """When it is to end for want of progress."""
        if not self.channel.established:
            return self._opened_at + HANDSHAKE_S
        oldest = next(iter(self.requests.values()), None)
        waiting = [group.due for group in (*self._queued, *self._posted)]
        waiting += [oldest.due] if oldest is not None else []
        waiting += [self._meet_by] if self._meet_by is not None else []
        return min(waiting, default=None)

    def advance(self, now: float) -> None:
        """Takes its groups as far as they go. Raises TransferFailed when it has to end."""
        if (due := self.due) is not None and due <= now:
            raise TransferFailed("nothing moved for too long")
        if self._wanted and self.channel.established and self._communicator is None:
            unique_id = self._communicators.unique_id()
            self._join(unique_id, now)
            self.channel.send(Kind.MEET, 0, unique_id)
        if self._communicator is None:
            return
        if self._meet_by is not None and self._communicator.ready():
            self._meet_by = None
        while self._posted and self._ended(self._posted[0]):
            self._finish(self._posted.popleft())
        while self._queued and self._communicator.ready():
            self._post(self._communicator, self._queued.popleft())

    def abort(self) -> None:
        """Ends the communicator; its memory is free once it is quiet."""
        if self._communicator is not None:
            self._communicator.abort()

    @property
    def quiet(self) -> bool:
        """After `abort`: whether its blocks are touched no more."""
        return self._communicator is None or self._communicator.quiet()

    def _join(self, unique_id: bytes, now: float) -> None:
        self._communicator = self._communicators.join(unique_id, self.rank)
        self._meet_by = now + REQUEST_S

    def _post(self, communicator: Communicator, group: _Group) -> None:
        if self.rank == OWNER:
            self.channel.send(Kind.SENDING, group.request)
        if not group.spans:  # the meeting was all that was asked for
            self._finish(group)
            return
        if self.rank == OWNER:
            group.operation = communicator.post(READER, send=group.spans)
        else:
            group.operation = communicator.post(OWNER, recv=group.spans)
        self._posted.append(group)

    def _ended(self, group: _Group) -> bool:
        return group.operation is not None and group.operation.done()

    def _finish(self, group: _Group) -> None:
        if self.rank == READER:
            self.requests.pop(group.request).done(None)

    def _under_way(self, number: int) -> bool:
        return any(group.request == number for group in (*self._queued, *self._posted))
