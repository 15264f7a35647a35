"""Whether a worker would begin another sequence soon: what is sent beyond that only waits there,
in order of arrival, where nobody's turn counts."""

from __future__ import annotations

from crossdock.proto.types import Role
from crossdock.router.placement.view import ClusterView, WorkerView

CHUNKS_AHEAD = 2  # of prompts: one that is computed, and one to follow it without a pause
STREAMS_AHEAD = 0.25  # of a batch: what is prefilled while others still decode


def has_room(view: ClusterView, now: float) -> bool:
    """Whether some path through the cluster has room; also where there is no path at all, since
    that is not what turns are for."""
    found = {
        role: [takes_more(worker) for worker in view.usable(role, now, tokens=1)] for role in Role
    }
    pair = found[Role.PREFILL], found[Role.DECODE]
    if not all(pair) and not found[Role.COLOCATED]:
        return True
    return any(found[Role.COLOCATED]) or all(any(side) for side in pair)


def takes_more(worker: WorkerView) -> bool:
    """Whether this worker has room. One that does not say how much it takes has."""
    facts, load = worker.facts, worker.load
    most_tokens = CHUNKS_AHEAD * facts.chunk_tokens
    if worker.role is not Role.DECODE and most_tokens and worker.queued_tokens >= most_tokens:
        return False
    ahead = max(1, int(STREAMS_AHEAD * facts.max_batch))
    if worker.role is Role.PREFILL or not facts.max_batch:
        return True
    return load.waiting < ahead and worker.sequences < facts.max_batch + ahead
