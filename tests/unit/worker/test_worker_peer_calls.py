"""Introductions to other workers that fail or are over early: what is left of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from crossdock.proto.errors import TransferFailed
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.worker.peer_calls import GrpcPeerCalls
from crossdock.worker.peers import Met

PEER = pb.WorkerDescription(name="p", incarnation=b"1" * 16)


class Pools:
    """Which peers' pools are readable. `gates`: for each add, what it waits for."""

    def __init__(self) -> None:
        self.readable: set[bytes] = set()
        self.adding, self.gates = threading.Semaphore(0), list[threading.Event]()
        self.dead = False

    def add_peer(self, incarnation: bytes, info: bytes, num_blocks: int, block_bytes: int) -> None:
        gate = self.gates.pop(0) if self.gates else None
        self.adding.release()
        if gate is not None:
            assert gate.wait(20)
        self.readable.add(incarnation)

    def remove_peer(self, incarnation: bytes) -> None:
        self.readable.discard(incarnation)

    def warm(self, incarnation: bytes, timeout_s: float = 5.0) -> float:
        if self.dead:
            raise TransferFailed("nothing in 5 s")
        return 0.0


class Calls(GrpcPeerCalls):
    """The peer describes itself at once."""

    async def describe(self, incarnation: bytes, address: str) -> pb.WorkerDescription:
        return PEER


class Meetings:
    """One worker's introductions to one peer."""

    def __init__(self) -> None:
        self.pools = Pools()
        self.calls = Calls(pb.KVLayout(), self.pools)  # type: ignore[arg-type]

    def meet(self) -> asyncio.Future[Met]:
        met: asyncio.Future[Met] = asyncio.get_running_loop().create_future()
        self.calls.introduce(PEER.incarnation, "h:1", met.set_result)
        return met

    async def begun(self) -> None:
        """Returns once another thread adds the peer."""
        assert await asyncio.to_thread(self.pools.adding.acquire, timeout=20)

    async def over(self) -> None:
        """Returns once the threads have done, and the loop has heard of it."""
        await asyncio.get_running_loop().shutdown_default_executor()
        await asyncio.sleep(0)

    @property
    def readable(self) -> bool:
        return PEER.incarnation in self.pools.readable


@pytest.fixture
async def meetings() -> AsyncIterator[Meetings]:
    made = Meetings()
    yield made
    for gate in made.pools.gates:
        gate.set()


async def test_a_peer_that_does_not_warm_up_is_forgotten(meetings: Meetings) -> None:
    """It is known to nobody, so nobody would remove it when it leaves."""
    meetings.pools.dead = True
    assert isinstance(await meetings.meet(), TransferFailed)
    assert not meetings.readable and not meetings.calls._meetings
    meetings.pools.dead = False
    assert await meetings.meet() == PEER
    assert meetings.readable


async def test_a_peer_that_leaves_while_it_is_added_is_removed_after_that(
    meetings: Meetings,
) -> None:
    gate = threading.Event()
    meetings.pools.gates.append(gate)
    met = meetings.meet()
    await meetings.begun()
    meetings.calls.forget(PEER.incarnation)
    gate.set()
    await meetings.over()
    assert not met.done() and not meetings.readable


async def test_a_peer_that_left_and_came_back_meanwhile_stays(meetings: Meetings) -> None:
    gate = threading.Event()
    meetings.pools.gates.append(gate)
    meetings.meet()
    await meetings.begun()
    meetings.calls.forget(PEER.incarnation)
    assert await meetings.meet() == PEER
    gate.set()
    await meetings.over()
    assert meetings.readable
