"""HTTP as bytes, for what no client library sends."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from gateway_rig import Rig


class Raw:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and body of the next answer, 100s left out."""
        status = 100
        while status == 100:
            head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 20)
            first, *lines = head.decode().strip().split("\r\n")
            status = int(first.split()[1])
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return status, headers, body

    async def error(self) -> tuple[int, dict[str, Any]]:
        """Status and OpenAI's error of the next answer."""
        status, _, body = await self.answer()
        return status, json.loads(body)["error"]

    async def closed(self) -> None:
        """Returns once the server has closed the connection."""
        with contextlib.suppress(ConnectionError):
            while await asyncio.wait_for(self.reader.read(65536), 20):
                pass


@asynccontextmanager
async def connected(rig: Rig) -> AsyncIterator[Raw]:
    host, _, port = rig.gateway.http_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()


def request(body: bytes, *headers: str, path: str = "/v1/completions") -> bytes:
    """A POST as bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json"]
    lines += [*headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body
