"""What is sent and received on the streams of one connection, within the peer's windows."""

from __future__ import annotations

import asyncio
from collections import deque

from crossdock.proto.http2 import frames
from crossdock.proto.http2.frames import (
    FIRST_WINDOW,
    FRAME_BYTES,
    MAX_WINDOW,
    MESSAGE_BYTES,
    Code,
    ConnectionFault,
    Kind,
    StreamFault,
)
from crossdock.router.frontdoor.http2.bounds import (
    CONTROL_BYTES,
    QUEUED_BYTES,
    ROOM_S,
    UNSENT_BYTES,
    WINDOW_BYTES,
    Held,
)


class Unread(Exception):
    """A client makes no room for what it asked for."""


class Outbox:
    """Bytes of one connection on their way: all that a turn of the loop gives is one write."""

    __slots__ = (
        *("_blocked", "_loop", "_parts", "_scheduled", "_shut", "_transport"),
        *("first_head", "first_window", "paused", "sent", "size", "window"),
    )

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.window = FIRST_WINDOW  # of the connection
        self.first_window = FIRST_WINDOW  # of new streams
        self.paused = False  # the client does not read
        self.sent = 0  # frames of streams, ever
        self.first_head = b""  # what the next head begins with
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []
        self.size = 0  # bytes of this turn
        self._scheduled = False
        self._shut = False
        self._blocked: dict[Stream, None] = {}  # with something to send and no room for it

    def add(self, data: bytes) -> None:
        """Sends it with whatever else this turn gives."""
        self._parts.append(data)
        self.size += len(data)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.flush)

    def head(self, stream_id: int, block: bytes, end: bool) -> None:
        """Sends a head or trailers."""
        self.sent += 1
        self.add(frames.headers(stream_id, self.first_head + block, end))
        self.first_head = b""

    def flush(self) -> None:
        """Sends what is there. A client that asks on without reading the answers is cut off."""
        self._scheduled = False
        parts, self._parts, self.size = self._parts, [], 0
        if parts and not (self._shut or self._transport.is_closing()):
            self._transport.write(b"".join(parts))
            if self.paused and self._transport.get_write_buffer_size() > CONTROL_BYTES:
                self._transport.abort()
        self.pump()

    def shut(self) -> None:
        """Sends what is there, and nothing from now on."""
        self.flush()
        self._shut = True

    @property
    def full(self) -> bool:
        """This turn has given enough: the rest goes with the next, so that others run."""
        return self.size >= UNSENT_BYTES

    def pause(self) -> None:
        """The client does not read."""
        self.paused = True

    def resume(self) -> None:
        """It does again."""
        self.paused = False
        self.pump()

    def widen(self, increment: int) -> None:
        """The peer takes more on the connection. Raises ConnectionFault."""
        self.window += increment
        if increment == 0 or self.window > MAX_WINDOW:
            code = Code.FLOW_CONTROL_ERROR if increment else Code.PROTOCOL_ERROR
            raise ConnectionFault(code, f"the connection's window grows by {increment}")
        self.pump()

    def block(self, stream: Stream) -> None:
        """A stream has something to send that its own window has room for."""
        self._blocked[stream] = None
        self.pump()

    def unblock(self, stream: Stream) -> None:
        """It has not any more."""
        self._blocked.pop(stream, None)

    def pump(self) -> None:
        """Sends what there is room for, a frame of each stream in turn."""
        while self._blocked and self.window > 0 and not self.paused and not self.full:
            stream = next(iter(self._blocked))
            del self._blocked[stream]
            if stream.send_some():
                self._blocked[stream] = None


