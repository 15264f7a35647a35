"""The decode side's states, on the fake transport and a virtual clock."""

from __future__ import annotations

import numpy as np
import pytest
from fake_transport import FakeNetwork, FakeTransport
from transport_kit import held

from crossdock.kvtransfer.memory import allocate_pages
from crossdock.kvtransfer.offers import Offers, OfferSettings
from crossdock.kvtransfer.pull import PullDone, Puller
from crossdock.kvtransfer.regions import merge_runs
from crossdock.kvtransfer.registry import allocate, create_transport
from crossdock.kvtransfer.ticket import new_incarnation
from crossdock.kvtransfer.transport import HandleState, PoolMemory, Transport
from crossdock.proto.errors import ConfigError, TransferFailed
from crossdock.proto.v1.worker_pb2 import PromptProgress, Ticket

BLOCKS, BYTES = 32, 64


class Side:
    def __init__(self, network: FakeNetwork) -> None:
        self.incarnation = new_incarnation()
        buffer, generations, self._free = allocate_pages(BLOCKS * BYTES, BLOCKS)
        self.memory = PoolMemory.block_major(buffer.ctypes.data, BLOCKS, BYTES, generations)
        self.blocks = buffer.reshape(BLOCKS, BYTES)
        self.transport: Transport = FakeTransport(network, self.incarnation, self.memory)


def computed(ticket: Ticket) -> PromptProgress:
    return PromptProgress(ticket=ticket, ready_blocks=len(ticket.block_ids))


class Pair:
    """One prefill and one decode side."""

    def __init__(self, max_reading: int = 16) -> None:
        self.now = 0.0
        self.network = FakeNetwork()
        self.prefill, self.decode = Side(self.network), Side(self.network)
        self.prefill.blocks[:] = np.arange(BLOCKS)[:, None] + 1
        self.prefill.memory.generations[:] = np.arange(BLOCKS) + 50
        self.freed: list[int] = []
        settings = OfferSettings("p", "h:1", self.prefill.incarnation, b"l" * 16, b"k", 30.0)
        self.offers = Offers(lambda: self.now, settings, self.freed.extend)
        self.decode.transport.add_peer(
            self.prefill.incarnation, self.prefill.transport.info(), BLOCKS, BYTES
        )
        self.puller = Puller(
            self.decode.transport, self.decode.memory, lambda: self.now, max_reading
        )

    def offer(self, ids: list[int]) -> Ticket:
        generations = self.prefill.memory.generations[ids].tolist()
        ticket = self.offers.announce(ids, generations, len(ids) * 16, b"p" * 16)
        self.offers.offer(ticket, "s", "g")
        return ticket

    def start(self, name: str, ids: list[int], local: list[int], deadline: float = 100.0) -> Ticket:
        ticket = self.offer(ids)
        self.puller.start(name, computed(ticket), ids, local, deadline)
        return ticket

    def start_early(self, name: str, ids: list[int], local: list[int], ready: int) -> None:
        ticket = self.offer(ids)
        progress = PromptProgress(ticket=ticket, ready_blocks=ready)
        self.puller.start(name, progress, ids, local, 100.0)

    def all_ready(self) -> None:
        """The rest of the prompt of the one pull is computed."""
        (pull,) = self.puller._pulls.values()
        self.puller.more(pull.pull_id, computed(pull.ticket), 100.0, 100.0)

    @property
    def fences(self) -> int:
        return sum(pull.fence is not None for pull in self.puller._pulls.values())

    def only(self) -> PullDone:
        [done] = self.puller.poll()
        return done

    def take_releases(self) -> int:
        return self.offers.release(self.prefill.transport.notifications())


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_every_state_on_the_way_to_joined(pair: Pair) -> None:
    pair.network.hold()
    pair.start("s", [3, 4], [0, 1])
    assert (pair.network.pending(), pair.fences) == (1, 0)
    assert pair.puller.poll() == []
    pair.now = 1.0
    assert pair.network.deliver(1) == 1
    assert pair.puller.poll() == []
    assert (pair.network.pending(), pair.fences) == (1, 1)
    assert pair.take_releases() == 0  # nothing is released before the fence
    pair.now = 2.0
    pair.network.deliver(1)
    done = pair.only()
    assert done.error is None
    assert (done.started_at, done.pulled_at, done.fenced_at) == (0.0, 1.0, 2.0)
    assert (done.transfer.blocks, done.transfer.bytes) == (2, 2 * BYTES)
    assert pair.decode.blocks[0].tolist() == [4] * BYTES
    assert pair.take_releases() == 1
    assert pair.freed == [3, 4]
    assert (len(pair.puller._pulls), pair.puller.next_deadline()) == (0, None)


