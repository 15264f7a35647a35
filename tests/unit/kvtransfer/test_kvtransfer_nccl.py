"""What is the nccl transport's own: aborts, broken peers, strangers.

On the fake of NCCL, which can be told to hang, to fail, and to be busy still after an abort.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from test_kvtransfer_contract import (
    BLOCK_BYTES,
    KEY,
    NUM_BLOCKS,
    WAIT_S,
    Pool,
    ProcessPeer,
    content,
)

from crossdock.kvtransfer.nccl import link as nccl_link
from crossdock.kvtransfer.nccl import messages
from crossdock.kvtransfer.nccl.channel import Channel, Frame, Kind
from crossdock.kvtransfer.nccl.fake import FakeCommunicators
from crossdock.kvtransfer.nccl.transport import NcclTransport
from crossdock.kvtransfer.registry import allocate, create_transport
from crossdock.kvtransfer.ticket import new_incarnation
from crossdock.kvtransfer.transport import Handle, HandleState, PoolMemory, merge_runs
from crossdock.proto.errors import TransferFailed


def until(check: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    end = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def settled(*handles: Handle) -> list[HandleState]:
    until(lambda: all(handle.terminal for handle in handles))
    return [handle.state for handle in handles]


class Worker:
    """A pool with its transport, and the fake's faults."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.nccl = FakeCommunicators()
        self.pool = Pool("nccl", communicators=self.nccl)
        self.pool.fill(seed)
        assert isinstance(self.pool.transport, NcclTransport)
        self.transport = self.pool.transport
        self.incarnation = self.pool.incarnation

    @property
    def links(self) -> int:
        return self.transport._call(lambda: len(self.transport._links))

    def meet(self, owner: Worker | ProcessPeer) -> None:
        info = owner.info if isinstance(owner, ProcessPeer) else owner.transport.info()
        self.transport.add_peer(owner.incarnation, info, NUM_BLOCKS, BLOCK_BYTES)

    def read(self, owner: Worker | ProcessPeer, remote: list[int], local: list[int]) -> Handle:
        return self.transport.read_blocks(owner.incarnation, remote, local)

    def holds(self, owner: Worker | ProcessPeer, remote: int, local: int) -> bool:
        return np.array_equal(self.pool.blocks[local], content(owner.seed, remote))

    def reads_again(self, owner: Worker | ProcessPeer) -> bool:
        """Whether a read works, maybe after the pause before a lost peer is dialed again."""
        self.pool.blocks[0] = 0
        read = self.read(owner, [5], [0])
        return settled(read) == [HandleState.DONE] and self.holds(owner, 5, 0)


@pytest.fixture
def pair() -> Iterator[tuple[Worker, Worker]]:
    reader, owner = Worker(), Worker(seed=3)
    reader.meet(owner)
    reader.transport.warm(owner.incarnation)
    yield reader, owner
    for worker in (reader, owner):
        worker.nccl.stuck = worker.nccl.noisy = False
        worker.pool.close()


def post_and_hang(reader: Worker, owner: Worker) -> Handle:
    """A read whose receives are posted and move nothing."""
    reader.nccl.stuck = True
    read = reader.read(owner, [1, 2, 9], [10, 11, 12])
    until(lambda: any(made._recvs for made in reader.nccl.made))
    return read


# Aborts.


def test_an_aborted_read_is_terminal_only_when_the_stream_is_quiet(
    pair: tuple[Worker, Worker],
) -> None:
    reader, owner = pair
    read = post_and_hang(reader, owner)
    reader.nccl.noisy = True
    fence = reader.transport.read_generations(owner.incarnation, [1], b"")
    assert settled(fence) == [HandleState.DONE]  # messages go on while blocks hang
    reader.nccl.fault = "a cable was pulled"
    until(lambda: reader.nccl.made[-1].aborted)
    time.sleep(0.05)
    assert not read.terminal  # a kernel may still write
    reader.nccl.noisy = False
    assert settled(read) == [HandleState.FAILED]
    assert "a cable was pulled" in str(read.error)