class Stream:
    """One stream, both ways. `held` counts what came and is not read; `limit` is that of a message,
    `length` what the client has said of its DATA."""

    def __init__(
        self, stream_id: int, out: Outbox, held: Held, limit: int, length: int | None = None
    ) -> None:
        self.id = stream_id
        self.window = out.first_window
        self.open = True  # for what is sent
        self.ended = False  # the client has said all
        self.failure: tuple[int, str] | None = None  # gRPC status of what the client sent wrong
        self._out, self._held, self._limit = out, held, limit
        self._unsent = bytearray()
        self._sent: asyncio.Future[None] | None = None
        self._room = WINDOW_BYTES  # that the client may use now
        self._due = length  # bytes of DATA, where it is known
        self._received = bytearray()
        self._messages: deque[tuple[bool, bytes]] = deque()
        self._arrived: asyncio.Future[None] | None = None
        self._owed = 0  # bytes for which the client gets room again
        self._waits_with = 0  # bytes that are held until the first message is here

    # -- what is sent -------------------------------------------------------------------------

    def offer(self, message: bytes) -> bool:
        """Sends a message where it can go now as one frame."""
        out, size = self._out, len(message) + MESSAGE_BYTES
        if size > self.window or size > out.window or size > FRAME_BYTES:
            return False
        if out.paused or out.size >= UNSENT_BYTES or self._unsent or not self.open:
            return False
        self.window -= size
        out.window -= size
        out.sent += 1
        out.add(frames.message_head(len(message), self.id) + message)
        return True

    async def send(self, message: bytes) -> None:
        """Sends a message, in parts as the client takes them; returns once it is on its way.
        Raises Unread where the client makes no room for it."""
        if self.offer(message) or not self.open:
            return
        self._unsent += b"\0" + len(message).to_bytes(4, "big") + message
        self._out.block(self)
        while self._unsent and self.open:
            self._sent, left = asyncio.get_running_loop().create_future(), len(self._unsent)
            try:  # wait_for would swallow a cancellation that comes with the stream's end
                async with asyncio.timeout(ROOM_S):
                    await self._sent
            except TimeoutError:
                if len(self._unsent) == left:
                    raise Unread(f"no room in its window for {ROOM_S:g} s") from None

    def send_some(self) -> bool:
        """Sends one frame of what is unsent; whether more may follow."""
        out, unsent = self._out, self._unsent
        if (size := min(len(unsent), self.window, out.window, FRAME_BYTES)) > 0:
            self.window -= size
            out.window -= size
            out.sent += 1
            out.add(frames.frame(Kind.DATA, 0, self.id, bytes(unsent[:size])))
            del unsent[:size]
        if unsent:
            return self.window > 0
        if self._sent is not None and not self._sent.done():
            self._sent.set_result(None)
        return False

    def finish(self, trailers: bytes) -> None:
        """Ends the stream by these trailers; by RST_STREAM where part of a message is unsent."""
        if not self.open:
            return
        self.open = False
        if self._unsent:
            self._out.add(frames.rst_stream(self.id, Code.CANCEL))
            return
        self._out.head(self.id, trailers, end=True)

    def widen(self, increment: int) -> None:
        """The client takes more. Raises StreamFault."""
        self.window += increment
        if increment == 0 or self.window > MAX_WINDOW:
            code = Code.FLOW_CONTROL_ERROR if increment else Code.PROTOCOL_ERROR
            raise StreamFault(code, self.id, f"its window grows by {increment}")
        if self._unsent:
            self._out.block(self)

    def move_window(self, change: int) -> None:
        """The first window of all streams was changed by so much. Raises ConnectionFault."""
        self.window += change
        if self.window > MAX_WINDOW:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, f"the window of stream {self.id}")
        if self._unsent and change > 0:
            self._out.block(self)

    # -- what is received ---------------------------------------------------------------------

    def wait(self, size: int) -> None:
        """A call of so many bytes waits for its first message, and they count as that does."""
        self._waits_with = size
        self._held.add(self, size)

    def receive(self, data: bytes, counted: int) -> None:
        """DATA came, that used `counted` bytes of the window. Raises StreamFault."""
        self._room -= counted
        if self._room < 0:
            raise StreamFault(Code.FLOW_CONTROL_ERROR, self.id, "more than its window")
        if self._due is not None:
            self._due -= len(data)
            if self._due < 0:
                raise StreamFault(Code.PROTOCOL_ERROR, self.id, "more than its content-length")
        self._owed += counted
        if self.failure is not None or not self.open:
            return
        self._received += data
        self._held.add(self, len(data))
        self._cut()
        self._make_room()

    def end(self) -> None:
        """The client has said all. Raises StreamFault."""
        self.ended = True
        if self._due:
            raise StreamFault(Code.PROTOCOL_ERROR, self.id, "less than its content-length")
        if self._received and self.failure is None:
            self.failure = 13, "the last message is not whole"
        self._wake()

    def fail(self, status: int, why: str) -> None:
        """What the client sent cannot be read on."""
        self.failure = self.failure or (status, why)
        self.drop()
        self._wake()

    def give_up(self) -> None:
        """See bounds.Holder."""
        self.fail(8, f"unread messages hold over {self._held.most} bytes")

    def drop(self) -> None:
        """Forgets what is not read."""
        queued = sum(len(data) + QUEUED_BYTES for _, data in self._messages)
        size = len(self._received) + queued + self._waits_with
        self._waits_with = 0
        self._received.clear()
        self._messages.clear()
        if size:
            self._held.add(self, -size)

    def close(self) -> None:
        """The stream is over, both ways."""
        self.open = False
        self._unsent.clear()
        self._out.unblock(self)
        self.drop()
        if self._sent is not None and not self._sent.done():
            self._sent.set_result(None)

    @property
    def has_message(self) -> bool:
        """One is here, or none will come."""
        return bool(self._messages) or self.ended or self.failure is not None

    async def heard(self) -> None:
        """Waits until there is a message, or it is known that none comes."""
        while not self.has_message:
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived

    async def message(self) -> tuple[bool, bytes] | None:
        """Whether the next message is compressed, and its bytes; None after the last one, and
        where `failure` says what is wrong."""
        await self.heard()
        if not self._messages:
            return None
        found = self._messages.popleft()
        self._held.add(self, -len(found[1]) - QUEUED_BYTES - self._waits_with)
        self._waits_with = 0
        self._make_room()
        return found

    def _cut(self) -> None:
        """Takes whole messages out of what came."""
        data, at, found = self._received, 0, 0
        wrong: tuple[int, str] | None = None
        while len(data) - at >= MESSAGE_BYTES:
            size, flag, start = frames.number(data, at + 1), data[at], at + MESSAGE_BYTES
            if flag > 1:
                wrong = 13, f"a message has the flag {flag}"
            elif size > self._limit:
                wrong = 8, f"a message of {size} bytes; at most {self._limit} are read"
            if wrong is not None or len(data) < start + size:
                break
            at = start + size
            found += 1
            self._messages.append((flag == 1, bytes(data[start:at])))
        if found:
            del data[:at]
            self._held.add(self, found * (QUEUED_BYTES - MESSAGE_BYTES))
            self._wake()
        if wrong is not None:
            self.fail(*wrong)

    def _make_room(self) -> None:
        """Lets the client send on, unless it has sent a message that nobody has read yet."""
        if self._owed > WINDOW_BYTES // 2 and not self._messages and not self.ended:
            self._out.add(frames.window_update(self.id, self._owed))
            self._room += self._owed
            self._owed = 0

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
