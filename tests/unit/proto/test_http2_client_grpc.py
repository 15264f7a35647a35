"""gRPC's calling end against a real server of gRPC: mutual TLS, both event loops; floods."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import timedelta
from typing import Any

import grpc
import pytest
import uvloop
from call_kit import OPEN, PATH, Caller
from trust_kit import AUTHORITY, CLUSTER, credentials

from crossdock.deploy.authority import Authority
from crossdock.proto.channels import connect, listen
from crossdock.proto.http2.client import ClientStream
from crossdock.proto.http2.frames import Kind, frame
from crossdock.proto.identity import Credentials

WAIT_S = 100.0
FLOOD = 200_000


Run = Callable[[Coroutine[Any, Any, None]], None]
Serve = Callable[[AsyncIterator[bytes], Any], AsyncIterator[bytes]]
both_loops = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


async def echo(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for each in messages:
        yield each


@contextlib.asynccontextmanager
async def serving(serve: Serve, certified: Credentials | None = None) -> AsyncIterator[Any]:
    """A server whose one method is `serve`, and its address."""
    method = grpc.stream_stream_rpc_method_handler(serve)
    handler = grpc.method_handlers_generic_handler("crossdock.v1.Worker", {"Connect": method})
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((handler,))
    address = listen(server, "127.0.0.1:0", certified, "test")
    await server.start()
    try:
        yield server, address
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def calling(
    address: str, certified: Credentials | None, whom: str, *messages: bytes, wanted: int = 1
) -> AsyncIterator[tuple[ClientStream, Caller]]:
    caller = Caller(*messages)
    caller.wanted = wanted
    stream = ClientStream(PATH, caller, 1 << 28)
    try:
        await connect(stream, address, certified, whom)
        async with asyncio.timeout(WAIT_S):
            yield stream, caller
    finally:
        stream.end("the test is over")
        await stream.gone()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@both_loops
def test_a_server_of_grpc_hears_and_answers(run: Run, secure: bool) -> None:
    run(echoed(secure))


async def echoed(secure: bool) -> None:
    worker, gateway = credentials("prefill"), credentials("gateway")
    said = [b"", b"x", bytes(100_000), *(bytes([i]) * 20_000 for i in range(200))]
    async with (
        serving(echo, worker if secure else None) as (server, address),
        calling(
            address,
            gateway if secure else None,
            worker.peer.incarnation,
            *said,
            wanted=len(said),
        ) as (stream, caller),
    ):
        await caller.arrived.wait()
        assert caller.got == said
        await server.stop(None)
        assert (await stream.over).split(":")[0] in ("UNAVAILABLE", "CANCELLED")


async def test_a_snapshot_of_64_mib_comes_and_goes() -> None:
    large = bytes(1 << 20) * 64
    async with (
        serving(echo) as (_, address),
        calling(address, None, "", large) as (_, caller),
    ):
        await caller.arrived.wait()
        assert len(caller.got[0]) == len(large)


async def test_the_servers_status_is_the_reason() -> None:
    async def refuse(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "50 %, für Tore")
        yield b""

    async with (
        serving(refuse) as (_, address),
        calling(address, None, "") as (stream, _),
    ):
        assert await stream.over == "PERMISSION_DENIED: 50 %, für Tore"


async def test_who_calls_off_is_heard() -> None:
    ended = asyncio.Event()

    async def wait(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"hello"
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with serving(wait) as (_, address), calling(address, None, "") as (stream, caller):
        await caller.arrived.wait()
        stream.end("enough")
        await asyncio.wait_for(ended.wait(), WAIT_S)


async def test_a_server_that_does_not_read_gets_no_more_than_its_window() -> None:
    async def deaf(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        yield b"hello"
        await asyncio.Event().wait()

    kept = [bytes(1 << 20)] * 64
    async with (
        serving(deaf) as (_, address),
        calling(address, None, "", *kept) as (_, caller),
    ):
        await caller.arrived.wait()
        left = -1
        while left != len(caller.messages):
            left = len(caller.messages)
            await asyncio.sleep(0.1)
        assert left > 32


OTHERS = Authority(b"another key", CLUSTER)
LAPSED = timedelta(minutes=-1)  # since certificates begin some minutes in the past


@pytest.mark.parametrize(
    "server,caller,whom",
    [
        (credentials("prefill"), credentials("gateway"), "f" * 32),
        (credentials("prefill", authority=OTHERS), credentials("gateway"), ""),
        (credentials("prefill"), credentials("gateway", authority=OTHERS), ""),
        (credentials("prefill", life=LAPSED), credentials("gateway"), ""),
        (credentials("prefill"), credentials("gateway", life=LAPSED), ""),
        (None, credentials("gateway"), "f" * 32),
        (credentials("prefill"), None, ""),
    ],
    ids=[
        *("another incarnation", "another cluster's server", "another cluster's caller"),
        *("a server whose time is over", "a caller whose time is over", "a plain server"),
        "a plain caller",
    ],
)
@both_loops
def test_nobody_else_is_talked_to(
    run: Run, server: Credentials | None, caller: Credentials | None, whom: str
) -> None:
    run(refused(server, caller, whom))


async def refused(server: Credentials | None, caller: Credentials | None, whom: str) -> None:
    heard: list[bytes] = []

    async def hear(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for each in messages:
            heard.append(each)
            yield each

    async with serving(hear, server) as (_, address):
        named = whom or (server.peer.incarnation if server else "")
        with contextlib.suppress(OSError):
            async with calling(address, caller, named, b"secret") as (stream, said):
                assert (await stream.over).startswith("UNAVAILABLE: ")
                assert said.got == []
        assert heard == []


async def test_who_speaks_tls_but_not_http2_gets_no_byte() -> None:
    """ALPN says nothing: whoever it is, it holds the certificate, and is no worker."""
    worker, gateway = credentials("prefill"), credentials("gateway")
    got: list[bytes] = []
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            got.append(await reader.read())
        writer.close()
        done.set()

    context = server_context(worker)
    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = listening.sockets[0].getsockname()[1]
    async with (
        listening,
        calling(f"127.0.0.1:{port}", gateway, worker.peer.incarnation, b"secret") as (stream, _),
    ):
        assert await stream.over == "UNAVAILABLE: the peer speaks TLS, but not HTTP/2"
        await asyncio.wait_for(done.wait(), WAIT_S)
    assert got in ([], [b""])


def server_context(certified: Credentials) -> Any:
    """Of a server that knows no ALPN."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(certified.identity.key + certified.identity.certificate)
        file.flush()
        context.load_cert_chain(file.name)
    return context


def test_a_context_is_made_once_for_each_identity() -> None:
    held = credentials("gateway")
    first = held.client_tls()
    assert held.client_tls() is first
    held.renew(AUTHORITY.renewed(held.peer, timedelta(days=1)))
    assert held.client_tls() is not first


async def test_a_flood_of_pings_from_who_reads_nothing_is_cut() -> None:
    """Over a real socket: answers that are not read do not pile up."""
    ping = frame(Kind.PING, 0, 0, bytes(8))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OPEN)
        with contextlib.suppress(OSError):
            for _ in range(FLOOD // 1000):
                writer.write(ping * 1000)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 10)
    port = server.sockets[0].getsockname()[1]
    async with server, calling(f"127.0.0.1:{port}", None, "") as (stream, _):
        reason = await stream.over
    assert reason.split(":")[0] in ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
