"""In NCCL's place where there is no GPU: communicators over sockets, for host memory of one host.

It keeps what the transport must cope with: nothing moves unless both ranks post, groups run in the
order they were posted in, a peer that is gone is an error, one that stands still is none, and
after an abort memory is touched no more once it is `quiet`.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections import deque
from collections.abc import Sequence

from crossdock.kvtransfer.nccl.communicator import UNIQUE_ID_BYTES, Span
from crossdock.kvtransfer.transport import PoolMemory
from crossdock.proto.errors import TransferFailed

_PORT = struct.Struct("<H")
_MOST_BYTES = 4 << 20  # moved in one look


class FakeCommunicators:
    """See Communicators. Scripted faults, for all it makes: `fault` breaks them at their next
    look, `apart` lets no ranks meet, `stuck` moves nothing, `noisy` is not quiet after an abort."""

    def __init__(self) -> None:
        self.fault: str | None = None
        self.apart = False
        self.stuck = False
        self.noisy = False
        self.made: list[FakeCommunicator] = []
        self._listeners: dict[bytes, socket.socket] = {}

    def open(self, memory: PoolMemory) -> None:
        if memory.memory_type != "DRAM":
            raise TransferFailed("the fake of NCCL moves host memory only")

    def unique_id(self) -> bytes:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        unique_id = _PORT.pack(listener.getsockname()[1]).ljust(UNIQUE_ID_BYTES, b"\0")
        self._listeners[unique_id] = listener
        return unique_id

    def join(self, unique_id: bytes, rank: int, ranks: int = 2) -> FakeCommunicator:
        listener = self._listeners.pop(unique_id, None)
        if ranks == 1:
            made = FakeCommunicator(self, listener, None)
        elif rank == 0:
            made = FakeCommunicator(self, listener, None, alone=False)
        else:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.connect_ex(("127.0.0.1", _PORT.unpack_from(unique_id)[0]))
            made = FakeCommunicator(self, None, sock, alone=False)
        self.made.append(made)
        return made


class _Operation:
    def __init__(self, communicator: FakeCommunicator, spans: int) -> None:
        self.communicator, self.left = communicator, spans

    def done(self) -> bool:
        if self.left:
            self.communicator.ready()
        return self.left == 0


class FakeCommunicator:
    """See Communicator. The connection's two directions are the two ranks' sends."""

    def __init__(
        self,
        owner: FakeCommunicators,
        listener: socket.socket | None,
        sock: socket.socket | None,
        *,
        alone: bool = True,
    ) -> None:
        self.aborted = False
        self._owner, self._listener, self._socket, self._alone = owner, listener, sock, alone
        self._sends: deque[tuple[memoryview, _Operation]] = deque()
        self._recvs: deque[tuple[memoryview, _Operation]] = deque()

    def ready(self) -> bool:
        if self._owner.fault is not None or self.aborted:
            raise TransferFailed(self._owner.fault or "aborted")
        if self._owner.apart:
            return False
        if self._owner.stuck:
            return self._socket is not None or self._alone
        if self._alone:
            self._to_itself()
            return True
        try:
            return self._met() and self._move()
        except OSError as error:
            raise TransferFailed(f"rank lost: {error}") from error

    def post(
        self, peer: int, *, send: Sequence[Span] = (), recv: Sequence[Span] = ()
    ) -> _Operation:
        operation = _Operation(self, len(send) + len(recv))
        self._sends.extend((_view(span), operation) for span in send)
        self._recvs.extend((_view(span), operation) for span in recv)
        return operation

    def abort(self) -> None:
        self.aborted = True
        self._sends.clear()
        self._recvs.clear()
        for each in (self._socket, self._listener):
            if each is not None:
                each.close()

    def quiet(self) -> bool:
        return not self._owner.noisy

    def _met(self) -> bool:
        if self._socket is None:
            assert self._listener is not None
            try:
                self._socket, _ = self._listener.accept()
            except BlockingIOError:
                return False
            self._socket.setblocking(False)
        elif self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError("nobody there")
        return True

    def _move(self) -> bool:
        assert self._socket is not None
        budget = _MOST_BYTES
        try:
            while self._sends and budget > 0:
                budget -= self._advance(self._sends, self._socket.send(self._sends[0][0]))
        except BlockingIOError:
            pass
        try:
            while self._recvs and budget > 0:
                count = self._socket.recv_into(self._recvs[0][0])
                if count == 0:
                    raise OSError("it is gone")
                budget -= self._advance(self._recvs, count)
        except BlockingIOError:
            pass
        return True

    def _to_itself(self) -> None:
        while self._sends and self._recvs:
            source, target = self._sends[0][0], self._recvs[0][0]
            assert len(source) == len(target), "NCCL would hang"
            target[:] = source
            self._advance(self._sends, len(source))
            self._advance(self._recvs, len(target))

    def _advance(self, queue: deque[tuple[memoryview, _Operation]], count: int) -> int:
        view, operation = queue[0]
        if count == len(view):
            queue.popleft()
            operation.left -= 1
        else:
            queue[0] = (view[count:], operation)
        return count


def _view(span: Span) -> memoryview:
    address, nbytes = span
    return memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")
