"""What the nccl transport asks of NCCL, and of the fake that its tests run on.

Every call comes from the transport's one thread, and none waits: what takes time is looked at
again later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from crossdock.kvtransfer.transport import PoolMemory

UNIQUE_ID_BYTES = 128

Span = tuple[int, int]  # address, bytes


class Operation(Protocol):
    """Sends and receives that were posted together, and end together."""

    def done(self) -> bool:
        """Whether it has ended and touches memory no more. Raises TransferFailed when broken."""


class Communicator(Protocol):
    """Some ranks, each in its own process, that met under one id. Broken once, it stays broken."""

    def ready(self) -> bool:
        """Whether `post` may be called: all ranks have met, and what was posted is on its way.
        Raises TransferFailed when broken."""

    def post(self, peer: int, *, send: Sequence[Span] = (), recv: Sequence[Span] = ()) -> Operation:
        """One group of sends to and receives from a rank, which posts its own halves of them: spans
        match in order and in size. Groups run in the order they were posted in."""

    def abort(self) -> None:
        """Gives up everything under way, in this process. Nothing new begins after it."""

    def quiet(self) -> bool:
        """After `abort`: whether nothing of it touches memory any more."""


class Communicators(Protocol):
    """Makes them, for one pool."""

    def open(self, memory: PoolMemory) -> None:
        """Before all else. Raises TransferFailed where this cannot work, or not on that memory."""

    def unique_id(self) -> bytes:
        """UNIQUE_ID_BYTES that name a communicator to be. Rank 0 is to be where it was made."""

    def join(self, unique_id: bytes, rank: int, ranks: int = 2) -> Communicator:
        """Begins to meet the other ranks."""
