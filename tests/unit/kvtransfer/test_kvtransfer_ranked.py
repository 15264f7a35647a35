"""The ranks of a worker: each reads its own part of a block, and one fence follows them all."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from fake_transport import FakeNetwork, FakeTransport
from transport_kit import NUM_BLOCKS, WAIT_S, FakePeer, Pool, computed, content, later

from crossdock.kvtransfer.pull import PullDone, Puller
from crossdock.kvtransfer.rank_link import RankTransport, serve
from crossdock.kvtransfer.ranked import RankedTransport, rank_incarnation
from crossdock.kvtransfer.registry import Allocator
from crossdock.kvtransfer.ticket import new_incarnation
from crossdock.kvtransfer.transport import Handle, HandleState, PoolMemory, Transport
from crossdock.proto.errors import TransferFailed

IDS, LOCAL = [7, 8, 9], [0, 1, 2]


class Two:
    """A worker of two ranks and its peer, on a wire that is held."""

    def __init__(self) -> None:
        self.network = FakeNetwork()
        self.mine = Pool("fake", self.network, "ranks")
        self.peer = FakePeer(self.network, 1, "ranks")
        self.transport = self.mine.transport
        self.transport.add_peer(
            self.peer.incarnation, self.peer.info, NUM_BLOCKS, self.mine.memory.block_bytes
        )
        self.network.hold()
        self.puller = Puller(self.transport, self.mine.memory, time.monotonic)
        self.woken = 0
        self.transport.set_wakeup(self._wake)

    def _wake(self) -> None:
        self.woken += 1

    def read(self) -> Handle:
        return self.transport.read_blocks(self.peer.incarnation, IDS, LOCAL)

    def pull(self) -> None:
        self.puller.start("s", computed(self.peer.ticket(IDS)), IDS, LOCAL, later())

    def end(self) -> PullDone:
        self.network.deliver()
        (done,) = self.puller.poll()
        return done


@pytest.fixture
def two() -> Two:
    return Two()


def test_the_fence_is_read_once_after_the_reads_of_all_ranks(two: Two) -> None:
    two.pull()
    fakes = two.network.transports
    assert two.network.pending() == 2  # one read a rank
    two.network.deliver(1)
    assert two.puller.poll() == [] and two.network.pending() == 1
    two.network.deliver(1)
    assert two.network.pending() == 1  # the fence, posted by the last of them
    done = two.end()
    assert (done.error, done.transfer.bytes) == (None, 3 * two.mine.memory.block_bytes)
    assert [fakes[rank_incarnation(two.mine.incarnation, n)].stats.fences for n in (0, 1)] == [1, 0]
    for remote, local in zip(IDS, LOCAL, strict=True):
        assert np.array_equal(two.mine.block(local), content(1, remote))
    assert two.transport.stats.bytes == done.transfer.bytes
    assert two.peer.releases(two.peer.ticket([])) is False and len(two.peer._seen) == 1


def test_an_owner_that_came_between_the_ranks_reads_is_seen(two: Two) -> None:
    two.pull()
    two.network.deliver(1)
    two.peer.change_owner(IDS[1])
    assert "fence refused: 1 of 3" in str(two.end().error)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_read_that_fails_in_one_rank_ends_with_that_of_the_other(two: Two, failing: int) -> None:
    """Until then the other one may still write into the local blocks."""
    handle = two.read()
    if failing == 0:
        two.network.fail_next_read()
    two.network.deliver(1)
    assert not handle.terminal
    if failing == 1:
        two.network.fail_next_read()
    two.network.deliver(1)
    assert (handle.state, handle.error) == (HandleState.FAILED, f"rank {failing}: scripted failure")
    assert two.woken
    two.pull()
    two.network.fail_next_read()
    assert "read failed: rank 0: scripted failure" in str(two.end().error)


def test_a_peer_that_dies_fails_the_reads_of_all_ranks(two: Two) -> None:
    handle = two.read()
    two.peer.kill()
    assert handle.state is HandleState.FAILED and "peer is gone" in str(handle.error)
    two.transport.remove_peer(two.peer.incarnation)
    assert "unknown" in str(two.read().error)


def test_unlike_degrees_are_refused_with_both_numbers(two: Two) -> None:
    network, incarnation = FakeNetwork(), new_incarnation()
    fakes = [
        FakeTransport(network, rank_incarnation(incarnation, number), two.mine.memory.part)
        for number in range(4)
    ]
    four = RankedTransport(fakes)
    add = partial(two.transport.add_peer, incarnation)
    with pytest.raises(TransferFailed, match="has 4 ranks, here there are 2"):
        add(four.info(), NUM_BLOCKS, two.mine.memory.block_bytes)
    for info in (fakes[0].info(), b"", four.info()[:-1], four.info() + b"x", four.info()[:8]):
        with pytest.raises(TransferFailed, match="not of ranks"):
            add(info, NUM_BLOCKS, two.mine.memory.block_bytes)


def test_ranks_are_peers_by_names_of_their_own() -> None:
    one, other = new_incarnation(), new_incarnation()
    names = {rank_incarnation(worker, rank) for worker in (one, other) for rank in range(64)}
    assert len(names) == 128 and {len(name) for name in names} == {16}
    assert rank_incarnation(one, 0) == one


def test_an_allocator_is_sent_and_allocates_where_it_arrives() -> None:
    make, arguments = Allocator("local").__reduce__()  # type: ignore[misc]
    allocator = make(*arguments)
    buffer, generations = allocator(4096, 4)
    assert (buffer.nbytes, len(generations)) == (4096, 4)
    del buffer, generations
    allocator.close()
    allocator.close()


# -- a rank in another process -------------------------------------------------------------------


class Linked:
    """The transport of a rank behind a link, `serve` on a thread for its process."""

    def __init__(self, two: Two) -> None:
        self.ended = threading.Event()
        mine, self.theirs = multiprocessing.Pipe()
        incarnation = new_incarnation()
        create: Callable[[PoolMemory], Transport] = partial(FakeTransport, two.network, incarnation)

        def run() -> None:
            serve(create, two.mine.memory.part, self.theirs)
            self.ended.set()

        threading.Thread(target=run, daemon=True).start()
        self.transport = RankTransport(mine)
        self.fake = two.network.transports[incarnation]
        self.news = threading.Event()
        self.transport.set_wakeup(self.news.set)

    def ended_read(self, handle: Handle) -> Handle:
        assert self.news.wait(WAIT_S) and handle.terminal
        self.news.clear()
        return handle


@pytest.fixture
def linked(two: Two) -> Linked:
    return Linked(two)


def test_a_rank_in_another_process_reads_its_part(two: Two, linked: Linked) -> None:
    link, inner = linked.transport, two.peer.incarnation
    half = two.mine.memory.part.block_bytes
    with pytest.raises(TransferFailed, match="cannot be reached"):
        link.add_peer(inner, b"wrong", NUM_BLOCKS, half)
    link.add_peer(inner, inner, NUM_BLOCKS, half)
    assert link.warm(inner) == 0.0
    two.network.holding = False
    handle = linked.ended_read(link.read_blocks(inner, range(7, 10), LOCAL))
    assert handle.state is HandleState.DONE
    assert np.array_equal(two.mine.block(0)[:half], content(1, 7)[:half])
    assert not two.mine.block(0)[half:].any()
    failed = linked.ended_read(link.read_blocks(inner, [NUM_BLOCKS], [0]))
    assert "block ids" in str(failed.error)
    link.remove_peer(inner)
    with pytest.raises(TransferFailed, match="cannot be reached"):
        link.warm(inner)
    assert link.read_generations(inner, [0], b"").state is HandleState.FAILED
    link.close()
    link.close()
    assert linked.ended.wait(WAIT_S) and not linked.fake.alive


def test_a_rank_that_is_gone_fails_what_was_asked_of_it() -> None:
    mine, theirs = multiprocessing.Pipe()

    def process() -> None:
        number, method, _ = theirs.recv()
        assert method == "info"
        theirs.send((number, b"info", None))
        assert theirs.recv()[1] == "read_blocks"
        theirs.close()

    threading.Thread(target=process, daemon=True).start()
    link, news = RankTransport(mine), threading.Event()
    link.set_wakeup(news.set)
    handle = link.read_blocks(new_incarnation(), [1], [1])
    assert news.wait(WAIT_S)
    assert "process of a rank is gone" in str(handle.error)
    assert "process of a rank is gone" in str(link.read_blocks(new_incarnation(), [1], [1]).error)
    with pytest.raises(TransferFailed, match="process of a rank is gone"):
        link.warm(new_incarnation())
    link.close()


def test_what_is_closed_fails_a_read_at_once() -> None:
    """Also while its process is still about to end."""
    mine, theirs = multiprocessing.Pipe()

    def process() -> None:
        for _ in ("info", "close"):
            number, method, _ = theirs.recv()
            theirs.send((number, method.encode(), None))

    threading.Thread(target=process, daemon=True).start()
    link = RankTransport(mine)
    link.close()
    assert link.read_blocks(new_incarnation(), [1], [1]).state is HandleState.FAILED
    theirs.close()
