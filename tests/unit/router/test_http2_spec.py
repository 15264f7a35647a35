"""RFC 9113 and RFC 7541 section by section, in the order and by the numbers of h2spec: what goes
on, and what is answered with which code. Its cases that are not here are in test_http2_faults.py,
without a number."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from pathlib import Path

import hpack
import pytest
from gateway_rig import Rig, start_rig
from raw_http2 import EMPTY, GRPC, HELLO, OPEN, PSEUDO, WATCH, Peer, call, data, head, peer

from crossdock.proto.http2.frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    PADDED,
    PREFACE,
    PRIORITIZED,
    Code,
    Kind,
    Setting,
    frame,
    rst_stream,
    settings,
    window_update,
)
from crossdock.router.frontdoor.http2 import bounds, headers


@pytest.fixture
async def rig(tiny_model: Path) -> AsyncIterator[Rig]:
    async with start_rig(tiny_model, prefills=0, decodes=0) as made:
        yield made


PROTOCOL, SIZE, FLOW = Code.PROTOCOL_ERROR, Code.FRAME_SIZE_ERROR, Code.FLOW_CONTROL_ERROR
CLOSED, LOST = Code.STREAM_CLOSED, Code.COMPRESSION_ERROR
BLOCK = headers.block(PSEUDO + GRPC)
WATCHED = OPEN + data(EMPTY)  # the client has said all, the server has not
ENDED = OPEN + data(EMPTY) + rst_stream(1, Code.CANCEL)
PADDING = bytes((200,)) + EMPTY + bytes(200)


def block(payload: bytes, flags: int = END_HEADERS, stream_id: int = 1) -> bytes:
    """HEADERS of this block."""
    return frame(Kind.HEADERS, flags, stream_id, payload)


def priority(stream_id: int, on: int, weight: int = 15) -> bytes:
    return frame(Kind.PRIORITY, 0, stream_id, struct.pack(">IB", on, weight))


def more(payload: bytes, flags: int = 0, stream_id: int = 1) -> bytes:
    return frame(Kind.CONTINUATION, flags, stream_id, payload)


def literal(first: bytes, name: bytes, value: bytes) -> bytes:
    """A field of plain strings, after the bits that say what becomes of it."""
    return first + bytes((len(name),)) + name + bytes((len(value),)) + value


def packed(count: int) -> bytes:
    """So many heads alike by hpack, with Huffman's code and ever more of the table."""
    encoder = hpack.Encoder()
    fields = (*PSEUDO, *GRPC, ("x-a", "1"))
    return b"".join(block(encoder.encode(fields), stream_id=2 * i + 1) for i in range(count))