def test_a_failed_pair_heals_with_a_new_communicator(pair: tuple[Worker, Worker]) -> None:
    reader, owner = pair
    other = Worker(seed=8)
    reader.meet(other)
    assert reader.reads_again(other)
    read = post_and_hang(reader, owner)
    reader.transport._call(lambda: reader.transport._end(_link(reader, owner), "an error of NCCL"))
    assert settled(read) == [HandleState.FAILED]
    refused = reader.read(owner, [1], [0])
    assert settled(refused) == [HandleState.FAILED]
    assert "lost: an error of NCCL" in str(refused.error)
    reader.nccl.stuck = False
    assert reader.reads_again(other)  # whose communicator is the one it had
    made = len(reader.nccl.made)
    until(lambda: reader.reads_again(owner))
    assert len(reader.nccl.made) == made + 1
    assert not reader.nccl.made[-1].aborted
    other.pool.close()


def _link(reader: Worker, owner: Worker) -> nccl_link.Link:
    link = reader.transport._peers[owner.incarnation].link
    assert link is not None
    return link


def test_an_error_on_the_owners_side_fails_the_readers_handles(
    pair: tuple[Worker, Worker],
) -> None:
    reader, owner = pair
    owner.nccl.fault = "unhandled system error"
    read = reader.read(owner, [1], [10])
    assert settled(read) == [HandleState.FAILED]
    assert "unhandled system error" in str(read.error)  # it says why
    assert all(made.aborted for made in owner.nccl.made)
    owner.nccl.fault = None
    until(lambda: reader.reads_again(owner))


def test_a_communicator_that_does_not_come_about_fails_at_once() -> None:
    reader, owner = Worker(), Worker(seed=3)
    reader.meet(owner)
    reader.nccl.apart = owner.nccl.apart = True
    read = reader.read(owner, [1], [10])
    until(lambda: reader.nccl.made and owner.nccl.made)
    time.sleep(0.05)  # both have nothing to do now but to look whether they have met
    reader.nccl.fault = "out of memory"
    start = time.monotonic()
    assert settled(read) == [HandleState.FAILED]
    assert "out of memory" in str(read.error)
    assert time.monotonic() - start < 5.0
    reader.nccl.fault = None
    reader.nccl.apart = owner.nccl.apart = False
    until(lambda: reader.reads_again(owner))
    reader.pool.close()
    owner.pool.close()


def test_ranks_that_never_meet_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Worker, Worker]
) -> None:
    _, owner = pair
    monkeypatch.setattr(nccl_link, "REQUEST_S", 1.0)
    owner.nccl.apart = True
    wicked = Reader(owner)
    wicked.channel.send(Kind.MEET, 0, FakeCommunicators().unique_id())
    with pytest.raises(TransferFailed, match="too long"):
        until(lambda: wicked.frames())
    assert owner.nccl.made[-1].aborted


def test_a_lost_connection_aborts_both_sides(pair: tuple[Worker, Worker]) -> None:
    reader, owner = pair
    read = post_and_hang(reader, owner)
    link = _link(reader, owner)
    link.channel.socket.shutdown(socket.SHUT_RDWR)
    assert settled(read) == [HandleState.FAILED]
    assert reader.nccl.made[-1].aborted
    until(lambda: owner.nccl.made[-1].aborted)
    reader.nccl.stuck = False
    until(lambda: reader.reads_again(owner))


def test_what_hangs_is_aborted_after_its_time(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Worker, Worker]
) -> None:
    reader, owner = pair
    monkeypatch.setattr(nccl_link, "REQUEST_S", 1.0)
    start = time.monotonic()
    read = post_and_hang(reader, owner)
    assert settled(read) == [HandleState.FAILED]
    assert 0.9 < time.monotonic() - start < 10.0
    assert "too long" in str(read.error)


