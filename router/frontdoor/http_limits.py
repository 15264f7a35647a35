"""What clients can hold of the HTTP server before they have asked for anything."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

from aiohttp import web

from crossdock.proto.errors import InvalidRequest, RequestTooLarge

HEAD_S = 10.0  # from connecting to the end of the first request's head
IDLE_S = 75.0  # from an answer to the end of the next head; proxies commonly keep theirs for 60
MAX_SILENT = 1024


class Runner(web.AppRunner):
    """Closes connections that bring no request within HEAD_S seconds, and the oldest of them where
    there are more than MAX_SILENT. Leaves compressed bodies to `inflate`: aiohttp would inflate a
    refused one to its end, on the loop."""

    def __init__(self, app: web.Application, **options: Any) -> None:
        super().__init__(app, auto_decompress=False, keepalive_timeout=IDLE_S, **options)
        self._silent: dict[web.RequestHandler, asyncio.TimerHandle] = {}  # oldest first

    @property
    def server(self) -> Any:
        """What a site calls for the protocol of each connection that it accepts."""
        return self._accept

    def heard(self, connection: web.RequestHandler) -> None:
        """The head of a request was read: from now on its handler answers for the connection."""
        if connection in self._silent:
            self._silent.pop(connection).cancel()

    def _accept(self) -> web.RequestHandler:
        server, loop = super().server, asyncio.get_running_loop()
        assert server is not None, "not set up"
        made = server()
        self._silent[made] = loop.call_later(HEAD_S, self._close, made)
        if len(self._silent) > MAX_SILENT:
            self._close(next(iter(self._silent)))
        return made

    def _close(self, connection: web.RequestHandler) -> None:
        self.heard(connection)
        connection.force_close()


def inflate(data: bytes, encoding: str, limit: int) -> bytes:
    """A compressed body, of which never more than `limit` + 1 bytes are made. Raises InvalidRequest
    for another encoding or a broken body, RequestTooLarge."""
    if encoding not in ("gzip", "deflate"):
        raise InvalidRequest("Content-Encoding", encoding, "must be gzip, deflate or identity")
    # Some clients send deflate without the zlib header, whose first byte would end in 8.
    bare = encoding == "deflate" and bool(data) and data[0] & 0xF != 8
    inflater = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
    try:
        whole = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise InvalidRequest("body", str(error), f"must be {encoding}") from None
    if len(whole) > limit:
        raise RequestTooLarge("body", f"over {limit} bytes inflated", f"at most {limit} bytes")
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequest("body", f"{len(data)} bytes", f"must be one whole {encoding} stream")
    return whole
