"""What serving leaves for the garbage collector, which holds the loop while it looks for it."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import access_kit as keyed
import aiohttp
import grpc
import pytest
from access_kit import start_doors
from gateway_rig import PROMPT, Rig, until
from http_kit import complete, post
from raw_http import connected

from crossdock.proto.v1 import inference_pb2 as pb

TIMES = 3
MALFORMED = b"GET / HTTP/9.9\r\n\r\n"


@contextlib.contextmanager
def cycles() -> Iterator[Counter[str]]:
    """Counts our own objects that only the collector frees, by their types."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        kinds = [type(each) for each in gc.garbage]
        found.update(k.__qualname__ for k in kinds if k.__module__.startswith("crossdock."))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def ask_over_http(rig: Rig, call: tuple[str, Any], status: int) -> None:
    assert (await post(rig, *call))[0] == status


@pytest.mark.parametrize(("call", "status"), [
    (complete(max_tokens=2), 200),
    (complete(prompt=["x", "y"], n=2, max_tokens=2), 200),
    (complete(n="x"), 400),
    (complete(prompt=[10**9]), 400),
    (complete(max_tokens=10**6), 400),
    (("/v1/completions", b'{"prompt": "\xff"}'), 400),
    (("/nothing", {}), 404),
    (("/v1/models", {}), 405),
])  # fmt: skip
async def test_an_answer_leaves_no_cycle(rig: Rig, call: tuple[str, Any], status: int) -> None:
    await ask_over_http(rig, call, status)  # what is made once is made
    with cycles() as found:
        for _ in range(TIMES):
            await ask_over_http(rig, call, status)
        await until(lambda: rig.idle and not rig.metric("http_connections"))
    assert not found


async def test_what_no_parser_reads_leaves_no_cycle(rig: Rig) -> None:
    async def send() -> None:
        async with connected(rig) as raw:
            await raw.send(MALFORMED)
            assert (await raw.error())[0] == 400

    await send()
    with cycles() as found:
        for _ in range(TIMES):
            await send()
        await until(lambda: not rig.metric("http_connections"))
    assert not found


async def test_a_client_that_goes_away_leaves_no_cycle(rig: Rig) -> None:
    rig.decodes[0].step_s = 0.05

    async def leave() -> None:
        path, body = complete(max_tokens=500, stream=True)
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{rig.url}{path}", json=body) as response,
        ):
            await response.content.readany()
        await until(lambda: rig.idle and not rig.metric("http_connections"))

    await leave()
    with cycles() as found:
        for _ in range(TIMES):
            await leave()
    assert not found


@pytest.mark.parametrize("most", [2, 0, 10**6])
async def test_a_call_leaves_no_cycle(rig: Rig, most: int) -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT), sampling=pb.SamplingParams(max_tokens=most, top_p=most)
    )

    async def ask() -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in rig.stub.Generate(request):
                pass
        with contextlib.suppress(grpc.aio.AioRpcError):
            await rig.stub.GenerateUnary(request)
        await until(lambda: rig.idle)

    await ask()
    with cycles() as found:
        for _ in range(TIMES):
            await ask()
    assert not found


async def test_who_is_refused_by_a_limit_leaves_no_cycle(tiny_model: Path, tmp_path: Path) -> None:
    async with start_doors(tiny_model, tmp_path) as doors:
        key = doors.key("acme", limits={"tokens_per_minute": 42})
        await doors.known(key)
        assert (await keyed.complete(doors.rig, key)).status == 200  # of 42 tokens
        assert (await keyed.complete(doors.rig, key)).status == 429
        with cycles() as found:
            for _ in range(TIMES):
                assert (await keyed.complete(doors.rig, key)).status == 429
            await until(lambda: not doors.rig.metric("http_connections"))
    assert not found
