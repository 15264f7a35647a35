"""Public failures of the hand-off under load. See test_known_failures.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cluster_kit import start, stop
from gateway_rig import ask, collect, ids_of, start_rig, until
from handoff_kit import all_free, hand_off, pair, prefill, tokens_of
from roles_kit import Site, undisturbed

from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2
from crossdock.router.dispatch.lifecycle import TTFT_STAGES

PULL_FAILED = worker_pb2.ERROR_CODE_PULL_FAILED
PREEMPTED = worker_pb2.ERROR_CODE_PREEMPTED
PROMPT = [(11 * i) % 900 + 3 for i in range(60)]


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["nixl", "local"])
async def test_many_small_hand_offs_wear_no_transport_out(tiny_model: Path, transport: str) -> None:
    """sglang#23272: about 4 small requests a second broke one backend; each is soaked, 128 at
    once."""
    total, at_once = 1000, asyncio.Semaphore(128)
    cluster = await start(tiny_model, [Role.PREFILL, Role.DECODE], transport, max_batch=128)
    try:

        async def one(index: int) -> tuple[int, ...]:
            prompt = [3 + (index + j * (1 + index // 180)) % 180 for j in range(20 + index % 24)]
            async with at_once:
                answer = await cluster.client.generate(
                    prompt, max_tokens=2, temperature=0, ignore_eos=True
                )
            return answer.token_ids

        answers = await asyncio.gather(*(one(index) for index in range(total)))
        assert {len(tokens) for tokens in answers} == {2}
        statuses = await cluster.settled()
        assert [status.used_blocks for status in statuses] == [0, 0]
        assert statuses[1].recomputed_tokens == 0
        offers = cluster.workers[0]._role._offers  # type: ignore[attr-defined]
        assert {str(how): n for how, n in offers.exits.items() if n} == {"released": total}
        assert cluster.workers[1]._transport.stats.failures == 0
        shown = cluster.gateway.metrics.exposition().decode()
        assert "crossdock_restarted_sequences_total{" not in shown
    finally:
        await stop(cluster)


def test_decode_computes_nothing_of_a_prompt_that_was_handed_off(site: Site) -> None:
    """vllm#21037, #26896, sglang#6411: twice the TTFT of one engine; recomputed tokens are 0."""
    p, d = pair(site)
    first = prefill(p, PROMPT)
    hand_off(d, PROMPT, first)
    d.turn(12)
    assert tokens_of([first, *d.take()]) == undisturbed(PROMPT, 8)
    computed = [chunk for plan in p.runner.plans for chunk in plan.chunks]
    assert sum(chunk.length for chunk in computed) == len(PROMPT)
    chunks = [chunk for plan in d.runner.plans for chunk in plan.chunks]
    assert {chunk.length for chunk in chunks} == {1} and len(chunks) == 7
    assert min(chunk.start for chunk in chunks) == len(PROMPT)
    assert d.role.state.counters.recomputed_tokens == d.role.state.counters.computed_tokens == 0
    all_free(p, d)


async def test_preempted_work_goes_back_to_prefill(tiny_model: Path) -> None:
    """vllm#24256, #53250: decode prefilled it itself and locked up."""
    async with start_rig(tiny_model) as rig:
        rig.decodes[0].fail_after[4] = PREEMPTED
        answer = await collect(rig.stub.Generate(ask(max_tokens=8)))
        assert ids_of(answer) == list(range(10, 18))
        again = rig.prefills[0].prefills[1].sequence
        assert list(again.token_ids[again.prompt_tokens :]) == list(range(10, 14))
        assert all(request.HasField("progress") for request in rig.decodes[0].decodes)
        assert rig.metric("restarted_sequences_total", cause="preempted") == 1


def test_a_preempted_hand_off_computes_no_prompt_on_decode(site: Site) -> None:
    """vllm#24256: what decode says of it is an error that names the cause, and nothing runs on."""
    p, d = site.worker(Role.PREFILL), site.worker(Role.DECODE, blocks=10)
    site.introduce(p, d)
    prompts = [[3 + i] * 30 for i in range(2)]
    names = [hand_off(d, prompt, prefill(p, prompt), max_tokens=30) for prompt in prompts]
    d.turn(30)
    ends = {o.sequence_id: o for o in d.take() if o.finish_reason}
    assert [ends[name].error.code for name in names if ends[name].HasField("error")] == [PREEMPTED]
    assert {chunk.length for plan in d.runner.plans for chunk in plan.chunks} == {1}
    p.turn()
    all_free(p, d)


async def test_lost_block_events_are_seen_and_the_index_is_made_anew(tiny_model: Path) -> None:
    """dynamo#7209, #7072, #11194: events were lost in silence; numbers, a snapshot, a gauge."""
    async with start_rig(tiny_model) as rig:
        worker, view = rig.prefills[0], rig.gateway.view
        names = rig.hashes(list(range(160)))
        slot = view.workers["prefill-0"].slot
        worker.store(names[:3])
        await until(lambda: view.index.depths(names) == {slot: 3})
        worker.store(names[3:6], lose=True)
        assert rig.metric("block_resyncs") == 0
        worker.store(names[6:])
        await until(lambda: worker.resyncs == 1)
        await until(lambda: rig.metric("block_resyncs") == 1)
        await until(lambda: view.index.depths(names) == {slot: 10})


async def test_the_parts_of_the_gateways_ttft_sum(tiny_model: Path) -> None:
    """vllm#29474, #22454: two TTFT metrics that did not add up; the client's is the gateway's."""
    async with start_rig(tiny_model) as rig:
        rig.prefills[0].step_s = 0.01
        calls = [collect(rig.stub.Generate(ask(max_tokens=3))) for _ in range(20)]
        answers = await asyncio.gather(*calls)
        parts = sum(rig.timed("stage_seconds_sum", stage=stage) for stage in TTFT_STAGES)
        whole = rig.timed("ttft_seconds_sum")
        assert rig.timed("ttft_seconds_count") == 20
        assert parts == pytest.approx(whole, abs=20 * 0.001)
        told = sum(answer[-1].timings.first_token for answer in answers)
        assert told == pytest.approx(whole, abs=20 * 0.001)