FINE = {
    "3.5/1 the preface": b"",
    "4.1/1 a frame of an unknown type": frame(0x16, 0, 0, b"x"),  # type: ignore[arg-type]
    "4.1/2 flags that are not defined": frame(Kind.PING, 0xFE, 0, bytes(8)),
    "4.1/3 the reserved bit": frame(Kind.PING, 0, 1 << 31, bytes(8)),
    "4.2/1 DATA of 16,384 bytes": OPEN[len(HELLO) :]
    + data(b"\0\0\0\x3f\xfb" + bytes(1 << 14)[5:], flags=0),
    "5.1 WINDOW_UPDATE half closed": WATCHED[len(HELLO) :] + window_update(1, 9),
    "5.1 PRIORITY half closed": WATCHED[len(HELLO) :] + priority(1, 0),
    "5.1 RST_STREAM half closed": ENDED[len(HELLO) :],
    "5.1 PRIORITY closed": ENDED[len(HELLO) :] + priority(1, 0),
    "5.1 WINDOW_UPDATE closed": ENDED[len(HELLO) :] + window_update(1, 9),
    "5.1 RST_STREAM closed": ENDED[len(HELLO) :] + rst_stream(1, Code.CANCEL),
    "5.3.1/1 HEADERS that depend on themselves: priorities are not heeded": block(
        struct.pack(">IB", 1, 1) + BLOCK, END_HEADERS | PRIORITIZED
    ),
    "5.3.1/2 PRIORITY the same": priority(7, 7),
    "5.5/1 an extension": frame(0x20, 0, 1, b"x"),  # type: ignore[arg-type]
    "6.1 DATA padded": OPEN[len(HELLO) :] + data(PADDING, flags=END_STREAM | PADDED),
    "6.1 DATA of padding alone": OPEN[len(HELLO) :] + data(b"\1\0", flags=PADDED),
    "6.2 HEADERS padded, with priority": block(
        b"\3" + struct.pack(">IB", 1 << 31, 255) + BLOCK + bytes(3),
        END_HEADERS | PRIORITIZED | PADDED,
    ),
    "6.3 PRIORITY of an idle stream": priority(9, 0, 255) + priority(11, 1 << 31 | 9, 0),
    "6.3 and HEADERS of an older one": priority(9, 0) + head(stream_id=3),
    "6.5 SETTINGS that nobody knows": settings([(0xFF, 1)]),  # type: ignore[list-item]
    "6.5.3/1 a value twice: the last counts": settings(
        [(Setting.INITIAL_WINDOW_SIZE, 0), (Setting.INITIAL_WINDOW_SIZE, 100)]
    ),
    "6.5.3 ACK that nobody waits for": frame(Kind.SETTINGS, ACK, 0),
    "6.7/2 PING with ACK": frame(Kind.PING, ACK, 0, bytes(8)),
    "6.8 GOAWAY: what the client still asks for is served": frame(Kind.GOAWAY, 0, 0, bytes(8)),
    "6.10/1 CONTINUATION, several": block(BLOCK[:5], 0)
    + more(BLOCK[5:9])
    + more(b"")
    + more(BLOCK[9:], END_HEADERS),
    "6.10 HEADERS with END_STREAM, and CONTINUATION": block(BLOCK[:5], END_STREAM)
    + more(BLOCK[5:], END_HEADERS),
    "7/1 GOAWAY with a code that nobody knows": frame(
        Kind.GOAWAY, 0, 0, struct.pack(">II", 0, 0xFF)
    ),
    "7/2 RST_STREAM the same": OPEN[len(HELLO) :] + frame(Kind.RST_STREAM, 0, 1, b"\0\0\0\xff"),
    "8.1 trailers": OPEN[len(HELLO) :]
    + data(EMPTY, flags=0)
    + block(headers.block([("x-trailer", "1")]), END_HEADERS | END_STREAM),
    "8.1.2.6 content-length that is right": head(more=(("content-length", "5"),)) + data(EMPTY),
    "hpack 2.3.3 indices of both tables": packed(3),
    "hpack 6.2.1 literals that are kept": block(BLOCK + literal(b"\x40", b"x-b", b"2")),
    "hpack 6.2.2 that are not": block(BLOCK + literal(b"\0", b"x-b", b"2")),
    "hpack 6.2.3 that never are": block(BLOCK + literal(b"\x10", b"x-b", b"2")),
    "hpack 6.3 sizes of the table": block(b"\x20\x3f\xe1\x1f" + BLOCK),
    "hpack 4.4 a field that empties the table": packed(1)
    + block(BLOCK + b"\x40\x01x\x7f\x89\x26" + b"v" * 5000, stream_id=3),
}


async def answer(client: Peer, stream_id: int) -> str:
    """Of a call, its status; "GOAWAY" where the connection ends before."""
    while True:
        flags, found, payload = await client.see(
            lambda kind, f, s, p: (
                kind == Kind.GOAWAY or (kind in (Kind.HEADERS, Kind.RST_STREAM) and s == stream_id)
            )
        )
        if not found:
            return f"GOAWAY {payload!r}"
        if len(payload) == 4:
            return f"RST_STREAM {payload!r}"
        if flags & END_STREAM:
            return dict(client.decoder.decode(payload))["grpc-status"]


async def test_what_is_allowed_goes_on(rig: Rig) -> None:
    for name, said in FINE.items():
        async with peer(rig) as client:
            client.say(HELLO, said, call(101))
            assert await answer(client, 101) == "0", name
            assert not [each for each in client.seen if each[0] == Kind.GOAWAY], name


