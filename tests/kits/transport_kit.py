"""A pool on any transport, and peers for it in memory or in a process of their own.

The peer's process serves a pool and obeys what it is told over its pipe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from fake_nccl import FakeCommunicators
from fake_transport import FakeNetwork, FakeTransport
from forked import forked

from crossdock.kvtransfer.nccl.transport import NcclTransport
from crossdock.kvtransfer.pull import Puller
from crossdock.kvtransfer.ranked import RankedTransport, rank_incarnation
from crossdock.kvtransfer.registry import allocate, create_transport
from crossdock.kvtransfer.ticket import make_ticket, new_incarnation
from crossdock.kvtransfer.transport import PoolMemory, Region, Transport
from crossdock.proto.v1.worker_pb2 import PromptProgress, Ticket

NUM_BLOCKS = 64
BLOCK_BYTES = 12_288
ROOM = 512  # behind a block, where a layout leaves some
WAIT_S = 20.0
START_S = 60.0
KEY = b"contract"
RANKS = 2  # of the layout "ranks", each with its half of every block


def regions_of(layout: str, address: int) -> tuple[Region, ...]:
    """A pool's regions from that address on. Of "parts" and "woven" one pool can read another: in
    both the first part of each block is next to that of the block before; in "woven" the other two
    interleave, with room behind them."""
    if layout == "block-major":
        return (Region(address, BLOCK_BYTES, BLOCK_BYTES),)
    one, two, three = 4096, 6144, 2048
    behind = address + NUM_BLOCKS * one
    if layout == "parts":
        last = Region(behind + NUM_BLOCKS * two, three, three)
        return Region(address, one, one), Region(behind, two, two), last
    stride = two + three + ROOM
    return (
        Region(address, one, one),
        Region(behind, stride, two),
        Region(behind + two, stride, three),
    )


def content(seed: int, block_id: int) -> np.ndarray:
    """What a peer's block holds."""
    return ((np.arange(BLOCK_BYTES) * 31 + block_id * 7 + seed) % 251).astype(np.uint8)


def held(puller: Puller) -> list[list[int]]:
    """The local blocks of each pull that has not ended."""
    return [pull.local_ids for pull in puller._pulls.values()]


def computed(ticket: Ticket) -> PromptProgress:
    return PromptProgress(ticket=ticket, ready_blocks=len(ticket.block_ids))


def memory_of(layout: str, address: int, generations: np.ndarray) -> list[PoolMemory]:
    """Of each rank. All but the first have generations that nobody raises or compares."""
    if layout != "ranks":
        return [PoolMemory(regions_of(layout, address), NUM_BLOCKS, generations)]
    half = BLOCK_BYTES // RANKS
    return [
        PoolMemory(
            (Region(address + rank * NUM_BLOCKS * half, half, half),),
            NUM_BLOCKS,
            np.zeros(NUM_BLOCKS, np.int64) if rank else generations,
            ranks=RANKS,
        )
        for rank in range(RANKS)
    ]


def fake_transport(
    network: FakeNetwork, incarnation: bytes, ranks: Sequence[PoolMemory]
) -> Transport:
    fakes = [
        FakeTransport(network, rank_incarnation(incarnation, number), memory.part)
        for number, memory in enumerate(ranks)
    ]
    return fakes[0] if len(fakes) == 1 else RankedTransport(fakes)


def hosted(memory: PoolMemory) -> Callable[..., Connection]:
    """A thread in the place of a rank's process."""

    def host(service: Callable[[PoolMemory, Connection], None]) -> Connection:
        mine, theirs = multiprocessing.Pipe()
        threading.Thread(target=service, args=(memory.part, theirs), daemon=True).start()
        return mine

    return host


class Pool:
    """A pool and its transport: what one worker has."""

    def __init__(
        self,
        name: str,
        network: FakeNetwork | None = None,
        layout: str = "block-major",
        **options: object,
    ) -> None:
        self.incarnation = new_incarnation()
        library = "nixl" if name == "fake" else name
        room = NUM_BLOCKS * (BLOCK_BYTES + ROOM)
        buffer, generations, self._free = allocate(library, room, NUM_BLOCKS)
        ranks = memory_of(layout, buffer.ctypes.data, generations)
        self.memory, self.parts = ranks[0], sum((rank.views for rank in ranks), ())
        if name == "nccl":
            options = {"communicators": FakeCommunicators(), "key": KEY, **options}
            self.transport: Transport = NcclTransport(self.incarnation, self.memory, **options)
        elif name == "fake":
            self.transport = fake_transport(network or FakeNetwork(), self.incarnation, ranks)
        else:
            hosts = [hosted(rank) for rank in ranks[1:]]
            self.transport = create_transport(
                name, self.incarnation, self.memory, hosts=hosts, **options
            )

    def block(self, block_id: int) -> np.ndarray:
        """Its bytes now, region after region."""
        return np.concatenate([part[block_id] for part in self.parts])

    def write(self, block_id: int, block: np.ndarray) -> None:
        start = 0
        for part in self.parts:
            part[block_id] = block[start : start + part.shape[1]]
            start += part.shape[1]

    def clear(self) -> None:
        for part in self.parts:
            part[:] = 0

    def written(self) -> set[int]:
        """The blocks that are not all zeros."""
        return {row for part in self.parts for row in np.flatnonzero(part.any(axis=1)).tolist()}

    def fill(self, seed: int) -> None:
        for block_id in range(NUM_BLOCKS):
            self.write(block_id, content(seed, block_id))
        self.memory.generations[:] = 100 + np.arange(NUM_BLOCKS)

    def change_owner(self, block_id: int) -> None:
        self.memory.generations[block_id] += 1
        self.write(block_id, np.full(BLOCK_BYTES, 255, dtype=np.uint8))

    def close(self) -> None:
        self.transport.close()
        del self.parts, self.memory
        self._free()