def test_a_frozen_peer_writes_nothing_once_it_was_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With NIXL its bytes arrive when it wakes up; here an abort is an end."""
    reader, peer = Worker(), ProcessPeer("nccl", 4)
    try:
        reader.meet(peer)
        assert reader.reads_again(peer)
        monkeypatch.setattr(nccl_link, "REQUEST_S", 1.0)
        os.kill(peer.pid, signal.SIGSTOP)
        read = reader.read(peer, list(range(32)), list(range(32)))
        fence = reader.transport.read_generations(peer.incarnation, [1], b"late")
        assert settled(read, fence) == [HandleState.FAILED, HandleState.FAILED]
        reader.pool.blocks[:] = 0  # their next owner's
        monkeypatch.undo()
        os.kill(peer.pid, signal.SIGCONT)
        until(lambda: reader.reads_again(peer))
        assert not reader.pool.blocks[1:].any()
    finally:
        peer.kill()
        reader.pool.close()


def test_closing_aborts_what_hangs(pair: tuple[Worker, Worker]) -> None:
    reader, owner = pair
    read = post_and_hang(reader, owner)
    asked = time.monotonic()
    reader.transport.close()
    assert time.monotonic() - asked < 5.0
    assert read.state is HandleState.FAILED
    assert all(made.aborted for made in reader.nccl.made)
    until(lambda: owner.nccl.made[-1].aborted)


def test_a_removed_peer_is_let_go_when_its_reads_have_ended(pair: tuple[Worker, Worker]) -> None:
    reader, owner = pair
    read = post_and_hang(reader, owner)
    reader.transport.remove_peer(owner.incarnation)
    late = reader.read(owner, [1], [0])
    assert settled(late) == [HandleState.FAILED]
    assert "unknown" in str(late.error)
    assert not read.terminal
    assert reader.links == 1
    reader.nccl.stuck = False
    assert settled(read) == [HandleState.DONE]
    assert reader.holds(owner, 9, 12)
    until(lambda: reader.links == 0)
    until(lambda: owner.links == 0)


# What is asked of the owner.


class Reader:
    """The reader's end of a channel, for messages that no transport sends."""

    def __init__(self, owner: Worker, key: bytes = KEY) -> None:
        (_, address), _ = messages.parse_info(owner.transport.info(), owner.incarnation)
        sock = socket.create_connection(address[:2], timeout=WAIT_S)
        sock.setblocking(False)
        self.channel = Channel(sock, key, new_incarnation(), owner.incarnation)
        until(lambda: self.frames() == [] and self.channel.established)

    def frames(self) -> list[Frame]:
        return self.channel.pump()

    def ask(self, kind: int, body: bytes) -> Frame:
        self.channel.send(kind, 7, body)
        found: list[Frame] = []
        until(lambda: found.extend(self.frames()) or found)
        assert len(found) == 1
        assert found[0].request == 7
        return found[0]


def runs(*pairs: tuple[int, int]) -> bytes:
    return np.array(pairs, dtype="<i8").tobytes()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (runs((NUM_BLOCKS, 1)), "the pool has 64"),
        (runs((0, NUM_BLOCKS + 1)), "the pool has 64"),
        (runs((1, NUM_BLOCKS)), "64 blocks from 1"),
        (runs((-1, 2)), "2 blocks from -1"),
        (runs((0, 0)), "0 blocks"),
        (runs((0, 1), (5, -3)), "-3 blocks from 5"),
        (runs((2**63 - 1, 1)), "the pool has 64"),
        (runs((1, 2**63 - 1)), "the pool has 64"),
        (runs(*[(0, 1)] * (NUM_BLOCKS + 1)), "65 runs"),
        (b"odd", "3 bytes"),
    ],
)
def test_a_read_outside_the_pool_is_refused_and_harms_nobody(
    pair: tuple[Worker, Worker], body: bytes, why: str
) -> None:
    reader, owner = pair
    wicked = Reader(owner)
    answer = wicked.ask(Kind.READ, body)
    assert answer.kind == Kind.REFUSED
    assert why in answer.body.decode()
    # The same connection is served, and so are others.
    assert wicked.ask(Kind.FENCE, messages.pack_fence(b"", [3])).kind == Kind.GENERATIONS
    assert reader.reads_again(owner)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x05abc",
        b"\x00\x01",
        messages.pack_fence(b"ticket", [NUM_BLOCKS]),
        messages.pack_fence(b"ticket", [-1]),
        messages.pack_fence(b"ticket", [2**62, 0]),
    ],
)
def test_a_fence_outside_the_pool_is_refused_and_releases_nothing(
    pair: tuple[Worker, Worker], body: bytes
) -> None:
    _, owner = pair
    wicked = Reader(owner)
    assert wicked.ask(Kind.FENCE, body).kind == Kind.REFUSED
    assert owner.transport.notifications() == []
    answer = wicked.ask(Kind.FENCE, messages.pack_fence(b"ticket", [3, 2]))
    assert messages.parse_generations(answer.body).tolist() == [103, 102]
    assert owner.transport.notifications() == [b"ticket"]


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.SENDING, Kind.GENERATIONS, 99, Kind.MEET])
def test_nonsense_ends_the_connection_that_it_came_on(
    pair: tuple[Worker, Worker], kind: int
) -> None:
    reader, owner = pair
    wicked = Reader(owner)
    with pytest.raises(TransferFailed, match=r"ended it|gone"):
        wicked.ask(kind, b"nonsense")
    assert reader.reads_again(owner)


