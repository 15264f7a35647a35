"""What the frames of one connection do: its settings, streams, calls and windows (RFC 9113)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from itertools import islice
from typing import Protocol

import grpc

from crossdock.proto.http2 import frames
from crossdock.proto.http2.compression import DECODED_BYTES, HEAD_LIST_BYTES, TABLE_BYTES
from crossdock.proto.http2.frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    FIRST_WINDOW,
    MAX_WINDOW,
    Code,
    ConnectionFault,
    Kind,
    Setting,
    StreamFault,
)
from crossdock.router.frontdoor.http2 import bounds, headers
from crossdock.router.frontdoor.http2.bounds import Held
from crossdock.router.frontdoor.http2.call import Context, Rules
from crossdock.router.frontdoor.http2.manners import Block, Ender, Manners
from crossdock.router.frontdoor.http2.stream import Outbox, Stream

log = logging.getLogger(__name__)

OUR_SETTINGS = frames.settings(
    (
        (Setting.MAX_CONCURRENT_STREAMS, bounds.MAX_STREAMS),
        (Setting.INITIAL_WINDOW_SIZE, bounds.WINDOW_BYTES),
        (Setting.MAX_HEADER_LIST_SIZE, HEAD_LIST_BYTES),
    )
)
DROPPED_AT_ONCE = 128
MORE_ROOM = frames.window_update(0, bounds.CONNECTION_WINDOW_BYTES - FIRST_WINDOW)


class Owner(Protocol):
    """The connection of a session, which hears how it goes."""

    def greeted(self) -> None:
        """The client has said its first word."""

    def busy(self) -> None:
        """It has a call again."""

    def idle(self) -> None:
        """Its last call is over."""


class Session:
    """Of one client, named `peer`. Runs a call for each of its streams."""

    __slots__ = (
        *("_calls", "_decoder", "_held", "_loop", "_manners", "_out", "_owner", "_peer"),
        *("_refuses_after", "_room", "_rules", "_settled", "_streams", "block", "last_id"),
    )

    def __init__(self, rules: Rules, held: Held, out: Outbox, peer: str, owner: Owner) -> None:
        self._rules, self._held, self._out = rules, held, out
        self._peer, self._owner = peer, owner
        self._loop = asyncio.get_running_loop()
        self._decoder = headers.Decoder()
        self._manners = Manners()
        self._settled = False  # the client's settings have come
        self._streams: dict[int, Stream] = {}
        self._calls: dict[int, Context] = {}
        self._room = bounds.CONNECTION_WINDOW_BYTES  # that the client may use now, of all streams
        self._refuses_after = MAX_WINDOW  # streams beyond are not served: GOAWAY says so
        self.block: Block | None = None  # a head that is not whole
        self.last_id = 0  # the newest stream of the client

    def begin(self) -> None:
        """Says what this end wants."""
        self._out.add(OUR_SETTINGS + MORE_ROOM)

    @property
    def calls(self) -> int:
        """Calls under way."""
        return len(self._calls)

    @property
    def ends(self) -> bool:
        """It takes no new calls."""
        return self._refuses_after < MAX_WINDOW

    def go_away(self) -> None:
        """No new calls from now on."""
        self._refuses_after = self.last_id
        self._out.add(frames.goaway(self.last_id, Code.NO_ERROR))

    def end_calls(self, code: grpc.StatusCode, details: str) -> None:
        """Ends what is under way with this status."""
        for call in list(self._calls.values()):
            call.end(code, details)

    def drop_calls(self) -> None:
        """Ends what is under way, some of it in each turn of the loop; nobody is told."""
        for call in list(islice(self._calls.values(), DROPPED_AT_ONCE)):
            call.end(None)
        if self._calls:
            self._loop.call_soon(self.drop_calls)

    # -- frames -------------------------------------------------------------------------------

    def take(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """One frame. Raises ConnectionFault; a stream that is at fault is reset."""
        if self.block is not None and (
            kind != Kind.CONTINUATION or stream_id != self.block.stream_id
        ):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a head is not whole")
        if not self._settled and (kind != Kind.SETTINGS or flags & ACK):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "the first frame is to be SETTINGS")
        take = _BY_KIND.get(kind)
        if take is None:
            self._manners.idle("frames of unknown types")
            return
        try:
            take(self, flags, stream_id, payload)
        except StreamFault as fault:
            self._reset(fault)

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
            self.block = Block(stream_id, flags, data, time.monotonic())
            return
        self._head(flags, stream_id, data)

    def _continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        block = self.block
        if block is None:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        if not payload:
            self._manners.idle("empty CONTINUATION frames")
        block.data += payload
        if len(block.data) > DECODED_BYTES:  # one that is shorter is refused alone
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "a head that is too long")
        if flags & END_HEADERS:
            self.block = None
            self._head(block.flags, stream_id, block.data)

    def _head(self, flags: int, stream_id: int, block: bytes) -> None:
        """A whole head: of a new stream, or what a client says after its messages."""
        if stream_id > self._refuses_after:
            self._decoder.fields(block)  # later ones may refer to them
            return
        if stream_id <= self.last_id:
            self._trailers(flags, stream_id, block)
            return
        self.last_id = stream_id
        try:
            head = self._decoder.head(block, stream_id)
        except headers.BadHead as bad:
            self._manners.reset()
            self._out.head(stream_id, headers.refusal(bad), end=True)
            self._manners.ended(stream_id, Ender.CLIENT if flags & END_STREAM else Ender.SERVER)
            return
        if len(self._streams) >= bounds.MAX_STREAMS:
            raise StreamFault(Code.REFUSED_STREAM, stream_id, "too many calls at once")
        out, rules = self._out, self._rules
        stream = Stream(stream_id, out, self._held, rules.limit(head.path), head.length)
        if flags & END_STREAM:
            stream.end()
        stream.wait(bounds.CALL_BYTES + head.size)
        call = Context(head, stream, out, rules, self._peer)
        call.on_end = self._ended
        self._streams[stream_id], self._calls[stream_id] = stream, call
        if len(self._calls) == 1:
            self._owner.busy()
        call.start(self._loop)

    def _trailers(self, flags: int, stream_id: int, block: bytes) -> None:
        fields = self._decoder.fields(block)
        stream = self._streams.get(stream_id)
        if stream is None:
            ender = self._manners.ender(stream_id)
            if ender is None and self._manners.forgotten(stream_id):
                self._manners.idle("trailers of streams that are over")
                return
            if ender is None:
                raise ConnectionFault(Code.PROTOCOL_ERROR, f"stream {stream_id} is not a new one")
            if ender is Ender.CLIENT:
                raise ConnectionFault(Code.STREAM_CLOSED, f"HEADERS on closed stream {stream_id}")
            return
        if stream.ended:
            raise StreamFault(Code.STREAM_CLOSED, stream_id, "HEADERS after its end")
        if not flags & END_STREAM:
            raise StreamFault(Code.PROTOCOL_ERROR, stream_id, "a second head")
        headers.check_fields(fields, stream_id)  # they mean nothing to gRPC
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
            self._owner.greeted()
        if (first := given.get(Setting.INITIAL_WINDOW_SIZE)) is not None:
            change, self._out.first_window = first - self._out.first_window, first
            for number, stream in enumerate(list(self._streams.values()), 1):
                stream.move_window(change)
                if number % 64 == 0:
                    self._manners.idle("SETTINGS frames for so many streams")
        self._out.add(frames.frame(Kind.SETTINGS, ACK, 0))
        if given.get(Setting.HEADER_TABLE_SIZE, TABLE_BYTES) < TABLE_BYTES:
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
        if len(payload) < 8:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, "GOAWAY")
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
        if stream_id == 0 or stream_id % 2 == 0 or stream_id > self.last_id:
            if stream_id > self._refuses_after:
                return
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"{what} on stream {stream_id}")

    # -- ends of streams ----------------------------------------------------------------------

    def _ended(self, stream_id: int) -> None:
        """A call is over."""
        stream = self._streams.pop(stream_id)
        del self._calls[stream_id]
        self._manners.ended(stream_id, Ender.CLIENT if stream.ended else Ender.SERVER)
        if not self._calls:
            self._owner.idle()

    def _reset(self, fault: StreamFault) -> None:
        """Ends a stream on which the client broke the protocol."""
        log.info("%s, stream %d: %s: %s", self._peer, fault.stream_id, fault.code.name, fault)
        self._manners.reset()
        self._out.add(frames.rst_stream(fault.stream_id, fault.code))
        call = self._calls.get(fault.stream_id)
        if call is not None:
            call.end(None)
        self._manners.ended(fault.stream_id, Ender.RESET)


_BY_KIND: dict[int, Callable[[Session, int, int, bytes], None]] = {
    Kind.DATA: Session._data,
    Kind.HEADERS: Session._headers,
    Kind.PRIORITY: Session._priority,
    Kind.RST_STREAM: Session._rst_stream,
    Kind.SETTINGS: Session._settings,
    Kind.PUSH_PROMISE: Session._push_promise,
    Kind.PING: Session._ping,
    Kind.GOAWAY: Session._goaway,
    Kind.WINDOW_UPDATE: Session._window_update,
    Kind.CONTINUATION: Session._continuation,
}
