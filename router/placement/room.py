"""Whether a worker would begin another sequence at once: what is sent beyond that only waits there,
in order of arrival, where nobody's turn counts."""

from __future__ import annotations

from crossdock.proto.steps import Yields
from crossdock.proto.types import Role
from crossdock.router.placement.demand import Demand
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.workers import WorkerView

AHEAD_S = 0.005  # before a prompt is expected to be done the next is sent, so that nothing idles
AHEAD_PART = 0.1  # of a whole chunk's time, where that is longer: so much is an estimate off
FIXED_PART = 1 / 3  # of a step's time: prompts go together until its fixed part is no more
CHUNKS_AHEAD = 2  # of prompts, whatever is expected
STREAMS_AHEAD = 0.25  # of a batch: what is prefilled while others still decode


def has_room(view: ClusterView, now: float, yields: int = 0) -> bool:
    """Whether some path through the cluster has room; also where there is no path at all, since
    that is not what turns are for. For one that `yields`, those count that do so as well."""
    colocated = _some_take_more(view, Role.COLOCATED, now, yields)
    if colocated:
        return True
    pair = [_some_take_more(view, role, now, yields) for role in (Role.PREFILL, Role.DECODE)]
    if None in pair:
        return colocated is None
    return all(pair)


def _some_take_more(view: ClusterView, role: Role, now: float, yields: int) -> bool | None:
    """Whether a usable worker of a role has room; None: there is none. Of many the first with room
    is the last that is looked at."""
    found = None
    for worker in view.some_usable(role, now):
        if takes_more(worker, now, yields):
            return True
        found = False
    return found


def has_place(view: ClusterView, demand: Demand, now: float) -> bool:
    """Whether a worker that decodes has a place in its batch, and the blocks, for a sequence."""
    workers = [
        worker
        for role in (Role.DECODE, Role.COLOCATED)
        for worker in view.usable(role, now, tokens=demand.held[role])
    ]
    return any(
        worker.available_blocks >= demand.blocks and _has_place(worker) for worker in workers
    )


def takes_more(worker: WorkerView, now: float, yields: int = 0) -> bool:
    """Whether this worker has room. One that does not say how much it takes has."""
    facts = worker.facts
    if worker.role is not Role.DECODE and facts.chunk_tokens and _computes(worker, now, yields):
        return False
    return worker.role is Role.PREFILL or _has_place(worker)


def _has_place(worker: WorkerView) -> bool:
    """Whether it may get a sequence to decode beside those that it has."""
    most, load = worker.facts.max_batch, worker.load
    if not most:
        return True
    ahead = max(1, int(STREAMS_AHEAD * most))
    return load.waiting < ahead and worker.sequences < most + ahead


def _computes(worker: WorkerView, now: float, yields: int) -> bool:
    """Whether it has prompts of this gateway for a while yet, or very many of anybody, that one
    which `yields` so would wait for."""
    if worker.tokens_before(yields) >= CHUNKS_AHEAD * worker.facts.chunk_tokens:
        return True
    last = yields if worker.role is Role.PREFILL else Yields.LATE
    tokens, attended = 0, 0.0
    for prompt in worker.computing.values():
        if prompt.yields <= last:
            tokens += prompt.tokens
            attended += prompt.attention
    if not tokens:
        return False
    if worker.load.prefill_alike:
        return False  # several together will tell
    takes_s = max(worker.numbers.chunk_s, worker.prompts_s(tokens, attended))
    if worker.prompt_s(0, 1) > FIXED_PART * takes_s:
        return False
    ahead_s = max(AHEAD_S, AHEAD_PART * worker.prompt_s(0, worker.facts.chunk_tokens))
    return takes_s - (now - worker.computing_since) > ahead_s
