"""The gRPC server with handlers of the tests' own: cancelled calls, large answers, and drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from gateway_rig import until
from raw_http2 import EMPTY, HELLO, Peer, data, head

from crossdock.proto.http2.frames import (
    END_HEADERS,
    END_STREAM,
    FIRST_WINDOW,
    MAX_WINDOW,
    PREFACE,
    Code,
    ConnectionFault,
    Kind,
    Setting,
    rst_stream,
    settings,
    window_update,
)
from crossdock.router.frontdoor import http_limits
from crossdock.router.frontdoor.http2 import bounds, manners
from crossdock.router.frontdoor.http2.server import Server
from crossdock.router.frontdoor.http2.stream import Stream

WIDE = (  # a client that makes all the room there is
    PREFACE
    + settings([(Setting.INITIAL_WINDOW_SIZE, MAX_WINDOW)])
    + window_update(0, MAX_WINDOW - FIRST_WINDOW)
)
LARGE = 4_000_000


def same(message: bytes) -> bytes:
    return message


@asynccontextmanager
async def serving(kind: str, handler: Any, age_s: float = 0.0) -> AsyncIterator[tuple[Server, int]]:
    """A server of the one method /t.T/M, and its port."""
    server = Server(lambda call: None, lambda call, error: None, {"/t.T/M": 1 << 20}, age_s)
    method = getattr(grpc, f"{kind}_rpc_method_handler")(handler, same, same)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"M": method}),))
    port = await server.listen("127.0.0.1:0", None)
    try:
        yield server, port
    finally:
        await server.stop(0)


@asynccontextmanager
async def client_of(port: int) -> AsyncIterator[Peer]:
    made = Peer(*await asyncio.open_connection("127.0.0.1", port))
    try:
        yield made
    finally:
        made.writer.transport.abort()


def call(*more: tuple[str, str]) -> bytes:
    return head("/t.T/M", more) + data(EMPTY)


async def read_answer(client: Peer) -> int:
    """Bytes of DATA up to the end of stream 1. Raises ConnectionError where there is none."""
    got = 0
    while True:
        flags, _, payload = await client.see(
            lambda kind, flags, stream, payload: (
                kind == Kind.DATA or (kind == Kind.HEADERS and bool(flags & END_STREAM))
            )
        )
        if flags & END_STREAM:
            return got
        got += len(payload)


@pytest.mark.parametrize("how", ["reset", "gone", "deadline"])
async def test_a_call_that_waits_for_room_ends_with_its_client(how: str) -> None:
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    waits = asyncio.Event()

    async def answers(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            waits.set()
            yield bytes(10 * FIRST_WINDOW)
            ended.set_result("went on")
            yield b""
        finally:
            if not ended.done():
                ended.set_result("cancelled")

    async with serving("unary_stream", answers) as (_, port), client_of(port) as client:
        client.say(HELLO, call(*[("grpc-timeout", "200m")] * (how == "deadline")))
        await waits.wait()
        await client.see_kind(Kind.DATA)
        if how == "reset":
            client.say(rst_stream(1, Code.CANCEL))
        elif how == "gone":
            client.writer.transport.abort()
        async with asyncio.timeout(100):
            assert await ended == "cancelled"


async def test_a_large_answer_reaches_a_client_with_room_for_it() -> None:
    async def answer(request: bytes, context: Any) -> bytes:
        return bytes(LARGE)

    async with serving("unary_unary", answer) as (_, port), client_of(port) as client:
        client.say(WIDE, call())
        assert await read_answer(client) == LARGE + len(EMPTY)


async def test_many_messages_go_in_turns() -> None:
    others = 0

    async def answers(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(50_000)
        assert others, "nothing else ran meanwhile"

    async def run_beside() -> None:
        nonlocal others
        while True:
            await asyncio.sleep(0)
            others += 1

    async with serving("unary_stream", answers) as (_, port), client_of(port) as client:
        client.say(HELLO)
        await client.see_kind(Kind.SETTINGS)
        beside = asyncio.create_task(run_beside())
        client.say(WIDE[len(PREFACE) :], call())
        assert await read_answer(client) == 100 * (50_000 + len(EMPTY))
        beside.cancel()


async def test_messages_come_apart_and_together() -> None:
    """Each byte of one in a frame of its own, and several in one frame."""

    async def echo(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for each in requests:
            yield each

    message = b"\0\0\0\0\3abc"
    async with serving("stream_stream", echo) as (_, port), client_of(port) as client:
        client.say(HELLO, head("/t.T/M"))
        client.say(*(data(message[i : i + 1], flags=0) for i in range(len(message))))
        assert (await client.see_kind(Kind.DATA))[2] == message
        client.say(data(3 * message + message[:6], flags=0), data(message[6:], flags=0), data(b""))
        assert await read_answer(client) == 4 * len(message)


async def test_what_is_held_is_counted_to_the_byte() -> None:
    """Also of a client whose messages are right until one is not."""
    heard = asyncio.Event()

    async def waits(requests: AsyncIterator[bytes], context: Any) -> bytes:
        await heard.wait()
        return b"".join([each async for each in requests])

    async with serving("stream_unary", waits) as (server, port), client_of(port) as client:
        held = server._shared.held
        client.say(HELLO, head("/t.T/M"))
        await until(lambda: held.bytes)
        waits_with = held.bytes
        assert waits_with > bounds.CALL_BYTES
        client.say(data(3 * EMPTY + EMPTY[:2], flags=0))
        await until(lambda: held.bytes > waits_with)
        assert held.bytes == waits_with + 3 * bounds.QUEUED_BYTES + 2
        client.say(data(EMPTY[2:] + EMPTY + b"\7" + EMPTY[1:], flags=0))
        await until(lambda: not held.bytes)
        heard.set()
        assert (await client.trailers())["grpc-status"] == "13"


async def test_a_status_is_written_so_that_every_client_reads_it() -> None:
    """Percent-encoded, cut where it is long; no answer before it: trailers alone."""

    async def fails(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("x-bin", b"\0\xff"), ("x-plain", "1")))
        await context.abort(grpc.StatusCode.NOT_FOUND, "50 % of\nKöln ~")

    async with serving("unary_unary", fails) as (_, port), client_of(port) as client:
        client.say(HELLO, call())
        flags, _, payload = await client.see_kind(Kind.HEADERS)
        assert flags & END_STREAM
        fields = dict(client.decoder.decode(payload))
        assert (fields[":status"], fields["content-type"]) == ("200", "application/grpc")
        assert (fields["grpc-status"], fields["x-plain"], fields["x-bin"]) == ("5", "1", "AP8")
        assert fields["grpc-message"] == "50 %25 of%0AK%C3%B6ln ~"
        assert "gzip" in fields["grpc-accept-encoding"]


async def test_a_client_that_reads_slowly_holds_up_itself_alone() -> None:
    """gRPC's own client, 5,000 messages: no more are made than it has room for, others go on beside
    them in its connection, and it gets all of them in order."""
    made = 0

    async def answers(request: bytes, context: Any) -> AsyncIterator[bytes]:
        nonlocal made
        for i in range(5000 if request else 1):
            made += bool(request)
            yield i.to_bytes(2, "big") + bytes(8_000 * bool(request))

    async with (
        serving("unary_stream", answers) as (server, port),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        method = channel.unary_stream("/t.T/M")
        slow = method(b"all")
        assert (await slow.read())[:2] == b"\0\0"
        for _ in range(50):
            assert [each async for each in method(b"")] == [b"\0\0"]
        assert made < 5000
        (only,) = server._connections
        assert only.unsent <= 1 << 18
        for i in range(1, 5000):
            assert (await slow.read())[:2] == i.to_bytes(2, "big")
        assert await slow.read() is grpc.aio.EOF


async def test_no_call_is_lost_when_connections_grow_old() -> None:
    """gRPC's own client makes new ones; calls that wait and those that come meanwhile end well."""

    async def answer(request: bytes, context: Any) -> bytes:
        peers.add(context.peer())
        await asyncio.sleep(0)
        return request

    peers: set[str] = set()
    async with serving("unary_unary", answer, age_s=0.02) as (_, port):

        async def caller(channel: Any) -> None:
            method = channel.unary_unary("/t.T/M")
            while len(peers) < 6:
                assert await method(b"x", timeout=100) == b"x"

        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await asyncio.gather(*(caller(channel) for _ in range(8)))


