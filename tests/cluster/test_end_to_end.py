"""Gateway, prefill and decode workers and client, all real but for Ray and the model's size."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from cluster_kit import KEY, Cluster, start, stop
from fake_nccl import FakeCommunicators
from offline import LLM
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from crossdock.kvtransfer.nccl import transport as nccl
from crossdock.proto.errors import DeadlineExceeded
from crossdock.proto.hashing import BlockHasher, hash_key
from crossdock.proto.types import LIFE_CYCLE, Role, SamplingParams
from crossdock.proto.v1 import worker_pb2, worker_pb2_grpc
from crossdock.router.dispatch import tracing as router_tracing
from crossdock.router.gateway import GatewayServer
from crossdock.worker import loop
from crossdock.worker import tracing as worker_tracing
from crossdock.worker.peer_calls import met

SEED = 7


@pytest.fixture
async def cluster(tiny_model: Path) -> AsyncIterator[Cluster]:
    made = await start(tiny_model, [Role.PREFILL] * 2 + [Role.DECODE] * 2)
    yield made
    await stop(made)


def prompts(count: int, length: int = 120) -> list[list[int]]:
    """Prompts with nothing in common."""
    return [[(i * 31 + j * (i + 3)) % 200 + 3 for j in range(length + i)] for i in range(count)]


async def test_every_stream_goes_on_where_one_device_fails_every_step(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, cluster: Cluster
) -> None:
    ended: list[bool] = []
    monkeypatch.setattr(loop, "_exit_soon", lambda why: ended.append(True))
    broken = cluster.workers[2]

    def fail(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(broken._loop._runner, "run", fail)  # the device under it
    asked = prompts(12, length=40)
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    wanted = [g.token_ids for g in LLM(str(tiny_model), num_blocks=256).generate(asked, sampling)]
    got = await asyncio.gather(
        *(
            cluster.client.generate(p, temperature=0.0, max_tokens=12, ignore_eos=True)
            for p in asked
        )
    )
    assert [[*completion.token_ids] for completion in got] == wanted
    status = await broken.status(check_integrity=True)
    assert (status.integrity_error, status.used_blocks) == ("", 0)
    assert ended, "and so does its worker, which the controller replaces"


@pytest.mark.parametrize("transport", ["nixl", "nccl", "local"])
async def test_streams_equal_one_engine_whatever_the_transport(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, transport: str
) -> None:
    monkeypatch.setattr(nccl, "communicators_of_nccl", FakeCommunicators)  # no GPU is needed
    cluster = await start(tiny_model, [Role.PREFILL, Role.DECODE], transport)
    try:
        kinds = [
            {"temperature": 0.0},
            {"temperature": 0.9, "seed": SEED, "top_p": 0.9},
            {"temperature": 1.0, "seed": SEED, "repetition_penalty": 1.3, "top_k": 40},
            {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        ]
        requests = list(zip(prompts(8), itertools.cycle(kinds)))
        answers = await asyncio.gather(
            *(
                cluster.client.generate(prompt, max_tokens=24, ignore_eos=True, **kind)
                for prompt, kind in requests
            )
        )
        params = [SamplingParams(max_tokens=24, ignore_eos=True, **kind) for _, kind in requests]
        alone = LLM(str(tiny_model), num_blocks=256).generate([p for p, _ in requests], params)
        assert [[*a.token_ids] for a in answers] == [[*a.token_ids] for a in alone]
        prefill, decode = await cluster.settled()
        blocks = sum(-(-len(prompt) // 16) for prompt, _ in requests)
        assert decode.transferred_blocks == blocks
        assert decode.transferred_bytes == blocks * decode.description.block_bytes
        assert decode.recomputed_tokens == 0
        assert prefill.prompt_tokens == sum(len(prompt) for prompt, _ in requests)
    finally:
        await stop(cluster)


async def test_a_shared_prefix_goes_where_it_is_cached(cluster: Cluster) -> None:
    (prefix,) = prompts(1, 1000)
    first = await cluster.client.generate([*prefix, 5, 6], max_tokens=2, temperature=0)
    home = first.timings.prefill_worker
    for i in range(4):
        again = await cluster.client.generate([*prefix, 7 + i], max_tokens=2, temperature=0)
        assert again.timings.prefill_worker == home
        assert again.usage.cached_tokens == 992
    assert first.usage.cached_tokens == 0
    await cluster.settled()


async def test_gateways_and_workers_agree_on_the_hashes_of_a_turn(cluster: Cluster) -> None:
    """Prompt and answer are found where they are, also by a gateway that was not there."""
    (prompt,) = prompts(1)
    turn = await cluster.client.generate(prompt, max_tokens=40, temperature=0, ignore_eos=True)
    gateway = cluster.gateway
    later = GatewayServer(replace(gateway.config, name="later"))
    await later.start()
    try:
        await later.update_members(worker.endpoint for worker in cluster.workers)
        async with asyncio.timeout(10):
            while len(later.view.workers) < len(cluster.workers):
                await asyncio.sleep(0.01)
        for view in (gateway.view, later.view):
            hasher = BlockHasher(hash_key(KEY), 16)
            hashes = hasher.chain([*prompt, *turn.token_ids], hasher.root(view.layout_hash))
            slots = {name: worker.slot for name, worker in view.workers.items()}
            depths = {slots[turn.timings.prefill_worker]: 7, slots[turn.timings.decode_worker]: 9}
            async with asyncio.timeout(10):
                while view.index.depths(hashes) != depths:
                    await asyncio.sleep(0.01)
    finally:
        await later.stop()


async def test_streams_that_end_early_leave_nothing_behind(cluster: Cluster) -> None:
    """32 streams: a third cancelled midway, a sixth ended by their deadline."""

    async def one(index: int, prompt: list[int]) -> str:
        if index % 6 == 5:
            with pytest.raises(DeadlineExceeded):
                await cluster.client.generate(
                    prompt, max_tokens=1800, ignore_eos=True, timeout=0.5 + index / 100
                )
            return "deadline"
        stream = cluster.client.stream(prompt, max_tokens=40, ignore_eos=True, temperature=0)
        count = 0
        async for chunk in stream:
            count += len(chunk.token_ids)
            if index % 3 == 0 and count >= 1 + index:
                await stream.aclose()
                return "cancelled"
        assert count == 40
        return "finished"

    asked = [(i, prompt) for i, prompt in enumerate(prompts(32, 60))]
    # Those with a deadline come before any pace is known, by which they might be refused.
    ending = [asyncio.create_task(one(i, prompt)) for i, prompt in asked if i % 6 == 5]
    async with asyncio.timeout(10):
        while cluster.gateway.active_requests < len(ending):
            await asyncio.sleep(0.001)
    others = (one(i, prompt) for i, prompt in asked if i % 6 != 5)
    ends = await asyncio.gather(*ending, *others)
    assert [ends.count(end) for end in ("cancelled", "deadline", "finished")] == [11, 5, 16]
    await cluster.settled()


async def test_a_pool_that_is_too_small_preempts_and_the_streams_go_on(tiny_model: Path) -> None:
    roles = [Role.PREFILL, Role.DECODE]
    cluster = await start(tiny_model, roles, kv_blocks=24)
    try:
        asked = prompts(6, 60)
        answers = await asyncio.gather(
            *(
                cluster.client.generate(p, max_tokens=120, ignore_eos=True, temperature=0)
                for p in asked
            )
        )
        params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
        alone = LLM(str(tiny_model), num_blocks=256).generate(asked, params)
        assert [[*a.token_ids] for a in answers] == [[*a.token_ids] for a in alone]
        assert cluster.workers[1]._role.state.counters.preemptions > 0
        await cluster.settled()
    finally:
        await stop(cluster)


async def test_one_trace_spans_gateway_prefill_and_decode(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for module in (router_tracing, worker_tracing):
        monkeypatch.setattr(module, "_tracer", provider.get_tracer("test"))
    answers = await asyncio.gather(
        *(cluster.client.generate(p, max_tokens=6, ignore_eos=True) for p in prompts(12))
    )
    await cluster.settled()
    async with asyncio.timeout(5):
        while sum(s.name == "crossdock.request" for s in exporter.get_finished_spans()) < 12:
            await asyncio.sleep(0.01)
    traces: dict[int, dict[str, ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        traces.setdefault(span.context.trace_id, {})[span.name] = span
    assert len(traces) == 12
    for spans in traces.values():
        request = spans["crossdock.request"]
        for name in ("crossdock.prefill", "crossdock.decode"):
            assert spans[name].parent.span_id == request.context.span_id
        assert {e.name for e in spans["crossdock.prefill"].events} >= {"prefill_queued"}
        assert {e.name for e in spans["crossdock.decode"].events} >= {"fenced", "joined"}
    for answer in answers:
        events = answer.timings.events
        assert list(events) == list(LIFE_CYCLE) and list(events.values()) == sorted(events.values())


async def test_colocated_workers_answer_the_same(tiny_model: Path) -> None:
    cluster = await start(tiny_model, [Role.COLOCATED] * 2)
    try:
        asked = prompts(4)
        answers = await asyncio.gather(
            *(cluster.client.generate(p, max_tokens=10, temperature=0) for p in asked)
        )
        params = SamplingParams(temperature=0, max_tokens=10)
        alone = LLM(str(tiny_model), num_blocks=256).generate(asked, params)
        assert [[*a.token_ids] for a in answers] == [[*a.token_ids] for a in alone]
        await cluster.settled()
    finally:
        await stop(cluster)


async def test_a_worker_of_another_layout_is_refused_and_the_request_told(
    tiny_model: Path,
) -> None:
    """A ticket of another block size never reaches memory; both values are named."""
    prefill = await start(tiny_model, [Role.PREFILL], block_size=16)
    decode = await start(tiny_model, [Role.DECODE], block_size=32)
    try:
        stub = worker_pb2_grpc.WorkerStub(
            grpc.aio.insecure_channel(decode.workers[0].description.address)
        )
        await decode.workers[0].update_peers([prefill.workers[0].endpoint])
        assert (await stub.GetStatus(worker_pb2.GetStatusRequest())).integrity_error == ""
        with pytest.raises(Exception, match=r"block_size.*(16|32).*(32|16)"):
            await met(
                decode.workers[0].peers,
                prefill.workers[0].description.incarnation,
                prefill.workers[0].description.address,
            )
    finally:
        await stop(prefill)
        await stop(decode)
