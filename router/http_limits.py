"""What clients can hold of the HTTP server before they have asked for anything."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from crossdock.proto.errors import InvalidRequest, RequestTooLarge

HEAD_S = 10.0  # from connecting to the end of the first request's head
IDLE_S = 75.0  # from an answer to the end of the next head; proxies commonly keep theirs for 60
MAX_CONNECTIONS = 4096


class Connections:
    """Makes the connections of a server, and closes those that bring no request in time.

    At MAX_CONNECTIONS the oldest that is not being answered makes room for a new one.
    """

    def __init__(self, server: web.Server) -> None:
        self._server = server
        self._silent: set[web.RequestHandler] = set()
        self._answered: set[web.RequestHandler] = set()

    def __call__(self) -> web.RequestHandler:
        """The protocol of a connection that was just accepted."""
        others = self._server.connections
        if len(others) >= MAX_CONNECTIONS:
            for oldest in [one for one in others if one not in self._answered][:1]:
                oldest.force_close()
        made = self._server()
        self._silent.add(made)
        asyncio.get_running_loop().call_later(HEAD_S, self._end_silence, made)
        return made

    def heard(self, connection: web.RequestHandler) -> None:
        """The head of a request was read."""
        self._silent.discard(connection)

    @contextmanager
    def answering(self, connection: web.RequestHandler) -> Iterator[None]:
        """While a request that was read whole is answered, its connection makes no room."""
        self._answered.add(connection)
        try:
            yield
        finally:
            self._answered.discard(connection)

    def _end_silence(self, connection: web.RequestHandler) -> None:
        if connection in self._silent:
            self._silent.discard(connection)
            connection.force_close()


def inflate(data: bytes, encoding: str, limit: int) -> bytes:
    """A compressed body, of which never more than `limit` + 1 bytes are made.

    Raises InvalidRequest for another encoding or a broken body, RequestTooLarge.
    """
    if encoding not in ("gzip", "deflate"):
        raise InvalidRequest("Content-Encoding", encoding, "must be gzip, deflate or identity")
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # a gzip or a zlib header
    try:
        whole = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise InvalidRequest("body", str(error), f"must be {encoding}") from None
    if len(whole) > limit:
        raise RequestTooLarge("body", f"over {limit} bytes inflated", f"at most {limit} bytes")
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequest("body", f"{len(data)} bytes", f"must be one whole {encoding} stream")
    return whole
