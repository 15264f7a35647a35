"""A client that speaks HTTP/2 frame by frame, and says what no client says."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import hpack
from gateway_rig import Rig

from crossdock.proto.http2.frames import (
    END_HEADERS,
    END_STREAM,
    PREFACE,
    Code,
    Kind,
    Reader,
    frame,
    settings,
)
from crossdock.router.frontdoor.http2 import headers

CHECK, WATCH = (f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch"))
PSEUDO = ((":method", "POST"), (":scheme", "http"), (":path", CHECK), (":authority", "x"))
GRPC = (("content-type", "application/grpc"), ("te", "trailers"))
HELLO = PREFACE + settings(())
EMPTY = b"\0\0\0\0\0"  # an empty message


def head(
    path: str = CHECK,
    more: tuple[tuple[str, str], ...] = (),
    stream_id: int = 1,
    flags: int = END_HEADERS,
    fields: tuple[tuple[str, str], ...] | None = None,
) -> bytes:
    """HEADERS of a call, or of these fields alone."""
    pseudo = tuple((name, path if name == ":path" else value) for name, value in PSEUDO)
    given = pseudo + GRPC + more if fields is None else fields
    return frame(Kind.HEADERS, flags, stream_id, headers.block(given))


def data(payload: bytes, stream_id: int = 1, flags: int = END_STREAM) -> bytes:
    return frame(Kind.DATA, flags, stream_id, payload)


def call(stream_id: int = 1, path: str = CHECK, more: tuple[tuple[str, str], ...] = ()) -> bytes:
    """A whole call with an empty message."""
    return head(path, more, stream_id) + data(EMPTY, stream_id)


@dataclass
class Peer:
    """A client that says what it is told to."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    decoder: hpack.Decoder = field(default_factory=hpack.Decoder)
    closed: bool = False
    seen: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    _frames: Reader = field(default_factory=Reader)

    def say(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    async def see(self, wanted: Callable[[int, int, int, bytes], bool]) -> tuple[int, int, bytes]:
        """The first frame that is wanted, as flags, stream and payload. Raises ConnectionError
        where the server closes before."""
        async with asyncio.timeout(100):
            while True:
                for i, each in enumerate(self.seen):
                    if wanted(*each):
                        del self.seen[: i + 1]
                        return each[1:]
                given = await self.reader.read(1 << 16)
                if not given:
                    raise ConnectionError("closed")
                self._frames.feed(given)
                self.seen += self._frames.frames()

    async def see_kind(self, kind: Kind, stream_id: int | None = None) -> tuple[int, int, bytes]:
        return await self.see(
            lambda k, f, s, p: k == kind and stream_id in (None, s) and not (k == Kind.PING and f)
        )

    async def trailers(self, stream_id: int = 1) -> dict[str, str]:
        """Of a stream, after whatever came before."""
        while True:
            flags, _, payload = await self.see_kind(Kind.HEADERS, stream_id)
            fields = dict(self.decoder.decode(payload))
            if flags & END_STREAM:
                return fields

    async def fault(self) -> tuple[str, Code]:
        """How the server takes offence: GOAWAY or RST_STREAM, and the code."""
        kinds = (Kind.GOAWAY, Kind.RST_STREAM)
        found = await self.see(lambda k, f, s, p: k in kinds)
        if len(found[2]) == 4:
            return "stream", Code(struct.unpack(">I", found[2])[0])
        async with asyncio.timeout(100):
            while await self.reader.read(1 << 16):
                pass  # it closes after a GOAWAY
        return "connection", Code(struct.unpack_from(">I", found[2], 4)[0])


@asynccontextmanager
async def peer(rig: Rig) -> AsyncIterator[Peer]:
    host, _, port = rig.gateway.grpc_address.rpartition(":")
    made = Peer(*await asyncio.open_connection(host, int(port)))
    try:
        yield made
    finally:
        made.writer.close()


OPEN = HELLO + head(WATCH)  # a call that stays: its one message has not come
