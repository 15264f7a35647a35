"""One span a request, with the life-cycle events on it. Uses the OpenTelemetry API alone: without
an SDK configured, nothing here costs or records anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from crossdock.proto.errors import CrossdockError
from crossdock.router.dispatch.explained import summary
from crossdock.router.dispatch.lifecycle import STALL_STAGES, TTFT_STAGES
from crossdock.router.dispatch.request import Request
from crossdock.router.dispatch.sequence import ActiveRequest, SequenceState

TRACE_CONTEXT = ("traceparent", "tracestate")
MOST_CHARACTERS = 512  # of either, as W3C has it; what is wrong with it is a line in the log

_tracer = trace.get_tracer("crossdock.router")


def context_of(headers: Mapping[str, str]) -> Any:
    """The trace context that a client's headers or metadata carried (W3C)."""
    given = {name: headers.get(name, "") for name in TRACE_CONTEXT}
    return propagate.extract({k: v for k, v in given.items() if 0 < len(v) <= MOST_CHARACTERS})


def start(request: Request) -> tuple[Span, str]:
    """The request's span, and the traceparent under which workers put theirs."""
    span = _tracer.start_span(
        "crossdock.request",
        context=request.trace_context,
        kind=SpanKind.SERVER,
        start_time=_ns(request, 0.0),
    )
    carrier: dict[str, str] = {}
    propagate.inject(carrier, trace.set_span_in_context(span, request.trace_context))
    if span.is_recording():
        span.set_attribute("crossdock.request_id", request.request_id)
        for name in ("model", "asked_model", "route"):
            if value := getattr(request, name):
                span.set_attribute(f"crossdock.{name}", value)
        span.set_attribute("crossdock.sequences", request.num_sequences)
        span.set_attribute("crossdock.prompt_tokens", sum(len(p) for p in request.prompts))
    return span, carrier.get("traceparent", "")


def sequence_ended(sequence: SequenceState) -> None:
    """Puts a sequence's events on the request's span, and its stages under it as child spans."""
    span: Span = sequence.active.span
    if not span.is_recording():
        return
    request = sequence.active.request
    at = sequence.timeline.ordered()
    for event, seconds in at.items():
        span.add_event(event, {"index": sequence.index}, timestamp=_ns(request, seconds))
    parent = trace.set_span_in_context(span)
    stages = sequence.timeline.stages()
    begins = {TTFT_STAGES[0]: 0.0, STALL_STAGES[0]: at.get("first_token", 0.0)}
    clock = 0.0
    for stage, seconds in stages.items():
        clock = begins.get(stage, clock)
        child = _tracer.start_span(stage, context=parent, start_time=_ns(request, clock))
        child.set_attribute("index", sequence.index)
        clock += seconds
        child.end(end_time=_ns(request, clock))
    if sequence.placement.reason is not None:
        reason = sequence.placement.reason.value
        span.set_attribute(f"crossdock.placement_reason.{sequence.index}", reason)
    placements = [summary(attempt.placement) for attempt in sequence.attempts]
    span.set_attribute(f"crossdock.placements.{sequence.index}", placements)
    span.set_attribute(f"crossdock.prefill_worker.{sequence.index}", sequence.prefill_worker)
    span.set_attribute(f"crossdock.decode_worker.{sequence.index}", sequence.decode_worker)


def end(active: ActiveRequest, error: CrossdockError | None, now: float) -> None:
    span: Span = active.span
    if error is not None:
        span.set_status(Status(StatusCode.ERROR, str(error)))
        span.set_attribute("crossdock.error", type(error).__name__)
    span.end(end_time=_ns(active.request, now - active.request.received))


def _ns(request: Request, seconds: float) -> int:
    return int((request.received_unix + seconds) * 1e9)
