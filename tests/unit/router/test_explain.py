"""What a gateway knows of the requests that it had lately, asked by any of their ids."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gateway_rig import PROMPT, Rig, ask, collect, start_rig, until
from http_kit import post
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from view_kit import cache, demand, two_and_two

from crossdock.proto.v1 import admin_pb2, worker_pb2
from crossdock.proto.v1 import inference_pb2 as pb
from crossdock.router.dispatch import tracing
from crossdock.router.dispatch.explained import explained as explained_request
from crossdock.router.dispatch.explained import summary
from crossdock.router.dispatch.lifecycle import Timeline
from crossdock.router.dispatch.recent import Course, Recent, Trail
from crossdock.router.dispatch.sequence import Attempt
from crossdock.router.placement.latency import predicted_latency


def explained(rig: Rig, request_id: str) -> admin_pb2.ExplainedRequest:
    found = rig.gateway.explain(request_id)
    assert found is not None
    return found


def named(request_id: str) -> pb.GenerateRequest:
    request = ask(PROMPT, max_tokens=5)
    request.request_id = request_id
    return request


async def test_where_it_went_why_and_what_it_took(rig: Rig) -> None:
    responses = await collect(rig.stub.Generate(ask(PROMPT, max_tokens=5)))
    found = explained(rig, responses[0].request_id)
    assert (found.gateway, found.policy) == (rig.gateway.config.name, "predicted_latency")
    assert found.model == rig.only.name and not found.running and not found.error
    [sequence] = found.sequences
    assert (sequence.prompt_tokens, sequence.generated_tokens) == (40, 5)
    assert sequence.finish_reason == "length"
    [placement] = sequence.placements
    assert (placement.prefill, placement.decode) == ("prefill-0", "decode-0")
    assert placement.decoded_on == "decode-0" and placement.reason == "quickest_pair"
    assert placement.sequence_id == rig.prefills[0].prefills[0].sequence.sequence_id
    assert placement.uncached_tokens == 40
    assert [(each.worker, each.chosen) for each in placement.computing] == [("prefill-0", True)]
    assert [(each.worker, each.chosen) for each in placement.decoding] == [("decode-0", True)]
    times = responses[-1].timings
    assert sequence.timings.first_token == times.first_token
    assert sequence.timings.transferred_bytes == times.transferred_bytes > 0
    ttft = {stage.name: stage.seconds for stage in sequence.stages[:5]}
    assert sum(ttft.values()) == pytest.approx(times.first_token)
    assert sequence.tpot_s == pytest.approx((times.last_token - times.first_token) / 4)
    assert found.seconds >= times.finished


async def test_a_restart_is_a_second_placement(rig: Rig) -> None:
    rig.decodes[0].fail_after = {7: worker_pb2.ERROR_CODE_PREEMPTED}
    responses = await collect(rig.stub.Generate(ask(PROMPT, max_tokens=30)))
    [sequence] = explained(rig, responses[0].request_id).sequences
    first, second = sequence.placements
    assert first.gave_up == "preempted on decode-0" and not second.gave_up
    assert first.decoded_on == second.decoded_on == "decode-0"
    assert first.at_s < second.at_s and first.sequence_id != second.sequence_id
    assert (second.cached_blocks, second.uncached_tokens) == (2, 47 - 32)


async def test_of_many_placements_the_first_and_the_newest_are_kept(rig: Rig) -> None:
    codes = [worker_pb2.ERROR_CODE_PREEMPTED, worker_pb2.ERROR_CODE_DRAINING]
    rig.decodes[0].fail_after = {k: codes[k % 2] for k in range(1, 30, 3)}
    responses = await collect(rig.stub.Generate(ask(PROMPT, max_tokens=40)))
    placements = explained(rig, responses[0].request_id).sequences[0].placements
    assert len(placements) == 8
    assert [bool(each.gave_up) for each in placements] == [True] * 7 + [False]
    numbers = [int(each.sequence_id.rpartition("-")[2]) for each in placements]
    assert numbers == [1, *range(5, 12)]


async def test_one_that_runs_is_told_of_as_far_as_it_is(rig: Rig) -> None:
    rig.decodes[0].gate.clear()
    call = rig.stub.Generate(named("mine"))
    await call.read()
    found = explained(rig, "mine")
    assert found.running and found.sequences[0].generated_tokens == 1
    assert found.sequences[0].placements[0].prefill == "prefill-0"
    call.cancel()
    await until(lambda: rig.idle)
    found = explained(rig, "mine")
    assert not found.running and found.error == "Cancelled"


@pytest.mark.parametrize("chunk_tokens", [0, 64])  # with chunks it waits at the gateway
async def test_one_that_is_refused_early_shows_what_was_predicted(
    tiny_model: Path, chunk_tokens: int
) -> None:
    async with start_rig(tiny_model, chunk_tokens=chunk_tokens) as rig:
        worker = rig.prefills[0]
        worker.report(queued_tokens=10**6, prefill_tokens_per_s=1000.0)
        await until(lambda: rig.gateway.view.workers["prefill-0"].queued_tokens)
        with pytest.raises(Exception, match="predicted"):
            await collect(rig.stub.Generate(named("late"), timeout=30))
        found = explained(rig, "late")
        [placement] = found.sequences[0].placements
        assert found.error == "Overloaded" and not placement.sequence_id
        assert placement.predicted.queue_s == pytest.approx(1000.0)


async def test_ids_that_clients_see(rig: Rig, model: str) -> None:
    body: dict[str, Any] = {"model": model, "max_tokens": 2}
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for path, more in (
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", chat),
        ("/v1/responses", {"model": model, "input": "hi", "max_tokens": None}),
    ):
        given = {k: v for k, v in (body | more).items() if v is not None}
        status, headers, answer = await post(rig, path, given)
        assert status == 200
        request_id = headers["X-Request-Id"]
        assert answer["id"] != request_id
        assert explained(rig, answer["id"]).request_id == request_id
        assert explained(rig, request_id).request_id == request_id
    assert rig.gateway.explain("nobody's") is None


async def test_nothing_of_a_request_is_kept_but_numbers(rig: Rig) -> None:
    rig.decodes[0].gate.clear()  # else it may have ended before its first token is read
    call = rig.stub.Generate(named("gone"))
    await call.read()
    [active] = rig.only.dispatcher._requests
    parts = [weakref.ref(active), *map(weakref.ref, active.sequences), weakref.ref(active.request)]
    del active
    rig.decodes[0].gate.set()
    await collect(call)
    await until(lambda: rig.idle)

    def kept() -> bool:
        gc.collect()
        return any(part() is not None for part in parts)

    await until(lambda: not kept())  # tasks that have had it may have a turn of the loop to go
    assert explained(rig, "gone").sequences


def request(name: str, sequences: int = 1) -> Any:
    asked = SimpleNamespace(
        request_id=name, response="", model="m", received=0.0, received_unix=0.0,
        num_sequences=sequences,
    )  # fmt: skip
    return SimpleNamespaceKey(asked)


class SimpleNamespaceKey:
    """As much of an ActiveRequest as is looked at."""

    def __init__(self, asked: SimpleNamespace) -> None:
        self.request, self.sequences = asked, ()


def test_the_oldest_make_room() -> None:
    recent = Recent(most=10)
    for i in range(50):
        recent.began(active := request(f"r{i}", sequences=1 + i % 3))
        if i % 2:
            recent.ended(active, None, 1.0)
    kept = [i for i in range(50) if recent.find(f"r{i}")]
    assert kept == list(range(kept[0], 50))
    assert 8 <= sum(1 + i % 3 for i in kept) <= 10


def test_of_two_by_one_id_the_newer_is_known_for_as_long_as_it_is_kept() -> None:
    recent = Recent(most=3)
    for each in (request("a"), newer := request("a"), request("b"), request("c")):
        recent.began(each)
    found = recent.find("chatcmpl-a")
    assert found is not None and found.active is newer
    recent.began(request("d"))
    assert recent.find("a") is None


def test_a_decode_worker_that_computes_the_prompt_is_the_only_one_chosen() -> None:
    view, asked = two_and_two(), demand(1600, local_tokens=128)
    cache(view, "d1", list(asked.block_hashes[:99]))
    placement = predicted_latency(view, asked, 0.0, random.Random(1))
    timeline, moved = Timeline(0.0, 0.0), worker_pb2.TransferStats()
    attempts = [Attempt(0.0, placement, "s-1")]
    course = Course(0, 1600, 1584, 3, None, "d1", "d1", attempts, timeline, moved)
    trail = Trail("r", "", "m", 5.0, 0.0, None, [course], "", 7.0)
    found = explained_request(trail, 9.0)
    assert found.seconds == 2.0 and not found.running
    [told] = found.sequences[0].placements
    assert (told.prefill, told.decode, told.decoded_on) == ("", "d1", "d1")
    assert [each.worker for each in told.computing if each.chosen] == ["d1"]
    assert len(told.computing) == 3 and not told.decoding
    assert summary(placement).startswith("quickest_local: d1 queue=0 prompt=0.016 ")


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


async def test_the_span_tells_each_placement_in_a_line(
    rig: Rig, spans: InMemorySpanExporter
) -> None:
    rig.decodes[0].fail_after = {7: worker_pb2.ERROR_CODE_PREEMPTED}
    await collect(rig.stub.Generate(ask(PROMPT, max_tokens=10)))
    await until(lambda: any(s.name == "crossdock.request" for s in spans.get_finished_spans()))
    [span] = [s for s in spans.get_finished_spans() if s.name == "crossdock.request"]
    first, second = span.attributes["crossdock.placements.0"]
    assert first.startswith("quickest_pair: prefill-0 + decode-0 queue=0 prompt=0.04 ")
    assert first.endswith(" of=1+1") and "transfer=" in first
    assert second.startswith("quickest_pair: prefill-0 + decode-0")
