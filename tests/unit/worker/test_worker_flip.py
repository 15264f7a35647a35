"""A worker that changes its role keeps engine, KV pool, prefix cache and transport."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from worker_kit import PROMPT, Pair, config, connected, sequence, settled

from crossdock.decode.role import DecodeRole
from crossdock.prefill.role import PrefillRole
from crossdock.proto.errors import Unavailable
from crossdock.proto.types import Role, WorkerEndpoint
from crossdock.proto.v1 import worker_pb2
from crossdock.worker.server import WorkerServer

ROLES = {Role.PREFILL: PrefillRole, Role.DECODE: DecodeRole}


@pytest.fixture
async def pair(tiny_model: Path) -> AsyncIterator[Pair]:
    short = {"lease_s": 0.5, "pull_timeout_s": 0.5}
    prefill = config("prefill-0", Role.PREFILL, tiny_model, **short)
    decode = config("decode-0", Role.DECODE, tiny_model, **short)
    async with connected(prefill, decode) as made:
        yield made


async def flip(worker: WorkerServer, name: str, role: Role) -> WorkerEndpoint:
    await worker.drain(5.0, stays=True)
    told = replace(worker.config, name=name, pool=str(role), role=role, revision="b")
    return await worker.become(told, ROLES[role])


def tokens_of(*outputs: worker_pb2.SequenceOutput) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def test_a_pair_that_changes_places_serves_as_before(pair: Pair) -> None:
    first = await pair.first("s", PROMPT)
    before = tokens_of(first, *await pair.rest("s", PROMPT, first))
    await settled(pair.prefill, pair.decode)
    memory, incarnation = pair.decode._state.memory, pair.decode.description.incarnation

    prefill = await flip(pair.decode, "prefill-1", Role.PREFILL)
    decode = await flip(pair.prefill, "decode-1", Role.DECODE)
    await pair.prefill.update_peers([prefill, decode])
    assert (prefill.name, prefill.role, prefill.revision) == ("prefill-1", Role.PREFILL, "b")
    assert pair.decode._state.memory is memory
    assert pair.decode.description.incarnation == incarnation

    turned = Pair(pair.decode, pair.prefill)
    await turned.p.connect()
    await turned.d.connect()
    hello = turned.p.hello
    assert (hello.hello.name, hello.hello.role) == ("prefill-1", worker_pb2.ROLE_PREFILL)
    assert [event for event in hello.block_events.events if event.stored], "the cache is kept"
    first = await turned.first("t", PROMPT)
    assert first.cached_tokens > 0
    assert tokens_of(first, *await turned.rest("t", PROMPT, first)) == before
    await settled(pair.prefill, pair.decode)
    for part in (turned.p, turned.d):
        await part.close()


async def test_an_offered_ticket_is_read_or_ends_before_the_role_does(pair: Pair) -> None:
    first = await pair.first("s", PROMPT)
    flipping = asyncio.create_task(flip(pair.prefill, "decode-1", Role.DECODE))
    await asyncio.sleep(0)
    rest = await pair.rest("s", PROMPT, first)
    assert len(tokens_of(first, *rest)) == 8
    await flipping
    await settled(pair.prefill)
    assert isinstance(pair.prefill._role, DecodeRole)


async def test_a_ticket_that_nobody_reads_ends_with_its_lease(pair: Pair) -> None:
    await pair.first("s", PROMPT)
    assert (await pair.prefill.status()).leases
    assert not await pair.prefill.drain(0.0, stays=True)
    told = replace(pair.prefill.config, name="decode-1", role=Role.DECODE)
    await pair.prefill.become(told, DecodeRole)
    await settled(pair.prefill)


async def test_what_runs_is_handed_back_when_its_time_is_over(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, run = pair.decode._loop._runner, pair.decode._loop._runner.run
    begun, go_on = threading.Event(), threading.Event()

    def waits(plan: object) -> object:
        begun.set()
        go_on.wait(20)
        return run(plan)

    monkeypatch.setattr(runner, "run", waits)
    await pair.d.send(decode=worker_pb2.DecodeRequest(sequence=sequence("s", PROMPT)))
    await asyncio.to_thread(begun.wait, 20)
    draining = asyncio.create_task(pair.decode.drain(0.0, stays=True))
    await asyncio.sleep(0)
    go_on.set()
    assert await draining
    *_, last = [output async for output in pair.d.outputs("s")]
    assert last.error.code == worker_pb2.ERROR_CODE_DRAINING
    await pair.decode.become(replace(pair.decode.config, role=Role.PREFILL), PrefillRole)
    await settled(pair.decode)


async def test_streams_of_the_old_role_end_with_it(pair: Pair) -> None:
    await flip(pair.prefill, "decode-1", Role.DECODE)
    async with asyncio.timeout(20):
        while await pair.p._call.read() is not grpc.aio.EOF:
            pass


async def test_deaf_streams_refuse_new_work(pair: Pair) -> None:
    (stream,) = pair.prefill._gateways.deafen()
    await pair.p.send(prefill=worker_pb2.PrefillRequest(sequence=sequence("late", PROMPT)))
    output = await anext(pair.p.outputs("late"))
    assert output.error.code == worker_pb2.ERROR_CODE_DRAINING
    assert stream.deaf


async def test_a_worker_that_still_works_keeps_its_role(pair: Pair) -> None:
    told = replace(pair.prefill.config, lease_s=0.1, pull_timeout_s=0.1)
    with pytest.raises(Unavailable, match="prefill-0 cannot change its role"):
        await pair.prefill.become(told, DecodeRole)  # it was not drained
    assert isinstance(pair.prefill._role, PrefillRole)
    assert tokens_of(await pair.first("s", PROMPT))


async def test_metrics_are_those_of_the_new_role(pair: Pair) -> None:
    from urllib.request import urlopen

    await flip(pair.prefill, "decode-1", Role.DECODE)

    def page() -> str:
        with urlopen(f"http://{pair.prefill.description.metrics_address}/metrics") as answer:
            return str(answer.read().decode())

    text = await asyncio.to_thread(page)
    assert 'role="decode"' in text and 'worker="decode-1"' in text
    assert 'role="prefill"' not in text
