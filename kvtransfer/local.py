"""KV transfer on one host: pools lie in shared memory, a reader copies from its peer's.

A pool is one file under /dev/shm. Its owner holds a lock on it for life, so a file that can be
locked by another belongs to nobody and is removed. Releases travel over a Unix socket in the
abstract namespace; when the kernel closes it, the peer is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import mmap
import os
import re
import secrets
import selectors
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crossdock.kvtransfer.threaded import ThreadedTransport
from crossdock.kvtransfer.transport import (
    Generations,
    Handle,
    PoolMemory,
    Runs,
    check_ids,
    merge_runs,
)
from crossdock.proto.errors import TransferFailed

_SHM = Path("/dev/shm")
_NAME = re.compile(r"crossdock-\d+-[0-9a-f]{32}")
_SLICE_BYTES = 4 << 20  # copied between two looks at commands and sockets
_CONNECT_TIMEOUT_S = 2.0
_MESSAGE_BYTES = 64


@dataclass(frozen=True)
class _Segment:
    """A pool of this process. The file holds the generations, then, on a page of its own, KV."""

    name: str
    fd: int
    kv_offset: int

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            (_SHM / self.name).unlink()
        with contextlib.suppress(OSError):
            os.close(self.fd)


_segments: dict[int, _Segment] = {}  # by the address of their first block


def allocate_segment(
    nbytes: int, num_blocks: int
) -> tuple[npt.NDArray[np.uint8], Generations, Callable[[], None]]:
    """See registry.allocate. Raises TransferFailed when /dev/shm has no room."""
    cleanup_stale()
    kv_offset = -(-num_blocks * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
    segment = _create_file(kv_offset + max(nbytes, 1), kv_offset)
    pages = mmap.mmap(segment.fd, kv_offset + max(nbytes, 1))
    generations = np.frombuffer(pages, dtype=np.int64, count=num_blocks)
    buffer = np.frombuffer(pages, dtype=np.uint8, count=nbytes, offset=kv_offset)
    address = buffer.ctypes.data
    _segments[address] = segment

    def close() -> None:
        if _segments.pop(address, None) is not None:
            segment.remove()
            # A view that somebody still has keeps the pages mapped until it goes.
            with contextlib.suppress(BufferError):
                pages.close()

    return buffer, generations, close


def cleanup_stale() -> list[str]:
    """Removes the pools of processes that are gone, and names them."""
    removed = []
    for path in _SHM.glob("crossdock-*"):
        if not _NAME.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path.name)
            finally:
                os.close(fd)
    return removed


def _create_file(nbytes: int, kv_offset: int) -> _Segment:
    """A file that is locked before it is linked anywhere, so that no janitor finds it unlocked."""
    fd = os.open(_SHM, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    name = f"crossdock-{os.getpid()}-{secrets.token_hex(16)}"
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.posix_fallocate(fd, 0, nbytes)  # a full /dev/shm is an error here, not a SIGBUS later
        _link(fd, _SHM / name)
    except OSError as error:
        os.close(fd)
        raise TransferFailed(
            f"no shared memory for a KV pool of {nbytes} bytes under {_SHM}: {error.strerror}"
        ) from error
    return _Segment(name, fd, kv_offset)


def _link(fd: int, path: Path) -> None:
    """Gives an O_TMPFILE file its name. Without the folder, os.link would not follow."""
    folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(str(fd), path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _remove_own() -> None:
    for segment in list(_segments.values()):
        if segment.name.startswith(f"crossdock-{os.getpid()}-"):
            segment.remove()


atexit.register(_remove_own)


@dataclass
class _Peer:
    incarnation: bytes
    connection: socket.socket
    generations: Generations  # int64 [num_blocks], the peer's own
    blocks: npt.NDArray[np.uint8]  # [num_blocks, block_bytes], the peer's own
    lost: bool = False
    unsent: deque[bytes] = field(default_factory=deque)  # releases that its socket had no room for


@dataclass
class _Copy:
    handle: Handle
    peer: _Peer
    runs: Runs
    run: int = 0
    offset: int = 0  # blocks of that run already copied
    nblocks: int = field(default=0)


class LocalTransport(ThreadedTransport):
    """See transport.Transport. Its memory has to come from `allocate_segment`."""

    def __init__(self, incarnation: bytes, memory: PoolMemory) -> None:
        super().__init__(f"local-{incarnation.hex()[:8]}")
        segment = _segments.get(memory.kv_ptr)
        if segment is None:
            raise TransferFailed("the local transport needs a KV pool in shared memory")
        self._incarnation = incarnation
        self._memory = memory
        self._own_blocks = memory.blocks()
        self._segment = segment
        self._peers: dict[bytes, _Peer] = {}
        self._copies: deque[_Copy] = deque()
        self._listener: socket.socket | None = None
        self._readers: set[socket.socket] = set()
        self._start()

    def info(self) -> bytes:
        """JSON: the shared segment, where its KV begins, number of blocks and bytes of each."""
        described = {
            "segment": self._segment.name,
            "kv_offset": self._segment.kv_offset,
            "num_blocks": self._memory.num_blocks,
            "block_bytes": self._memory.block_bytes,
        }
        return json.dumps(described).encode()

    def add_peer(self, incarnation: bytes, info: bytes, num_blocks: int, block_bytes: int) -> None:
        """Maps the peer's segment. Raises TransferFailed: gone, or its blocks differ in size."""
        if block_bytes != self._memory.block_bytes:
            raise TransferFailed(
                f"peer {incarnation.hex()} has blocks of {block_bytes} bytes, "
                f"here they have {self._memory.block_bytes}"
            )
        self._call(lambda: self._add(incarnation, info, num_blocks, block_bytes))

    def remove_peer(self, incarnation: bytes) -> None:
        """Closes the connection on the transport's thread; copies under way fail."""
        if not self._closing:
            self._enqueue(lambda: self._drop(incarnation, "peer was removed"))

    def read_blocks(
        self, incarnation: bytes, remote_ids: Sequence[int], local_ids: Sequence[int]
    ) -> Handle:
        """Copied on the transport's thread, some megabytes at a time, in turn with other reads."""
        handle = Handle()
        return self._submit(
            handle, lambda: self._begin_copy(handle, incarnation, remote_ids, local_ids)
        )

    def read_generations(
        self, incarnation: bytes, remote_ids: Sequence[int], notify: bytes
    ) -> Handle:
        """Reads the peer's counters, then sends `notify` to its socket."""
        handle = Handle()
        return self._submit(handle, lambda: self._fence(handle, incarnation, remote_ids, notify))

    # On the transport's thread.

    def _open(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        listener.bind(_address(self._incarnation))
        listener.listen(128)
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ)

    def _add(self, incarnation: bytes, info: bytes, num_blocks: int, block_bytes: int) -> None:
        known = self._peers.get(incarnation)
        if known is not None and not known.lost:
            return
        name, kv_offset = _parse_info(info, num_blocks, block_bytes)
        connection = _connect(incarnation)
        try:
            generations, blocks = _map_pool(name, kv_offset, num_blocks, block_bytes)
        except (OSError, ValueError) as error:
            connection.close()
            raise TransferFailed(
                f"peer {incarnation.hex()}: its pool cannot be mapped: {error}"
            ) from error
        self._peers[incarnation] = _Peer(incarnation, connection, generations, blocks)
        self._selector.register(connection, selectors.EVENT_READ, data=incarnation)

    def _drop(self, incarnation: bytes, reason: str) -> None:
        peer = self._peers.pop(incarnation, None)
        if peer is None:
            return
        peer.lost = True
        self._selector.unregister(peer.connection)
        peer.connection.close()
        for copy in [copy for copy in self._copies if copy.peer is peer]:
            self._copies.remove(copy)
            self._fail(copy.handle, reason)

    def _peer(self, incarnation: bytes) -> _Peer:
        peer = self._peers.get(incarnation)
        if peer is None:
            raise TransferFailed(f"peer {incarnation.hex()} is unknown")
        self._check_alive(peer)
        return peer

    def _check_alive(self, peer: _Peer) -> None:
        """A dead peer's memory stays readable: ask the kernel whether it still has an owner."""
        try:
            gone = not peer.connection.recv(_MESSAGE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            gone = False
        except OSError:
            gone = True
        if gone:
            self._drop(peer.incarnation, "peer is gone")
            cleanup_stale()
            raise TransferFailed("peer is gone")

    def _begin_copy(
        self,
        handle: Handle,
        incarnation: bytes,
        remote_ids: Sequence[int],
        local_ids: Sequence[int],
    ) -> None:
        peer = self._peer(incarnation)
        check_ids(remote_ids, len(peer.blocks), "remote")
        check_ids(local_ids, self._memory.num_blocks, "local")
        if len(remote_ids) == 0:
            self._finish(handle)
            return
        runs = merge_runs(remote_ids, local_ids)
        self._copies.append(_Copy(handle, peer, runs, nblocks=len(remote_ids)))

    def _fence(
        self, handle: Handle, incarnation: bytes, remote_ids: Sequence[int], notify: bytes
    ) -> None:
        peer = self._peer(incarnation)
        check_ids(remote_ids, len(peer.blocks), "remote")
        handle.generations = peer.generations[np.asarray(remote_ids, dtype=np.int64)]
        self._check_alive(peer)
        if notify:
            peer.unsent.append(notify)
            self._send(peer)
        self.stats.fences += 1
        self._finish(handle)

    def _send(self, peer: _Peer) -> None:
        """A peer that does not read now, since it is busy or stopped, gets the rest later."""
        try:
            while peer.unsent:
                peer.connection.send(peer.unsent[0], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                peer.unsent.popleft()
        except BlockingIOError:
            pass
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.unsent else 0)
        self._selector.modify(peer.connection, events, data=peer.incarnation)

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
        budget = max(1, _SLICE_BYTES // self._memory.block_bytes)
        while budget and copy.run < len(copy.runs):
            length = int(copy.runs.length[copy.run])
            count = min(budget, length - copy.offset)
            remote = int(copy.runs.remote[copy.run]) + copy.offset
            local = int(copy.runs.local[copy.run]) + copy.offset
            self._own_blocks[local : local + count] = copy.peer.blocks[remote : remote + count]
            budget -= count
            copy.offset += count
            if copy.offset == length:
                copy.run, copy.offset = copy.run + 1, 0
        return copy.run == len(copy.runs)

    def _end_copy(self, copy: _Copy) -> None:
        try:
            self._check_alive(copy.peer)
        except TransferFailed as error:
            self._fail(copy.handle, str(error))
            return
        self.stats.reads += 1
        self.stats.blocks += copy.nblocks
        self.stats.descriptors += len(copy.runs)
        self.stats.bytes += copy.nblocks * self._memory.block_bytes
        self._finish(copy.handle)

    def _readable(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._listener:
            self._accept()
        elif key.data is not None:
            peer = self._peers.get(key.data)
            if peer is not None:
                with contextlib.suppress(TransferFailed, OSError):
                    self._check_alive(peer)
                    self._send(peer)
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
        for incarnation in list(self._peers):
            self._drop(incarnation, "transport is closed")
        for end in [*self._readers, *([self._listener] if self._listener else [])]:
            end.close()


def _address(incarnation: bytes) -> str:
    """In the abstract namespace: it leaves no file behind, however its owner ends."""
    return f"\0crossdock-{incarnation.hex()}"


def _connect(incarnation: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_CONNECT_TIMEOUT_S)
        connection.connect(_address(incarnation))
        if _uid(connection) != os.getuid():
            raise TransferFailed(f"peer {incarnation.hex()} runs as another user")
        connection.setblocking(False)
    except OSError as error:
        connection.close()
        raise TransferFailed(
            f"peer {incarnation.hex()} cannot be reached: {error.strerror or error}"
        ) from error
    except TransferFailed:
        connection.close()
        raise
    return connection


def _uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


def _map_pool(
    name: str, kv_offset: int, num_blocks: int, block_bytes: int
) -> tuple[Generations, npt.NDArray[np.uint8]]:
    """The peer's generations and blocks, readable only."""
    fd = os.open(_SHM / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pages = mmap.mmap(fd, kv_offset + num_blocks * block_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    generations = np.frombuffer(pages, dtype=np.int64, count=num_blocks)
    blocks = np.frombuffer(pages, np.uint8, num_blocks * block_bytes, kv_offset)
    return generations, blocks.reshape(num_blocks, block_bytes)


def _parse_info(info: bytes, num_blocks: int, block_bytes: int) -> tuple[str, int]:
    """Segment name and offset of block 0. Raises TransferFailed for anything that is not that."""
    try:
        described = json.loads(info)
        name, kv_offset = str(described["segment"]), int(described["kv_offset"])
        counts = (int(described["num_blocks"]), int(described["block_bytes"]))
    except (ValueError, KeyError, TypeError) as error:
        raise TransferFailed("the peer's transport info is not the local transport's") from error
    if not _NAME.fullmatch(name) or kv_offset % mmap.PAGESIZE or kv_offset < num_blocks * 8:
        raise TransferFailed("the peer's transport info names no pool")
    if counts != (num_blocks, block_bytes):
        raise TransferFailed(
            f"the peer describes {num_blocks} blocks of {block_bytes} bytes, "
            f"its transport {counts[0]} of {counts[1]}"
        )
    return name, kv_offset
