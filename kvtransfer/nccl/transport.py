"""KV transfer over NCCL, for clusters without RDMA: one communicator of two for each pair.

NCCL is two-sided, so a reader asks: for blocks, and once they are here for their generations, with
its release in the same message. The messages go over TCP (channel.py), the blocks over the pair's
communicator, which is made at the first read (link.py).

Unlike NIXL's, these transfers can be ended. A lost connection, an error of NCCL, or a request that
is a minute old, aborts the pair's communicator; once its stream is empty, the blocks are touched no
more and the handles are FAILED. The next read of that peer connects anew.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crossdock.kvtransfer.nccl import messages
from crossdock.kvtransfer.nccl.channel import Channel, Frame, Kind
from crossdock.kvtransfer.nccl.communicator import Communicators, Span
from crossdock.kvtransfer.nccl.link import OWNER, READER, Link, Rank, Request
from crossdock.kvtransfer.regions import Ints, RegionTable, Runs, merge_runs
from crossdock.kvtransfer.threaded import (
    Peer,
    ThreadedTransport,
    polling_pause,
    reason_of,
    wait_for,
)
from crossdock.kvtransfer.transport import Generations, Handle, PoolMemory
from crossdock.proto.errors import TransferFailed

log = logging.getLogger(__name__)

_MEET_S = 6.0  # for the other end to be there, when a peer is added
_RETRY_S = 0.25  # a peer that was lost is not dialed again sooner
_MAX_STRANGERS = 64  # connections that have not said yet who they are
_CLOSE_S = 1.0  # for aborted transfers to leave the stream

_abandoned: list[object] = []  # what a stream still used when its transport was closed


@dataclass(eq=False)
class _Peer(Peer):
    """Its link comes and goes."""

    address: messages.Address
    link: Link | None = None
    lost: str = ""
    retry_at: float = 0.0


class NcclTransport(ThreadedTransport[_Peer]):
    """See transport.Transport. Needs GPU memory, and peers on other GPUs.

    key: the cluster's; both ends of a connection prove that they know it. host: where peers reach
    this worker. communicators: NCCL's, or a fake.
    """

    def __init__(
        self,
        incarnation: bytes,
        memory: PoolMemory,
        *,
        key: bytes,
        host: str = "127.0.0.1",
        communicators: Communicators | None = None,
    ) -> None:
        if not key:
            raise TransferFailed("the nccl transport needs the cluster's key")
        super().__init__(f"nccl-{incarnation.hex()[:8]}")
        self._incarnation, self._memory = incarnation, memory
        self._table = RegionTable(memory.regions)
        self._key, self._host = key, host
        self._communicators = communicators or communicators_of_nccl()
        self._listener: socket.socket | None = None
        self._links: dict[Link, int] = {}  # all, with what the selector watches for
        self._ending: list[tuple[Link, str]] = []  # aborted, not quiet yet
        self._busy_since = 0.0
        self._start()

    def info(self) -> bytes:
        """Incarnation, blocks and their regions, and the TCP port where peers ask for reads."""
        assert self._listener is not None
        port = self._listener.getsockname()[1]
        return messages.pack_info(self._incarnation, self._memory, self._host, port)

    def add_peer(self, incarnation: bytes, info: bytes, num_blocks: int, block_bytes: int) -> None:
        """Connects and waits for an answer. Raises TransferFailed: none came, or blocks differ."""
        super().add_peer(incarnation, info, num_blocks, block_bytes)
        try:
            nothing = self.read_generations(incarnation, [], b"")
            wait_for(nothing, _MEET_S, f"peer {incarnation.hex()} cannot be reached")
        except TransferFailed:
            self.remove_peer(incarnation)
            raise

    def warm(self, incarnation: bytes, timeout_s: float = 5.0) -> float:
        """Makes the pair's communicator, too."""
        start, nothing = time.perf_counter(), merge_runs([], [])
        handle = self._submit(lambda made: self._read(made, self._peer(incarnation), nothing))
        wait_for(handle, timeout_s, f"warming up {incarnation.hex()}")
        return time.perf_counter() - start + super().warm(incarnation, timeout_s)

    # On the transport's thread: peers.

    def _open(self) -> None:
        self._communicators.open(self._memory)
        family, address = messages.resolve(self._host, 0)
        self._listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(address)
        self._listener.listen(128)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def _described(self, incarnation: bytes, info: bytes) -> _Peer:
        address, num_blocks, regions = messages.parse_info(info, incarnation)
        return _Peer(incarnation, num_blocks, regions, address)

    def _add(self, peer: _Peer) -> None:
        known = self._peers.get(peer.incarnation)
        told = (peer.address, peer.num_blocks, peer.regions)
        if known and (known.address, known.num_blocks, known.regions) == told:
            known.removed, known.retry_at = False, 0.0
            return
        if known and known.link is not None:
            self._end(known.link, "the peer is described anew")
        self._peers[peer.incarnation] = peer

    def _settle_peer(self, peer: _Peer) -> None:
        if peer.removed and (peer.link is None or peer.link.idle):
            self._peers.pop(peer.incarnation, None)
            if peer.link is not None:
                self._end(peer.link, "not needed any more")

    def _check_peer(self, peer: _Peer) -> None:
        if peer.link is None and time.monotonic() < peer.retry_at:
            raise TransferFailed(f"peer {peer.name} is lost: {peer.lost}")

    def _link(self, peer: _Peer) -> Link:
        if peer.link is None:
            family, address = peer.address
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.connect_ex(address)
            channel = Channel(sock, self._key, self._incarnation, peer.incarnation)
            peer.link = self._watch(channel, READER)
        return peer.link

    def _watch(self, channel: Channel, rank: Rank) -> Link:
        sock = channel.socket
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A host that is gone without a word is noticed within seconds.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)
        link = Link(channel, rank, self._communicators, time.monotonic())
        self._links[link] = selectors.EVENT_READ
        self._selector.register(sock, selectors.EVENT_READ, data=link)
        return link

    def _end(self, link: Link, reason: str) -> None:
        """The one way out of a link. Its handles fail when their blocks are touched no more."""
        if self._links.pop(link, None) is None:
            return
        log.info("link with %s ended: %s", (link.channel.peer or b"").hex() or "a stranger", reason)
        self._selector.unregister(link.channel.socket)
        link.channel.close(reason)
        peer = self._peers.get(link.channel.peer or b"")
        if peer is not None and peer.link is link:
            peer.link, peer.lost, peer.retry_at = None, reason, time.monotonic() + _RETRY_S
            self._settle_peer(peer)
        try:
            link.abort()
        except Exception as error:
            log.warning("aborting a communicator: %s", reason_of(error))
        if not self._ended(link, reason):
            self._ending.append((link, reason))

    def _ended(self, link: Link, reason: str) -> bool:
        if not link.quiet:
            return False
        for request in link.requests.values():
            self._fail(request.handle, reason)
        link.requests.clear()
        return True

    # On the transport's thread: what this worker asks.

    def _read(self, handle: Handle, peer: _Peer, runs: Runs) -> None:
        """Asks the owner, and posts the receives once it says that it sends. Without runs it is
        the communicator alone that is made."""

        def done(_: Generations | None) -> None:
            if len(runs):
                self._end_read(handle, runs)
            else:
                self._finish(handle)

        request = Request(handle, done, self._spans(runs.region, runs.local, runs.length))
        self._link(peer).ask(request, Kind.READ, messages.pack_read(runs), time.monotonic())

    def _fence(self, handle: Handle, peer: _Peer, remote_ids: Sequence[int], notify: bytes) -> None:
        """Asks over TCP; the owner's thread answers with the counters as they stand then."""
        body = messages.pack_fence(notify, remote_ids)

        def done(generations: Generations | None) -> None:
            if generations is None or len(generations) != len(remote_ids):
                self._fail(handle, "the peer answered with other generations than asked for")
            else:
                self._end_fence(handle, generations)

        self._link(peer).ask(Request(handle, done), Kind.FENCE, body, time.monotonic())

    def _spans(self, region: Ints, first: Ints, length: Ints) -> list[Span]:
        """Address and bytes of runs of this pool."""
        address, nbytes = self._table.spans(region, first, length)
        return list(zip(address.tolist(), nbytes.tolist()))

    # On the transport's thread: frames.

    def _take(self, link: Link, frame: Frame) -> None:
        """Raises TransferFailed for what only a broken peer sends."""
        kind, number, body = frame
        if link.rank == OWNER:
            try:
                self._serve(link, frame)
            except ValueError as error:
                link.channel.send(Kind.REFUSED, number, str(error).encode())
        elif kind == Kind.SENDING:
            link.receive(number)
        elif kind == Kind.GENERATIONS:
            generations = messages.parse_generations(body)
            link.answered(number).done(generations)
        elif kind == Kind.REFUSED:
            reason = body.decode(errors="replace")
            self._fail(link.refused(number).handle, f"the peer refused: {reason}")
        else:
            raise TransferFailed(f"the owner of the blocks sent a message of kind {kind}")

    def _serve(self, link: Link, frame: Frame) -> None:
        """Raises ValueError for what the pool does not have."""
        kind, number, body = frame
        if kind == Kind.MEET:
            link.meet(body, time.monotonic())
        elif kind == Kind.READ:
            memory = self._memory
            runs = messages.parse_read(body, memory.num_blocks, memory.regions)
            link.give(number, self._spans(*runs), time.monotonic())
        elif kind == Kind.FENCE:
            notify, ids = messages.parse_fence(body, self._memory.num_blocks)
            found = messages.pack_generations(self._memory.generations[ids])
            if notify:
                self._notified(notify)
            link.channel.send(Kind.GENERATIONS, number, found)
        else:
            raise TransferFailed(f"the reader sent a message of kind {kind}")

    # On the transport's thread: turning.

    def _readable(self, key: selectors.SelectorKey) -> None:
        if isinstance(key.data, Link):
            self._attempt(self._pump, key.data)
        elif self._listener is not None:
            self._accept(self._listener)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            strangers = sum(not link.channel.established for link in self._links)
            if strangers >= _MAX_STRANGERS:
                sock.close()
                return
            sock.setblocking(False)
            self._watch(Channel(sock, self._key, self._incarnation), OWNER)

    def _attempt(self, step: Callable[[Link], None], link: Link) -> None:
        """Whatever goes wrong with a link ends that link alone."""
        if link in self._links:
            try:
                step(link)
            except Exception as error:
                self._end(link, reason_of(error))

    def _pump(self, link: Link) -> None:
        for frame in link.channel.pump():
            self._take(link, frame)
            self._busy_since = time.perf_counter()

    def _advance(self, link: Link) -> None:
        link.advance(time.monotonic())
        if link.channel.wants_to_write:
            self._pump(link)
            link.advance(time.monotonic())  # an answer may have come at once
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE * link.channel.wants_to_write)
        if events != self._links[link]:
            self._links[link] = events
            self._selector.modify(link.channel.socket, events, data=link)
        peer = self._peers.get(link.channel.peer or b"")
        if peer is not None and peer.link is link:
            self._settle_peer(peer)

    def _progress(self) -> float | None:
        for link in list(self._links):
            self._attempt(self._advance, link)
        self._ending = [each for each in self._ending if not self._ended(*each)]
        if self._ending or any(link.moving for link in self._links):
            return polling_pause(time.perf_counter() - self._busy_since)
        due = min((link.due for link in self._links if link.due is not None), default=None)
        return None if due is None else max(0.001, due - time.monotonic())

    def _in_flight(self) -> int:
        return len(self._ending) + sum(link.moving for link in self._links)

    def _shut(self) -> None:
        for link in list(self._links):
            self._end(link, "transport is closed")
        end = time.monotonic() + _CLOSE_S
        while self._ending and time.monotonic() < end:
            self._ending = [each for each in self._ending if not self._ended(*each)]
            time.sleep(0.001)
        if self._ending:
            log.error("%d aborted transfers never left the GPU", len(self._ending))
            _abandoned.append((self._memory, self._ending))
        for link, reason in self._ending:
            for request in link.requests.values():
                self._fail(request.handle, reason)
        if self._listener is not None:
            self._listener.close()


def communicators_of_nccl() -> Communicators:
    """Those of the installed NCCL. Raises TransferFailed where cupy is missing."""
    try:
        from crossdock.kvtransfer.nccl.cupy import CupyCommunicators
    except ImportError as error:
        raise TransferFailed(
            f"the nccl transport needs cupy (pip install 'crossdock[gpu]'): {error}"
        ) from error
    return CupyCommunicators()
