"""What became of a request, for whoever accounts for it."""

from __future__ import annotations

import logging

from crossdock.proto.errors import CrossdockError
from crossdock.router.dispatch.request import Ended, EndedSequence
from crossdock.router.dispatch.sequence import ActiveRequest, SequenceState
from crossdock.router.placement.view import ClusterView

log = logging.getLogger(__name__)


def tell(
    active: ActiveRequest, view: ClusterView, error: CrossdockError | None, now: float
) -> None:
    """Tells who asked for it that a request ends `now`, and how."""
    request = active.request
    if request.on_end is None:
        return
    try:
        sequences = [_sequence(sequence, view) for sequence in active.sequences]
        request.on_end(Ended(error, now - request.received, request.n, sequences))
    except Exception:  # the other requests go on, and this one ends
        log.exception("%s: it could not be accounted for", request.request_id)


def _sequence(sequence: SequenceState, view: ClusterView) -> EndedSequence:
    events = sequence.timeline.ordered()
    seconds, gpu_seconds = _used(sequence, events, view)
    cached, started = sequence.cached_tokens, bool(sequence.sequence_id)
    if cached is None:  # no worker has said, so what was predicted when it was sent
        predicted = sequence.prompt_tokens - sequence.placement.uncached_tokens
        cached = max(0, predicted) if started else 0
    return EndedSequence(
        index=sequence.index,
        prompt_tokens=sequence.prompt_tokens,
        cached_tokens=cached,
        token_ids=sequence.token_ids[sequence.prompt_tokens :],
        finish_reason=sequence.finish_reason,
        prefill_worker=sequence.prefill_worker,
        decode_worker=sequence.decode_worker,
        events=events,
        worker_seconds=seconds,
        gpu_seconds=gpu_seconds,
        started=started,
    )


def _used(
    sequence: SequenceState, events: dict[str, float], view: ClusterView
) -> tuple[float, float]:
    """Seconds of workers, and of their GPUs. The prompt's are from its first chunk to token 0; a
    step of decoding belongs to each of its batch in equal parts, which is taken to be as large as
    the worker says at the end. A worker that is gone is not known any more."""
    found = [0.0, 0.0]
    computed = events.get("first_token")
    if computed is None and sequence.finish_reason is not None:  # it asked for no token
        computed = events.get("finished")
    spans = [
        (sequence.prefill_worker, events.get("prefill_started"), computed, False),
        (sequence.decode_worker, events.get("first_token"), events.get("last_token"), True),
    ]
    for name, begin, end, shared in spans:
        worker = view.workers.get(name)
        if worker is None or begin is None or end is None:
            continue
        seconds = (end - begin) / (max(1, worker.load.running) if shared else 1)
        found[0] += seconds
        found[1] += seconds * worker.facts.gpus
    return found[0], found[1]
