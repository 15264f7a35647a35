"""What a client can hold of the gRPC server, and how often it may try its patience."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

MESSAGE_BYTES = 1 << 16  # of a message to a method that has no limit of its own
WHOLE_S = 60.0  # from the head of a call to the end of its only message
FIRST_S = 0.2  # for the first message of a stream that is refused
WRITE_S = 30.0  # for a client to read more of what waits for it
ROOM_S = 300.0  # for a client to make room in a stream's window while it reads others
LEAST_READ = 1 << 15  # bytes that it reads meanwhile
LINGER_S = 1.0  # so that who is told why the connection ends can read it
MAX_STREAMS = 4096  # calls at once of a connection
MAX_SILENT = 4096  # connections that have said nothing yet
IDLE_S = 1800.0  # without a call, before a connection is asked to be made anew
TURN_S = 0.002  # that frames of a connection are read for before others have their turn
WINDOW_BYTES = 1 << 18  # that a stream may send before it is read
CONNECTION_WINDOW_BYTES = 1 << 22  # the same of all streams of a connection
UNSENT_BYTES = 1 << 18  # that wait in a connection for its client; tokens merge meanwhile
QUEUED_BYTES = 96  # that a message costs beside its own
CALL_BYTES = 4096  # that a call costs beside its head
CONTROL_BYTES = 1 << 20  # the same, with answers to pings and settings: who asks on is cut off
KEEPALIVE_S = 10.0  # without a byte of a client that has calls under way, before it is asked
PONG_S = 5.0  # for its answer
TICK_S = 2.5  # how often that is looked at
PING_S = 5.0  # between pings of a client that gets nothing meanwhile
MAX_EARLY_PINGS = 2
RESETS, RESETS_PER_S = 1000, 200.0  # streams that end in a reset, at once and over time
YOUNG_S = 1.0  # a call that its client cancels later than this is no reset of that kind
MOST_HELD = 256 * 2**20  # bytes of all messages that came and are not read
IDLE_FRAMES, IDLE_FRAMES_PER_S = 1000, 200.0  # frames that ask for nothing


@dataclass(slots=True)
class Patience:
    """A bucket of so many offences, which fills up again. `clock` in seconds."""

    most: int
    per_s: float
    clock: Callable[[], float]
    _left: float = field(init=False)
    _at: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._left = self.most

    def tried(self) -> bool:
        """Whether one more is too many."""
        now = self.clock()
        self._left = min(self.most, self._left + (now - self._at) * self.per_s) - 1
        self._at = now
        return self._left < 0


class Holder(Protocol):
    """A call that holds what came for it."""

    def give_up(self) -> None:
        """Drops that, and ends."""


class Held:
    """Bytes of messages that came and are not read yet, over all connections. Where they are more
    than `most`, the call that holds the longest is told to give up."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes = 0
        self._by: dict[Holder, int] = {}  # oldest first

    def add(self, holder: Holder, size: int) -> None:
        """`holder` has `size` bytes more, or fewer where negative."""
        self.bytes += size
        holds = self._by.get(holder, 0) + size
        if holds:
            self._by[holder] = holds
        else:
            self._by.pop(holder, None)
        if size > 0:  # who gives up comes here too
            while self.bytes > self.most and self._by:
                next(iter(self._by)).give_up()


def most_held(limit: int) -> int:
    """Bytes of messages that may wait together, where one may have `limit`."""
    return max(MOST_HELD, limit)
