"""What clients can hold of the HTTP server: connections, and answers that they do not read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from crossdock.proto.errors import CrossdockError, InvalidRequest, RequestTooLarge, show
from crossdock.router.frontdoor.http_errors import Handler, Outcome, error_response

log = logging.getLogger(__name__)

Around = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]

HEAD_S = 10.0  # from connecting to the end of the first request's head
IDLE_S = 75.0  # from an answer to the end of the next head; proxies commonly keep theirs for 60
WRITE_S = 30.0  # for a client to make room for more of its answer
LEAST_READ = 1 << 15  # bytes that it reads of a longer answer meanwhile
LINGER_S = 2.0  # for the rest of a body that was refused
READ_BYTES = 1 << 16  # of a body that nobody takes, about
SEND_BYTES = 1 << 18  # of answers on their way that the kernel holds for a connection, about
MAX_SILENT = 4096
MAX_CONNECTIONS = 20_000  # of HTTP, and of gRPC: the one that is idle for the longest makes room
DESCRIPTORS = 0.55  # of the process's, that either may have: as a rule only one is crowded
_PROBE_S = (0.01, 1.0)  # how soon it is seen that a client that had half closed is gone
_TCP_CLOSE = 7  # Linux's state of a socket that was reset
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # what every client skips


def max_connections() -> int:
    """How many there may be of either kind, where the process has descriptors for so many."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, int(DESCRIPTORS * soft))


class Owner(Protocol):
    """Whose a connection is."""

    def opened(self, connection: Connection) -> None: ...

    def answered(self, connection: Connection) -> None:
        """A request has its answer, and the next one has not begun."""

    def closed(self, connection: Connection) -> None: ...