FAULTS = {
    "4.2/3 HEADERS of over 16,384 bytes": (
        HELLO + b"\0\x40\x01\x01\x04\0\0\0\1" + bytes(9),
        *("connection", SIZE),
    ),
    "4.3/1 a block that is cut short": (HELLO + block(BLOCK + b"\x40"), "connection", LOST),
    "4.3/2 PRIORITY within a head": (
        HELLO + head(flags=0) + priority(1, 0),
        *("connection", PROTOCOL),
    ),
    "4.3/3 HEADERS of another stream within one": (
        HELLO + head(flags=0) + head(stream_id=3),
        *("connection", PROTOCOL),
    ),
    "5.1/7 CONTINUATION half closed": (
        WATCHED + more(b"", END_HEADERS),
        *("connection", PROTOCOL),
    ),
    "5.1/8 DATA after RST_STREAM": (ENDED + data(b"x"), "stream", CLOSED),
    "5.1/9 HEADERS after RST_STREAM": (ENDED + head(), "connection", CLOSED),
    "5.1/10 CONTINUATION after RST_STREAM": (
        ENDED + more(b"", END_HEADERS),
        *("connection", PROTOCOL),
    ),
    "5.5/2 an extension within a head": (
        HELLO + head(flags=0) + frame(0x20, 0, 1, b"x"),  # type: ignore[arg-type]
        *("connection", PROTOCOL),
    ),
    "6.2/4 HEADERS of padding alone": (
        HELLO + block(b"\x08" + bytes(7), PADDED | END_HEADERS),
        *("connection", PROTOCOL),
    ),
    "6.4 RST_STREAM of 5 bytes": (
        OPEN + frame(Kind.RST_STREAM, 0, 1, bytes(5)),
        *("connection", SIZE),
    ),
    "6.5.2/2 too large a window, and one that is not": (
        PREFACE
        + settings([(Setting.INITIAL_WINDOW_SIZE, 1 << 31), (Setting.INITIAL_WINDOW_SIZE, 9)]),
        *("connection", FLOW),
    ),
    "6.5.2/4 too large frames": (
        PREFACE + settings([(Setting.MAX_FRAME_SIZE, 1 << 24)]),
        *("connection", PROTOCOL),
    ),
    "6.8 GOAWAY of 7 bytes": (
        HELLO + frame(Kind.GOAWAY, 0, 0, bytes(7)),
        *("connection", SIZE),
    ),
    "6.10/3 CONTINUATION on stream 0": (
        HELLO + head(flags=0) + more(b"", END_HEADERS, 0),
        *("connection", PROTOCOL),
    ),
    "6.10/4 CONTINUATION after a whole head": (
        OPEN + more(b"", END_HEADERS),
        *("connection", PROTOCOL),
    ),
    "6.10/5 the same, after its last part": (
        HELLO + head(flags=0) + more(b"", END_HEADERS) + more(b"", END_HEADERS),
        *("connection", PROTOCOL),
    ),
    "6.10/6 CONTINUATION after DATA": (
        OPEN + data(b"", flags=0) + more(b"", END_HEADERS),
        *("connection", PROTOCOL),
    ),
    "8.1.2.1/1 a pseudo field that nobody knows": (
        HELLO + head(fields=(*PSEUDO, (":test", "x"), *GRPC)),
        *("stream", PROTOCOL),
    ),
    "8.1.2.1/3 a pseudo field in trailers": (
        OPEN + block(headers.block([(":method", "POST")]), END_HEADERS | END_STREAM),
        *("stream", PROTOCOL),
    ),
    "8.1.2 upper case in trailers": (
        OPEN + block(headers.block([("X-T", "1")]), END_HEADERS | END_STREAM),
        *("stream", PROTOCOL),
    ),
    "8.1.2.3/2 no :method": (HELLO + head(fields=(*PSEUDO[1:], *GRPC)), "stream", PROTOCOL),
    "8.1.2.3/3 no :scheme": (
        HELLO + head(fields=(PSEUDO[0], *PSEUDO[2:], *GRPC)),
        *("stream", PROTOCOL),
    ),
    "8.1.2.3/5 :method twice": (
        HELLO + head(fields=(*PSEUDO, PSEUDO[0], *GRPC)),
        *("stream", PROTOCOL),
    ),
    "8.1.2.3/6 :scheme twice": (
        HELLO + head(fields=(*PSEUDO, PSEUDO[1], *GRPC)),
        *("stream", PROTOCOL),
    ),
    "8.2.1 a line break in :path": (HELLO + head("/a\r\nb"), "stream", PROTOCOL),
    "8.1.2.6/1 more than content-length": (
        HELLO + head(WATCH, (("content-length", "1"),)) + data(EMPTY),
        *("stream", PROTOCOL),
    ),
    "8.1.2.6/1 less than content-length": (
        HELLO + head(WATCH, (("content-length", "9"),)) + data(EMPTY[:1]),
        *("stream", PROTOCOL),
    ),
    "8.1.2.6/2 the same, in several DATA": (
        HELLO + head(WATCH, (("content-length", "9"),)) + data(b"\0", flags=0) + data(b"\0"),
        *("stream", PROTOCOL),
    ),
    "8.1.2.6 content-length, and no DATA": (
        HELLO + head(WATCH, (("content-length", "5"),), flags=END_HEADERS | END_STREAM),
        *("stream", PROTOCOL),
    ),
    "8.1.2.6 two lengths": (
        HELLO + head(WATCH, (("content-length", "5"), ("content-length", "6"))),
        *("stream", PROTOCOL),
    ),
    "8.1.2.6 a length that is none": (
        HELLO + head(WATCH, (("content-length", "-5"),)),
        *("stream", PROTOCOL),
    ),
    "hpack 2.3.3/1 an index that is none": (HELLO + block(b"\xc6"), "connection", LOST),
    "hpack 2.3.3/2 of a name": (HELLO + block(b"\x7f\x07\x01x"), "connection", LOST),
    "hpack 4.2/1 the table's size after a field": (
        HELLO + block(BLOCK + b"\x20"),
        *("connection", LOST),
    ),
    "hpack 5.1 an integer without end": (
        HELLO + block(b"\xff" + b"\x80" * 9 + b"\0"),
        *("connection", LOST),
    ),
    "hpack 5.2/1 padding of 8 bits": (
        HELLO + block(BLOCK + b"\0\x01x\x82\x1f\xff"),
        *("connection", LOST),
    ),
    "hpack 5.2/2 padding of zeros": (
        HELLO + block(BLOCK + b"\0\x01x\x81\x18"),
        *("connection", LOST),
    ),
    "hpack 5.2/3 the end of strings in one": (
        HELLO + block(BLOCK + b"\0\x01x\x84\xff\xff\xff\xff"),
        *("connection", LOST),
    ),
    "hpack 5.2 a string that is cut short": (
        HELLO + block(BLOCK + b"\0\x01x\x7e1"),
        *("connection", LOST),
    ),
    "hpack 6.1/1 index 0": (HELLO + block(b"\x80"), "connection", LOST),
    "hpack 6.3/1 a table that is too large": (
        HELLO + block(b"\x3f\xe2\x1f" + BLOCK),
        *("connection", LOST),
    ),
}


