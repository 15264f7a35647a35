"""One connection of the gRPC server: its transport, what it reads in a turn, and its end."""

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

from crossdock.proto.http2 import frames
from crossdock.proto.http2.frames import (
    MAX_WINDOW,
    PREFACE,
    Code,
    ConnectionFault,
    Kind,
)
from crossdock.router.frontdoor import http_limits
from crossdock.router.frontdoor.http2 import bounds
from crossdock.router.frontdoor.http2.bounds import Held
from crossdock.router.frontdoor.http2.call import Rules
from crossdock.router.frontdoor.http2.manners import peer_name
from crossdock.router.frontdoor.http2.session import Session
from crossdock.router.frontdoor.http2.stream import Outbox

log = logging.getLogger(__name__)

KEEPALIVE = b"crossdoc"  # 8 bytes, which come back
FRAMES_A_LOOK = 16  # that cost little, between two looks at the clock
COSTLY = {Kind.HEADERS, Kind.SETTINGS}  # which move the window of each stream
COSTLY_BYTES = 1024  # of any other frame that is costly


@dataclass(frozen=True, slots=True)
class Shared:
    """What the connections of a server have in common, and whom they tell how they do."""

    rules: Rules
    held: Held
    opened: Callable[[Connection], object]
    greeted: Callable[[Connection], object]  # it has said its first word
    busy: Callable[[Connection], object]  # it has calls
    idle: Callable[[Connection], object]  # it has none any more
    closed: Callable[[Connection], object]


class Connection(asyncio.Protocol):
    """Reads frames for its session, in turns of TURN_S seconds, so that others run between them."""

    __slots__ = (
        *("_asked", "_failed", "_heard", "_loop", "_out", "_peer", "_preface", "_reader"),
        *("_reading", "_session", "_shared", "_transport", "_unread"),
    )

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._out: Outbox
        self._session: Session
        self._peer = ""
        self._reader = frames.Reader()
        self._preface = PREFACE  # what is still to come of it
        self._heard = time.monotonic()
        self._asked: float | None = None  # our own ping
        self._failed = False
        self._unread: asyncio.TimerHandle | None = None
        self._reading: asyncio.Handle | None = None  # goes on with what has come

    @property
    def calls(self) -> int:
        """Calls under way."""
        return self._session.calls

    # -- the transport ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self._transport = transport
        self._peer = peer_name(transport.get_extra_info("peername"))
        self._out = Outbox(self._transport, self._loop)
        self._session = Session(self._shared.rules, self._shared.held, self._out, self._peer, self)
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
        self._session.begin()
        self._shared.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client is gone: so are its calls."""
        self._failed = True
        self._stop_waiting()
        if self._reading is not None:
            self._reading.cancel()
        self._session.drop_calls()
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

    # -- reading ------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Takes what came, a frame after the other."""
        if self._failed:
            return
        self._heard, self._asked = time.monotonic(), None
        if self._preface:
            size = min(len(data), len(self._preface))
            if data[:size] != self._preface[:size]:
                self._fail(Code.PROTOCOL_ERROR, "this port speaks HTTP/2 (gRPC) alone")
                return
            self._preface, data = self._preface[size:], data[size:]
        self._reader.feed(data)
        if self._reading is None and not self._read():
            self._transport.pause_reading()
            self._reading = self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        """Another turn, with what the last one left; nothing more comes before all is read."""
        self._reading = None
        if self._failed:
            return
        if self._read():
            self._transport.resume_reading()
        else:
            self._reading = self._loop.call_soon(self._read_on)

    def _read(self) -> bool:
        """A turn of reading: whether all is read that is here."""
        try:
            return self._take_some(time.monotonic() + bounds.TURN_S)
        except ConnectionFault as fault:
            self._fail(fault.code, str(fault))
        except Exception:
            log.exception("%s: its frames could not be read", self._peer)
            self._fail(Code.INTERNAL_ERROR, "internal error")
        return True

    def _take_some(self, until: float) -> bool:
        """Takes frames; whether none is left. Raises ConnectionFault."""
        take, looked = self._session.take, 0
        for kind, flags, stream_id, payload in self._reader.frames():
            take(kind, flags, stream_id, payload)
            costly = kind in COSTLY or len(payload) > COSTLY_BYTES
            looked += FRAMES_A_LOOK if costly else 1
            if looked >= FRAMES_A_LOOK:
                looked = 0
                if self._transport.is_closing():
                    return True
                if time.monotonic() > until:
                    return False
        return True

    # -- what the session says ----------------------------------------------------------------

    def greeted(self) -> None:
        """The client's settings have come."""
        self._shared.greeted(self)

    def busy(self) -> None:
        """It has calls."""
        self._shared.busy(self)

    def idle(self) -> None:
        """It has none any more."""
        if self._failed:
            return
        if self._session.ends:
            self._loop.call_soon(self._close)
        else:
            self._shared.idle(self)

    # -- ends ---------------------------------------------------------------------------------

    def _fail(self, code: Code, why: str) -> None:
        """The client broke the protocol of the connection: it is told, and that was it."""
        log.info("%s: %s: %s", self._peer, code.name, why)
        self._failed = True
        self._session.drop_calls()
        self._out.add(frames.goaway(self._session.last_id, code, why))
        self._close()

    def _close(self) -> None:
        """Closes once what is on its way has been read."""
        self._failed = True
        self._out.shut()
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
        if self._failed or self._session.ends:
            return
        self._session.go_away()
        if not self.calls:
            self._loop.call_soon(self._close)

    def warn(self) -> None:
        """Tells the client that `go_away` comes, so that it begins no new calls here."""
        if not self._failed:
            self._out.add(frames.goaway(MAX_WINDOW, Code.NO_ERROR, "max_age"))

    def stop(self) -> None:
        """Ends what is under way."""
        why = "the gateway stopped; send the request again"
        self._session.end_calls(grpc.StatusCode.UNAVAILABLE, why)
        self._close()

    def abort(self) -> None:
        """Closes now."""
        self._transport.abort()

    def tick(self, now: float) -> None:
        """Looks whether the client is there still."""
        if self._failed:
            return
        block, quiet_s = self._session.block, now - self._heard
        if block is not None and now - block.since > http_limits.HEAD_S:
            self._fail(Code.ENHANCE_YOUR_CALM, "the rest of a head does not come")
        elif self._reader.waits and quiet_s > http_limits.HEAD_S:
            self._fail(Code.ENHANCE_YOUR_CALM, "the rest of a frame does not come")
        elif self._out.paused:
            self._asked = None  # it cannot see what we ask before it reads on; `unread` judges it
        elif self._asked is not None and now - self._asked > bounds.PONG_S:
            log.info("%s does not answer: closed", self._peer)
            self._transport.abort()
        elif self._asked is None and self.calls and quiet_s >= bounds.KEEPALIVE_S:
            self._asked = now
            self._out.add(frames.frame(Kind.PING, 0, 0, KEEPALIVE))