def test_a_block_rewritten_between_read_and_fence_never_joins(pair: Pair) -> None:
    pair.network.hold()
    pair.start("s", [3, 4], [0, 1])
    pair.network.deliver(1)
    pair.puller.poll()
    pair.prefill.memory.generations[4] += 1
    pair.network.deliver()
    error = pair.only().error
    assert error is not None
    assert "fence refused: 1 of 2 blocks had a new owner, block 4 is at generation 55" in error


def test_a_block_rewritten_before_the_read_never_joins(pair: Pair) -> None:
    pair.network.hold()
    pair.start("s", [3, 4], [0, 1])
    pair.prefill.memory.generations[3] += 1
    pair.network.deliver()
    assert "fence refused" in str(pair.only().error)


def test_the_lease_is_counted_from_the_ticket_and_fails_closed(pair: Pair) -> None:
    pair.network.hold()
    pair.start("s", [3], [0])
    pair.network.deliver(1)
    pair.now = 29.9
    assert pair.puller.poll() == []
    pair.now = 30.0
    pair.network.deliver()  # the fence would hold, but its time is over
    done = pair.only()
    assert (done.error, done.transfer.bytes) == ("lease is over", 0)


def test_a_renewed_lease_lives_on(pair: Pair) -> None:
    pair.network.hold()
    ticket = pair.start("s", [3], [0])
    pair.now = 20.0
    pair.puller.renewed(ticket.ticket_id, 49.0)
    pair.puller.renewed(ticket.ticket_id, 20.0)  # never shortens
    pair.puller.renewed(b"another", 110.0)
    pair.now = 48.9
    pair.network.deliver(1)
    assert pair.puller.poll() == []
    pair.network.deliver()
    assert pair.only().error is None


def test_nothing_to_read_still_releases_and_minds_the_lease(pair: Pair) -> None:
    ticket = pair.offer([3])
    pair.puller.start("s", computed(ticket), [], [], deadline=100.0)
    assert pair.only().error is None
    assert pair.take_releases() == 1
    pair.puller.start("late", computed(pair.offer([4])), [], [], deadline=100.0, lease_until=0.0)
    assert pair.only().error == "lease is over"


def test_what_was_read_is_told_by_when_it_was_read_not_by_when_it_was_looked_at(pair: Pair) -> None:
    """An engine step is long: both its reads ended, and the last progress came, while one ran."""
    pair.network.hold()
    pair.start_early("s", [3, 4, 5], [0, 1, 2], ready=2)
    pair.now = 1.0
    pair.network.deliver(1)
    pair.now = 5.0
    pair.all_ready()
    assert pair.puller.poll() == []
    pair.now = 6.0
    pair.network.deliver(1)
    pair.now = 9.0
    pair.network.deliver()
    done = pair.only()
    assert (done.error, done.pulled_at, done.transfer.seconds) == (None, 6.0, 2.0)
    assert done.transfer.late_bytes == BYTES


def test_a_cancelled_pull_keeps_its_blocks_until_the_read_is_over(pair: Pair) -> None:
    pair.network.hold()
    pair.start("s", [3], [0])
    assert pair.puller.cancel("s")
    assert pair.puller.poll() == []
    assert held(pair.puller) == [[0]]
    pair.network.deliver()
    assert pair.decode.blocks[0].any()  # it was written after the cancel, and nobody minded
    assert pair.only().error == "cancelled"
    assert held(pair.puller) == []
    assert pair.take_releases() == 1  # the prefill side need not wait for the lease's end
    assert not pair.puller.cancel("s")


def test_past_its_deadline_a_pull_has_failed_but_keeps_its_blocks(pair: Pair) -> None:
    pair.network.hold()
    pair.start("s", [3], [0], deadline=5.0)
    assert pair.puller.next_deadline() == 5.0
    assert pair.puller.overdue() == []
    pair.now = 5.0
    assert pair.puller.poll() == []
    assert pair.puller.overdue() == ["s"]
    assert pair.puller.overdue() == []  # named once
    assert held(pair.puller) == [[0]]
    assert pair.puller.next_deadline() is None
    pair.network.deliver()
    assert pair.only().error == "deadline passed"
    assert len(pair.puller._pulls) == 0


def test_pulls_beyond_the_limit_wait_and_time_out_in_the_queue() -> None:
    pair = Pair(max_reading=1)
    pair.network.hold()
    pair.start("a", [1], [1])
    pair.start("b", [2], [2])
    pair.start("c", [3], [3], deadline=5.0)
    assert pair.network.pending() == 1
    pair.now = 5.0
    assert [done.pull_id for done in pair.puller.poll()] == ["c"]
    pair.network.deliver()
    ended = {done.pull_id: done.error for done in pair.puller.poll() + pair.puller.poll()}
    assert ended == {"a": None, "b": None}
    assert not pair.decode.blocks[3].any()


