"""Links over gRPC: opens their streams and carries their frames. What they mean is links.py's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import Any

import grpc

from crossdock.proto.channels import open_channel
from crossdock.proto.identity import Credentials
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.proto.v1 import worker_pb2_grpc
from crossdock.router.dispatch.links import WorkerLink

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0
KEEPALIVE_MS = 5000
MAX_FRAME_BYTES = 256 * 2**20  # a snapshot of a large prefix cache is one frame
MOST_TOGETHER_BYTES = 1 << 20  # of frames in one message
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
)


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
    """See links.Wire. One task, which lives one stream after another."""

    def __init__(self, link: WorkerLink, credentials: Credentials | None) -> None:
        self._link = link
        self._credentials = credentials
        self._call: Any = None
        self._cut = ""  # why we cancelled the call ourselves
        self._outbox: deque[pb.GatewayFrame] = deque()
        self._outbox_filled = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(self._run(), name=f"link-{link.name}")

    def send(self, frame: pb.GatewayFrame) -> None:
        if self._call is not None:
            self._outbox.append(frame)
            self._outbox_filled.set()

    def cut(self, reason: str) -> None:
        self._cut = reason
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        self.task.cancel()

    async def _run(self) -> None:
        while (wait_s := self._link.ended(await self._stream())) is not None:
            await asyncio.sleep(wait_s)

    async def _stream(self) -> str:
        """Lives one stream from connect to its end; the answer says why it ended."""
        self._cut = ""
        member = self._link.endpoint
        async with open_channel(
            member.address, self._credentials, member.incarnation, *CHANNEL_OPTIONS
        ) as channel:
            call = worker_pb2_grpc.WorkerStub(channel).Connect()
            self._call = call
            writer = asyncio.get_running_loop().create_task(self._write(call))
            try:
                return await self._read(call)
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"
            except TimeoutError:
                return f"no hello within {HELLO_TIMEOUT_S} s"
            except asyncio.CancelledError:
                if self._cut and not self.task.cancelling():
                    return self._cut
                raise
            except Exception as error:
                log.exception("worker %s: its stream could not be read", self._link.name)
                return f"{type(error).__name__}: {error}"
            finally:
                self._call = None
                self._outbox.clear()
                writer.cancel()
                call.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, call: Any) -> None:
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await call.write(self._link.hello)
            while True:
                while self._outbox:
                    await call.write(self._next_frame())
                self._outbox_filled.clear()
                await self._outbox_filled.wait()

    def _next_frame(self) -> pb.GatewayFrame:
        """The next to send, and as many after it: a message costs as much as what is in it."""
        first = self._outbox.popleft()
        size = first.ByteSize()
        while self._outbox and (size := size + self._outbox[0].ByteSize()) <= MOST_TOGETHER_BYTES:
            first.more.append(self._outbox.popleft())
        return first

    async def _read(self, call: Any) -> str:
        frame = await asyncio.wait_for(call.read(), HELLO_TIMEOUT_S)
        while frame is not grpc.aio.EOF:
            if over := self._link.receive(frame):
                return over
            frame = await call.read()
        return "the worker closed the stream"
