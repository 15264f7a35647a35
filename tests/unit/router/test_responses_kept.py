"""Where responses are kept, and for how long: before fake workers that come and go."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_worker import FakeWorker
from gateway_rig import Rig, start_rig
from http_kit import SAID, post
from responses_kit import client_of, ending, prompts

from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.config import ResponsesSettings
from crossdock.router.frontdoor.responses_store import Kept
from crossdock.worker.kept import AT_ONCE
from crossdock.worker.states import Bounds, States


@pytest.fixture
async def client(rig: Rig) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(rig) as made:
        yield made


def lose(worker: FakeWorker) -> None:
    """All that it keeps."""
    worker.kept.states = States()


async def test_two_workers_keep_it_and_either_is_enough(
    rig: Rig, client: openai.AsyncOpenAI, text: Any
) -> None:
    ending(rig, text, SAID)
    made = await client.responses.create(model="", input="hi")
    assert all(worker.states.held for worker in rig.workers)
    lose(rig.workers[0])
    assert (await client.responses.retrieve(made.id)).output_text == SAID
    lose(rig.workers[1])
    with pytest.raises(openai.NotFoundError, match="the workers that kept it are gone"):
        await client.responses.retrieve(made.id)
    body = {"input": "x", "previous_response_id": made.id}
    status, _, answer = await post(rig, "/v1/responses", body)
    error = answer["error"]
    assert (status, error["param"], error["code"]) == (
        404,
        "previous_response_id",
        "response_not_found",
    )


async def test_another_gateway_goes_on(rig: Rig, text: Any, tiny_model: Path) -> None:
    ending(rig, text, SAID)
    async with client_of(rig) as client:
        made = await client.responses.create(model="", input="hi")
    async with start_rig(tiny_model, prefills=0, decodes=0) as other:
        other.prefills, other.decodes = rig.prefills, rig.decodes
        await other.members()
        await rig.gateway.stop()
        async with client_of(other) as client:
            second = await client.responses.create(
                model="", input="and?", previous_response_id=made.id
            )
            assert second.output_text == SAID
    one, two = prompts(rig)
    assert two[: len(one)] == one


async def test_tenants_see_their_own(rig: Rig, text: Any) -> None:
    ending(rig, text, SAID)
    async with client_of(rig, **{"X-Crossdock-Tenant": "a"}) as a:
        made = await a.responses.create(model="", input="hi")
        async with client_of(rig, **{"X-Crossdock-Tenant": "b"}) as b:
            with pytest.raises(openai.NotFoundError):
                await b.responses.retrieve(made.id)
            with pytest.raises(openai.NotFoundError):
                await b.responses.create(model="", input="x", previous_response_id=made.id)
            with pytest.raises(openai.NotFoundError):
                await b.responses.delete(made.id)
        assert (await a.responses.retrieve(made.id)).id == made.id


async def test_it_can_be_deleted(rig: Rig, client: openai.AsyncOpenAI, text: Any) -> None:
    ending(rig, text, SAID)
    made = await client.responses.create(model="", input="hi")
    await client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.delete(made.id)
    assert not any(each.data for worker in rig.workers for each in worker.states.all())


@pytest.mark.parametrize("loses", ["the other keeps knowing", "the other is lost"])
async def test_what_was_deleted_while_a_copy_was_away_stays_so(
    rig: Rig, client: openai.AsyncOpenAI, text: Any, loses: str
) -> None:
    async with FakeWorker("decode-1", Role.DECODE) as third:
        ending(rig, text, SAID)
        made = await client.responses.create(model="", input="hi")
        away, there = rig.workers
        await rig.members(there, third)
        await client.responses.delete(made.id)
        if loses == "the other is lost":
            await rig.members(away, third)
            lose(there)
        else:
            await rig.members(away, there, third)
        assert away.states.fetch("", made.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="", input="x", previous_response_id=made.id)


async def test_what_was_deleted_while_both_copies_were_away_stays_so(
    rig: Rig, client: openai.AsyncOpenAI, text: Any
) -> None:
    async with FakeWorker("colocated-0", Role.COLOCATED) as third:
        ending(rig, text, SAID)
        made = await client.responses.create(model="", input="hi")
        await rig.members(third)
        with pytest.raises(openai.NotFoundError):
            await client.responses.delete(made.id)
        await rig.members(*rig.workers, third)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)


async def test_what_workers_keep_outlives_them_where_they_are_drained(
    rig: Rig, client: openai.AsyncOpenAI, text: Any
) -> None:
    """One after the other is replaced; two copies are there at the end as at the beginning."""
    ending(rig, text, SAID)
    made = await client.responses.create(model="", input="hi")
    gone = await client.responses.create(model="", input="hi")
    async with AsyncExitStack() as stack:
        for i, drained in enumerate(list(rig.workers)):
            fresh = await stack.enter_async_context(FakeWorker(f"{drained.name}-{i}", drained.role))
            kept = [worker for worker in (*rig.workers, fresh) if worker is not drained]
            rig.prefills = [worker for worker in kept if worker.role is Role.PREFILL]
            rig.decodes = [worker for worker in kept if worker.role is Role.DECODE]
            await rig.members()
            await drained.kept.hand_over([worker.endpoint for worker in rig.workers])
            if not i:
                await client.responses.delete(gone.id)
            await drained.stop()
        assert all(worker.states.fetch("", made.id) for worker in rig.workers)
        assert (await client.responses.retrieve(made.id)).output_text == SAID
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(gone.id)


async def test_one_that_drains_takes_nothing_and_says_that_it_may_have_given(rig: Rig) -> None:
    worker, other = rig.workers
    store = pb.StoreStateRequest(id="1", data=b"x", ttl_ms=10**6, most_bytes=10**6)
    store.most_tenant_bytes = 10**6
    assert worker.kept.store(store).stored
    await worker.kept.hand_over([other.endpoint])
    assert other.states.fetch("", "1") == b"x"
    assert not worker.kept.store(store).stored
    drop = pb.DropStateRequest(id="1", ttl_ms=10**6, most_tenant_bytes=10**6, most_bytes=10**6)
    assert worker.kept.drop(drop).draining and not other.kept.drop(drop).draining


async def test_what_is_not_to_be_stored_is_not(
    rig: Rig, client: openai.AsyncOpenAI, text: Any
) -> None:
    ending(rig, text, SAID)
    made = await client.responses.create(model="", input="hi", store=False)
    assert not any(worker.states.held for worker in rig.workers)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)


async def test_a_response_that_nobody_could_keep_says_so(text: Any, tiny_model: Path) -> None:
    settings = ResponsesSettings(max_tenant_mb=0.01)
    async with start_rig(tiny_model, responses=settings) as rig, client_of(rig) as client:
        ending(rig, text, SAID)
        made = await client.responses.create(model="", input="hi " * 600)
        assert made.output_text == SAID and made.to_dict()["store"] is False


async def test_where_most_workers_drain_at_once_nothing_is_lost() -> None:
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(FakeWorker(f"w{i}", Role.DECODE)) for i in range(8)
        ]
        going, staying = workers[:6], workers[6:]
        bounds = Bounds(3600, 10**7, 10**8)
        for number in range(40):
            for worker in random.Random(number).sample(workers, 2):
                worker.states.store("t", f"resp_{number}", b"x", bounds)
        others = {
            worker: [each.endpoint for each in workers if each is not worker] for worker in going
        }
        await asyncio.gather(*(worker.kept.hand_over(others[worker]) for worker in going))
        for number in range(40):
            assert any(worker.states.fetch("t", f"resp_{number}") for worker in staying)


async def test_workers_that_drain_are_asked_while_nobody_else_has_it(
    rig: Rig, client: openai.AsyncOpenAI, text: Any
) -> None:
    ending(rig, text, SAID)
    made = await client.responses.create(model="", input="hi")
    async with FakeWorker("colocated-0", Role.COLOCATED) as third:
        await rig.members(third)
        assert (await client.responses.retrieve(made.id)).output_text == SAID


async def test_of_an_id_that_nobody_made_no_worker_hears(
    rig: Rig, client: openai.AsyncOpenAI, text: Any
) -> None:
    ending(rig, text, SAID)
    made = (await client.responses.create(model="", input="hi")).id
    held = [worker.states.all() for worker in rig.workers]
    forged = [made[:-1] + ("1" if made[-1] == "0" else "0"), "resp_" + "0" * 52]
    async with client_of(rig, **{"X-Crossdock-Tenant": "other"}) as other:
        for asking, id_ in ((client, forged[0]), (client, forged[1]), (other, made)):
            with pytest.raises(openai.NotFoundError):
                await asking.responses.delete(id_)
            with pytest.raises(openai.NotFoundError):
                await asking.responses.retrieve(id_)
    assert [[each.id_ for each in worker.states.all()] for worker in rig.workers] == [
        [each.id_ for each in entries] for entries in held
    ]
    assert (await client.responses.retrieve(made)).output_text == SAID


async def test_where_those_that_an_id_names_are_gone_others_keep_it(rig: Rig) -> None:
    store = rig.gateway._responses
    id_ = store.new_id("t")
    kept = Kept(b"{}", [], 0, 0, b"", b"")
    async with FakeWorker("colocated-0", Role.COLOCATED) as third:
        await rig.members(third)
        assert await store.put("t", id_, kept)
        assert third.states.fetch("t", id_) and await store.get("t", id_) == kept
        assert await store.drop("t", id_) and await store.get("t", id_) is None


@pytest.mark.parametrize("why", ["all of them drain", "it was deleted"])
async def test_what_nobody_takes_is_offered_a_few_times_alone(why: str) -> None:
    bounds, entries = Bounds(3600, 10**7, 10**8), 100
    async with AsyncExitStack() as stack:
        going, *staying = [
            await stack.enter_async_context(FakeWorker(f"w{i}", Role.DECODE)) for i in range(4)
        ]
        offered = 0
        for worker in staying:
            store = worker.kept.store

            def counted(request: Any, store: Any = store) -> Any:
                nonlocal offered
                offered += 1
                return store(request)

            worker.kept.store = counted  # type: ignore[method-assign]
            if why == "all of them drain":
                await worker.kept.hand_over([])
        for number in range(entries):
            going.states.store("t", str(number), b"x", bounds)
            for worker in staying if why == "it was deleted" else ():
                worker.states.drop("t", str(number), bounds)
        await going.kept.hand_over([worker.endpoint for worker in staying])
        assert offered <= (3 * AT_ONCE if why == "all of them drain" else entries)
