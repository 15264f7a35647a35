"""RFC 9113 over raw sockets: what breaks the protocol is answered with the code that it has.

Floods are four times what is allowed at once, since a slow machine gives time to recover."""

from __future__ import annotations

import logging
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_rig import Rig, start_rig
from grpc_health.v1 import health_pb2
from raw_http2 import GRPC, HELLO, OPEN, PSEUDO, WATCH, call, data, head, peer

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
from crossdock.router.frontdoor.http2 import headers
from crossdock.router.frontdoor.http2.manners import RECENT


@pytest.fixture
async def rig(tiny_model: Path) -> AsyncIterator[Rig]:
    async with start_rig(tiny_model, prefills=0, decodes=0) as made:
        yield made


ENDED = HELLO + call()
PROTOCOL, SIZE, FLOW = Code.PROTOCOL_ERROR, Code.FRAME_SIZE_ERROR, Code.FLOW_CONTROL_ERROR
CLOSED, CALM = Code.STREAM_CLOSED, Code.ENHANCE_YOUR_CALM
ZERO, ONE = b"\0\0\0\0", b"\0\0\0\1"
BLOCK = headers.block(PSEUDO + GRPC)
LONG = b"\0\0\0\x3e\x80" + health_pb2.HealthCheckRequest(service="x" * 15_997).SerializeToString()
TOO_LONG = b"\0\x40\x01" + b"\0" * 6  # the head of a frame of 16,385 bytes