class Peer(ABC):
    """What the tests ask of a peer, whatever process it lives in."""

    incarnation: bytes
    info: bytes
    seed: int

    def ticket(self, block_ids: Sequence[int], lease_s: float = 60.0) -> Ticket:
        return make_ticket(
            key=KEY,
            prefill_worker="p",
            prefill_address="",
            incarnation=self.incarnation,
            block_ids=block_ids,
            generations=[100 + block_id for block_id in block_ids],
            num_tokens=len(block_ids) * 16,
            prompt_hash=b"",
            layout_hash=b"",
            lease_s=lease_s,
        )

    @abstractmethod
    def change_owner(self, block_id: int) -> None:
        """Raises the block's generation and overwrites it, as a new owner would."""

    @abstractmethod
    def reset(self) -> None:
        """Every block as in the beginning."""

    @abstractmethod
    def releases(self, *tickets: Ticket) -> bool:
        """Waits until all of them were released; False after WAIT_S."""

    @abstractmethod
    def kill(self) -> None:
        """Ends its process, or what stands for one, at once."""


class FakePeer(Peer):
    def __init__(self, network: FakeNetwork, seed: int, layout: str = "block-major") -> None:
        self._network, self.seed = network, seed
        self._seen: set[bytes] = set()
        self._pool = Pool("fake", network, layout)
        self._pool.fill(seed)
        self.incarnation, self.info = self._pool.incarnation, self._pool.transport.info()

    def change_owner(self, block_id: int) -> None:
        self._pool.change_owner(block_id)

    def reset(self) -> None:
        self._pool.fill(self.seed)

    def releases(self, *tickets: Ticket) -> bool:
        self._seen.update(self._pool.transport.notifications())
        return self._seen >= {ticket.ticket_id for ticket in tickets}

    def kill(self) -> None:
        self._pool.transport.close()


class ProcessPeer(Peer):
    def __init__(
        self,
        name: str,
        seed: int,
        ucx: dict[str, str] | None = None,
        layout: str = "block-major",
    ) -> None:
        self.seed = seed
        context = multiprocessing.get_context("spawn")
        if name == "nixl":  # whose import takes seconds, most of them torch's
            context = forked()
        self._pipe, theirs = multiprocessing.Pipe()
        arguments = (name, seed, ucx or {}, layout, theirs)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.incarnation, self.info = self._answer()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def change_owner(self, block_id: int) -> None:
        assert self._ask("change", block_id)

    def reset(self) -> None:
        assert self._ask("reset", None)

    def releases(self, *tickets: Ticket) -> bool:
        return self._ask("releases", {ticket.ticket_id for ticket in tickets})

    def kill(self) -> None:
        self._process.kill()
        self._process.join(WAIT_S)
        self._pipe.close()

    def stop(self) -> int | None:
        """Ends it in order; its exit code."""
        self._pipe.close()
        self._process.join(WAIT_S)
        return self._process.exitcode

    def _ask(self, command: str, argument: object) -> bool:
        self._pipe.send((command, argument))
        return self._answer()

    def _answer(self) -> Any:
        assert self._pipe.poll(START_S), "the peer process does not answer"
        return self._pipe.recv()


def later() -> float:
    return time.monotonic() + WAIT_S


def serve(name: str, seed: int, ucx: dict[str, str], layout: str, pipe: Connection) -> None:
    """The peer process: obeys (change, block), (reset, None) and (releases, ticket ids)."""
    options = {"ucx": ucx} if name == "nixl" else {}
    pool = Pool(name, layout=layout, **options)
    pool.fill(seed)
    news = threading.Event()
    pool.transport.set_wakeup(news.set)
    pool.transport.expect_notifications(True)
    pipe.send((pool.incarnation, pool.transport.info()))
    seen: set[bytes] = set()

    def released(wanted: set[bytes]) -> bool:
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            seen.update(pool.transport.notifications())
            if seen >= wanted:
                return True
            news.wait(0.05)
            news.clear()
        return False

    with contextlib.suppress(EOFError):
        while True:
            command, argument = pipe.recv()
            answer = True
            if command == "change":
                pool.change_owner(argument)
            elif command == "reset":
                pool.fill(seed)
            else:
                answer = released(argument)
            pipe.send(answer)
    pool.close()