def test_an_endless_message_is_not_waited_for(pair: tuple[Worker, Worker]) -> None:
    _, owner = pair
    wicked = Reader(owner)
    wicked.channel.socket.send(b"\x04" + b"\0" * 8 + b"\xff\xff\xff\xff")
    with pytest.raises(TransferFailed, match="4294967295 bytes"):
        until(lambda: wicked.frames())


def test_an_owner_that_answers_what_nobody_asked_loses_its_reader(
    pair: tuple[Worker, Worker],
) -> None:
    reader, owner = pair
    for kind in (Kind.SENDING, Kind.GENERATIONS, Kind.REFUSED, Kind.FENCE):
        until(lambda: reader.reads_again(owner))
        before = _link(reader, owner)
        lie(owner, kind, 10_000)
        until(lambda before=before: before not in reader.transport._links)  # type: ignore[misc]


def lie(owner: Worker, kind: Kind, number: int, body: bytes = b"") -> None:
    def tell() -> None:
        for link in owner.transport._links:
            link.channel.send(kind, number, body)

    owner.transport._call(tell)


@pytest.mark.parametrize(
    ("kind", "body"), [(Kind.GENERATIONS, b""), (Kind.REFUSED, b"late"), (Kind.SENDING, b"")]
)
def test_an_answer_that_does_not_fit_its_question_fails_the_handle(
    pair: tuple[Worker, Worker], kind: Kind, body: bytes
) -> None:
    """To a read whose receives are posted."""
    reader, owner = pair
    read = post_and_hang(reader, owner)
    number = next(iter(_link(reader, owner).requests))
    lie(owner, kind, number, body)
    assert settled(read) == [HandleState.FAILED]
    assert f"request {number}" in str(read.error)
    assert reader.nccl.made[-1].aborted


@pytest.mark.parametrize(
    ("body", "why"), [(bytes(9), "9 bytes"), (bytes(16), "other generations than asked for")]
)
def test_generations_of_another_number_fail_the_fence(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Worker, Worker], body: bytes, why: str
) -> None:
    reader, owner = pair
    monkeypatch.setattr(messages, "pack_generations", lambda generations: body)
    fence = reader.transport.read_generations(owner.incarnation, [1], b"")
    assert settled(fence) == [HandleState.FAILED]
    assert why in str(fence.error)


# Who may ask.


def test_another_clusters_key_is_refused_by_both(pair: tuple[Worker, Worker]) -> None:
    _, owner = pair
    with pytest.raises(TransferFailed, match="does not know this cluster's key"):
        Reader(owner, key=b"another cluster's")
    stranger = Pool("nccl", cluster_key=b"another cluster's")
    with pytest.raises(TransferFailed, match="does not know this cluster's key"):
        stranger.transport.add_peer(
            owner.incarnation, owner.transport.info(), NUM_BLOCKS, BLOCK_BYTES
        )
    stranger.close()
    until(lambda: owner.links == 1)


