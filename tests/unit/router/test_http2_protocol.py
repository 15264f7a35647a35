"""HTTP/2 over raw sockets: what is allowed, bounds, windows, and ends."""

from __future__ import annotations

import asyncio
import gzip
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_rig import Rig, ask, start_rig, until
from raw_http2 import EMPTY, GRPC, HELLO, OPEN, PSEUDO, WATCH, call, data, head, peer

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
    settings,
    window_update,
)
from crossdock.router.frontdoor import http_limits
from crossdock.router.frontdoor.http2 import bounds, headers, stream
from crossdock.router.frontdoor.http2.connection import Connection


@pytest.fixture
async def rig(tiny_model: Path) -> AsyncIterator[Rig]:
    async with start_rig(tiny_model, prefills=0, decodes=0) as made:
        yield made


REFUSALS = {
    "GET": (head(fields=((":method", "GET"), *PSEUDO[1:], *GRPC)), ":status", "405"),
    "JSON": (head(fields=(*PSEUDO, ("content-type", "application/json"))), ":status", "415"),
    "grpc-web": (head(fields=(*PSEUDO, ("content-type", "application/grpcweb"))), ":status", "415"),
    "a long head": (head(more=tuple((f"x-{i}", "v" * 40) for i in range(250))), ":status", "431"),
    "no time": (head(more=(("grpc-timeout", "soon"),)), "grpc-status", "3"),
    "no base64": (head(more=(("x-bin", "*"),)), "grpc-status", "3"),
    "no such method": (call(path="/a/b"), "grpc-status", "12"),
    "no such encoding": (call(more=(("grpc-encoding", "zstd"),)), "grpc-status", "12"),
    "no message": (head() + data(b""), "grpc-status", "3"),
    "half a message": (head() + data(EMPTY[:4]), "grpc-status", "13"),
    "a flag that is none": (head() + data(b"\7" + EMPTY[1:]), "grpc-status", "13"),
    "too large a message": (head() + data(b"\0\xff\0\0\0"), "grpc-status", "8"),
    "compressed, it says not how": (head() + data(b"\1\0\0\0\1x"), "grpc-status", "13"),
    "no gzip": (
        head(more=(("grpc-encoding", "gzip"),)) + data(b"\1\0\0\0\1x"),
        *("grpc-status", "13"),
    ),
    "no protobuf": (head() + data(b"\0\0\0\0\1\xff"), "grpc-status", "3"),
    "too late": (head(WATCH, (("grpc-timeout", "1m"),)), "grpc-status", "4"),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_what_is_no_call_is_refused(rig: Rig, name: str) -> None:
    said, field_, value = REFUSALS[name]
    async with peer(rig) as client:
        client.say(HELLO, said)
        assert (await client.trailers())[field_] == value
        client.say(call(3))
        assert (await client.trailers(3))["grpc-status"] == "0", "the connection lives on"


def compressed(message: bytes) -> bytes:
    packed = gzip.compress(message)
    return b"\1" + struct.pack(">I", len(packed)) + packed


async def test_what_is_unusual_and_allowed(rig: Rig) -> None:
    """Byte by byte, padded, with priorities, in parts, unknown frames between, gzip, trailers."""
    block = headers.block(PSEUDO + GRPC + (("grpc-timeout", "10S"), ("x-bin", "AAE,/w==")))
    parts = [
        HELLO,
        frame(99, 0xFF, 7, b"what is this"),  # type: ignore[arg-type]
        frame(Kind.HEADERS, PADDED | PRIORITIZED, 1, b"\2" + bytes(5) + block[:20] + b"\0\0"),
        frame(Kind.CONTINUATION, 0, 1, block[20:30]),
        frame(Kind.CONTINUATION, END_HEADERS, 1, block[30:]),
        frame(Kind.PRIORITY, 0, 9, bytes(5)),
        data(b"\3" + EMPTY[:3] + bytes(3), flags=PADDED),
        window_update(1, 5),
        data(EMPTY[3:], flags=0),
        frame(Kind.HEADERS, END_HEADERS | END_STREAM, 1, headers.block([("x-trailer", "1")])),
        call(3),
        head(more=(("grpc-encoding", "gzip"),), stream_id=5) + data(compressed(b""), 5),
        frame(Kind.PING, 0, 0, b"12345678"),
    ]
    async with peer(rig) as client:
        for byte in b"".join(parts):
            client.say(bytes((byte,)))
            await asyncio.sleep(0)
        for stream_id in (1, 3, 5):
            assert (await client.trailers(stream_id))["grpc-status"] == "0", stream_id
        _, _, payload = await client.see(lambda k, f, s, p: k == Kind.PING and f == ACK)
        assert payload == b"12345678"


async def test_a_bomb_is_not_inflated(rig: Rig) -> None:
    """80 KB that are 80 MB."""
    async with peer(rig) as client:
        client.say(HELLO, head(GENERATE, (("grpc-encoding", "gzip"),)))
        bomb = compressed(bytes(80_000_000))
        for at in range(0, len(bomb), 16_000):
            client.say(data(bomb[at : at + 16_000], flags=END_STREAM * (at + 16_000 >= len(bomb))))
        trailers = await client.trailers()
        assert (trailers["grpc-status"], "inflated" in trailers["grpc-message"]) == ("8", True)


async def test_a_table_that_is_to_shrink_is_said_to(rig: Rig) -> None:
    async with peer(rig) as client:
        client.decoder.max_allowed_table_size = 0
        client.say(PREFACE, settings([(Setting.HEADER_TABLE_SIZE, 0)]), call(), call(3))
        assert (await client.trailers())["grpc-status"] == "0"
        assert (await client.trailers(3))["grpc-status"] == "0"


def asked(tokens: int) -> bytes:
    message = ask(max_tokens=tokens, ignore_eos=True).SerializeToString()
    return b"\0" + struct.pack(">I", len(message)) + message


GENERATE = "/crossdock.v1.Inference/Generate"


async def test_a_client_gets_no_more_than_its_windows_allow(tiny_model: Path) -> None:
    """Of two streams, one with no window: tokens merge until it has one, and none is lost."""
    async with start_rig(tiny_model) as rig, peer(rig) as client:
        client.say(PREFACE, settings([(Setting.INITIAL_WINDOW_SIZE, 0)]))
        for stream_id in (1, 3):
            client.say(head(GENERATE, stream_id=stream_id), data(asked(200), stream_id))
        client.say(window_update(3, 100_000))
        assert (await client.trailers(3))["grpc-status"] == "0"
        await until(lambda: rig.idle)
        assert not [each for each in client.seen if each[2] == 1 and each[0] == Kind.DATA]
        client.say(window_update(1, 7))
        assert len((await client.see_kind(Kind.DATA, 1))[2]) == 7
        client.say(settings([(Setting.INITIAL_WINDOW_SIZE, 100_000)]))
        sizes = 7
        while True:
            flags, _, payload = await client.see(lambda k, f, s, p: s == 1)
            if flags & END_STREAM:
                break
            sizes += len(payload)
        assert dict(client.decoder.decode(payload))["grpc-status"] == "0"
        assert 7 < sizes < 20_000, "tokens that wait are one message"


async def test_who_makes_no_room_is_not_waited_for(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "ROOM_S", 0.05)
    async with start_rig(tiny_model) as rig, peer(rig) as client:
        client.say(PREFACE, settings([(Setting.INITIAL_WINDOW_SIZE, 0)]))
        client.say(head(GENERATE), data(asked(2000)))
        assert await client.fault() == ("stream", Code.CANCEL)
        await until(lambda: rig.idle)


async def test_a_connection_has_one_window(tiny_model: Path) -> None:
    async with start_rig(tiny_model) as rig, peer(rig) as client:
        client.say(PREFACE, settings([(Setting.INITIAL_WINDOW_SIZE, 2**31 - 1)]))
        got, told, ended = 0, 0, 0
        for stream_id in range(1, 41, 2):
            client.say(head(GENERATE, stream_id=stream_id), data(asked(100), stream_id))
        while ended < 20:
            flags, _, payload = await client.see(lambda k, f, s, p: s > 0)
            got += 0 if flags else len(payload)
            ended += bool(flags & END_STREAM)
            assert got - told <= 65_535
            if got - told > 60_000:
                client.say(window_update(0, 60_000))
                told += 60_000
        assert told, "it was too little to try anything"


@pytest.mark.parametrize("said", [b"", PREFACE[:9], PREFACE])
async def test_who_says_nothing_is_left(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(http_limits, "HEAD_S", 0.05)
    async with peer(rig) as client:
        client.say(said)
        with pytest.raises(ConnectionError):
            await client.see(lambda *_: False)


async def connected(rig: Rig) -> Connection:
    """The server's side of the only client, once that has said who it is."""
    server = rig.gateway._grpc._server
    await until(lambda: server._connections and not server._silent)
    (only,) = server._connections
    return only


@pytest.mark.parametrize("said", [head(flags=0), head()[:20]])
async def test_the_rest_of_a_head_is_not_waited_for(rig: Rig, said: bytes) -> None:
    async with peer(rig) as client:
        client.say(HELLO, said)
        served = await connected(rig)
        await until(lambda: served._session.block or served._reader.waits)
        served.tick(time.monotonic() + http_limits.HEAD_S + 1)
        assert await client.fault() == ("connection", Code.ENHANCE_YOUR_CALM)


@pytest.mark.parametrize("answers", [True, False])
async def test_who_is_quiet_is_asked(rig: Rig, answers: bool) -> None:
    async with peer(rig) as client:
        client.say(OPEN)
        served = await connected(rig)
        await until(lambda: served.calls)
        later = time.monotonic() + bounds.KEEPALIVE_S + 1
        served.tick(later)
        _, _, payload = await client.see_kind(Kind.PING)
        if answers:
            client.say(frame(Kind.PING, ACK, 0, payload))
            await until(lambda: served._asked is None)
        served.tick(later + bounds.PONG_S + 1)
        if answers:
            client.say(data(EMPTY))
            assert (await client.see_kind(Kind.DATA))[2]
        else:
            with pytest.raises(ConnectionError):
                await client.see(lambda *_: False)


async def test_an_end_with_grace(rig: Rig) -> None:
    """Calls under way get their time, new ones are not begun, and then all is over."""
    async with peer(rig) as client, peer(rig) as idle:
        idle.say(HELLO)
        client.say(HELLO, head(WATCH), data(EMPTY))
        await client.see_kind(Kind.DATA)
        await idle.see_kind(Kind.SETTINGS)
        stopping = asyncio.create_task(rig.gateway._grpc.stop(0.2))
        _, _, payload = await client.see_kind(Kind.GOAWAY)
        assert struct.unpack(">II", payload) == (1, Code.NO_ERROR)
        client.say(call(3))
        assert (await idle.fault()) == ("connection", Code.NO_ERROR)
        assert (await client.trailers())["grpc-status"] == "14"
        await stopping
        assert not [each for each in client.seen if each[2] == 3]


async def test_messages_that_nobody_reads_are_bounded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all connections: the call that waits for the longest gives up, others go on."""
    held = rig.gateway._grpc._server._shared.held
    held.most = 100_000
    part = b"\0\0\x0f\xff\xff" + bytes(16_000)
    async with peer(rig) as one, peer(rig) as other:
        one.say(HELLO, head(GENERATE), *(data(part, flags=0) for _ in range(3)))
        await until(lambda: held.bytes > 40_000)
        other.say(HELLO, head(GENERATE), *(data(part, flags=0) for _ in range(4)))
        trailers = await one.trailers()
        assert (trailers["grpc-status"], "100000 bytes" in trailers["grpc-message"]) == ("8", True)
        await until(lambda: 4 * len(part) < held.bytes < 5 * len(part))
    await until(lambda: held.bytes == 0)
