"""One contract for every transport: nixl, nccl and local between real processes, fake in memory.

nccl runs on its fake of NCCL, which moves host memory and needs no GPU.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_transport import FakeNetwork
from transport_kit import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    WAIT_S,
    FakePeer,
    Peer,
    Pool,
    ProcessPeer,
    computed,
    content,
    held,
    later,
)

from crossdock.kvtransfer.pull import PullDone, Puller
from crossdock.kvtransfer.shared_memory import cleanup_stale
from crossdock.kvtransfer.ticket import new_incarnation
from crossdock.kvtransfer.transport import Handle, HandleState
from crossdock.proto.errors import TransferFailed

SHM = Path("/dev/shm")


class World:
    """This process's pool on one kind of transport, and the peers it reads from: `standing` lays
    its blocks out as this one does, with parts every second peer leaves them where it likes."""

    def __init__(self, name: str, layout: str) -> None:
        self.name, self.layout = name, layout
        self.network = FakeNetwork()
        self.pool = Pool(name, self.network, layout)
        self.transport = self.pool.transport
        self.peers: list[Peer] = []
        self._news = threading.Event()
        self.transport.set_wakeup(self._news.set)
        # Never killed: they show that others' faults don't matter to them.
        self.standing, self.second = self.spawn(), self.spawn()

    def spawn(self) -> Peer:
        seed = len(self.peers) + 1
        layout = "woven" if self.layout == "parts" and seed % 2 == 0 else self.layout
        peer: Peer = (
            FakePeer(self.network, seed, layout)
            if self.name == "fake"
            else ProcessPeer(self.name, seed, layout=layout)
        )
        self.peers.append(peer)
        self.add(peer)
        return peer

    def add(self, peer: Peer) -> None:
        self.transport.add_peer(peer.incarnation, peer.info, NUM_BLOCKS, BLOCK_BYTES)

    def puller(self, **limits: int) -> Puller:
        self.pool.clear()
        return Puller(self.transport, self.pool.memory, time.monotonic, **limits)

    def until(self, check: Callable[[], bool]) -> None:
        """Waits on the transport's wakeups, as an engine thread does."""
        end = time.monotonic() + WAIT_S
        while not check():
            assert time.monotonic() < end, "nothing happened"
            self._news.wait(0.05)
            self._news.clear()

    def settled(self, handle: Handle) -> Handle:
        self.until(lambda: handle.terminal)
        return handle

    def run(self, puller: Puller) -> dict[str, PullDone]:
        done: dict[str, PullDone] = {}

        def polled() -> bool:
            done.update({end.pull_id: end for end in puller.poll()})
            return len(puller._pulls) == 0

        self.until(polled)
        return done

    def holds(self, peer: Peer, remote_ids: Sequence[int], local_ids: Sequence[int]) -> bool:
        return all(
            np.array_equal(self.pool.block(local), content(peer.seed, remote))
            for remote, local in zip(remote_ids, local_ids, strict=True)
        )

    def close(self) -> None:
        self.pool.close()
        peers = [peer for peer in self.peers if isinstance(peer, ProcessPeer)]
        ends = [peer.stop() for peer in peers if peer.running]
        for peer in peers:
            peer.kill()
        assert ends == [0] * len(ends)
        cleanup_stale()  # of the peers that were killed
        assert not [path for peer in peers for path in SHM.glob(f"crossdock-{peer.pid}-*")]
        assert not list(SHM.glob(f"crossdock-{os.getpid()}-*"))


NIXL = pytest.param("nixl", marks=pytest.mark.slow)  # its processes take seconds to load it


