"""Links over gRPC: opens their streams and carries their frames. What they mean is links.py's."""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from crossdock.proto.channels import connect
from crossdock.proto.http2.client import ClientStream
from crossdock.proto.identity import Credentials
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.links import WorkerLink

log = logging.getLogger(__name__)

METHOD = "/crossdock.v1.Worker/Connect"
HELLO_TIMEOUT_S = 10.0  # from the first try to connect
MAX_FRAME_BYTES = 256 * 2**20  # a snapshot of a large prefix cache is one frame
MOST_TOGETHER_BYTES = 1 << 20  # of frames in one message
MOST_WAITING_BYTES = MAX_FRAME_BYTES  # of frames that the worker does not read
_MORE = bytes((pb.GatewayFrame.MORE_FIELD_NUMBER << 3 | 2,))  # of bytes with their length


class Dialer:
    """Makes the wires of one gateway. Called with a link, on the event loop."""

    def __init__(self, credentials: Credentials | None = None) -> None:
        self._credentials = credentials
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, link: WorkerLink) -> GrpcWire:
        wire = GrpcWire(link, self._credentials)
        self._tasks.add(wire.task)
        wire.task.add_done_callback(self._tasks.discard)
        return wire

    async def closed(self) -> None:
        """Returns once the streams of closed links have ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)


class GrpcWire:
    """See links.Wire. One task, which lives one stream after another; frames come and go by
    callbacks of the stream."""

    def __init__(self, link: WorkerLink, credentials: Credentials | None) -> None:
        self._link = link
        self._credentials = credentials
        self._stream: ClientStream | None = None
        self._greeted = False  # the hello is sent
        self._unanswered: asyncio.TimerHandle | None = None  # runs until the worker's hello comes
        self._outbox: deque[bytes] = deque()
        self._waiting = 0  # bytes of it
        self.task = asyncio.get_running_loop().create_task(self._run(), name=f"link-{link.name}")

    def send(self, frame: pb.GatewayFrame) -> None:
        if self._stream is None:
            return
        message = frame.SerializeToString()
        self._waiting += len(message)
        if self._waiting > MOST_WAITING_BYTES:
            self.cut(f"{self._waiting} bytes wait for the worker to read")
            return
        self._outbox.append(message)
        self._stream.wake()

    def cut(self, reason: str) -> None:
        if self._stream is not None:
            self._stream.end(reason)

    def close(self) -> None:
        self.task.cancel()
        self.cut("closed")

    # -- the stream's side --------------------------------------------------------------------

    def next_message(self) -> bytes | None:
        """The next frame to send, and as many after it: a message costs as much as what is in it.
        The hello goes alone."""
        if not self._greeted:
            self._greeted = True
            return self._link.hello.SerializeToString()
        if not self._outbox:
            return None
        first = self._outbox.popleft()
        parts, size = [first], len(first)
        while self._outbox and (size := size + len(self._outbox[0])) <= MOST_TOGETHER_BYTES:
            more = self._outbox.popleft()
            parts += (_MORE, _varint(len(more)), more)
            self._waiting -= len(more)
        self._waiting -= len(first)
        return b"".join(parts)

    def receive(self, message: bytes) -> None:
        """A frame of the worker."""
        if self._unanswered is not None:
            self._answered()
        try:
            over = self._link.receive(pb.WorkerFrame.FromString(message))
        except Exception as error:
            log.exception("worker %s: its stream could not be read", self._link.name)
            over = f"{type(error).__name__}: {error}"
        if over:
            self.cut(over)

    def _answered(self) -> None:
        if self._unanswered is not None:
            self._unanswered.cancel()
            self._unanswered = None

    # -- life -----------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            stream = ClientStream(METHOD, self, MAX_FRAME_BYTES)
            try:
                wait_s = self._link.ended(await self._live(stream))
                if wait_s is None:
                    return
                await asyncio.sleep(wait_s)
            finally:
                await stream.gone()

    async def _live(self, stream: ClientStream) -> str:
        """Lives one stream from connect to its end; the answer says why it ended."""
        loop = asyncio.get_running_loop()
        self._stream, self._greeted = stream, False
        late = f"no hello within {HELLO_TIMEOUT_S} s"
        self._unanswered = loop.call_later(HELLO_TIMEOUT_S, stream.end, late)
        connecting = loop.create_task(self._connect(stream))
        try:
            return await stream.over or "the worker closed the stream"
        finally:
            self._stream = None
            self._outbox.clear()
            self._waiting = 0
            self._answered()
            connecting.cancel()
            stream.end("closed")

    async def _connect(self, stream: ClientStream) -> None:
        member = self._link.endpoint
        try:
            await connect(stream, member.address, self._credentials, member.incarnation)
        except OSError as error:
            stream.end(f"UNAVAILABLE: {error}")
        except Exception as error:
            log.exception("worker %s at %s: cannot connect", member.name, member.address)
            stream.end(f"{type(error).__name__}: {error}")


def _varint(value: int) -> bytes:
    """A length as protobuf writes it."""
    made = bytearray()
    while value >= 128:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)
