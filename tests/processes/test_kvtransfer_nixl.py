"""What is NIXL's own: transfers that hang, the price of being idle, settings passed to UCX."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from freeze import freeze
from transport_kit import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    WAIT_S,
    Pool,
    ProcessPeer,
    content,
    held,
    later,
)

from crossdock.kvtransfer import nixl, ucx
from crossdock.kvtransfer.memory import Scratch, spans_of
from crossdock.kvtransfer.pull import PullDone, Puller
from crossdock.kvtransfer.transport import Handle, HandleState
from crossdock.proto.errors import TransferFailed
from crossdock.proto.v1.worker_pb2 import PromptProgress

TCP = {"TLS": "tcp"}


class Bench:
    """This process's pool and one peer process, joined by TCP: reads need the peer's help."""

    def __init__(self) -> None:
        self.pool = Pool("nixl", ucx=TCP)
        self.transport = self.pool.transport
        self.news = threading.Event()
        self.transport.set_wakeup(self.news.set)
        self.peers: list[ProcessPeer] = []
        self.peer = self.spawn()

    def spawn(self) -> ProcessPeer:
        peer = ProcessPeer("nixl", len(self.peers) + 1, TCP)
        self.peers.append(peer)
        self.add(peer)
        return peer

    def add(self, peer: ProcessPeer) -> None:
        self.transport.add_peer(peer.incarnation, peer.info, NUM_BLOCKS, BLOCK_BYTES)
        self.transport.warm(peer.incarnation)

    def settled(self, *handles: Handle) -> None:
        end = time.monotonic() + WAIT_S
        while not all(handle.terminal for handle in handles):
            assert time.monotonic() < end, "nothing happened"
            self.news.wait(0.05)
            self.news.clear()

    def close(self) -> None:
        for peer in self.peers:
            peer.kill()
        self.pool.close()


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_ucx_settings_reach_ucx_and_not_the_environment(bench: Bench) -> None:
    assert "UCX_TLS" not in os.environ
    with pytest.raises(TransferFailed, match="did not start"):
        Pool("nixl", ucx={"TLS": "no_such_transport"})
    assert "UCX_TLS" not in os.environ


def test_settings_go_before_the_environment_and_that_before_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_TCP_KEEPCNT", "9")
    monkeypatch.setenv("UCX_TCP_KEEPIDLE", "9s")
    monkeypatch.delenv("UCX_TCP_SYN_CNT", raising=False)
    with ucx.environment({"TCP_KEEPIDLE": "7s", "TLS": "tcp"}):
        assert os.environ["UCX_TCP_KEEPIDLE"] == "7s"
        assert os.environ["UCX_TCP_KEEPCNT"] == "9"
        assert os.environ["UCX_TCP_SYN_CNT"] == ucx.DEFAULTS["TCP_SYN_CNT"]
        assert os.environ["UCX_TLS"] == "tcp"
    assert os.environ["UCX_TCP_KEEPIDLE"] == "9s"
    assert not {"UCX_TCP_SYN_CNT", "UCX_TLS"} & os.environ.keys()


def test_a_frozen_peer_holds_its_readers_blocks_until_it_is_over(bench: Bench) -> None:
    peer = bench.spawn()
    puller = Puller(bench.transport, bench.pool.memory, time.monotonic)
    ids = list(range(NUM_BLOCKS))
    bench.pool.clear()
    freeze(peer.pid)
    puller.start(
        "s",
        PromptProgress(ticket=peer.ticket(ids), ready_blocks=len(ids)),
        ids,
        ids,
        deadline=time.monotonic() + 0.2,
    )
    done: list[PullDone] = []
    while not puller.overdue():
        done += puller.poll()
        bench.news.wait(0.02)
    assert done == []
    assert held(puller) == [ids]
    bench.transport.remove_peer(peer.incarnation)  # no way to end it sooner: it would still write
    late = bench.transport.read_blocks(peer.incarnation, [0], [0])
    bench.settled(late)
    assert late.state is HandleState.FAILED
    assert puller.poll() == []

    os.kill(peer.pid, signal.SIGCONT)
    end = time.monotonic() + WAIT_S
    while not (done := puller.poll()) and time.monotonic() < end:
        bench.news.wait(0.02)
    assert done[0].error == "deadline passed"
    # Here the bytes came after all: whoever reused those blocks before had lost them.
    assert np.array_equal(bench.pool.block(7), content(peer.seed, 7))
    bench.pool.clear()
    bench.add(peer)
    assert not bench.pool.written()


def test_a_killed_peer_ends_what_hangs_on_it(bench: Bench) -> None:
    peer = bench.spawn()
    freeze(peer.pid)
    read = bench.transport.read_blocks(peer.incarnation, range(32), range(32))
    fence = bench.transport.read_generations(peer.incarnation, range(32), b"ticket")
    fine = bench.transport.read_blocks(bench.peer.incarnation, [1], [40])
    bench.settled(fine)
    assert fine.state is HandleState.DONE
    assert not read.terminal
    peer.kill()
    bench.settled(read, fence)
    assert (read.state, fence.state) == (HandleState.FAILED, HandleState.FAILED)
    assert "Disconnect" in str(read.error)
    again = bench.transport.read_blocks(peer.incarnation, [0], [0])
    bench.settled(again)
    assert "lost" in str(again.error)


def test_fences_wait_for_room_to_read_into(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    monkeypatch.setattr(nixl, "_SCRATCH_ENTRIES", 1)  # room for one fence of the whole pool
    pool = Pool("nixl", ucx=TCP)
    news = threading.Event()
    pool.transport.set_wakeup(news.set)
    try:
        peer = bench.peer
        pool.transport.add_peer(peer.incarnation, peer.info, NUM_BLOCKS, BLOCK_BYTES)
        handles = [
            pool.transport.read_generations(peer.incarnation, range(NUM_BLOCKS), b"")
            for _ in range(10)
        ]
        end = later()
        while not all(handle.terminal for handle in handles) and time.monotonic() < end:
            news.wait(0.05)
            news.clear()
        expected = list(range(100, 100 + NUM_BLOCKS))
        for handle in handles:
            assert handle.generations is not None
            assert handle.generations.tolist() == expected
    finally:
        pool.close()


def test_waiting_costs_no_cpu(bench: Bench) -> None:
    """Its progress thread spins on a whole core unless told otherwise."""

    def cpu_s() -> float:
        fields = Path(f"/proc/{bench.peer.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before, start = cpu_s(), time.monotonic()
    threading.Event().wait(0.5)
    assert (cpu_s() - before) / (time.monotonic() - start) < 0.3


def test_spans_hold_every_entry_wanted() -> None:
    for ids, gap, count in (
        ([9300, 5, 7, 9, 9200, 8], 128, 2),
        ([300, 5, 7, 9, 200, 8], 128, 1),
        ([3], 1, 1),
        (list(range(100, 200)), 128, 1),
        (list(range(0, 1000, 2)), 1, 500),
    ):
        spans = spans_of(ids, gap)
        laid = np.concatenate([np.arange(f, f + n) for f, n in zip(spans.first, spans.length)])
        assert laid[spans.places].tolist() == ids
        assert laid[spans.offset].tolist() == spans.first.tolist()
        assert len(spans.first) == count and len(laid) <= gap * len(ids)


def test_scratch_is_handed_out_and_merged_again() -> None:
    scratch = Scratch(10)
    first, second, third = scratch.take(4), scratch.take(4), scratch.take(2)
    assert first is not None and second is not None and third is not None
    assert (first, second, third) == (slice(0, 4), slice(4, 8), slice(8, 10))
    assert scratch.take(1) is None
    scratch.give_back(first)
    scratch.give_back(third)
    assert scratch.take(5) is None  # six entries are free, in two pieces
    scratch.give_back(second)
    assert scratch.take(10) == slice(0, 10)


def test_a_broken_connection_is_made_again(bench: Bench) -> None:
    """The peer lives, the link had an error: refused until a read of the transport's own, which
    no request asked for, came back over another connection."""
    transport, peer = bench.transport, bench.spawn()
    assert isinstance(transport, nixl.NixlTransport)

    def snap() -> None:
        known = transport._peers[peer.incarnation]
        transport._break(known, "the link went down")
        transport._settle_peer(known)

    transport._call(snap)
    refused = transport.read_blocks(peer.incarnation, [1], [0])
    bench.settled(refused)
    assert "lost: the link went down" in str(refused.error)
    end = later()
    while transport._peers[peer.incarnation].broken and time.monotonic() < end:
        threading.Event().wait(0.05)
    read = transport.read_blocks(peer.incarnation, [1], [0])
    bench.settled(read)
    assert read.state is HandleState.DONE
    assert np.array_equal(bench.pool.block(0), content(peer.seed, 1))