@pytest.fixture(scope="module", params=["block-major", "parts", "ranks"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["fake", "local", NIXL, "nccl"])
def world(request: pytest.FixtureRequest, layout: str) -> Iterator[World]:
    if (request.param, layout) == ("nccl", "ranks"):
        pytest.skip("its fake's communicators are of one process")
    world = World(request.param, layout)
    yield world
    world.close()


def test_a_pull_moves_the_bytes_and_joins(world: World) -> None:
    puller, peer = world.puller(), world.standing
    ids = list(range(8, 24))
    puller.start("s", computed(peer.ticket(ids)), ids, list(range(16)), later())
    done = world.run(puller)["s"]
    assert done.error is None
    assert (done.transfer.blocks, done.transfer.bytes) == (16, 16 * BLOCK_BYTES)
    assert done.started_at <= done.pulled_at <= done.fenced_at
    assert world.holds(peer, ids, range(16))
    assert world.pool.written() == set(range(16))


@pytest.mark.parametrize("whose", ["standing", "second"])
def test_scattered_blocks_are_moved_in_runs(world: World, whose: str) -> None:
    puller, peer = world.puller(), getattr(world, whose)
    peer.reset()
    remote = [30, 31, 32, 5, 6, 50, 9, 8]
    local = [10, 11, 12, 20, 21, 22, 41, 40]
    before = replace(world.transport.stats)
    puller.start("s", computed(peer.ticket(remote)), remote, local, later())
    assert world.run(puller)["s"].error is None
    assert world.holds(peer, remote, local)
    stats = world.transport.stats
    # Whatever a block is made of.
    assert (stats.reads - before.reads, stats.fences - before.fences) == (1, 1)
    # 30-32, 5-6, 50, and 8-9, which are in order on both sides however they were listed: in each
    # region; and block by block where they do not lie end to end at the peer.
    apart = {"standing": 3 * 4, "second": 4 + 8 + 8}[whose]
    assert stats.descriptors - before.descriptors == (apart if world.layout == "parts" else 4)


def test_only_the_blocks_asked_for_are_moved(world: World) -> None:
    puller, peer = world.puller(), world.standing
    before = world.transport.stats.bytes
    puller.start("s", computed(peer.ticket([1, 2, 3, 4])), [3, 4], [0, 1], later())
    assert world.run(puller)["s"].error is None
    assert world.holds(peer, [3, 4], [0, 1])
    assert world.transport.stats.bytes - before == 2 * BLOCK_BYTES


def test_the_release_arrives_with_the_ticket_id(world: World) -> None:
    puller, peer = world.puller(), world.standing
    ticket, cached = peer.ticket([1, 2]), peer.ticket([1, 2])
    puller.start("read", computed(ticket), [1, 2], [0, 1], later())
    puller.start("all cached", computed(cached), [], [], later())
    done = world.run(puller)
    assert [done["read"].error, done["all cached"].error] == [None, None]
    assert done["all cached"].transfer.bytes == 0
    assert peer.releases(ticket, cached)


def test_a_new_owner_fails_the_fence(world: World) -> None:
    puller, peer = world.puller(), world.second
    ticket, fine = peer.ticket([10, 11, 12]), peer.ticket([20, 21])
    peer.reset()
    peer.change_owner(11)
    puller.start("stale", computed(ticket), [10, 11, 12], [0, 1, 2], later())
    puller.start("fine", computed(fine), [20, 21], [3, 4], later())
    done = world.run(puller)
    assert done["fine"].error is None
    error = done["stale"].error
    assert error is not None
    assert "fence refused: 1 of 3" in error
    assert "block 11 is at generation 112, the ticket says 111" in error
    assert peer.releases(ticket, fine)


def test_an_owner_that_changes_between_read_and_fence_is_seen_every_time(world: World) -> None:
    peer = world.second
    peer.reset()
    for round_ in range(20):
        block_id = 1 + 3 * round_
        read = world.transport.read_blocks(peer.incarnation, [block_id, block_id + 1], [0, 1])
        assert world.settled(read).state is HandleState.DONE
        assert world.holds(peer, [block_id], [0])
        peer.change_owner(block_id)
        fence = world.transport.read_generations(peer.incarnation, [block_id + 1, block_id], b"")
        assert world.settled(fence).state is HandleState.DONE
        assert fence.generations is not None
        assert fence.generations.tolist() == [101 + block_id, 101 + block_id]


def test_an_unknown_peer_fails_that_pull_only(world: World) -> None:
    puller, peer = world.puller(), world.standing
    stranger = peer.ticket([1])
    stranger.incarnation = new_incarnation()
    puller.start("stranger", computed(stranger), [1], [0], later())
    puller.start("known", computed(peer.ticket([2])), [2], [1], later())
    done = world.run(puller)
    assert "unknown" in str(done["stranger"].error)
    assert done["known"].error is None


def test_ids_outside_a_pool_fail_the_handle(world: World) -> None:
    for remote, local in ([NUM_BLOCKS], [0]), ([-1], [0]), ([0], [NUM_BLOCKS]):
        handle = world.transport.read_blocks(world.standing.incarnation, remote, local)
        assert world.settled(handle).state is HandleState.FAILED
        assert "block ids" in str(handle.error)


def test_a_peer_that_describes_itself_wrongly_is_refused(world: World) -> None:
    peer = world.standing
    with pytest.raises(TransferFailed):
        world.transport.add_peer(new_incarnation(), peer.info, NUM_BLOCKS, BLOCK_BYTES)
    with pytest.raises(TransferFailed):
        world.transport.add_peer(new_incarnation(), b"\x07nonsense", NUM_BLOCKS, BLOCK_BYTES)
    with pytest.raises(TransferFailed, match="bytes"):
        world.transport.add_peer(peer.incarnation, peer.info, NUM_BLOCKS, 2 * BLOCK_BYTES)
    assert world.transport.warm(peer.incarnation) >= 0.0


def test_warming_up(world: World) -> None:
    assert 0.0 <= world.transport.warm(world.standing.incarnation) < WAIT_S
    with pytest.raises(TransferFailed, match=r"unknown|cannot be reached"):
        world.transport.warm(new_incarnation())


def test_many_pulls_at_once(world: World) -> None:
    puller = world.puller(max_reading=4)
    other = world.second
    other.reset()
    for index in range(16):
        peer = (world.standing, other)[index % 2]
        remote = [index, index + 16, index + 17]
        puller.start(f"s{index}", computed(peer.ticket(remote)), remote, _mine(index), later())
    assert len(puller._pulls) == 16
    done = world.run(puller)
    assert [end.error for end in done.values()] == [None] * 16
    for index in range(16):
        peer = (world.standing, other)[index % 2]
        assert world.holds(peer, [index, index + 16, index + 17], _mine(index))


def _mine(index: int) -> list[int]:
    return [3 * index, 3 * index + 1, 3 * index + 2]


def test_a_cancelled_pull_ends_only_when_its_transfer_has(world: World) -> None:
    puller, peer = world.puller(), world.standing
    ticket = peer.ticket([1, 2])
    puller.start("s", computed(ticket), [1, 2], [0, 1], later())
    assert puller.cancel("s")
    assert held(puller) == [[0, 1]]  # not the caller's before poll says so
    done = world.run(puller)["s"]
    assert (done.error, done.transfer.bytes) == ("cancelled", 0)
    assert held(puller) == []
    assert peer.releases(ticket)
    assert not puller.cancel("s")


def test_a_killed_peer_fails_quickly_and_alone(world: World) -> None:
    puller, doomed = world.puller(), world.spawn()
    world.transport.warm(doomed.incarnation)
    doomed.kill()
    start = time.monotonic()
    for index in range(3):
        puller.start(f"dead{index}", computed(doomed.ticket([1])), [1], [index], later())
    puller.start("cached", computed(doomed.ticket([1])), [], [], later())
    puller.start("alive", computed(world.standing.ticket([2])), [2], [8], later())
    done = world.run(puller)
    assert time.monotonic() - start < 5.0
    assert all(done[f"dead{index}"].error for index in range(3))
    assert done["alive"].error is None
    with pytest.raises(TransferFailed):
        world.transport.warm(doomed.incarnation)
    world.transport.remove_peer(doomed.incarnation)
    assert world.transport.warm(world.standing.incarnation) >= 0.0


def test_a_peer_killed_while_it_is_read(world: World) -> None:
    puller, doomed = world.puller(max_reading=NUM_BLOCKS), world.spawn()
    ids = list(range(0, NUM_BLOCKS, 2))
    handles = [
        world.transport.read_blocks(doomed.incarnation, ids, range(len(ids))) for _ in range(50)
    ]
    doomed.kill()
    handles.append(world.transport.read_generations(doomed.incarnation, ids, b"x"))
    world.until(lambda: all(handle.terminal for handle in handles))
    assert handles[-1].state is HandleState.FAILED
    puller.start("alive", computed(world.standing.ticket([2])), [2], [8], later())
    assert world.run(puller)["alive"].error is None


def test_a_restarted_peer_is_a_new_peer(world: World) -> None:
    puller, first = world.puller(), world.spawn()
    old = first.ticket([1])
    first.kill()
    world.transport.remove_peer(first.incarnation)
    second = world.spawn()
    puller.start("old", computed(old), [1], [0], later())
    puller.start("new", computed(second.ticket([1])), [1], [1], later())
    done = world.run(puller)
    assert "unknown" in str(done["old"].error)
    assert done["new"].error is None
    assert world.holds(second, [1], [1])


def test_a_removed_peer_can_be_added_again(world: World) -> None:
    puller, peer = world.puller(), world.second
    peer.reset()
    for round_ in range(3):
        world.transport.remove_peer(peer.incarnation)
        failed = world.transport.read_blocks(peer.incarnation, [1], [0])
        assert world.settled(failed).state is HandleState.FAILED
        world.add(peer)
        puller.start(f"s{round_}", computed(peer.ticket([round_])), [round_], [round_], later())
        assert world.run(puller)[f"s{round_}"].error is None
    world.transport.remove_peer(new_incarnation())  # never added: no matter


def test_a_closed_transport_refuses(world: World) -> None:
    pool = Pool(world.name, world.network, world.layout)
    pool.transport.close()
    handle = pool.transport.read_blocks(world.standing.incarnation, [0], [0])
    assert handle.state is HandleState.FAILED
    pool.close()