class Connection(web.RequestHandler):
    """One connection. Closed where its client reads nothing for WRITE_S seconds. A client that has
    closed its own side alone still gets the answers that it asked for."""

    def __init__(
        self,
        server: web.Server,
        outcome: Outcome,
        owner: Owner,
        **options: Any,
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(server, loop=loop, lingering_time=LINGER_S, **options)
        self._outcome, self._owner = outcome, owner
        self._timer: asyncio.TimerHandle | None = None  # of an answer that is not read
        self._probing: asyncio.Handle | None = None
        self.malformed = False  # the body of the request that is being handled

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if (sock := transport.get_extra_info("socket")) is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        self._owner.opened(self)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        request = self._current_request
        if self._messages and request is not None and not request.content.is_eof():
            self.malformed = True  # an error is what comes before the end of a body
            self._messages.clear()
            self.close()  # after the answer
            request.content.feed_eof()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer()

    def force_close(self) -> None:
        """As it is, but what the client does not read in time is dropped."""
        transport = self.transport
        super().force_close()
        if transport is not None and transport.get_write_buffer_size():
            self._loop.call_later(WRITE_S, transport.abort)

    def abort(self) -> None:
        """Closes it at once."""
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_timer()
        if self._probing is not None:
            self._probing.cancel()
        self._owner.closed(self)
        super().connection_lost(exc)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        done = await super().finish_response(request, resp, start_time)
        self._owner.answered(self)
        return done

    def eof_received(self) -> bool:  # type: ignore[override]
        """True keeps the connection while a request that is all here waits for its answer."""
        waits_for_head = self._waiter is not None and not self._waiter.done()
        if waits_for_head or self.transport is None or self.ssl_context is not None:
            return False
        if self._probing is None:
            self._probing = self._loop.call_soon(self._probe, _PROBE_S[0])
        return True

    def _probe(self, wait_s: float) -> None:
        """Whether the client is there still: a reset answers what is written to one that is not."""
        request, transport = self._current_request, self.transport
        if transport is None or (request is None and not self._messages):
            self.force_close()
            return
        if request is not None and not request.content.is_eof():
            transport.abort()  # the body will never be whole
            return
        silent = request is not None and not (
            request.writer.output_size or request.version < (1, 1)
        )
        if silent and wait_s == _PROBE_S[0]:
            transport.write(_CONTINUE)
        if _was_reset(transport):
            transport.abort()
            return
        self._probing = self._loop.call_later(wait_s, self._probe, min(2 * wait_s, _PROBE_S[1]))

    def _wait_for_reader(self) -> None:
        if self.transport is not None:
            unsent = self.transport.get_write_buffer_size()
            self._timer = self._loop.call_later(WRITE_S, self._give_up, unsent)

    def _give_up(self, unsent: int) -> None:
        """Unless the client has read some of what was unsent: a large answer takes its time."""
        transport = self.transport
        if transport is None:
            return
        if transport.get_write_buffer_size() <= unsent - LEAST_READ:
            self._wait_for_reader()
            return
        log.info("%s reads no answer: closed", _peer(self))
        transport.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what no handler saw: HTTP that cannot be parsed, mostly."""
        if isinstance(exc, HttpProcessingError):
            error: CrossdockError = _malformed(exc)
            exc.__traceback__ = None  # of aiohttp's frame that holds it
            log.info("%s: %s", _peer(self), error)
        else:
            error = CrossdockError("internal error; the gateway's log has it")
            log.error("%s %s failed", request.method, show(request.path), exc_info=exc)
        if request.writer.output_size:
            raise ConnectionError("an answer has begun already")
        self._outcome(error)
        response = error_response(error)
        response.headers.update({"X-Request-Id": uuid.uuid4().hex, "Server": "crossdock"})
        response.force_close()
        return response


class Runner(web.AppRunner):
    """Closes connections that bring no request within HEAD_S seconds, and the oldest of them where
    there are more than MAX_SILENT; where there are too many in all, the one that is idle for the
    longest, or the new one. Leaves compressed bodies to their reader: aiohttp would inflate a
    refused one to its end, on the loop."""

    def __init__(
        self, app: web.Application, around: Around, outcome: Outcome, **options: Any
    ) -> None:
        # A client that goes away cancels its handler, and that its request.
        super().__init__(app, handler_cancellation=True, **options)
        self._around, self._outcome = around, outcome
        self._connections: set[Connection] = set()
        self._silent: dict[Connection, asyncio.TimerHandle] = {}  # oldest first
        self._idle: dict[Connection, None] = {}  # between two requests, the longest first

    @property
    def server(self) -> Any:
        """What a site calls for the protocol of each connection that it accepts."""
        return self._accept

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    async def setup(self) -> None:
        """Also puts `around` around every handler, and around what finds none."""
        await super().setup()
        server = super().server
        assert server is not None
        server.request_handler = partial(self._heard, server.request_handler)

    async def _heard(self, handler: Handler, request: web.Request) -> web.StreamResponse:
        """The head of a request was read: from now on its handler answers for the connection."""
        self._forget(request.protocol)
        return await self._around(request, handler)

    def _forget(self, connection: Any) -> None:
        self._idle.pop(connection, None)
        if connection in self._silent:
            self._silent.pop(connection).cancel()

    # -- for connections ----------------------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        """See Owner."""
        self._connections.add(connection)
        if len(self._connections) > max_connections():
            one = next(iter(self._idle), connection)
            self._forget(one)
            one.abort()

    def answered(self, connection: Connection) -> None:
        """See Owner."""
        if connection in self._connections:
            self._idle[connection] = None

    def closed(self, connection: Connection) -> None:
        """See Owner."""
        self._connections.discard(connection)
        self._forget(connection)

    def _accept(self) -> Connection:
        server, loop = super().server, asyncio.get_running_loop()
        assert server is not None, "not set up"
        options = {"access_log": None, "auto_decompress": False, "keepalive_timeout": IDLE_S}
        made = Connection(server, self._outcome, self, read_bufsize=READ_BYTES, **options)
        self._silent[made] = loop.call_later(HEAD_S, self._close, made)
        if len(self._silent) > MAX_SILENT:
            self._close(next(iter(self._silent)))
        return made

    def _close(self, connection: Connection) -> None:
        self._forget(connection)
        connection.force_close()


def _malformed(error: HttpProcessingError) -> InvalidRequest:
    """A parser's error, without the bytes that it quotes."""
    said = " ".join(str(error.message).partition(":")[0].split())
    if "bytes when reading" in said or "Too many headers" in said:
        return RequestTooLarge("head", said, "must be shorter")
    return InvalidRequest("request", said, "must be well-formed HTTP/1.1")


def _peer(connection: Connection) -> str:
    where = connection.peername
    return f"{where[0]}:{where[1]}" if isinstance(where, tuple) else str(where)


def _was_reset(transport: asyncio.BaseTransport) -> bool:
    sock = transport.get_extra_info("socket")
    try:
        return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE)
    except (AttributeError, OSError):
        return False
