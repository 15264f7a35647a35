"""Pools on the nccl transport, over the fake of NCCL and its faults."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import numpy as np
from fake_nccl import FakeCommunicators
from transport_kit import (
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
from crossdock.kvtransfer.nccl.transport import NcclTransport
from crossdock.kvtransfer.ticket import new_incarnation
from crossdock.kvtransfer.transport import Handle, HandleState


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

    def __init__(self, seed: int = 0, layout: str = "block-major") -> None:
        self.seed = seed
        self.nccl = FakeCommunicators()
        self.pool = Pool("nccl", layout=layout, communicators=self.nccl)
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
        return np.array_equal(self.pool.block(local), content(owner.seed, remote))

    def reads_again(self, owner: Worker | ProcessPeer) -> bool:
        """Whether a read works, maybe after the pause before a lost peer is dialed again."""
        self.pool.clear()
        read = self.read(owner, [5], [0])
        return settled(read) == [HandleState.DONE] and self.holds(owner, 5, 0)


def post_and_hang(reader: Worker, owner: Worker) -> Handle:
    """A read whose receives are posted and move nothing."""
    reader.nccl.stuck = True
    read = reader.read(owner, [1, 2, 9], [10, 11, 12])
    until(lambda: any(made._recvs for made in reader.nccl.made))
    return read


def link_of(reader: Worker, owner: Worker) -> nccl_link.Link:
    link = reader.transport._peers[owner.incarnation].link
    assert link is not None
    return link


class Reader:
    """The reader's end of a channel, for messages that no transport sends."""

    def __init__(self, owner: Worker, key: bytes = KEY) -> None:
        (_, address), *_ = messages.parse_info(owner.transport.info(), owner.incarnation)
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


def lie(owner: Worker, kind: Kind, number: int, body: bytes = b"") -> None:
    def tell() -> None:
        for link in owner.transport._links:
            link.channel.send(kind, number, body)

    owner.transport._call(tell)