def test_pings_of_clients_that_keep_alive_are_no_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    """grpc-go's come every 10 s at the most, also beside streams that get nothing."""
    now = 1000.0
    monkeypatch.setattr(manners.time, "monotonic", lambda: now)
    patient = manners.Manners()
    for _ in range(100):
        now += 10
        patient.pinged(sent=7)
    patient.pinged(sent=8)  # who measures the way of what it gets may ask at once
    for _ in range(bounds.MAX_EARLY_PINGS):
        now += 1
        patient.pinged(sent=8)
    with pytest.raises(ConnectionFault):
        patient.pinged(sent=8)


async def test_connections_without_calls_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """In number and in time, the one that has had no call for the longest first."""
    monkeypatch.setattr(http_limits, "MAX_CONNECTIONS", 2)

    async def waits(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b""
        await asyncio.Event().wait()

    async with serving("unary_stream", waits) as (server, port), client_of(port) as busy:
        busy.say(HELLO, call())
        await busy.see_kind(Kind.DATA)
        async with client_of(port) as idle:
            idle.say(HELLO)
            await until(lambda: server._idle)
            async with client_of(port) as third:
                assert await idle.fault() == ("connection", Code.NO_ERROR)
                third.say(HELLO)
                await until(lambda: len(server._idle) == 1)
                monkeypatch.setattr(bounds, "IDLE_S", -1.0)
                server._tick()
                assert await third.fault() == ("connection", Code.NO_ERROR)
        assert [each.calls for each in server._connections].count(1) == 1


async def test_a_drain_waits_for_what_its_clients_have_not_read() -> None:
    async def answer(request: bytes, context: Any) -> bytes:
        return bytes(LARGE)

    async with serving("unary_unary", answer) as (server, port), client_of(port) as client:
        client.say(WIDE)
        await client.see_kind(Kind.SETTINGS)
        client.say(call())
        await client.see_kind(Kind.HEADERS)
        stopping = asyncio.create_task(server.stop(100))
        await asyncio.sleep(0)
        assert await read_answer(client) == LARGE + len(EMPTY)
        client.writer.transport.abort()
        await stopping


def test_calls_that_wait_for_their_message_count_as_messages_do() -> None:
    held, out = bounds.Held(10_000), Mock(first_window=65_535)
    first, second, third = (Stream(number, out, held, 1000) for number in (1, 3, 5))
    first.wait(6000)
    second.wait(3000)
    assert first.failure is None and held.bytes == 9000
    third.wait(3000)
    assert first.failure == (8, "unread messages hold over 10000 bytes")
    assert (second.failure, third.failure, held.bytes) == (None, None, 6000)
    second.close()
    third.close()
    assert held.bytes == 0


async def test_nothing_is_held_of_calls_whose_head_is_wrong() -> None:
    async def echoes(request: bytes, context: Any) -> bytes:
        return request

    async with serving("unary_unary", echoes) as (server, port), client_of(port) as client:
        ends = END_HEADERS | END_STREAM
        client.say(HELLO, head("/t.T/M", (("content-length", "5"),), flags=ends))
        await client.see(lambda kind, *_: kind == Kind.RST_STREAM)
        assert server._shared.held.bytes == 0
