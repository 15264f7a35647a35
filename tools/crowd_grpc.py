"""Crowds a gRPC front door with connections that ask for nothing more, and says what they cost.

python tools/crowd_grpc.py 127.0.0.1:50051 --pid PID --idle 10000 --halves 200
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import time

from crowd_http import AT_ONCE, Connection, all_closed, crowd, resident

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
ENDED = b"grpc-status"  # is in the trailers as it stands here


def call() -> bytes:
    """Health's Check, with fields as literals."""
    fields = (
        *((b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"x")),
        (b":path", b"/grpc.health.v1.Health/Check"),
        *((b"content-type", b"application/grpc"), (b"te", b"trailers")),
    )
    block = b"".join(
        b"\x40" + bytes((len(name),)) + name + bytes((len(value),)) + value
        for name, value in fields
    )
    head = len(block).to_bytes(3, "big") + b"\x01\x04\0\0\0\x01" + block
    return PREFACE + SETTINGS + head + b"\0\0\x05\0\x01\0\0\0\x01" + bytes(5)


async def called(address: str) -> Connection:
    """A connection that has had one call."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 12)
    writer.write(call())
    await reader.readuntil(ENDED)
    return reader, writer


async def main(address: str, pid: int, idle: int, halves: int) -> None:
    """Prints one line for each crowd."""
    kinds = {
        "silent": b"",
        "half prefaces": PREFACE[:9],
        "without settings": PREFACE,
        "half frames": PREFACE + SETTINGS + b"\0\0\x08\x06",
        "half heads": PREFACE + SETTINGS + b"\0\0\x01\x01\0\0\0\0\x01\x83",
    }
    for name, sent in kinds.items():
        crowded = await crowd(address, sent, halves)
        print(f"{halves} {name}: closed in {await all_closed(crowded):.1f} s", flush=True)
    before, crowded = resident(pid), []
    for start in range(0, idle, AT_ONCE):
        crowded += await asyncio.gather(
            *(called(address) for _ in range(min(AT_ONCE, idle - start)))
        )
    now = resident(pid)
    print(f"{idle} idle connections: {now - before:.0f} MB more, {now:.0f} in all", flush=True)
    started = time.monotonic()
    await called(address)
    print(f"  another is answered in {1000 * (time.monotonic() - started):.1f} ms")
    for _, writer in crowded:
        writer.transport.abort()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="host:port of gRPC")
    parser.add_argument("--pid", type=int, required=True, help="the gateway's process")
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--halves", type=int, default=200)
    given = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(main(given.address, given.pid, given.idle, given.halves))
