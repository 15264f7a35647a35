"""Throws frames at a gRPC front door: right ones, nearly right ones, and bytes that are none.

python tools/fuzz_http2.py 127.0.0.1:50051 --cases 10000 --seed 1

A case is a connection that says some frames in a row, well-formed calls among them; some clients
are wilder than others. It is over when the server has ended it, or has answered a last ping: it
hangs where it does neither, and is wrong too where the server calls its end an internal error.
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
INTERNAL = b"internal error"  # in GOAWAY
WILD = (0.0, 0.0, 0.02, 0.1, 0.5)
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
        self._wild = rng.choice(WILD)
        self._encoder = hpack.Encoder()
        self._next = 1

    def some(self) -> bytes:
        """A frame, or a few that belong together."""
        rng = self._rng
        if self._is_wild():
            return self._any()
        if self._next == 1:
            return self._call()
        makers = (self._call, self._call, self._head, self._data, self._data, self._small)
        made = rng.choice(makers)()
        if self._is_wild():
            changed = bytearray(made)
            changed[rng.randrange(len(made))] = rng.randrange(256)
            made = bytes(changed)
        return made

    def _is_wild(self) -> bool:
        return self._rng.random() < self._wild

    def _stream(self) -> int:
        """A stream of the past, or, said by a wild client, any."""
        if self._is_wild() or self._next == 1:
            return self._rng.choice((0, 1, 2, self._next, 2**31 - 1))
        return self._rng.randrange(max(1, self._next - 8), self._next, 2) | 1

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
        if flags & 4 and rng.random() < 0.2:
            flags |= 0x28
            block = bytes((2,)) + rng.randbytes(5) + block + bytes(2)
        if flags & 4:
            return frame(1, flags, stream_id, block)
        at = rng.randrange(len(block) + 1)
        parts = frame(1, flags, stream_id, block[:at])
        return parts + frame(9, 0 if self._is_wild() else 4, stream_id, block[at:])

    def _call(self) -> bytes:
        stream_id, self._next = self._next, self._next + 2
        return frame(1, 4, stream_id, self._fields()) + frame(0, 1, stream_id, bytes(5))

    def _data(self) -> bytes:
        rng = self._rng
        size = rng.choice((0, 1, 5, 5, 100, 16_384))
        payload = rng.choice((bytes(size), rng.randbytes(size), b"\0\0\0\0\7" + bytes(size)))
        if rng.random() < 0.3:
            padding = rng.choice((0, 1, 255)) if not self._is_wild() else len(payload)
            padded = bytes((padding & 0xFF,)) + payload[:16_000] + bytes(padding & 0xFF)
            return frame(0, rng.choice((8, 9)), self._stream(), padded)
        return frame(0, rng.choice((0, 0, 1)), self._stream(), payload[:16_384])

    def _small(self) -> bytes:
        """SETTINGS, WINDOW_UPDATE, PING, RST_STREAM, PRIORITY, GOAWAY."""
        rng, number = (
            self._rng,
            struct.pack(">I", self._rng.choice((0, 1, 9, 2**31 - 1, 2**32 - 1))),
        )
        settings = b"".join(
            struct.pack(">HI", rng.choice((1, 3, 4, 4, 9)), rng.choice((0, 1, 100, 65535)))
            for _ in range(rng.randrange(3))
        )
        return rng.choice(
            (
                frame(4, 1 if self._is_wild() else 0, 0, settings),
                frame(8, 0, self._stream(), number),
                frame(6, 0 if self._is_wild() else 1, 0, rng.randbytes(8)),
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
                if INTERNAL in heard:
                    return "internal error"
            return "answered"
    except ConnectionError:
        return "ended by the server"
    except TimeoutError:
        return "hang"
    finally:
        writer.transport.abort()


async def run(address: str, cases: int, seed: int) -> tuple[Counter[str], list[int]]:
    """How the cases ended, and the seeds of those that are wrong."""
    host, _, port = address.rpartition(":")
    found: Counter[str] = Counter()
    wrong: list[int] = []
    seeds = iter(range(seed * 10**9, seed * 10**9 + cases))

    async def some() -> None:
        for each in seeds:
            how = await one(host, int(port), each)
            found[how] += 1
            if how in ("hang", "internal error"):
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