def test_a_listener_asks_for_the_proof(pair: tuple[Worker, Worker]) -> None:
    """A dialer that skips it, or sends a wrong one, gets nothing."""
    _, owner = pair

    class Trusting(Channel):
        def _proves(self, mac: bytes, role: bytes) -> bool:
            return True

    (_, address), _ = messages.parse_info(owner.transport.info(), owner.incarnation)
    sock = socket.create_connection(address[:2], timeout=WAIT_S)
    sock.setblocking(False)
    wicked = Trusting(sock, b"a guess", new_incarnation(), owner.incarnation)
    wicked.send(Kind.FENCE, 7, messages.pack_fence(b"ticket", [3]))
    with pytest.raises(TransferFailed, match="does not know this cluster's key"):
        until(lambda: wicked.pump())
    assert owner.transport.notifications() == []


def test_an_address_that_is_another_workers_now_is_refused(pair: tuple[Worker, Worker]) -> None:
    reader, owner = pair
    gone = new_incarnation()
    info = owner.transport.info().replace(owner.incarnation, gone)
    with pytest.raises(TransferFailed, match=f"now that of {owner.incarnation.hex()}"):
        reader.transport.add_peer(gone, info, NUM_BLOCKS, BLOCK_BYTES)
    assert settled(reader.transport.read_blocks(gone, [0], [0])) == [HandleState.FAILED]


def test_strangers_are_few_and_do_not_stay(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Worker, Worker]
) -> None:
    monkeypatch.setattr(nccl_link, "HANDSHAKE_S", 1.5)
    reader, owner = pair
    (_, address), _ = messages.parse_info(owner.transport.info(), owner.incarnation)
    silent = [socket.create_connection(address[:2]) for _ in range(80)]
    noisy = socket.create_connection(address[:2])
    noisy.send(b"GET / HTTP/1.1\r\n\r\n" * 100)
    until(lambda: owner.links > 30)
    assert owner.links <= 65
    assert reader.reads_again(owner)
    until(lambda: owner.links == 1)
    for each in (*silent, noisy):
        each.close()


def test_a_key_is_needed() -> None:
    with pytest.raises(TransferFailed, match="key"):
        Pool("nccl", cluster_key=b"")


def test_without_cupy_it_says_what_to_install() -> None:
    if importlib.util.find_spec("cupy") is not None:
        pytest.skip("cupy is installed here")
    buffer, generations, close = allocate("nccl", 4096, 1)
    memory = PoolMemory(buffer.ctypes.data, 1, 4096, generations)
    with pytest.raises(TransferFailed, match=r"crossdock\[gpu\]"):
        create_transport("nccl", new_incarnation(), memory, cluster_key=KEY)
    close()


# What a read is made of.


def test_one_receive_for_each_run(pair: tuple[Worker, Worker]) -> None:
    reader, owner = pair
    posted = []
    joined = reader.nccl.made[-1]
    post = joined.post

    def watched(peer, *, send=(), recv=()):  # type: ignore[no-untyped-def]
        posted.append([nbytes // BLOCK_BYTES for _, nbytes in recv])
        return post(peer, send=send, recv=recv)

    joined.post = watched  # type: ignore[method-assign]
    remote, local = [30, 31, 32, 5, 6, 50], [10, 11, 12, 20, 21, 22]
    assert settled(reader.read(owner, remote, local)) == [HandleState.DONE]
    assert posted == [merge_runs(remote, local).length.tolist()] == [[2, 3, 1]]


def test_waiting_costs_no_cpu(pair: tuple[Worker, Worker]) -> None:
    before, start = time.process_time(), time.monotonic()
    threading.Event().wait(0.5)
    assert (time.process_time() - before) / (time.monotonic() - start) < 0.1


def test_both_may_read_from_each_other(pair: tuple[Worker, Worker]) -> None:
    reader, owner = pair
    owner.meet(reader)
    there, back = reader.read(owner, [1], [40]), owner.read(reader, [2], [41])
    assert settled(there, back) == [HandleState.DONE, HandleState.DONE]
    assert reader.holds(owner, 1, 40)
    assert owner.holds(reader, 2, 41)
