"""One HTTP/2 connection of the gRPC server (RFC 9113): its frames, streams and manners."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from crossdock.router.frontdoor import http_limits
from crossdock.router.frontdoor.http2 import bounds, frames, headers
from crossdock.router.frontdoor.http2.bounds import Held
from crossdock.router.frontdoor.http2.call import Context, Rules
from crossdock.router.frontdoor.http2.frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    FIRST_WINDOW,
    MAX_WINDOW,
    PREFACE,
    Code,
    ConnectionFault,
    Kind,
    Setting,
    StreamFault,
)
from crossdock.router.frontdoor.http2.manners import Block, Ender, Manners, peer_name
from crossdock.router.frontdoor.http2.stream import Outbox, Stream

log = logging.getLogger(__name__)

OUR_SETTINGS = (
    (Setting.MAX_CONCURRENT_STREAMS, bounds.MAX_STREAMS),
    (Setting.INITIAL_WINDOW_SIZE, bounds.WINDOW_BYTES),
    (Setting.MAX_HEADER_LIST_SIZE, bounds.HEAD_LIST_BYTES),
)
KEEPALIVE = b"crossdoc"  # 8 bytes, which come back


@dataclass(frozen=True, slots=True)
class Shared:
    """What the connections of a server have in common."""

    rules: Rules
    held: Held
    opened: Callable[[Connection], object]
    greeted: Callable[[Connection], object]  # it has said its first word
    closed: Callable[[Connection], object]


class Connection(asyncio.Protocol):
    """Reads frames, and runs a call for each stream."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._out: Outbox
        self._peer = ""
        self._reader = frames.Reader()
        self._preface = PREFACE  # what is still to come of it
        self._decoder = headers.Decoder()
        self._settled = False  # the client's settings have come
        self._block: Block | None = None
        self._streams: dict[int, Stream] = {}
        self._calls: dict[int, Context] = {}
        self._last_id = 0  # the newest stream of the client
        self._manners = Manners()
        self._room = FIRST_WINDOW  # that the client may use now, of all streams
        self._heard = time.monotonic()
        self._asked: float | None = None  # our own ping
        self._refuses_after = MAX_WINDOW  # streams beyond are not served: GOAWAY says so
        self._failed = False
        self._unread: asyncio.TimerHandle | None = None
        self._by_kind: dict[int, Callable[[int, int, bytes], None]] = {
            Kind.DATA: self._data,
            Kind.HEADERS: self._headers,
            Kind.PRIORITY: self._priority,
            Kind.RST_STREAM: self._rst_stream,
            Kind.SETTINGS: self._settings,
            Kind.PUSH_PROMISE: self._push_promise,
            Kind.PING: self._ping,
            Kind.GOAWAY: self._goaway,
            Kind.WINDOW_UPDATE: self._window_update,
            Kind.CONTINUATION: self._continuation,
        }

    @property
    def calls(self) -> int:
        """Calls under way."""
        return len(self._calls)

    # -- the transport ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self._transport = transport
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._failed = True
            transport.close()
            return
        sock = transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, bounds.UNSENT_BYTES)
        self._transport.set_write_buffer_limits(high=bounds.UNSENT_BYTES)
        self._peer = peer_name(transport.get_extra_info("peername"))
        self._out = out = Outbox(self._transport, self._loop)
        out.add(frames.settings(OUR_SETTINGS))
        more = bounds.CONNECTION_WINDOW_BYTES - FIRST_WINDOW
        out.add(frames.window_update(0, more))
        self._room += more
        self._shared.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client is gone: so are its calls."""
        self._stop_waiting()
        for call in list(self._calls.values()):
            call.end(None)
        self._shared.closed(self)

    def eof_received(self) -> bool:
        """gRPC has no half connections."""
        return False

    def pause_writing(self) -> None:
        """The client does not read: it gets WRITE_S seconds."""
        self._out.pause()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """It reads."""
        self._stop_waiting()
        self._out.resume()

    def _wait_for_reader(self) -> None:
        unsent = self._transport.get_write_buffer_size()
        self._unread = self._loop.call_later(bounds.WRITE_S, self._give_up, unsent)

    def _give_up(self, unsent: int) -> None:
        if self._transport.get_write_buffer_size() <= unsent - bounds.LEAST_READ:
            self._wait_for_reader()
            return
        log.info("%s reads no answers: closed", self._peer)
        self._transport.abort()

    def _stop_waiting(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def data_received(self, data: bytes) -> None:
        """Takes what came, a frame after the other."""
        if self._failed:
            return
        self._heard, self._asked = time.monotonic(), None
        try:
            if self._preface:
                data = self._take_preface(data)
            for kind, flags, stream_id, payload in self._reader.frames(data):
                try:
                    self._take(kind, flags, stream_id, payload)
                except StreamFault as fault:
                    self._reset(fault)
                if self._failed or self._transport.is_closing():
                    return
        except ConnectionFault as fault:
            self._fail(fault.code, str(fault))
        except Exception:
            log.exception("%s: its frames could not be read", self._peer)
            self._fail(Code.INTERNAL_ERROR, "internal error")

    def _take_preface(self, data: bytes) -> bytes:
        size = min(len(data), len(self._preface))
        if data[:size] != self._preface[:size]:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "this port speaks HTTP/2 (gRPC) alone")
        self._preface = self._preface[size:]
        return data[size:]

    # -- frames -------------------------------------------------------------------------------

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if self._block is not None and (
            kind != Kind.CONTINUATION or stream_id != self._block.stream_id
        ):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a head is not whole")
        if not self._settled and (kind != Kind.SETTINGS or flags & ACK):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "the first frame is to be SETTINGS")
        take = self._by_kind.get(kind)
        if take is None:
            self._manners.idle("frames of unknown types")
        else:
            take(flags, stream_id, payload)

    def _data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._room -= size
        if self._room < 0:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "more than the connection's window")
        if self._room < bounds.CONNECTION_WINDOW_BYTES // 2:
            more = bounds.CONNECTION_WINDOW_BYTES - self._room
            self._room += more
            self._out.add(frames.window_update(0, more))
        if stream_id > self._refuses_after:
            return  # it began before it knew
        data = frames.unpadded(flags, payload, stream_id)
        if not data and not flags & END_STREAM:
            self._manners.idle("empty DATA frames")
        stream = self._streams.get(stream_id)
        if stream is None:
            self._check_known(stream_id, "DATA")
            ender = self._manners.ender(stream_id) or Ender.CLIENT
            if ender is Ender.CLIENT:
                raise StreamFault(Code.STREAM_CLOSED, stream_id, "DATA after its end")
            if ender is Ender.SERVER and not flags & END_STREAM:
                self._manners.ended(stream_id, Ender.RESET)
                self._out.add(frames.rst_stream(stream_id, Code.NO_ERROR))
            return  # it was on its way when we ended the stream
        if stream.ended:
            raise StreamFault(Code.STREAM_CLOSED, stream_id, "DATA after its end")
        if size:
            stream.receive(data, size)
        if flags & END_STREAM:
            stream.end()

    def _headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id % 2 == 0:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"HEADERS on stream {stream_id}")
        data = frames.unpadded(flags, payload, stream_id)
        data = frames.unprioritized(flags, data, stream_id)
        if not flags & END_HEADERS:
            self._block = Block(stream_id, flags, data, time.monotonic())
            return
        self._head(flags, stream_id, data)

    def _continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        block = self._block
        if block is None:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        if not payload:
            self._manners.idle("empty CONTINUATION frames")
        block.data += payload
        if len(block.data) > bounds.DECODED_BYTES:  # one that is shorter is refused alone
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "a head that is too long")
        if flags & END_HEADERS:
            self._block = None
            self._head(block.flags, stream_id, block.data)

    def _head(self, flags: int, stream_id: int, block: bytes) -> None:
        """A whole head: of a new stream, or what a client says after its messages."""
        if stream_id <= self._last_id:
            self._decoder.fields(block)
            self._trailers(flags, stream_id)
            return
        if stream_id > self._refuses_after:
            self._decoder.fields(block)  # which later ones may refer to
            return
        self._last_id = stream_id
        try:
            head = self._decoder.head(block, stream_id)
        except headers.BadHead as bad:
            self._manners.reset()
            self._out.head(stream_id, headers.refusal(bad), end=True)
            self._manners.ended(stream_id, Ender.CLIENT if flags & END_STREAM else Ender.SERVER)
            return
        if len(self._streams) >= bounds.MAX_STREAMS:
            raise StreamFault(Code.REFUSED_STREAM, stream_id, "too many calls at once")
        shared, out = self._shared, self._out
        stream = Stream(stream_id, out, shared.held, shared.rules.limit)
        stream.ended = bool(flags & END_STREAM)
        call = Context(head, stream, out, shared.rules, self._peer)
        call.on_end = self._ended
        self._streams[stream_id], self._calls[stream_id] = stream, call
        call.start(self._loop)

    def _trailers(self, flags: int, stream_id: int) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            ender = self._manners.ender(stream_id)
            if ender is None:
                raise ConnectionFault(Code.PROTOCOL_ERROR, f"stream {stream_id} is not a new one")
            if ender is Ender.CLIENT:
                raise ConnectionFault(Code.STREAM_CLOSED, f"HEADERS on closed stream {stream_id}")
        elif stream.ended:
            raise StreamFault(Code.STREAM_CLOSED, stream_id, "HEADERS after its end")
        elif not flags & END_STREAM:
            raise StreamFault(Code.PROTOCOL_ERROR, stream_id, "a second head")
        else:
            stream.end()

    def _priority(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id == 0:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(payload) != 5:
            raise StreamFault(Code.FRAME_SIZE_ERROR, stream_id, "PRIORITY")
        self._manners.idle("PRIORITY frames")

    def _rst_stream(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, "RST_STREAM")
        self._check_known(stream_id, "RST_STREAM")
        if stream_id > self._refuses_after:
            return
        call = self._calls.get(stream_id)
        if call is None or time.monotonic() - call.began < bounds.YOUNG_S:
            self._manners.reset()
        if call is not None:
            self._streams[stream_id].ended = True
            call.end(None)

    def _settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & ACK:
            if payload:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, "SETTINGS acknowledged with values")
            return
        given = frames.parse_settings(payload)
        if self._settled:
            self._manners.idle("SETTINGS frames")
        else:
            self._settled = True
            self._shared.greeted(self)
        if (first := given.get(Setting.INITIAL_WINDOW_SIZE)) is not None:
            change, self._out.first_window = first - self._out.first_window, first
            for number, stream in enumerate(list(self._streams.values()), 1):
                stream.move_window(change)
                if number % 64 == 0:
                    self._manners.idle("SETTINGS frames for so many streams")
        self._out.add(frames.frame(Kind.SETTINGS, ACK, 0))
        if given.get(Setting.HEADER_TABLE_SIZE, headers.TABLE_BYTES) < headers.TABLE_BYTES:
            self._out.first_head = headers.SHRUNK_TABLE

    def _push_promise(self, flags: int, stream_id: int, payload: bytes) -> None:
        raise ConnectionFault(Code.PROTOCOL_ERROR, "clients push nothing")

    def _ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, "PING")
        if flags & ACK:
            return
        self._manners.pinged(self._out.sent)
        self._out.add(frames.frame(Kind.PING, ACK, 0, payload))

    def _goaway(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "GOAWAY on a stream")
        self._manners.idle("GOAWAY frames")

    def _window_update(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE")
        increment = frames.number(payload) & MAX_WINDOW
        if stream_id == 0:
            self._out.widen(increment)
        elif (stream := self._streams.get(stream_id)) is not None:
            stream.widen(increment)
        else:
            self._check_known(stream_id, "WINDOW_UPDATE")

    def _check_known(self, stream_id: int, what: str) -> None:
        """Nothing but a head comes on a stream that has not begun."""
        if stream_id == 0 or stream_id % 2 == 0 or stream_id > self._last_id:
            if stream_id > self._refuses_after:
                return
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"{what} on stream {stream_id}")

    # -- ends ---------------------------------------------------------------------------------

    def _ended(self, stream_id: int) -> None:
        """A call is over."""
        stream = self._streams.pop(stream_id)
        del self._calls[stream_id]
        self._manners.ended(stream_id, Ender.CLIENT if stream.ended else Ender.SERVER)
        if not self._calls and self._refuses_after < MAX_WINDOW:
            self._loop.call_soon(self._close)

    def _reset(self, fault: StreamFault) -> None:
        """Ends a stream on which the client broke the protocol."""
        log.info("%s, stream %d: %s: %s", self._peer, fault.stream_id, fault.code.name, fault)
        self._manners.reset()
        self._out.add(frames.rst_stream(fault.stream_id, fault.code))
        call = self._calls.get(fault.stream_id)
        if call is not None:
            call.end(None)
        self._manners.ended(fault.stream_id, Ender.RESET)

    def _fail(self, code: Code, why: str) -> None:
        """The client broke the protocol of the connection: it is told, and that was it."""
        log.info("%s: %s: %s", self._peer, code.name, why)
        self._failed = True
        for call in list(self._calls.values()):
            call.end(None)
        self._out.add(frames.goaway(self._last_id, code, why))
        self._close()

    def _close(self) -> None:
        """Closes once what is on its way has been read."""
        self._failed = True
        self._out.flush()
        if self._transport.is_closing():
            return
        if self._transport.can_write_eof():
            with contextlib.suppress(OSError):  # it is gone already
                self._transport.write_eof()
            self._linger(self.unsent, time.monotonic())
        else:
            self._transport.close()

    @property
    def unsent(self) -> int:
        """Bytes that wait for the client to read."""
        closing = self._transport.is_closing()
        return 0 if closing else int(self._transport.get_write_buffer_size())

    def _linger(self, unsent: int, since: float) -> None:
        """Has the connection cut a moment after `unsent` bytes are sent, or where the client has
        read nothing of them since long."""
        self._loop.call_later(bounds.LINGER_S, self._lingered, unsent, since)

    def _lingered(self, unsent: int, since: float) -> None:
        left, now = self.unsent, time.monotonic()
        if left < unsent:
            self._linger(left, now)
        elif left and now - since < bounds.WRITE_S:
            self._linger(left, since)
        else:
            self._transport.abort()

    def go_away(self) -> None:
        """No new calls from now on; closes after the last one."""
        if self._failed or self._refuses_after < MAX_WINDOW:
            return
        self._refuses_after = self._last_id
        self._out.add(frames.goaway(self._last_id, Code.NO_ERROR))
        if not self._calls:
            self._loop.call_soon(self._close)

    def warn(self) -> None:
        """Tells the client that `go_away` comes, so that it begins no new calls here."""
        if not self._failed:
            self._out.add(frames.goaway(MAX_WINDOW, Code.NO_ERROR, "max_age"))

    def stop(self) -> None:
        """Ends what is under way."""
        for call in list(self._calls.values()):
            call.end(grpc.StatusCode.UNAVAILABLE, "the gateway stopped; send the request again")
        self._close()

    def abort(self) -> None:
        """Closes now."""
        self._transport.abort()

    def tick(self, now: float) -> None:
        """Looks whether the client is there still."""
        if self._failed:
            return
        block, quiet_s = self._block, now - self._heard
        if block is not None and now - block.since > http_limits.HEAD_S:
            self._fail(Code.ENHANCE_YOUR_CALM, "the rest of a head does not come")
        elif self._reader.waits and quiet_s > http_limits.HEAD_S:
            self._fail(Code.ENHANCE_YOUR_CALM, "the rest of a frame does not come")
        elif self._out.paused:
            self._asked = None  # it cannot see what we ask before it reads on; `unread` judges it
        elif self._asked is not None and now - self._asked > bounds.PONG_S:
            log.info("%s does not answer: closed", self._peer)
            self._transport.abort()
        elif self._asked is None and self._calls and quiet_s >= bounds.KEEPALIVE_S:
            self._asked = now
            self._out.add(frames.frame(Kind.PING, 0, 0, KEEPALIVE))
