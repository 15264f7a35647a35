"""KV transfer on one host: a reader copies from its peer's pool, which lies in shared memory.
Releases travel over a Unix socket; when the kernel closes it, the peer is gone."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from crossdock.kvtransfer.regions import Runs
from crossdock.kvtransfer.shared_memory import NAME, cleanup_stale, file_of, map_pool
from crossdock.kvtransfer.threaded import Peer, ThreadedTransport
from crossdock.kvtransfer.transport import Generations, Handle, PoolMemory, Region
from crossdock.proto.errors import TransferFailed

_SLICE_BYTES = 4 << 20  # copied between two looks at commands and sockets
_CONNECT_TIMEOUT_S = 2.0
_MESSAGE_BYTES = 64


@dataclass(eq=False)
class _Peer(Peer):
    segment: str
    unsent: deque[bytes] = field(default_factory=deque)  # releases that its socket had no room for
    # Once it is connected, and its pool mapped:
    connection: socket.socket = field(init=False)
    generations: Generations = field(init=False)  # int64 [num_blocks], the peer's own
    views: tuple[npt.NDArray[np.uint8], ...] = field(init=False)  # of its blocks in each region


@dataclass(eq=False)
class _Copy:
    handle: Handle
    peer: _Peer
    runs: Runs
    run: int = 0
    offset: int = 0  # blocks of that run already copied


class LocalTransport(ThreadedTransport[_Peer]):
    """See transport.Transport. All regions of its memory lie in one `allocate_segment`."""

    def __init__(self, incarnation: bytes, memory: PoolMemory) -> None:
        super().__init__(f"local-{incarnation.hex()[:8]}")
        file = file_of(memory)
        if file is None:
            raise TransferFailed("the local transport needs a KV pool in shared memory")
        self._incarnation = incarnation
        self._memory = memory
        self._segment, self._regions = file
        self._copies: deque[_Copy] = deque()
        self._listener: socket.socket | None = None
        self._readers: set[socket.socket] = set()
        self._start()

    def info(self) -> bytes:
        """JSON: the shared segment, number of blocks, offset, stride and bytes of each region."""
        described = {
            "segment": self._segment,
            "num_blocks": self._memory.num_blocks,
            "regions": [(each.address, each.stride, each.nbytes) for each in self._regions],
        }
        return json.dumps(described).encode()

    # On the transport's thread.

    def _open(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        listener.bind(_address(self._incarnation))
        listener.listen(128)
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ)

    def _described(self, incarnation: bytes, info: bytes) -> _Peer:
        try:
            found = json.loads(info)
            name, num_blocks = str(found["segment"]), int(found["num_blocks"])
            regions = tuple(Region(*map(int, numbers)) for numbers in found["regions"])
        except (ValueError, KeyError, TypeError) as error:
            message = "the peer's transport info is not the local transport's"
            raise TransferFailed(message) from error
        offsets = [region.address for region in regions]
        if not NAME.fullmatch(name) or min(offsets, default=0) < num_blocks * 8:
            raise TransferFailed("the peer's transport info names no pool")
        return _Peer(incarnation, num_blocks, regions, name)

    def _add(self, peer: _Peer) -> None:
        if peer.incarnation in self._peers:
            return
        peer.connection = _connect(peer)
        try:
            peer.generations, peer.views = map_pool(peer.segment, peer.num_blocks, peer.regions)
        except (OSError, ValueError) as error:
            peer.connection.close()
            raise TransferFailed(f"peer {peer.name}: its pool cannot be mapped: {error}") from error
        self._peers[peer.incarnation] = peer
        self._selector.register(peer.connection, selectors.EVENT_READ, data=peer)

    def _settle_peer(self, peer: _Peer) -> None:
        self._drop(peer, "peer was removed")

    def _drop(self, peer: _Peer, reason: str) -> None:
        if self._peers.pop(peer.incarnation, None) is None:
            return
        self._selector.unregister(peer.connection)
        peer.connection.close()
        for copy in [copy for copy in self._copies if copy.peer is peer]:
            self._copies.remove(copy)
            self._fail(copy.handle, reason)

    def _check_peer(self, peer: _Peer) -> None:
        """A dead peer's memory stays readable: ask the kernel whether it still has an owner."""
        try:
            gone = not peer.connection.recv(_MESSAGE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            gone = False
        except OSError:
            gone = True
        if gone:
            self._drop(peer, "peer is gone")
            cleanup_stale()
            raise TransferFailed("peer is gone")

    def _read(self, handle: Handle, peer: _Peer, runs: Runs) -> None:
        self._copies.append(_Copy(handle, peer, runs))

    def _fence(self, handle: Handle, peer: _Peer, remote_ids: Sequence[int], notify: bytes) -> None:
        generations = peer.generations[np.asarray(remote_ids, dtype=np.int64)]
        self._check_peer(peer)
        if notify:
            peer.unsent.append(notify)
            self._send(peer)
        self._end_fence(handle, generations)

    def _send(self, peer: _Peer) -> None:
        """A peer that does not read now, since it is busy or stopped, gets the rest later."""
        try:
            while peer.unsent:
                peer.connection.send(peer.unsent[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                peer.unsent.popleft()
        except BlockingIOError:
            pass
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.unsent else 0)
        self._selector.modify(peer.connection, events, data=peer)

    def _progress(self) -> float | None:
        if not self._copies:
            return None
        copy = self._copies.popleft()
        if self._copy_slice(copy):
            self._end_copy(copy)
        else:
            self._copies.append(copy)
        return 0.0 if self._copies else None

    def _copy_slice(self, copy: _Copy) -> bool:
        """Copies some megabytes; True when all is copied."""
        budget = _SLICE_BYTES
        while budget > 0 and copy.run < len(copy.runs):
            length, region = int(copy.runs.length[copy.run]), int(copy.runs.region[copy.run])
            mine, theirs = self._memory.views[region], copy.peer.views[region]
            nbytes = self._memory.regions[region].nbytes
            count = min(max(1, budget // nbytes), length - copy.offset)
            remote = int(copy.runs.remote[copy.run]) + copy.offset
            local = int(copy.runs.local[copy.run]) + copy.offset
            mine[local : local + count] = theirs[remote : remote + count]
            budget -= count * nbytes
            copy.offset += count
            if copy.offset == length:
                copy.run, copy.offset = copy.run + 1, 0
        return copy.run == len(copy.runs)

    def _end_copy(self, copy: _Copy) -> None:
        try:
            self._check_peer(copy.peer)
        except TransferFailed as error:
            self._fail(copy.handle, str(error))
            return
        self._end_read(copy.handle, copy.runs)

    def _readable(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._listener:
            self._accept()
        elif isinstance(key.data, _Peer):
            with contextlib.suppress(TransferFailed, OSError):
                self._check_peer(key.data)
                self._send(key.data)
        elif isinstance(key.fileobj, socket.socket):
            self._receive(key.fileobj)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            reader, _ = self._listener.accept()
            if _uid(reader) != os.getuid():
                reader.close()
                return
            reader.setblocking(False)
            self._readers.add(reader)
            self._selector.register(reader, selectors.EVENT_READ)

    def _receive(self, reader: socket.socket) -> None:
        try:
            message = reader.recv(_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if message:
            self._notified(message)
        else:
            self._selector.unregister(reader)
            self._readers.discard(reader)
            reader.close()

    def _in_flight(self) -> int:
        return len(self._copies)

    def _shut(self) -> None:
        for peer in list(self._peers.values()):
            self._drop(peer, "transport is closed")
        for end in [*self._readers, *([self._listener] if self._listener else [])]:
            end.close()


def _address(incarnation: bytes) -> str:
    """In the abstract namespace: it leaves no file behind, however its owner ends."""
    return f"\0crossdock-{incarnation.hex()}"


def _connect(peer: _Peer) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_CONNECT_TIMEOUT_S)
        connection.connect(_address(peer.incarnation))
        if _uid(connection) != os.getuid():
            raise TransferFailed(f"peer {peer.name} runs as another user")
        connection.setblocking(False)
    except OSError as error:
        connection.close()
        reason = error.strerror or error
        raise TransferFailed(f"peer {peer.name} cannot be reached: {reason}") from error
    except TransferFailed:
        connection.close()
        raise
    return connection


def _uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)