def test_a_failed_read_and_a_failed_fence_fail_their_pull_only(pair: Pair) -> None:
    pair.network.fail_next_read("cable")
    pair.start("read", [1], [1])
    pair.start("fine", [2], [2])
    ended = {done.pull_id: done.error for done in pair.puller.poll()}
    assert ended == {"read": "read failed: cable", "fine": None}
    pair.network.hold()
    pair.start("fence", [3], [3])
    pair.network.deliver(1)
    pair.puller.poll()
    pair.network.fail_next_read("cable")
    pair.network.deliver()
    assert pair.only().error == "fence failed: cable"


def test_a_lost_notification_leaves_the_lease_to_the_reaper(pair: Pair) -> None:
    pair.network.drop_next_notification()
    pair.start("s", [1], [1])
    assert pair.only().error is None
    assert pair.take_releases() == 0
    pair.now = 30.0
    pair.offers.reap()
    assert pair.freed == [1]


def test_a_peer_that_dies_fails_what_was_under_way_and_its_successor_is_another(pair: Pair) -> None:
    pair.network.hold()
    pair.start("s", [1], [1])
    pair.network.kill(pair.prefill.incarnation)
    assert pair.only().error == "read failed: peer is gone"
    pair.network.deliver()
    again = Side(pair.network)
    pair.start("old ticket", [1], [1])
    assert "peer is gone" in str(pair.only().error)
    assert again.incarnation != pair.prefill.incarnation


@pytest.mark.parametrize(
    "remote, local, says",
    [
        ([9], [0], r"blocks \[9\] are not of the ticket"),
        ([1], [0, 1], "1 remote blocks, 2 local"),
        ([1, 2], [0, 0], "a local block is named twice"),
        ([1, 1], [0, 1], "not in the ticket's order"),
        ([1], [BLOCKS], "out of range"),
    ],
)
def test_a_pull_that_cannot_be_is_refused(
    pair: Pair, remote: list[int], local: list[int], says: str
) -> None:
    ticket = pair.offer([1, 2])
    with pytest.raises(TransferFailed, match=says):
        pair.puller.start("s", computed(ticket), remote, local, 100.0)
    assert len(pair.puller._pulls) == 0


def test_one_pull_a_sequence(pair: Pair) -> None:
    pair.network.hold()
    pair.start("s", [1], [1])
    with pytest.raises(TransferFailed, match="one is under way"):
        pair.start("s", [2], [2])
    pair.network.deliver()


def test_runs() -> None:
    runs = merge_runs([5, 3, 4, 9, 10, 20], [15, 13, 14, 1, 3, 7])
    assert list(zip(runs.remote, runs.local, runs.length, strict=True)) == [
        (3, 13, 3),
        (9, 1, 1),
        (10, 3, 1),
        (20, 7, 1),
    ]
    assert len(merge_runs([], [])) == 0
    assert len(merge_runs(range(1000), range(1000))) == 1


def test_a_fence_answers_in_the_order_asked(pair: Pair) -> None:
    handle = pair.decode.transport.read_generations(pair.prefill.incarnation, [9, 2, 3], b"")
    assert handle.state is HandleState.DONE
    assert handle.generations is not None
    assert handle.generations.tolist() == [59, 52, 53]


def test_an_unknown_transport_is_a_config_error(pair: Pair) -> None:
    says = r"'carrier pigeon' is not one of nixl, nccl, local$"
    with pytest.raises(ConfigError, match=says):
        create_transport("carrier pigeon", pair.decode.incarnation, pair.decode.memory)
    with pytest.raises(ConfigError, match=r"kv\.transport"):
        allocate("carrier pigeon", 64, 1)


@pytest.mark.parametrize("ready", [2, 3])
def test_a_read_wakes_the_engine_unless_the_fence_will(pair: Pair, ready: int) -> None:
    """Blocks became ready while an earlier part was read: nothing else would have them read before
    the idle engine's next turn. After the last read the fence follows, and tells of both."""
    woken: list[int] = []
    pair.decode.transport.set_wakeup(lambda: woken.append(pair.network.pending()))
    pair.network.hold()
    pair.start_early("s", [1, 2, 3], [0, 1, 2], ready=ready)
    pair.all_ready()
    assert pair.network.pending() == 1  # one read at a time
    pair.network.deliver(1)
    if ready < 3:
        assert woken == [0]
        assert pair.puller.poll() == [] and pair.network.pending() == 1  # the next part
        pair.network.deliver(1)
    assert woken == [0] * (ready < 3) and pair.network.pending() == 1  # the fence
    pair.network.deliver(1)
    assert len(woken) == 1 + (ready < 3)
    assert pair.only().error is None
