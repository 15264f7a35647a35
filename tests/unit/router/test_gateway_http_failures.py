"""HTTP connections that stall, crowd or end, and answers that fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
from gateway_rig import Rig, start_rig, until
from http_kit import complete, events, post
from raw_http import Raw, connected, request

from crossdock.proto.v1 import worker_pb2
from crossdock.router.frontdoor import http_limits


async def connection(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = address.split(":")
    return await asyncio.open_connection(host, int(port))


async def closed(reader: asyncio.StreamReader) -> None:
    """Returns once the server has closed the connection."""
    with contextlib.suppress(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 10)


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_a_head_that_is_never_finished_is_closed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    monkeypatch.setattr(http_limits, "HEAD_S", 0.2)
    async with start_rig(tiny_model) as rig:
        address = rig.gateway.http_address if door == "http" else rig.gateway.grpc_address
        heads = [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"]
        opened = []
        for head in heads if door == "http" else [b"", b"PRI * HT"]:
            opened.append(await connection(address))
            opened[-1][1].write(head)
        for reader, writer in opened:
            await closed(reader)
            writer.close()


async def test_a_connection_is_closed_where_no_further_head_comes(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_limits, "IDLE_S", 0.2)
    async with start_rig(tiny_model) as rig:
        reader, writer = await connection(rig.gateway.http_address)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea")
        assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)
        await closed(reader)
        writer.close()


async def test_who_has_left_is_not_counted_among_the_silent(rig: Rig) -> None:
    silent = rig.gateway._http._runner._silent
    _, writer = await connection(rig.gateway.http_address)
    await until(lambda: silent)
    writer.transport.abort()
    await until(lambda: not silent, 5.0)


async def test_the_oldest_connection_without_a_request_makes_room(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_limits, "MAX_SILENT", 2)
    async with start_rig(tiny_model) as rig:
        rig.prefills[0].gate.clear()
        held = asyncio.create_task(post(rig, *complete(max_tokens=2)))  # the oldest, but answered
        await until(lambda: rig.prefills[0].running)
        opened = []
        for _ in range(4):
            opened.append(await connection(rig.gateway.http_address))
            opened[-1][1].write(b"GET /health HT")
        for reader, _ in opened[:2]:
            await closed(reader)
        opened[3][1].write(b"TP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in await asyncio.wait_for(opened[3][0].readline(), 10)
        rig.prefills[0].gate.set()
        assert (await held)[0] == 200
        for _, writer in opened:
            writer.close()


async def test_the_connection_that_is_idle_for_the_longest_makes_room(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_limits, "MAX_CONNECTIONS", 3)
    health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    async with start_rig(tiny_model) as rig, AsyncExitStack() as stack:

        async def opened() -> Raw:
            return await stack.enter_async_context(connected(rig))

        async def asks(raw: Raw) -> None:
            await raw.send(health)
            assert (await raw.answer())[0] == 200

        rig.prefills[0].gate.clear()
        busy, first, second = [await opened() for _ in range(3)]
        await busy.send(request(b'{"prompt": "x", "max_tokens": 1}'))
        await until(lambda: rig.prefills[0].running)
        for raw in (first, second, first):  # of which the second is idle for longer now
            await asks(raw)
        third = await opened()
        await second.closed()
        for raw in (third, first):
            await asks(raw)
        assert rig.metric("http_connections") == 3
        for raw in (third, first):  # from now on all are busy
            await raw.send(request(b'{"prompt": "x", "max_tokens": 1}'))
        await until(lambda: len(rig.prefills[0].running) == 3)
        await (await opened()).closed()
        rig.prefills[0].gate.set()
        for raw in (busy, first, third):
            assert (await raw.answer())[0] == 200
    runner = rig.gateway._http._runner
    assert not (runner._connections or runner._idle or runner._silent)


@pytest.mark.parametrize(
    ("descriptors", "most"), [(1024, 563), (50_000, 20_000), (resource.RLIM_INFINITY, 20_000)]
)
def test_as_many_connections_as_there_are_descriptors_for(
    descriptors: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (descriptors, descriptors))
    assert http_limits.max_connections() == most


async def test_too_many_get_429_and_retry_after(tiny_model: Path) -> None:
    async with start_rig(tiny_model, max_active=1) as rig:
        rig.prefills[0].gate.clear()
        held = asyncio.create_task(post(rig, *complete(max_tokens=2)))
        await until(lambda: rig.prefills[0].running)
        for stream in (False, True):
            status, headers, answer = await post(rig, *complete(stream=stream))
            assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
            assert int(headers["Retry-After"]) >= 1
        rig.prefills[0].gate.set()
        assert (await held)[0] == 200


async def test_no_worker_gets_503_and_a_deadline_504(tiny_model: Path) -> None:
    async with start_rig(tiny_model, decodes=0, worker_wait_s=0.1) as rig:
        status, headers, answer = await post(rig, *complete(stream=True))
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "no decode worker" in answer["error"]["message"]
    async with start_rig(tiny_model, request_timeout_s=0.1) as rig:
        rig.prefills[0].gate.clear()
        status, _, answer = await post(rig, *complete())
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")


async def test_an_error_after_the_first_token_is_an_event(rig: Rig) -> None:
    rig.decodes[0].fail_after = {3: worker_pb2.ERROR_CODE_INTERNAL}
    found = await events(rig, *complete(prompt="The capital of", stream=True, ignore_eos=True))
    last = json.loads(found[-1])
    assert "decode-0" in last["error"]["message"]
    assert "[DONE]" not in found


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_frees_the_workers(rig: Rig, stream: bool) -> None:
    rig.decodes[0].step_s = 0.005
    async with aiohttp.ClientSession() as session:
        body = {"prompt": "x y z", "max_tokens": 900, "stream": stream, "ignore_eos": True}
        asking = asyncio.create_task(session.post(f"{rig.url}/v1/completions", json=body))
        await until(lambda: rig.decodes[0].running)
        if stream:
            response = await asking
            await response.content.readline()
            response.close()
        else:
            asking.cancel()
    await until(lambda: rig.decodes[0].cancels and rig.idle)
    await until(lambda: rig.metric("requests_total", outcome="cancelled") == 1)


async def test_http_is_served_over_ipv6(tiny_model: Path) -> None:
    async with start_rig(tiny_model, http="[::1]:0") as rig, aiohttp.ClientSession() as session:
        assert rig.gateway.http_address.startswith("[::1]:")
        async with session.get(f"http://{rig.gateway.http_address}/health") as answer:
            assert answer.status == 200


async def test_a_body_that_never_ends_meets_the_deadline(tiny_model: Path) -> None:
    async with start_rig(tiny_model, request_timeout_s=0.1) as rig:
        reader, writer = await connection(rig.gateway.http_address)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert b" 504 " in await asyncio.wait_for(reader.readline(), 10)
        writer.close()
