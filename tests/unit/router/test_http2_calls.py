"""The gRPC server with handlers of the tests' own: cancelled calls, large answers, and drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from raw_http2 import EMPTY, HELLO, Peer, data, head

from crossdock.router.frontdoor.http2.frames import (
    END_STREAM,
    FIRST_WINDOW,
    MAX_WINDOW,
    PREFACE,
    Code,
    Kind,
    Setting,
    rst_stream,
    settings,
    window_update,
)
from crossdock.router.frontdoor.http2.server import Server

WIDE = (  # a client that makes all the room there is
    PREFACE
    + settings([(Setting.INITIAL_WINDOW_SIZE, MAX_WINDOW)])
    + window_update(0, MAX_WINDOW - FIRST_WINDOW)
)
LARGE = 4_000_000


def same(message: bytes) -> bytes:
    return message


@asynccontextmanager
async def serving(kind: str, handler: Any) -> AsyncIterator[tuple[Server, int]]:
    """A server of the one method /t.T/M, and its port."""
    server = Server(lambda call: None, lambda call, error: None, 1 << 20, 0.0)
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
