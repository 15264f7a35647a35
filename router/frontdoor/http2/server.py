"""A gRPC server of our own: its ports, its connections' ages, and how it ends.

Handlers are registered as with grpc.aio's server, and see a Context with the same few methods.
"""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc

from crossdock.proto.settings import split_address
from crossdock.router.frontdoor import http_limits
from crossdock.router.frontdoor.http2 import bounds
from crossdock.router.frontdoor.http2.bounds import Held
from crossdock.router.frontdoor.http2.call import Context, Rules
from crossdock.router.frontdoor.http2.connection import Connection, Shared

BACKLOG = 1024
AGE_SPREAD = 0.1  # of an age: so that clients do not all come back at once
LOOKED_AT = 500  # connections at once: a look at each takes about a microsecond
WARNED_S = 5.0  # between both GOAWAYs of a connection that is old


class Server:
    """Serves gRPC. `admit` looks at each call before its message is read, and what it raises
    `refuse` turns into a status. `limits`: bytes of a message, by the paths of the methods that
    take more than bounds.MESSAGE_BYTES."""

    def __init__(
        self,
        admit: Callable[[Context], None],
        refuse: Callable[[Context, Exception], None],
        limits: Mapping[str, int],
        connection_age_s: float = 0.0,
    ) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._methods: dict[str, grpc.RpcMethodHandler] = {}
        self._age_s = connection_age_s  # 0: connections live as long as they will
        self._connections: set[Connection] = set()
        self._silent: dict[Connection, asyncio.TimerHandle] = {}  # oldest first
        self._idle: dict[Connection, float] = {}  # without calls since when, oldest first
        self._ages: dict[Connection, asyncio.TimerHandle] = {}
        self._listening: list[asyncio.Server] = []
        self._ticking: asyncio.Handle | None = None
        rules = Rules(self._handler, admit, refuse, limits)
        held = Held(bounds.most_held(max(limits.values())))
        self._shared = Shared(
            rules, held, self._opened, self._greeted, self._busy, self._freed, self._closed
        )

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """As grpc.aio's."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """As grpc.aio's."""
        self._methods |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    async def listen(self, address: str, tls: ssl.SSLContext | None) -> int:
        """Serves from now on; returns the port. Raises OSError."""
        handshake_s = None if tls is None else http_limits.HEAD_S
        loop, sockets = asyncio.get_running_loop(), open_sockets(address)
        for sock in sockets:
            server = await loop.create_server(
                self._accept,
                sock=sock,
                backlog=BACKLOG,
                ssl=tls,
                ssl_handshake_timeout=handshake_s,
            )
            self._listening.append(server)
        self._ticking = loop.call_later(bounds.TICK_S, self._tick)
        return int(sockets[0].getsockname()[1])

    async def stop(self, grace_s: float) -> None:
        """Takes nothing new; calls under way get `grace_s` seconds."""
        for server in self._listening:
            server.close()
        for connection in list(self._connections):
            connection.go_away()
        deadline = time.monotonic() + grace_s
        while (
            any(each.calls or each.unsent for each in self._connections)
            and time.monotonic() < deadline
        ):
            await asyncio.sleep(0.01)
        for connection in list(self._connections):
            connection.stop()
        await asyncio.sleep(0)  # for what is cancelled to end
        for connection in list(self._connections):
            connection.abort()
        if self._ticking is not None:
            self._ticking.cancel()
        for timer in (*self._silent.values(), *self._ages.values()):
            timer.cancel()

    def _handler(self, path: str) -> grpc.RpcMethodHandler | None:
        if path not in self._methods:
            for each in self._handlers:
                if (found := each.service(_Details(path))) is not None:
                    self._methods[path] = found
                    break
        return self._methods.get(path)

    # -- connections --------------------------------------------------------------------------

    def _accept(self) -> Connection:
        return Connection(self._shared)

    def _opened(self, connection: Connection) -> None:
        full = len(self._connections) >= http_limits.max_connections()
        if full and not self._made_room():
            connection.abort()
            return
        self._connections.add(connection)
        loop = asyncio.get_running_loop()
        self._silent[connection] = loop.call_later(http_limits.HEAD_S, connection.abort)
        if len(self._silent) > bounds.MAX_SILENT:
            next(iter(self._silent)).abort()
        if self._age_s:
            age_s = self._age_s * random.uniform(1 - AGE_SPREAD, 1 + AGE_SPREAD)
            self._ages[connection] = loop.call_later(age_s, self._grown_old, connection)

    def _made_room(self) -> bool:
        """Asks the connection that has had no call for the longest to go; False where each has
        calls, or has said nothing yet."""
        if not self._idle:
            return False
        self._send_off(next(iter(self._idle)))
        return True

    def _send_off(self, connection: Connection) -> None:
        del self._idle[connection]
        connection.go_away()

    def _greeted(self, connection: Connection) -> None:
        if (timer := self._silent.pop(connection, None)) is not None:
            timer.cancel()
            self._freed(connection)

    def _busy(self, connection: Connection) -> None:
        self._idle.pop(connection, None)

    def _freed(self, connection: Connection) -> None:
        self._idle[connection] = time.monotonic()

    def _closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._idle.pop(connection, None)
        for timers in (self._silent, self._ages):
            if (timer := timers.pop(connection, None)) is not None:
                timer.cancel()

    def _grown_old(self, connection: Connection) -> None:
        """Streams under way may finish; what the client began before it knew is served."""
        if connection in self._connections:
            connection.warn()
            loop = asyncio.get_running_loop()
            wait_s = min(WARNED_S, self._age_s)
            self._ages[connection] = loop.call_later(wait_s, connection.go_away)

    def _tick(self) -> None:
        oldest = time.monotonic() - bounds.IDLE_S
        while self._idle and next(iter(self._idle.values())) < oldest:
            self._send_off(next(iter(self._idle)))
        self._look(list(self._connections))

    def _look(self, at: list[Connection]) -> None:
        """Looks at so many connections, and at the others in the loop's next turns."""
        now, loop = time.monotonic(), asyncio.get_running_loop()
        for connection in at[:LOOKED_AT]:
            connection.tick(now)
        if len(at) > LOOKED_AT:
            self._ticking = loop.call_soon(self._look, at[LOOKED_AT:])
        else:
            self._ticking = loop.call_later(bounds.TICK_S, self._tick)


class _Details(grpc.HandlerCallDetails):
    """What handlers are looked up by."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata = ()


def open_sockets(address: str) -> list[socket.socket]:
    """Sockets that are bound to HOST:PORT, all of a name's addresses, with one port. Raises
    OSError."""
    host, port = split_address(address)
    made: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, where in dict.fromkeys(found):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError:  # no IPv6 here, say
                continue
            made.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                alone = where[0] != "::" or len(found) > 1  # else it serves IPv4 as well
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(alone))
            sock.bind((where[0], port or made[0].getsockname()[1], *where[2:]))
        if not made:
            raise OSError(errno.EADDRNOTAVAIL, "no address of this host")
    except BaseException:
        for sock in made:
            sock.close()
        raise
    return made
