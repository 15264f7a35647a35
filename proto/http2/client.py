"""gRPC's calling end: a connection with one stream of messages both ways, and nothing beside it.

new ──connection_made──> open ──trailers, reset, fault, loss, `end`──> ended
 └───────────────────── `end`, no connection ───────────────────────────────────┘
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from crossdock.proto.http2 import compression, frames
from crossdock.proto.http2.frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    FIRST_WINDOW,
    FRAME_BYTES,
    MAX_WINDOW,
    MESSAGE_BYTES,
    PREFACE,
    Code,
    ConnectionFault,
    Kind,
    Setting,
)
from crossdock.proto.http2.literals import block
from crossdock.proto.http2.status import of_reset, of_trailers, refused

STREAM = 1  # the only one
WINDOW_BYTES = 1 << 22  # that the peer may send before it hears that we have read
TURN_BYTES = 1 << 18  # of messages that are written before others have their turn
UNSENT_BYTES = 1 << 18  # that wait in the transport: beyond, messages wait with who has them
CONTROL_BYTES = 1 << 20  # the same, with answers to pings and settings: who asks on is cut off
LINGER_S = 1.0  # for what was written to leave, after the end
HELLO = (
    PREFACE
    + frames.settings(
        (
            (Setting.ENABLE_PUSH, 0),
            (Setting.INITIAL_WINDOW_SIZE, WINDOW_BYTES),
            (Setting.MAX_HEADER_LIST_SIZE, compression.HEAD_LIST_BYTES),
        )
    )
    + frames.window_update(0, WINDOW_BYTES - FIRST_WINDOW)
)


class Caller(Protocol):
    """Whose stream it is."""

    def next_message(self) -> bytes | None:
        """What is to be sent next; None: nothing now. Asked when there is room."""

    def receive(self, message: bytes) -> None:
        """A message came, in the turn of the loop in which it did."""


class ClientStream(asyncio.Protocol):
    """One call of a method (`path`), for as long as `over` is not done: that gets why it has ended,
    such as "UNAVAILABLE: …". `most` bytes of a message are taken. On the event loop."""

    __slots__ = (
        *("_block", "_block_flags", "_caller", "_connection_room", "_ended", "_first_window"),
        *("_frames", "_goaway", "_gone", "_loop", "_most", "_open", "_out", "_partial", "_path"),
        *("_paused", "_peer_done", "_room", "_settled", "_starved", "_stream_room", "_table"),
        *("_transport", "_unsent", "_waking", "_wanted", "over"),
    )

    def __init__(self, path: str, caller: Caller, most: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._path, self._caller, self._most = path, caller, most
        self.over: asyncio.Future[str] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._transport: Any = None
        self._frames = frames.Reader()
        self._table = compression.Table()
        self._settled = False  # the peer's settings have come
        self._open = False  # its head has come
        self._ended = False
        self._peer_done = False  # it sends no more
        self._goaway = ""  # what it said of the connection's end
        self._block: bytes | None = None  # of a head that is not whole
        self._block_flags = 0
        self._partial = bytearray()  # of messages
        self._wanted = MESSAGE_BYTES  # of them, before there is one
        self._room = WINDOW_BYTES  # that the peer may send, on the stream as on the connection
        self._out: list[bytes] = []
        self._unsent = memoryview(b"")  # of the message that is being sent
        self._first_window = FIRST_WINDOW
        self._stream_room = self._connection_room = FIRST_WINDOW  # that we may send
        self._starved = False  # of that: something may wait
        self._paused = False  # the transport is full
        self._waking: asyncio.Handle | None = None

    # -- its owner's side ---------------------------------------------------------------------

    def wake(self) -> None:
        """There is something to send: it is asked for once in this turn of the loop."""
        if self._waking is None and self._transport is not None and not self._ended:
            self._waking = self._loop.call_soon(self._flush)

    def end(self, reason: str, code: Code = Code.CANCEL) -> None:
        """Nothing comes after this; the peer is told by a reset. Only the first reason counts."""
        if self._ended:
            return
        self._ended = True
        if not self.over.done():  # its owner's wait may have been cancelled
            self.over.set_result(reason)
        if self._waking is not None:
            self._waking.cancel()
        if self._transport is None:
            self._gone.set_result(None)
        else:
            self._close(code)

    async def gone(self) -> None:
        """Returns once the connection of a stream that has ended is no more: LINGER_S at most."""
        await self._gone

    def _close(self, code: Code) -> None:
        if not self._peer_done and not self._transport.is_closing():
            self._transport.write(b"".join(self._out) + frames.rst_stream(STREAM, code))
        self._out.clear()
        self._unsent = memoryview(b"")
        self._transport.close()
        self._loop.call_later(LINGER_S, self._transport.abort)

    # -- the transport ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The peer is who was meant: what is to be said first is said."""
        self._transport = transport
        tls = transport.get_extra_info("ssl_object")
        if self._ended:
            self._transport.abort()
        elif tls is not None and tls.selected_alpn_protocol() != "h2":
            self._peer_done = True  # nothing was said to it, nor is now
            self.end("UNAVAILABLE: the peer speaks TLS, but not HTTP/2")
        else:
            self._transport.set_write_buffer_limits(high=UNSENT_BYTES)
            scheme = "http" if tls is None else "https"
            self._out += (HELLO, frames.headers(STREAM, self._head(scheme), end=False))
            self.wake()

    def _head(self, scheme: str) -> bytes:
        return block(
            (
                (":method", "POST"),
                (":scheme", scheme),
                (":path", self._path),
                (":authority", "crossdock"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                ("user-agent", "crossdock"),
            )
        )

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is no more."""
        self._peer_done = True
        why = self._goaway or str(error or "") or "the peer closed the connection"
        self.end(f"UNAVAILABLE: {why}")
        if not self._gone.done():
            self._gone.set_result(None)

    def pause_writing(self) -> None:
        """The transport is full."""
        self._paused = True

    def resume_writing(self) -> None:
        """It has room again."""
        self._paused = False
        self.wake()

    def data_received(self, data: bytes) -> None:
        """Bytes of the peer."""
        if self._ended:
            return
        if (message := self._lone_message(data)) is not None:
            self._caller.receive(message)
            return
        self._frames.feed(data)
        try:
            for kind, flags, stream_id, payload in self._frames.frames():
                self._take(kind, flags, stream_id, payload)
                if self._ended:
                    return
        except ConnectionFault as fault:
            self._out.append(frames.goaway(0, fault.code, str(fault)))
            self.end(f"INTERNAL: {fault.code.name}: {fault}", fault.code)
            return
        if self._out:
            self.wake()

    # -- what is sent -------------------------------------------------------------------------

    def _flush(self) -> None:
        """Writes what there is, as far as the windows and a turn reach, at once."""
        self._waking = None
        out, self._out = self._out, []
        if not self._paused:
            self._add_messages(out)
        if out:
            self._transport.write(b"".join(out))
        if self._paused and self._transport.get_write_buffer_size() > CONTROL_BYTES:
            self.end("RESOURCE_EXHAUSTED: the peer asks on and does not read the answers")

    def _add_messages(self, out: list[bytes]) -> None:
        left, self._starved = TURN_BYTES, False
        while (room := min(self._stream_room, self._connection_room, FRAME_BYTES)) > 0:
            if left <= 0:
                self.wake()
                return
            if not self._unsent:
                message = self._caller.next_message()
                if message is None:
                    return
                if (whole := len(message) + MESSAGE_BYTES) <= room:
                    out += (frames.message_head(len(message), STREAM), message)
                    left -= self._spent(whole)
                    continue
                self._unsent = memoryview(b"\0" + len(message).to_bytes(4, "big") + message)
            part, self._unsent = self._unsent[:room], self._unsent[room:]
            out.append(frames.frame(Kind.DATA, 0, STREAM, bytes(part)))
            left -= self._spent(len(part))
        self._starved = True

    def _spent(self, size: int) -> int:
        self._stream_room -= size
        self._connection_room -= size
        return size

    # -- what is received ---------------------------------------------------------------------

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """One frame. Raises ConnectionFault."""
        if self._block is not None and kind != Kind.CONTINUATION:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a head is not whole")
        if not self._settled and (kind != Kind.SETTINGS or flags & ACK):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "the first frame is to be SETTINGS")
        rule = _BY_KIND.get(kind)
        if rule is None:
            return  # of a kind that we do not know
        take, streams, size = rule
        if stream_id not in streams:
            name = Kind(kind).name
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"{name} on stream {stream_id}")
        if size is not None and len(payload) != size:
            why = f"{Kind(kind).name} of {len(payload)} bytes"
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, why)
        take(self, flags, stream_id, payload)

    def _lone_message(self, data: bytes) -> bytes | None:
        """The message that is all that came, which most reads are: none of the code below is
        touched for it, whose way from memory costs more than its run."""
        if not self._open or self._block is not None or self._partial or self._frames.waits:
            return None
        message = frames.lone_message(data, STREAM)
        if message is None or len(message) > self._most:
            return None
        room = self._room - MESSAGE_BYTES - len(message)
        if room < WINDOW_BYTES // 2:
            return None
        self._room = room
        return message

    def _data(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not self._open:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "DATA before a head")
        self._room -= len(payload)
        if self._room < WINDOW_BYTES // 2:
            if self._room < 0:
                raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "more than the window")
            more = WINDOW_BYTES - self._room
            self._room = WINDOW_BYTES
            self._out += (frames.window_update(0, more), frames.window_update(STREAM, more))
        self._messages(frames.unpadded(flags, payload, STREAM))
        if flags & END_STREAM:
            self._peer_done = True
            self.end("INTERNAL: the stream ended without a status")

    def _messages(self, data: bytes) -> None:
        """Part of the stream of messages: hands over those that are whole by now."""
        partial = self._partial
        partial += data
        at, end = 0, len(partial)
        while end - at >= self._wanted:
            if self._wanted == MESSAGE_BYTES:
                size = frames.number(partial, at + 1)
                if partial[at]:
                    self.end("INTERNAL: a compressed message, which was not asked for")
                    return
                if size > self._most:
                    why = f"a message of {size} bytes; at most {self._most} are taken"
                    self.end(f"RESOURCE_EXHAUSTED: {why}")
                    return
                self._wanted += size
                if end - at < self._wanted:
                    break
            with memoryview(partial) as view:
                message = bytes(view[at + MESSAGE_BYTES : at + self._wanted])
            at += self._wanted
            self._wanted = MESSAGE_BYTES
            self._caller.receive(message)
            if self._ended:
                return
        del partial[:at]

    def _headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        data = frames.unpadded(flags, payload, STREAM)
        self._block, self._block_flags = b"", flags
        self._continuation(flags, stream_id, frames.unprioritized(flags, data, STREAM))

    def _continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is None:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        self._block += payload
        if len(self._block) > compression.DECODED_BYTES:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "a head that is too long")
        if flags & END_HEADERS:
            whole, self._block = self._block, None
            self._fields(dict(compression.decode(whole, self._table)[0]))

    def _fields(self, fields: dict[bytes, bytes]) -> None:
        """A whole head: the answer's, what comes before it, or trailers."""
        last = bool(self._block_flags & END_STREAM)
        if last:
            self._peer_done = True
            self.end(of_trailers(fields, cut_short=bool(self._partial)))
        elif self._open:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "trailers that end nothing")
        elif not fields.get(b":status", b"").startswith(b"1"):
            self._open = True
            if why := refused(fields):
                self.end(why)

    def _rst_stream(self, flags: int, stream_id: int, payload: bytes) -> None:
        self._peer_done = True
        self.end(of_reset(frames.number(payload)))

    def _settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & ACK:
            if payload:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, "SETTINGS acknowledged with values")
            return
        self._settled = True
        first = frames.parse_settings(payload).get(Setting.INITIAL_WINDOW_SIZE)
        if first is not None:
            self._widen_stream(first - self._first_window)
            self._first_window = first
        self._out.append(frames.frame(Kind.SETTINGS, ACK, 0))

    def _push_promise(self, flags: int, stream_id: int, payload: bytes) -> None:
        raise ConnectionFault(Code.PROTOCOL_ERROR, "PUSH_PROMISE, which is off")

    def _ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not flags & ACK:
            self._out.append(frames.frame(Kind.PING, ACK, 0, payload))

    def _goaway_frame(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) < 8:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, "GOAWAY")
        last, code = frames.number(payload) & MAX_WINDOW, frames.number(payload, 4)
        self._goaway = f"GOAWAY {code}: {payload[8:].decode('utf-8', 'replace')}".rstrip(": ")
        if last < STREAM:
            self.end(f"UNAVAILABLE: {self._goaway}")

    def _window_update(self, flags: int, stream_id: int, payload: bytes) -> None:
        more = frames.number(payload) & MAX_WINDOW
        if not more:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
        if stream_id == STREAM:
            self._widen_stream(more)
            return
        self._connection_room += more
        if self._connection_room > MAX_WINDOW:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "a window that is too large")
        if self._starved:
            self.wake()

    def _widen_stream(self, more: int) -> None:
        self._stream_room += more
        if self._stream_room > MAX_WINDOW:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "a window that is too large")
        if self._starved:
            self.wake()

    def _priority(self, flags: int, stream_id: int, payload: bytes) -> None:
        pass  # nobody heeds it


_ANY = range(1 << 31)
_THIS = range(STREAM, STREAM + 1)
_NONE = range(1)
_EITHER = range(STREAM + 1)
# What takes a frame, on which streams it may come, and how long it is where that is settled.
_BY_KIND: dict[int, tuple[Callable[[ClientStream, int, int, bytes], None], range, int | None]] = {
    Kind.DATA: (ClientStream._data, _THIS, None),
    Kind.HEADERS: (ClientStream._headers, _THIS, None),
    Kind.PRIORITY: (ClientStream._priority, _ANY, 5),
    Kind.RST_STREAM: (ClientStream._rst_stream, _THIS, 4),
    Kind.SETTINGS: (ClientStream._settings, _NONE, None),
    Kind.PUSH_PROMISE: (ClientStream._push_promise, _ANY, None),
    Kind.PING: (ClientStream._ping, _NONE, 8),
    Kind.GOAWAY: (ClientStream._goaway_frame, _NONE, None),
    Kind.WINDOW_UPDATE: (ClientStream._window_update, _EITHER, 4),
    Kind.CONTINUATION: (ClientStream._continuation, _THIS, None),
}
