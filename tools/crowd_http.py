"""Crowds an HTTP front door with connections that ask for nothing more, and says what they cost.

python tools/crowd_http.py 127.0.0.1:8000 --pid PID --idle 10000 --halves 200 --bodies 60
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY_BYTES = 7_900_000
AT_ONCE = 100

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def resident(pid: int) -> float:
    """MB that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def opened(address: str, sent: bytes, answered: bool = False) -> Connection:
    """A connection that has sent this, and had one answer where `answered`."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        writer.write(sent)
        await writer.drain()
        if answered:
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().split(b"content-length: ")[1].split(b"\r")[0]
            await reader.readexactly(int(length))
    return reader, writer


async def crowd(address: str, sent: bytes, count: int, answered: bool = False) -> list[Connection]:
    found: list[Connection] = []
    for start in range(0, count, AT_ONCE):
        several = [opened(address, sent, answered) for _ in range(min(AT_ONCE, count - start))]
        found += await asyncio.gather(*several)
    return found


async def all_closed(connections: Sequence[Connection]) -> float:
    """Seconds until the server has closed every one."""
    started = time.monotonic()

    async def closed(reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass

    await asyncio.gather(*(closed(reader) for reader, _ in connections))
    return time.monotonic() - started


async def main(address: str, pid: int, idle: int, halves: int, bodies: int) -> None:
    """Prints one line for each crowd."""
    half = HEAD + b"Content-Length: 99\r\n\r\n{"
    kinds = {"silent": b"", "half heads": b"POST /v1/comp", "half bodies": half}
    for name, sent in kinds.items():
        crowded = await crowd(address, sent, halves)
        print(f"{halves} {name}: closed in {await all_closed(crowded):.1f} s", flush=True)
    before = resident(pid)
    stalled = HEAD + b"Content-Length: %d\r\n\r\n" % (BODY_BYTES + 1) + b" " * BODY_BYTES
    sending = [asyncio.create_task(opened(address, stalled)) for _ in range(bodies)]
    most = before
    for _ in range(80):
        await asyncio.sleep(0.1)
        most = max(most, resident(pid))
    print(f"{bodies} stalled bodies of {BODY_BYTES / 1e6} MB: at most {most - before:.0f} MB more")
    crowded = [await task for task in sending]
    print(f"  closed in {await all_closed(crowded):.1f} s", flush=True)
    before = resident(pid)
    crowded = await crowd(address, HEALTH, idle, answered=True)
    now = resident(pid)
    print(f"{idle} idle connections: {now - before:.0f} MB more, {now:.0f} in all")
    started = time.monotonic()
    _, writer = await opened(address, HEALTH, answered=True)
    print(f"  another is answered in {1000 * (time.monotonic() - started):.1f} ms")
    for _, writer in crowded:
        writer.transport.abort()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="host:port of HTTP")
    parser.add_argument("--pid", type=int, required=True, help="the gateway's process")
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--halves", type=int, default=200)
    parser.add_argument("--bodies", type=int, default=60)
    given = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(main(given.address, given.pid, given.idle, given.halves, given.bodies))