async def test_what_is_not_allowed_has_its_code(rig: Rig) -> None:
    for name, (said, scope, code) in FAULTS.items():
        async with peer(rig) as client:
            client.say(said)
            assert await client.fault() == (scope, code), name
            if scope == "stream":
                client.say(call(101))
                assert await answer(client, 101) == "0", name


async def test_more_streams_than_are_allowed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """5.1.2/1: it is refused, and those under way go on."""
    monkeypatch.setattr(bounds, "MAX_STREAMS", 2)
    async with peer(rig) as client:
        client.say(HELLO, *(head(WATCH, stream_id=i) for i in (1, 3, 5)))
        assert await client.fault() == ("stream", Code.REFUSED_STREAM)
        client.say(data(EMPTY, 1))
        assert (await client.see_kind(Kind.DATA, 1))[2]


async def test_a_window_may_be_negative(rig: Rig) -> None:
    """6.9.1/1, 6.9.2/1 and /2: an answer of 7 bytes, and the window of its stream."""
    async with peer(rig) as client:
        client.say(PREFACE, settings([(Setting.INITIAL_WINDOW_SIZE, 3)]), call())
        assert len((await client.see_kind(Kind.DATA))[2]) == 3
        client.say(settings([(Setting.INITIAL_WINDOW_SIZE, 1)]))  # which makes it -2
        client.say(window_update(1, 2), frame(Kind.PING, 0, 0, bytes(8)))
        await client.see(lambda kind, flags, s, p: kind == Kind.PING and flags == ACK)
        client.say(settings([(Setting.INITIAL_WINDOW_SIZE, 2)]))
        assert len((await client.see_kind(Kind.DATA))[2]) == 1
        client.say(window_update(1, 100))
        assert len((await client.see_kind(Kind.DATA))[2]) == 3
        assert (await client.trailers())["grpc-status"] == "0"


async def test_settings_are_acknowledged(rig: Rig) -> None:
    """6.5.3/2: each, and after what they change."""
    async with peer(rig) as client:
        client.say(HELLO, settings([(Setting.INITIAL_WINDOW_SIZE, 9)]))
        for _ in range(2):
            await client.see(lambda kind, flags, s, p: kind == Kind.SETTINGS and flags == ACK)
