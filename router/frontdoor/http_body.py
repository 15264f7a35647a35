"""Reading bodies: in bounded time, and together in bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Iterator

from aiohttp import StreamReader, web

from crossdock.proto.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RequestStalled,
    RequestTooLarge,
    UnsupportedMediaType,
)

STALL_S = 10.0  # without a byte of a body
WHOLE_S = 60.0  # from the end of a head to the end of its body


class Reading:
    """One body, from its first byte until it is parsed."""

    def __init__(self) -> None:
        self.size = 0
        self.timeout: asyncio.Timeout | None = None  # while it waits for bytes
        self.crowded_out = False

    def crowd_out(self) -> None:
        """Ends the wait for its bytes."""
        self.crowded_out = True
        if self.timeout is not None:
            with contextlib.suppress(RuntimeError):  # it is late anyway
                self.timeout.reschedule(0.0)


class Bodies:
    """All bodies that are being read or parsed. Where they hold more than `most` bytes together,
    the one that began first is refused: of bodies that come as fast, that is the largest, and else
    the slowest."""

    def __init__(self, most_each: int, most: int) -> None:
        self._most_each, self._most = most_each, max(most, most_each)
        self._waiting: dict[Reading, None] = {}  # oldest first
        self.held = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[Reading]:
        """Around the reading and parsing of one body: what it holds is counted until the end."""
        one = Reading()
        try:
            yield one
        finally:
            self._waiting.pop(one, None)
            self.held -= one.size

    async def read(self, one: Reading, request: web.Request, deadline: float) -> list[bytes]:
        """The body of a request, inflated, in the parts that it came in; `deadline` is on the
        loop's clock. Raises InvalidRequest, RequestTooLarge, RequestStalled, Overloaded or
        DeadlineExceeded."""
        encoding = request.headers.get("Content-Encoding", "identity").lower()
        if encoding not in ("identity", "gzip", "deflate"):
            limit = "must be gzip, deflate or identity"
            raise InvalidRequest("Content-Encoding", encoding, limit)
        coding = request.headers.get("Transfer-Encoding", "chunked")
        if coding.strip().lower() != "chunked":
            raise InvalidRequest("Transfer-Encoding", coding, "must be chunked")
        if request.content_length is not None and request.content_length > self._most_each:
            raise self._too_large(f"{request.content_length} bytes")
        self._waiting[one] = None
        try:
            parts = await self._whole(one, request.content, deadline)
        finally:
            self._waiting.pop(one, None)
        if getattr(request.protocol, "malformed", False):
            raise InvalidRequest("body", "malformed chunks", "must be well-formed")
        if encoding == "identity":
            return parts
        return [await asyncio.to_thread(inflate, b"".join(parts), encoding, self._most_each)]

    async def _whole(self, one: Reading, content: StreamReader, deadline: float) -> list[bytes]:
        loop, parts = asyncio.get_running_loop(), list[bytes]()
        if content.is_eof() and not content.exception():  # all of it is here, as most are
            while part := content.read_nowait():
                parts.append(part)
                self._take(one, len(part))
            return parts
        last = min(deadline, loop.time() + WHOLE_S)
        try:
            async with asyncio.timeout(None) as one.timeout:
                while not content.at_eof():
                    if one.crowded_out:  # not while it waited: more of it had come
                        raise TimeoutError
                    one.timeout.reschedule(min(last, loop.time() + STALL_S))
                    if part := await content.readany():
                        parts.append(part)
                        self._take(one, len(part))
        except TimeoutError:
            raise self._late(one, loop.time() >= deadline) from None
        return parts

    def _take(self, one: Reading, size: int) -> None:
        one.size += size
        self.held += size
        if one.size > self._most_each:
            raise self._too_large(f"over {self._most_each} bytes")
        for oldest in self._waiting if self.held > self._most else ():
            if not oldest.crowded_out:
                oldest.crowd_out()
                break

    def _late(self, one: Reading, past_deadline: bool) -> Exception:
        if one.crowded_out:
            return Overloaded(f"bodies that are being read hold over {self._most} bytes together")
        if past_deadline:
            return DeadlineExceeded("the deadline passed before the body was there")
        limit = f"must go on within {STALL_S:g} s and end within {WHOLE_S:g} s"
        return RequestStalled("body", f"{one.size} bytes, and no more", limit)

    def _too_large(self, size: str) -> RequestTooLarge:
        return RequestTooLarge("body", size, f"at most {self._most_each} bytes")


def check_media_type(request: web.Request) -> None:
    """Raises UnsupportedMediaType where a body is said to be anything but JSON."""
    given = request.headers.get("Content-Type", "application/json")
    name = given.partition(";")[0].strip().lower()
    if name != "application/json" and not name.endswith("+json"):
        raise UnsupportedMediaType("Content-Type", given, "must be application/json")


def inflate(data: bytes, encoding: str, limit: int) -> bytes:
    """A compressed body, of which never more than `limit` + 1 bytes are made. Raises InvalidRequest
    for a broken body, RequestTooLarge."""
    # Some clients send deflate without the zlib header, whose first byte would end in 8.
    bare = encoding == "deflate" and bool(data) and data[0] & 0xF != 8
    inflater = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
    try:
        whole = inflater.decompress(data, limit + 1)
    except zlib.error:
        raise InvalidRequest("body", f"{len(data)} bytes", f"must be {encoding}") from None
    if len(whole) > limit:
        raise RequestTooLarge("body", f"over {limit} bytes inflated", f"at most {limit} bytes")
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequest("body", f"{len(data)} bytes", f"must be one whole {encoding} stream")
    return whole