FAULTS = {
    "another protocol": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "connection", PROTOCOL),
    "no settings": (PREFACE + frame(Kind.PING, 0, 0, bytes(8)), "connection", PROTOCOL),
    "settings acknowledged first": (
        PREFACE + frame(Kind.SETTINGS, ACK, 0),
        *("connection", PROTOCOL),
    ),
    "DATA on 0": (HELLO + data(b"x", 0), "connection", PROTOCOL),
    "DATA on a stream that is idle": (HELLO + data(b"x", 1), "connection", PROTOCOL),
    "DATA after the end": (OPEN + data(b"", 1) + data(b"x", 1), "stream", CLOSED),
    "DATA with too much padding": (OPEN + data(b"\5abc", flags=PADDED), "connection", PROTOCOL),
    "DATA with no padding": (OPEN + data(b"", flags=PADDED), "connection", PROTOCOL),
    "a frame that is too long": (HELLO + TOO_LONG, "connection", SIZE),
    "HEADERS on 0": (HELLO + head(stream_id=0), "connection", PROTOCOL),
    "HEADERS on an even stream": (HELLO + head(stream_id=2), "connection", PROTOCOL),
    "HEADERS on an older stream": (
        HELLO + head(WATCH, stream_id=5) + head(stream_id=3),
        "connection",
        PROTOCOL,
    ),
    "a second head": (OPEN + head(), "stream", PROTOCOL),
    "HEADERS after the end": (OPEN + data(b"") + head(), "stream", CLOSED),
    "priority that is cut short": (
        HELLO + frame(Kind.HEADERS, PRIORITIZED | END_HEADERS, 1, b"\0"),
        "connection",
        SIZE,
    ),
    "another frame within a head": (HELLO + head(flags=0) + data(b"x"), "connection", PROTOCOL),
    "another stream within a head": (
        HELLO + head(flags=0) + frame(Kind.CONTINUATION, 4, 3, b""),
        "connection",
        PROTOCOL,
    ),
    "CONTINUATION of nothing": (
        HELLO + frame(Kind.CONTINUATION, 4, 1, b""),
        "connection",
        PROTOCOL,
    ),
    "CONTINUATION without end": (
        HELLO + head(flags=0) + 8 * frame(Kind.CONTINUATION, 0, 1, bytes(9000)),
        "connection",
        CALM,
    ),
    "nothing but empty CONTINUATION": (
        HELLO + head(flags=0) + 4000 * frame(Kind.CONTINUATION, 0, 1),
        "connection",
        CALM,
    ),
    "a head that cannot be decoded": (
        HELLO + frame(Kind.HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff"),
        "connection",
        Code.COMPRESSION_ERROR,
    ),
    "a table that grows": (
        HELLO + frame(Kind.HEADERS, END_HEADERS, 1, b"\x3f\xe2\x7f"),
        "connection",
        Code.COMPRESSION_ERROR,
    ),
    "a head that inflates": (
        HELLO
        + frame(
            Kind.HEADERS,
            END_HEADERS,
            1,
            headers.block(()) + b"\x40\x01x\x7f\x80\x1e" + b"v" * 3967 + b"\xbe" * 99,
        ),
        "connection",
        CALM,
    ),
    "no path": (HELLO + head(fields=(*PSEUDO[:2], *GRPC)), "stream", PROTOCOL),
    "an empty path": (HELLO + head(""), "stream", PROTOCOL),
    "a path twice": (HELLO + head(fields=(*PSEUDO, PSEUDO[2], *GRPC)), "stream", PROTOCOL),
    "a pseudo field of answers": (
        HELLO + head(fields=(*PSEUDO, (":status", "200"), *GRPC)),
        "stream",
        PROTOCOL,
    ),
    "a pseudo field too late": (
        HELLO + head(fields=(*PSEUDO[1:], *GRPC, PSEUDO[0])),
        "stream",
        PROTOCOL,
    ),
    "upper case": (HELLO + head(more=(("X-Big", "1"),)), "stream", PROTOCOL),
    "no name": (HELLO + head(more=(("", "1"),)), "stream", PROTOCOL),
    "a line break": (HELLO + head(more=(("x", "a\r\nb"),)), "stream", PROTOCOL),
    "connection": (HELLO + head(more=(("connection", "close"),)), "stream", PROTOCOL),
    "te that is none": (HELLO + head(more=(("te", "gzip"),)), "stream", PROTOCOL),
    "PRIORITY on 0": (HELLO + frame(Kind.PRIORITY, 0, 0, bytes(5)), "connection", PROTOCOL),
    "PRIORITY of 4 bytes": (HELLO + frame(Kind.PRIORITY, 0, 1, bytes(4)), "stream", SIZE),
    "RST_STREAM on 0": (HELLO + rst_stream(0, Code.CANCEL), "connection", PROTOCOL),
    "RST_STREAM on a stream that is idle": (
        HELLO + rst_stream(1, Code.CANCEL),
        "connection",
        PROTOCOL,
    ),
    "RST_STREAM of 3 bytes": (OPEN + frame(Kind.RST_STREAM, 0, 1, bytes(3)), "connection", SIZE),
    "SETTINGS on a stream": (HELLO + frame(Kind.SETTINGS, 0, 1), "connection", PROTOCOL),
    "SETTINGS of 5 bytes": (HELLO + frame(Kind.SETTINGS, 0, 0, bytes(5)), "connection", SIZE),
    "SETTINGS acknowledged with values": (
        HELLO + frame(Kind.SETTINGS, ACK, 0, bytes(6)),
        "connection",
        SIZE,
    ),
    "ENABLE_PUSH 2": (PREFACE + settings([(Setting.ENABLE_PUSH, 2)]), "connection", PROTOCOL),
    "too large a window": (
        PREFACE + settings([(Setting.INITIAL_WINDOW_SIZE, 2**31)]),
        "connection",
        FLOW,
    ),
    "too small frames": (
        PREFACE + settings([(Setting.MAX_FRAME_SIZE, 100)]),
        "connection",
        PROTOCOL,
    ),
    "windows that overflow by settings": (
        OPEN
        + window_update(1, 2**31 - 1 - 65535)
        + settings([(Setting.INITIAL_WINDOW_SIZE, 65536)]),
        "connection",
        FLOW,
    ),
    "a flood of settings": (HELLO + 4000 * settings(()), "connection", CALM),
    "PUSH_PROMISE": (HELLO + frame(Kind.PUSH_PROMISE, 4, 1, bytes(4)), "connection", PROTOCOL),
    "PING on a stream": (HELLO + frame(Kind.PING, 0, 1, bytes(8)), "connection", PROTOCOL),
    "PING of 7 bytes": (HELLO + frame(Kind.PING, 0, 0, bytes(7)), "connection", SIZE),
    "a flood of pings": (HELLO + 4 * frame(Kind.PING, 0, 0, bytes(8)), "connection", CALM),
    "GOAWAY on a stream": (HELLO + frame(Kind.GOAWAY, 0, 1, bytes(8)), "connection", PROTOCOL),
    "WINDOW_UPDATE of 3 bytes": (
        HELLO + frame(Kind.WINDOW_UPDATE, 0, 0, bytes(3)),
        "connection",
        SIZE,
    ),
    "WINDOW_UPDATE of 0": (HELLO + window_update(0, 0), "connection", PROTOCOL),
    "WINDOW_UPDATE of 0 for a stream": (OPEN + window_update(1, 0), "stream", PROTOCOL),
    "WINDOW_UPDATE on a stream that is idle": (HELLO + window_update(1, 1), "connection", PROTOCOL),
    "a window that overflows": (HELLO + window_update(0, 2**31 - 1), "connection", FLOW),
    "a stream's window that overflows": (OPEN + window_update(1, 2**31 - 1), "stream", FLOW),
    "more than a stream's window": (OPEN + 20 * data(LONG, flags=0), "stream", FLOW),
    "a flood of empty DATA": (OPEN + 4000 * data(b"", flags=0), "connection", CALM),
    "a flood of PRIORITY": (
        HELLO + 4000 * frame(Kind.PRIORITY, 0, 1, bytes(5)),
        "connection",
        CALM,
    ),
    "a flood of unknown frames": (HELLO + 4000 * frame(99, 0, 0), "connection", CALM),  # type: ignore[arg-type]
    "rapid resets": (
        HELLO + b"".join(call(i) + rst_stream(i, Code.CANCEL) for i in range(1, 8000, 2)),
        "connection",
        CALM,
    ),
}


async def test_offences_are_answered_with_their_codes(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name, (said, scope, code) in FAULTS.items():
        async with peer(rig) as client:
            client.say(said)
            assert await client.fault() == (scope, code), name
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    lines = [record for record in caplog.records if "http2" in record.name]
    assert len(FAULTS) <= len(lines) < 4000 + len(FAULTS)
    async with peer(rig) as client:
        client.say(HELLO, call())
        assert (await client.trailers())["grpc-status"] == "0"


async def test_who_makes_us_reset_streams_is_cut_off(rig: Rig) -> None:
    async with peer(rig) as client:
        client.say(HELLO, *(head(stream_id=i) + window_update(i, 0) for i in range(1, 8000, 2)))
        _, _, payload = await client.see_kind(Kind.GOAWAY)
        assert struct.unpack_from(">I", payload, 4)[0] == CALM


async def test_trailers_of_a_stream_that_was_over_long_ago_are_passed_over(rig: Rig) -> None:
    last = 2 * RECENT + 3
    async with peer(rig) as client:
        for i in range(1, last, 2):
            client.say(*([HELLO] if i == 1 else []), call(i))
            await client.trailers(i)
        client.say(head(fields=(("x-late", "1"),), flags=END_HEADERS | END_STREAM), call(last))
        assert (await client.trailers(last))["grpc-status"] == "0"
