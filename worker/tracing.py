"""One span for a sequence's stay on a worker, child of the gateway's request span."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from crossdock.worker.config import WorkerConfig
from crossdock.worker.job import Job

_propagator = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("crossdock.worker")


def record(job: Job, config: WorkerConfig, error: str | None = None) -> None:
    """Makes the span from the job's event times once the job has ended; free without tracing."""
    if not job.traceparent or not job.times:
        return
    events = sorted(job.times.items(), key=lambda item: item[1])
    span = _tracer.start_span(
        f"crossdock.{config.role}",
        context=_propagator.extract({"traceparent": job.traceparent}),
        start_time=_nanoseconds(events[0][1]),
        attributes={
            "crossdock.sequence_id": job.id,
            "crossdock.worker": config.name,
            "crossdock.prompt_tokens": job.sequence.prompt_tokens,
            "crossdock.cached_tokens": job.sequence.num_cached,
            "crossdock.transferred_bytes": job.transfer.bytes,
            "crossdock.late_bytes": job.transfer.late_bytes,
        },
    )
    for name, at_ms in events:
        span.add_event(name, timestamp=_nanoseconds(at_ms))
    if error:
        span.set_status(trace.StatusCode.ERROR, error)
    span.end()


def _nanoseconds(milliseconds: float) -> int:
    return int(milliseconds * 1_000_000)
