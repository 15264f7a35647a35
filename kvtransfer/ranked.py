"""One transport over the ranks of a worker, each of which reads its own part of a peer's blocks.

A rank reads from the rank of the same number of the peer: to each other these two are peers by a
name of their own, which both sides derive from the worker's incarnation. The first rank alone has
the pool's generations. It reads the fence, once, after the reads of all ranks have ended, and sends
and receives the releases.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from crossdock.kvtransfer.transport import Handle, HandleState, Transport, TransportStats
from crossdock.proto.errors import TransferFailed

_MAGIC = b"ranks\0"
_COUNT, _LENGTH = struct.Struct("<H"), struct.Struct("<I")


@dataclass(eq=False)
class _Read:
    """A read of blocks, in all ranks. It is terminal once each of them is: until then one may still
    write into the local blocks, whatever became of the others."""

    parts: list[Handle]
    whole: Handle = field(default_factory=Handle)

    @property
    def ended(self) -> bool:
        return all(part.terminal for part in self.parts)

    def end(self) -> None:
        for rank, part in enumerate(self.parts):
            if part.state is HandleState.FAILED:
                self.whole.fail(f"rank {rank}: {part.error}")
                return
        self.whole.finish()


class RankedTransport:
    """See transport.Transport. `ranks`: of this worker, in their order; it closes them."""

    def __init__(self, ranks: Sequence[Transport]) -> None:
        self._ranks = list(ranks)
        self._reads: list[_Read] = []  # under way
        self._lock = threading.Lock()  # over them: each rank's transport has a thread
        self._wakeup: Callable[[], None] = lambda: None
        for rank in self._ranks:
            rank.set_wakeup(self._news)

    @property
    def stats(self) -> TransportStats:
        """Of the first rank: the others do the same. Bytes are those of all."""
        first = self._ranks[0].stats
        return replace(first, bytes=len(self._ranks) * first.bytes)

    def info(self) -> bytes:
        """What every rank's peer needs of it, in their order."""
        infos = [rank.info() for rank in self._ranks]
        packed = b"".join(_LENGTH.pack(len(info)) + info for info in infos)
        return _MAGIC + _COUNT.pack(len(infos)) + packed

    def add_peer(self, incarnation: bytes, info: bytes, num_blocks: int, block_bytes: int) -> None:
        """See Transport.add_peer. Raises TransferFailed, also for a peer of more or fewer ranks."""
        infos, here = _parse(info), len(self._ranks)
        if len(infos) != here:
            ranks = f"has {len(infos)} ranks, here there are {here}"
            raise TransferFailed(f"peer {incarnation.hex()} {ranks}")
        for number, (rank, part) in enumerate(zip(self._ranks, infos, strict=True)):
            rank.add_peer(
                rank_incarnation(incarnation, number), part, num_blocks, block_bytes // here
            )

    def remove_peer(self, incarnation: bytes) -> None:
        for number, rank in enumerate(self._ranks):
            rank.remove_peer(rank_incarnation(incarnation, number))

    def warm(self, incarnation: bytes, timeout_s: float = 5.0) -> float:
        """See Transport.warm: of the slowest rank."""
        ranks = enumerate(self._ranks)
        return max(rank.warm(rank_incarnation(incarnation, n), timeout_s) for n, rank in ranks)

    def read_blocks(
        self, incarnation: bytes, remote_ids: Sequence[int], local_ids: Sequence[int]
    ) -> Handle:
        """See Transport.read_blocks: of every rank, each into its own part of the blocks."""
        read = _Read(
            [
                rank.read_blocks(rank_incarnation(incarnation, number), remote_ids, local_ids)
                for number, rank in enumerate(self._ranks)
            ]
        )
        with self._lock:
            self._reads.append(read)
        self._settle()  # where all of them ended before
        return read.whole

    def read_generations(
        self, incarnation: bytes, remote_ids: Sequence[int], notify: bytes
    ) -> Handle:
        """See Transport.read_generations: the first rank's."""
        return self._ranks[0].read_generations(incarnation, remote_ids, notify)

    def notifications(self) -> list[bytes]:
        return self._ranks[0].notifications()

    def expect_notifications(self, expected: bool) -> None:
        self._ranks[0].expect_notifications(expected)

    def set_wakeup(self, callback: Callable[[], None]) -> None:
        self._wakeup = callback

    def close(self) -> None:
        """Of every rank, the first one last."""
        for rank in reversed(self._ranks):
            rank.close()

    def _news(self) -> None:
        """On the thread of one of the ranks."""
        self._settle()
        self._wakeup()

    def _settle(self) -> None:
        with self._lock:
            ended = [read for read in self._reads if read.ended]
            self._reads = [read for read in self._reads if read not in ended]
        for read in ended:
            read.end()


def rank_incarnation(incarnation: bytes, rank: int) -> bytes:
    """By what name a rank of this worker is known to its peers: 16 bytes. The first has the
    worker's own."""
    if rank == 0:
        return incarnation
    person = f"rank {rank}".encode()
    return hashlib.blake2b(incarnation, digest_size=16, person=person).digest()


def _parse(info: bytes) -> list[bytes]:
    """What each rank packed. Raises TransferFailed for anything else."""
    try:
        if not info.startswith(_MAGIC):
            raise ValueError("it has none")
        (count,) = _COUNT.unpack_from(info, len(_MAGIC))
        at, infos = len(_MAGIC) + _COUNT.size, []
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(info, at)
            at += _LENGTH.size + length
            infos.append(info[at - length : at])
        if at != len(info):
            raise ValueError(f"{len(info)} bytes are not of {count} ranks")
    except (struct.error, ValueError) as error:
        raise TransferFailed(f"the peer's transport info is not of ranks: {error}") from error
    return infos
