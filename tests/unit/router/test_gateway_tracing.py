"""One trace a request: the gateway's span, its events and stages, and the context for workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_rig import PROMPT, Rig, ask, collect, start_rig, until
from http_kit import complete, post
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from crossdock.proto.types import LIFE_CYCLE
from crossdock.router.dispatch import tracing
from crossdock.router.dispatch.lifecycle import STALL_STAGES, TTFT_STAGES
from crossdock.router.placement.peers import KvCost
from crossdock.router.placement.policy import Policies

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


async def ended(rig: Rig, spans: InMemorySpanExporter) -> dict[str, object]:
    await until(lambda: any(s.name == "crossdock.request" for s in spans.get_finished_spans()))
    return {span.name: span for span in spans.get_finished_spans()}


async def test_the_span_of_a_request(
    tiny_model: Path, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "crossdock.router.dispatch.dispatcher")
    async with start_rig(tiny_model) as rig:
        header = ("traceparent", f"00-{TRACE}-{PARENT}-01")
        await collect(rig.stub.Generate(ask(max_tokens=4), metadata=(header,)))
        found = await ended(rig, spans)
    request = found["crossdock.request"]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    assert tuple(event.name for event in request.events) == LIFE_CYCLE
    assert request.attributes["crossdock.placement_reason.0"] == "quickest_pair"
    assert "'quickest_pair'" in caplog.text, "each placement is logged with its reason"
    times = [event.timestamp for event in request.events]
    assert times == sorted(times)
    assert request.start_time <= times[0] and times[-1] <= request.end_time
    children = [found[name] for name in TTFT_STAGES + STALL_STAGES]
    assert {child.parent.span_id for child in children} == {request.context.span_id}
    ttft = sum(child.end_time - child.start_time for child in children[:5])
    first_token = times[LIFE_CYCLE.index("first_token")]
    assert ttft == pytest.approx(first_token - request.start_time, abs=1000)
    assert children[5].start_time == pytest.approx(first_token, abs=1000)
    sequence = rig.prefills[0].prefills[0].sequence
    assert sequence.traceparent == f"00-{TRACE}-{request.context.span_id:016x}-01"
    assert rig.decodes[0].decodes[0].sequence.traceparent == sequence.traceparent


async def test_the_policy_of_the_configuration_places_and_says_why(
    tiny_model: Path, spans: InMemorySpanExporter
) -> None:
    policies = Policies(kv_cost=KvCost(prefill_scale=2.0))
    async with start_rig(tiny_model, policy="kv_cost", policies=policies) as rig:
        await collect(rig.stub.Generate(ask(max_tokens=2)))
        request = (await ended(rig, spans))["crossdock.request"]
    assert request.attributes["crossdock.placement_reason.0"] == "least_cost"


async def test_a_failed_request_says_so(tiny_model: Path, spans: InMemorySpanExporter) -> None:
    async with start_rig(tiny_model) as rig:
        rig.decodes[0].gate.clear()
        call = rig.stub.Generate(ask(max_tokens=4))
        await call.read()
        call.cancel()
        request = (await ended(rig, spans))["crossdock.request"]
    assert request.status.status_code is trace.StatusCode.ERROR
    assert request.attributes["crossdock.error"] == "Cancelled"


async def test_without_an_sdk_the_clients_context_still_travels(tiny_model: Path) -> None:
    async with start_rig(tiny_model) as rig:
        header = ("traceparent", f"00-{TRACE}-{PARENT}-01")
        await collect(rig.stub.Generate(ask(max_tokens=1), metadata=(header,)))
        assert rig.prefills[0].prefills[0].sequence.traceparent == header[1]
        await collect(rig.stub.Generate(ask(max_tokens=1)))
        assert rig.prefills[0].prefills[1].sequence.traceparent == ""


async def test_a_client_writes_little_to_the_log(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"baggage": ",".join(["no baggage"] * 100), "tracestate": "x" * 5000}
    headers["traceparent"] = f"00-{'a' * 32}-{'b' * 16}-01"
    assert (await post(rig, *complete(max_tokens=1), headers=headers))[0] == 200
    metadata = tuple(headers.items())
    await rig.stub.GenerateUnary(ask(PROMPT, max_tokens=1), metadata=metadata)
    assert not [each for each in caplog.records if each.name.startswith("opentelemetry")]
