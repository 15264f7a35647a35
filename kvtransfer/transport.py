"""What moves KV bytes between workers, seen from the engine thread.

A transport owns one thread (the fake: none) and makes every call of its library there. The engine
thread posts reads and looks at handles; it never waits. A peer is one incarnation of one process:
an address that comes back is a new peer.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from crossdock.proto.memory import Generations as Generations
from crossdock.proto.memory import MemoryType as MemoryType
from crossdock.proto.memory import PoolMemory as PoolMemory
from crossdock.proto.memory import Region as Region

# What holds a KV pool: uint8 [bytes], int64 [num_blocks] generations, and what gives both back.
PoolBuffers = tuple[npt.NDArray[np.uint8], Generations, Callable[[], None]]


class HandleState(enum.Enum):
    """A handle leaves PENDING once; DONE and FAILED are terminal."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class Handle:
    """One posted read. Written by the transport, read by whoever posted it.

    Terminal (DONE or FAILED) means that the transport touches the local blocks no more. There is
    no way to cancel one: a library that says it did may still write.
    `generations` is set on a DONE read of generations, in the order of the ids asked for.
    """

    __slots__ = ("_next", "error", "generations", "state")

    def __init__(self) -> None:
        self.state = HandleState.PENDING
        self.error: str | None = None
        self.generations: Generations | None = None
        self._next: list[Callable[[], bool]] = []

    @property
    def terminal(self) -> bool:
        """Whether the transfer has ended and touches its blocks no more."""
        return self.state is not HandleState.PENDING

    def when_done(self, action: Callable[[], bool]) -> None:
        """Calls `action` once when the read is DONE, mostly on the transport's thread; a FAILED
        read calls nothing. It saves the next read a wait for the thread that posted this one, and
        returns whether it has posted one, with whose end the poster is told of both."""
        self._next.append(action)
        if self.state is HandleState.DONE:
            self._call_next()

    def finish(self, generations: Generations | None = None) -> bool:
        """For transports. The state is written last: readers look at it first. Returns whether
        another read followed, so that nobody need be told of this one alone."""
        self.generations = generations
        self.state = HandleState.DONE
        return self._call_next()

    def _call_next(self) -> bool:
        try:
            action = self._next.pop()
        except IndexError:
            return False  # none, or the other thread was here first
        return action()

    def fail(self, reason: str) -> None:
        """For transports."""
        self.error = reason
        self.state = HandleState.FAILED


@dataclass
class TransportStats:
    """Since start."""

    reads: int = 0
    blocks: int = 0
    descriptors: int = 0  # of block reads: one for each run of consecutive blocks of a region
    bytes: int = 0
    fences: int = 0
    failures: int = 0
    notifications: int = 0  # received


class Transport(Protocol):
    """The calls that may block say so; all others return at once."""

    @property
    def stats(self) -> TransportStats:
        """Counts of this side's reads since start."""

    def info(self) -> bytes:
        """What a peer's `add_peer` needs of this worker."""

    def add_peer(self, incarnation: bytes, info: bytes, num_blocks: int, block_bytes: int) -> None:
        """Makes the peer's pool readable, or replaces what is known of it. Blocks for milliseconds;
        raises TransferFailed."""

    def remove_peer(self, incarnation: bytes) -> None:
        """Refuses new reads of the peer at once. Those under way end by themselves, and only then
        is its connection dropped: a dropped one may still write. Unknown peers are ignored.
        """

    def warm(self, incarnation: bytes, timeout_s: float = 5.0) -> float:
        """Reads one generation entry, so that no request pays for connecting. Blocks, on any thread
        but the transport's. Returns seconds; raises TransferFailed."""

    def read_blocks(
        self, incarnation: bytes, remote_ids: Sequence[int], local_ids: Sequence[int]
    ) -> Handle:
        """Reads the peer's block remote_ids[i] into this pool's block local_ids[i]."""

    def read_generations(
        self, incarnation: bytes, remote_ids: Sequence[int], notify: bytes
    ) -> Handle:
        """Reads the generations of the peer's blocks, if there are ids, then notifies the peer if
        `notify`. DONE: it was handed over, not yet seen."""

    def notifications(self) -> list[bytes]:
        """The ticket ids that peers have released since the last call."""

    def expect_notifications(self, expected: bool) -> None:
        """Whether to look for them often. An idle worker need not."""

    def set_wakeup(self, callback: Callable[[], None]) -> None:
        """Called on the transport's thread when a handle turned terminal or a release came."""

    def close(self) -> None:
        """Ends the thread and every connection; pending handles fail. Blocks briefly."""


def check_ids(ids: Sequence[int] | Generations, num_blocks: int, what: str) -> None:
    """Raises ValueError for ids that the pool does not have."""
    array: npt.NDArray[Any] = np.asarray(ids, dtype=np.int64)
    if len(array) and (array.min() < 0 or array.max() >= num_blocks):
        raise ValueError(
            f"{what} block ids from {array.min()} to {array.max()}, the pool has {num_blocks}"
        )
