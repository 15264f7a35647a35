"""Throws frames at a gRPC front door: right ones, nearly right ones, and bytes that are none.

python tools/fuzz_http2.py 127.0.0.1:50051 --cases 10000 --seed 1

A case is a connection that says some frames in a row, well-formed calls among them. It is over
when the server has ended it, or has answered a last ping: it hangs where it does neither.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import struct
import sys
from collections import Counter

import hpack

AT_ONCE = 16
HANG_S = 60.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LAST = b"the last"  # of a case, and comes back
ACKED = b"\0\0\x08\x06\x01\0\0\0\0" + LAST
PATHS = ("/grpc.health.v1.Health/Check", "/crossdock.v1.Inference/ListModels", "/", "/a/b", "")
FIELDS = (
    *(("x-a", "1"), ("x-bin", "AAE"), ("x-bin", "*"), ("te", "gzip"), ("X-Upper", "1")),
    *(("grpc-timeout", "1S"), ("grpc-timeout", "x"), ("grpc-encoding", "gzip"), (":late", "1")),
    *(("content-length", "5"), ("connection", "close"), ("x-long", "v" * 3000), ("", "")),
)


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """One frame."""
    size = len(payload).to_bytes(3, "big")
    return size + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


class Client:
    """What one connection says, at random."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._encoder = hpack.Encoder()
        self._next = 1

    def some(self) -> bytes:
        """A frame, or a few that belong together."""
        rng = self._rng
        makers = (self._call, self._call, self._head, self._data, self._small, self._any)
        made = rng.choice(makers)()
        if rng.random() < 0.1 and made:
            changed = bytearray(made)
            changed[rng.randrange(len(made))] = rng.randrange(256)
            made = bytes(changed)
        return made

    def _stream(self) -> int:
        """A stream of the past, or of the future."""
        return self._rng.choice((0, 1, 2, max(1, self._next - 2), self._next, 2**31 - 1))

    def _fields(self) -> bytes:
        rng = self._rng
        fields = [
            *((":method", "POST"), (":scheme", "http"), (":path", rng.choice(PATHS))),
            *((":authority", "x"), ("content-type", "application/grpc"), ("te", "trailers")),
        ]
        if rng.random() < 0.5:
            fields.insert(rng.randrange(4, 7), rng.choice(FIELDS))
        if rng.random() < 0.1:
            del fields[rng.randrange(len(fields))]
        return self._encoder.encode(fields, huffman=rng.random() < 0.5)

    def _head(self) -> bytes:
        rng, block = self._rng, self._fields()
        stream_id, self._next = self._next, self._next + 2
        flags = rng.choice((4, 4, 4, 5, 0, 1))
        if rng.random() < 0.2:
            flags |= 0x28
            block = bytes((2,)) + rng.randbytes(5) + block + bytes(2)
        if flags & 4:
            return frame(1, flags, stream_id, block)
        at = rng.randrange(len(block) + 1)
        parts = frame(1, flags, stream_id, block[:at])
        return parts + frame(9, rng.choice((4, 4, 4, 0)), stream_id, block[at:])

    def _call(self) -> bytes:
        stream_id, self._next = self._next, self._next + 2
        return frame(1, 4, stream_id, self._fields()) + frame(0, 1, stream_id, bytes(5))

    def _data(self) -> bytes:
        rng = self._rng
        size = rng.choice((0, 1, 5, 5, 100, 16_384))
        payload = rng.choice((bytes(size), rng.randbytes(size), b"\0\0\0\0\7" + bytes(size)))
        return frame(0, rng.choice((0, 0, 1, 8, 9)), self._stream(), payload[:16_384])

    def _small(self) -> bytes:
        """SETTINGS, WINDOW_UPDATE, PING, RST_STREAM, PRIORITY, GOAWAY."""
        rng, number = (
            self._rng,
            struct.pack(">I", self._rng.choice((0, 1, 9, 2**31 - 1, 2**32 - 1))),
        )
        settings = b"".join(
            struct.pack(">H", rng.randrange(8)) + struct.pack(">I", rng.choice((0, 1, 100, 65535)))
            for _ in range(rng.randrange(3))
        )
        return rng.choice(
            (
                frame(4, rng.choice((0, 0, 1)), 0, settings),
                frame(8, 0, self._stream(), number),
                frame(6, rng.choice((0, 1)), 0, rng.randbytes(8)),
                frame(3, 0, self._stream(), number),
                frame(2, 0, self._stream(), rng.randbytes(5)),
                frame(7, 0, 0, rng.randbytes(8)),
            )
        )

    def _any(self) -> bytes:
        rng = self._rng
        payload = rng.randbytes(rng.choice((0, 1, 4, 5, 6, 8, 20)))
        stream_id = self._stream() if rng.random() < 0.9 else 2**32 - 1
        return frame(rng.randrange(12), rng.randrange(256), stream_id, payload)


async def one(host: str, port: int, seed: int) -> str:
    """How a case ended."""
    rng = random.Random(seed)
    client = Client(rng)
    said = b"" if rng.random() < 0.02 else PREFACE
    said += b"" if rng.random() < 0.02 else frame(4, 0, 0, b"")
    said += b"".join(client.some() for _ in range(rng.randrange(1, 30)))
    said += frame(6, 0, 0, LAST)
    reader, writer = await asyncio.open_connection(host, port)
    heard = b""
    try:
        async with asyncio.timeout(HANG_S):
            while said:
                size = rng.choice((1, 10, 100, 100_000))
                writer.write(said[:size])
                said = said[size:]
                if rng.random() < 0.2:
                    await writer.drain()
            while ACKED not in heard:
                given = await reader.read(1 << 16)
                if not given:
                    return "ended by the server"
                heard = heard[-len(ACKED) :] + given
            return "answered"
    except ConnectionError:
        return "ended by the server"
    except TimeoutError:
        return "hang"
    finally:
        writer.transport.abort()


async def run(address: str, cases: int, seed: int) -> tuple[Counter[str], list[int]]:
    """How the cases ended, and the seeds of those that hang."""
    host, _, port = address.rpartition(":")
    found: Counter[str] = Counter()
    wrong: list[int] = []
    seeds = iter(range(seed * 10**9, seed * 10**9 + cases))

    async def some() -> None:
        for each in seeds:
            how = await one(host, int(port), each)
            found[how] += 1
            if how == "hang":
                wrong.append(each)

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return found, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="host:port of gRPC")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found, wrong = asyncio.run(run(given.address, given.cases, given.seed))
    print(dict(found.most_common()), "wrong:", wrong[:20])
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
