"""What is the nccl transport's own: aborts and broken peers.

On the fake of NCCL, which can be told to hang, to fail, and to be busy still after an abort.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import threading
import time

import pytest
from fake_nccl import FakeCommunicators
from freeze import freeze
from nccl_kit import Reader, Worker, link_of, post_and_hang, settled, until
from transport_kit import (
    BLOCK_BYTES,
    KEY,
    ProcessPeer,
)

from crossdock.kvtransfer.nccl import link as nccl_link
from crossdock.kvtransfer.nccl.channel import Kind
from crossdock.kvtransfer.regions import merge_runs
from crossdock.kvtransfer.registry import allocate, create_transport
from crossdock.kvtransfer.ticket import new_incarnation
from crossdock.kvtransfer.transport import HandleState, PoolMemory
from crossdock.proto.errors import TransferFailed

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
    reader.transport._call(
        lambda: reader.transport._end(link_of(reader, owner), "an error of NCCL")
    )
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


def test_an_error_on_the_owners_side_fails_the_readers_handles(
    pair: tuple[Worker, Worker],
) -> None:
    reader, owner = pair
    owner.nccl.fault = "unhandled system error"
    read = reader.read(owner, [1], [10])
    assert settled(read) == [HandleState.FAILED]
    assert "unhandled system error" in str(read.error)  # it says why
    until(lambda: all(made.aborted for made in owner.nccl.made))  # soon after it said so
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
    until(lambda: owner.nccl.made[-1].aborted)


def test_a_lost_connection_aborts_both_sides(pair: tuple[Worker, Worker]) -> None:
    reader, owner = pair
    read = post_and_hang(reader, owner)
    link = link_of(reader, owner)
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
        freeze(peer.pid)
        read = reader.read(peer, list(range(32)), list(range(32)))
        fence = reader.transport.read_generations(peer.incarnation, [1], b"late")
        assert settled(read, fence) == [HandleState.FAILED, HandleState.FAILED]
        reader.pool.clear()  # their next owner's
        monkeypatch.undo()
        os.kill(peer.pid, signal.SIGCONT)
        until(lambda: reader.reads_again(peer))
        assert reader.pool.written() <= {0}
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


def test_the_link_to_a_removed_peer_ends_with_its_last_read(pair: tuple[Worker, Worker]) -> None:
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


def test_without_cupy_it_says_what_to_install() -> None:
    if importlib.util.find_spec("cupy") is not None:
        pytest.skip("cupy is installed here")
    buffer, generations, close = allocate("nccl", 4096, 1)
    memory = PoolMemory.block_major(buffer.ctypes.data, 1, 4096, generations)
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
