"""Workers that come, leave and say what they cache, before a gateway on real gRPC."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from gateway_rig import PROMPT, Rig, ask, collect, refusal, start_rig, until

# -- membership --------------------------------------------------------------------------------


async def test_without_workers_a_request_waits_a_while(tiny_model: Path) -> None:
    async with start_rig(tiny_model, decodes=0, worker_wait_s=0.15) as rig:
        error = await refusal(rig, ask(PROMPT))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert error.details() == "no decode worker is ready (waited 0.15 s)"
        assert not rig.prefills[0].prefills


async def test_a_worker_that_appears_serves_who_waited(tiny_model: Path) -> None:
    async with start_rig(tiny_model) as rig:
        await rig.members(rig.prefills[0])
        call = rig.stub.GenerateUnary(ask(PROMPT, max_tokens=3))
        await until(lambda: rig.metric("waiting_sequences") == 1)
        await rig.members()
        assert list((await call).completions[0].token_ids) == PROMPT[:3]


async def test_a_wait_is_one_whoever_comes_and_goes(tiny_model: Path) -> None:
    async with start_rig(tiny_model, worker_wait_s=30.0) as rig:
        await rig.members(rig.prefills[0])
        call = rig.stub.GenerateUnary(ask(PROMPT, max_tokens=3))
        await until(lambda: rig.metric("waiting_sequences") == 1)
        limits = rig.only.dispatcher._waiting._limits
        before = list(limits.values())
        rig.only.dispatcher.on_change()
        await until(lambda: rig.metric("waiting_sequences") == 1)
        assert len(before) == 1 and list(limits.values()) == before
        await rig.members()
        assert len((await call).completions[0].token_ids) == 3
        assert not limits


async def test_who_leaves_the_membership_finishes_what_it_has(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with start_rig(tiny_model, decodes=2) as rig:
        for worker in rig.decodes:
            worker.gate.clear()
        call = rig.stub.GenerateUnary(ask(PROMPT, max_tokens=20))
        await until(lambda: any(worker.running for worker in rig.decodes))
        leaver = next(worker for worker in rig.decodes if worker.running)
        stays = next(worker for worker in rig.decodes if worker is not leaver)
        await rig.members(rig.prefills[0], stays)
        stays.gate.set()
        second = await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=3))
        assert second.completions[0].timings.decode_worker == stays.name
        leaver.gate.set()
        assert list((await call).completions[0].token_ids) == PROMPT[:20]
        links = rig.only.links
        await until(lambda: not leaver.connected and links and not links._retiring)
        assert rig.metric("worker_streams_lost_total") == 0, "it ended in good order"
        assert not [r for r in caplog.records if r.name.endswith("links") and r.levelname != "INFO"]


async def test_a_draining_worker_gets_nothing_new(tiny_model: Path) -> None:
    async with start_rig(tiny_model, prefills=2) as rig:
        rig.prefills[0].report(draining=True)
        await until(lambda: rig.gateway.view.workers["prefill-0"].load.draining)
        for _ in range(6):
            await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1))
        assert (len(rig.prefills[0].prefills), len(rig.prefills[1].prefills)) == (0, 6)


async def test_a_restarted_worker_is_used_once_the_membership_says_so(tiny_model: Path) -> None:
    async with start_rig(tiny_model, worker_wait_s=0.1) as rig:
        await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1))
        await rig.prefills[0].restart()
        await until(lambda: len(rig.prefills[0].hellos) >= 2)  # reached again, and not trusted
        error = await refusal(rig, ask(PROMPT))
        assert error.details().startswith("no prefill worker is ready")
        await rig.members()
        assert (await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1))).usage.cached_tokens == 0


async def test_a_silent_worker_is_given_up(tiny_model: Path) -> None:
    from crossdock.router.dispatch.links import LinkSettings

    links = LinkSettings(silence_s=0.5, tick_s=0.05)
    async with start_rig(tiny_model, links=links) as rig:
        rig.decodes[0].silent = True
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await collect(rig.stub.Generate(ask(PROMPT, max_tokens=9)))
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "silent for 0.5 s" in error.value.details()


# -- prefix events -----------------------------------------------------------------------------


async def test_a_prefix_is_found_where_it_is(tiny_model: Path) -> None:
    async with start_rig(tiny_model, prefills=2) as rig:
        prompt = [i % 97 + 5 for i in range(800)]
        for worker in rig.prefills:
            worker.load.prefill_tokens_per_s = 100.0
        first = await rig.stub.GenerateUnary(ask(prompt, max_tokens=2))
        name = first.completions[0].timings.prefill_worker
        for _ in range(4):
            answer = await rig.stub.GenerateUnary(ask(prompt, max_tokens=2))
            assert answer.completions[0].timings.prefill_worker == name
            assert answer.usage.cached_tokens == 799


async def test_a_gap_in_the_events_is_healed_by_a_snapshot(rig: Rig) -> None:
    worker, index = rig.prefills[0], rig.gateway.view.index
    slot = rig.gateway.view.workers["prefill-0"].slot
    a, b, c = ([bytes([i]) * 16] for i in range(3))
    worker.store(a)
    await until(lambda: len(index.held(slot)) == 1)
    worker.store(b, lose=True)
    assert worker.resyncs == 0, "hello brought a snapshot"
    worker.store(c)
    await until(lambda: len(index.held(slot)) == 3)
    assert worker.resyncs == 1
    assert rig.metric("block_resyncs") == 1
    worker.evict(b)
    await until(lambda: len(index.held(slot)) == 2)
    worker.store(b, lose=True)  # and nothing after it: a heartbeat tells
    await until(lambda: len(index.held(slot)) == 3)


async def test_numbers_that_fall_back_are_healed_by_a_snapshot(rig: Rig) -> None:
    worker, index = rig.prefills[0], rig.gateway.view.index
    slot = rig.gateway.view.workers["prefill-0"].slot
    a, b, c = ([bytes([i]) * 16] for i in range(3))
    worker.store(a)
    worker.store(b)
    worker.evict(b)
    await until(lambda: len(index.held(slot)) == 1)
    worker.next_event -= 1  # the gateway has counted one more than there was
    await until(lambda: worker.resyncs == 1)
    worker.store(c)
    await until(lambda: len(index.held(slot)) == 2)
    assert rig.metric("block_resyncs") == 1
