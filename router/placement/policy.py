"""Where a request goes: pure functions over a ClusterView. The clock and the dice are passed in."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from crossdock.proto.errors import Unavailable
from crossdock.proto.types import Role
from crossdock.router.placement.view import ClusterView, WorkerView

TIE_RELATIVE = 0.05
TIE_ABSOLUTE_S = 0.0005
STREAM_TOKENS = 100  # over so many a decode worker's TPOT is weighed against seconds before them
# How many of each side are weighed as pairs, since each pair has a link of its own.
PREFILL_CANDIDATES = 32
DECODE_CANDIDATES = 8


class NoWorker(Unavailable):
    """No worker of a role that the request needs is connected and taking work."""


@dataclass(frozen=True)
class Demand:
    """What a sequence asks of the cluster."""

    num_tokens: int  # whose KV it needs: the prompt, and after a restart what was generated
    block_hashes: Sequence[bytes]
    block_size: int
    most_tokens: int = 0  # that it may grow to, prompt and completion; 0: one more than it has
    avoid: frozenset[str] = frozenset()  # workers that just failed it; used only if nobody else is

    @property
    def held(self) -> dict[Role, int]:
        """Tokens that a worker of each role must be able to hold: to the end, or to token 0."""
        most = max(self.most_tokens, self.num_tokens + 1)
        first = min(most, self.num_tokens + 2)  # full with token 0, it would end the stream there
        return {Role.PREFILL: first, Role.DECODE: most, Role.COLOCATED: most}

    @property
    def blocks(self) -> int:
        """Blocks it holds once the next token is written."""
        return (self.num_tokens + self.block_size) // self.block_size


@dataclass(frozen=True)
class Placement:
    """The workers of one sequence; `prefill` is None where the decode worker does both phases."""

    prefill: str | None
    decode: str
    cached_blocks: int  # on the worker that computes the prompt, as far as the view knows
    uncached_tokens: int
    predicted_ttft_s: float
    measured: bool  # the prediction rests on what its worker measured lately of such prompts
    reason: str


@dataclass(frozen=True)
class _Prefill:
    worker: WorkerView
    cached_blocks: int
    uncached: int
    ttft_s: float


Policy = Callable[[ClusterView, Demand, float, random.Random, int], Placement]


def least_latency(
    view: ClusterView, demand: Demand, now: float, rng: random.Random, turn: int = 0
) -> Placement:
    """The workers with the least predicted seconds, of those that can hold the sequence.

    Seconds = TTFT (queued + own uncached tokens, by the worker's prefill time) + bytes to pull /
    bandwidth of the pair, which delays token 1 + STREAM_TOKENS decode steps after joining, with the
    wait for a place in the batch. So queue depth, prefix hits, links and batches are one number.
    Near ties of either side go to the better of two at random, so that gateways with slightly old
    views do not herd. Pairs whose pulls fail are left to rest while there are others. Raises
    NoWorker.
    """
    depths = view.index.depths(demand.block_hashes)
    best: list[tuple[float, Placement]] = []
    prefills, decodes, colocated = _usable(view, demand, now)
    if prefills and decodes:
        best.append(_disaggregated(view, demand, depths, prefills, decodes, now, rng))
    if colocated:
        best.append(_colocated(view, demand, depths, colocated, now, rng))
    if not best:
        raise NoWorker(_missing(view, demand, prefills, decodes))
    return min(best, key=lambda option: option[0])[1]


def round_robin(
    view: ClusterView, demand: Demand, now: float, rng: random.Random, turn: int = 0
) -> Placement:
    """The baseline: each role in turn, blind to load and cache. Raises NoWorker."""
    depths = view.index.depths(demand.block_hashes)
    prefills, decodes, colocated = _usable(view, demand, now)
    if colocated and (not (prefills and decodes) or turn % 2):
        chosen = _candidate(view, demand, depths, colocated[turn % len(colocated)])
        return _placement(None, chosen.worker, chosen, now, "round robin")
    if not (prefills and decodes):
        raise NoWorker(_missing(view, demand, prefills, decodes))
    chosen = _candidate(view, demand, depths, prefills[turn % len(prefills)])
    rested = _rested(view, [chosen.worker.name], decodes, now)
    decode = rested[turn % len(rested)]
    return _placement(chosen.worker, decode, chosen, now, "round robin")


POLICIES: dict[str, Policy] = {"least_latency": least_latency, "round_robin": round_robin}


def decode_for(
    view: ClusterView, demand: Demand, prefill: str, now: float, rng: random.Random
) -> str:
    """Another decode worker for a sequence whose prompt is computed already. Raises NoWorker."""
    _, decodes, _ = _usable(view, demand, now)
    if not decodes:
        raise NoWorker(_missing(view, demand, [prefill], decodes))
    rested = _rested(view, [prefill], decodes, now)
    depths = view.index.depths(demand.block_hashes)
    candidates = _decode_candidates(view, demand, depths, rested, rng)
    costs = [
        (seconds + _transfer_s(view, demand, depths, prefill, decode), j)
        for j, (seconds, decode) in enumerate(candidates)
    ]
    return candidates[_best_of_two(costs, rng)[1]][1].name


def _usable(view: ClusterView, demand: Demand, now: float) -> tuple[list[WorkerView], ...]:
    """Prefill, decode and colocated workers that may get it."""
    return tuple(
        view.usable(role, now, demand.avoid, tokens) for role, tokens in demand.held.items()
    )


def _missing(
    view: ClusterView, demand: Demand, prefills: Sequence[object], decodes: Sequence[object]
) -> str:
    """Names the role that nobody fills, or nobody who can hold the sequence."""
    found = {Role.PREFILL: prefills, Role.DECODE: decodes}
    roles = [role for role, workers in found.items() if not workers]
    small = any(worker.role in roles for worker in view.workers.values())
    held = f" that holds {demand.held[roles[-1]]} tokens" if small else ""
    return f"no {' and no '.join(roles)} worker{held} is ready"


def _disaggregated(
    view: ClusterView,
    demand: Demand,
    depths: dict[int, int],
    prefills: Sequence[WorkerView],
    decodes: Sequence[WorkerView],
    now: float,
    rng: random.Random,
) -> tuple[float, Placement]:
    decodes = _rested(view, [worker.name for worker in prefills], decodes, now)
    streams = _decode_candidates(view, demand, depths, decodes, rng)
    firsts = [_candidate(view, demand, depths, w) for w in _with_room(demand, depths, prefills)]
    if len(firsts) > PREFILL_CANDIDATES:
        ranked = [(first.ttft_s, rng.random(), first) for first in firsts]
        nearest = heapq.nsmallest(PREFILL_CANDIDATES, ranked, key=lambda item: item[:2])
        firsts = [first for _, _, first in nearest]
    pairs = [(i, j) for i in range(len(firsts)) for j in range(len(streams))]
    if view.any_resting:
        pairs = [
            (i, j)
            for i, j in pairs
            if not view.resting(firsts[i].worker.name, streams[j][1].name, now)
        ] or pairs
    least_s = min(seconds for seconds, _ in streams)
    after: dict[int, list[tuple[float, int]]] = {}  # token 0 from i: seconds with each j
    for i, j in pairs:
        seconds, decode = streams[j]
        transfer_s = _transfer_s(view, demand, depths, firsts[i].worker.name, decode)
        after.setdefault(i, []).append((transfer_s + seconds, j))
    # What all have in common does not widen the tie.
    costs = [(firsts[i].ttft_s + min(options)[0] - least_s, i) for i, options in after.items()]
    chosen = firsts[_best_of_two(costs, rng)[1]]
    after_s, j = _best_of_two(after[firsts.index(chosen)], rng)
    decode = streams[j][1]
    reason = (
        f"{chosen.worker.queued_tokens} queued + {chosen.uncached} own tokens in "
        f"{chosen.ttft_s:.4f} s, transfer {after_s - streams[j][0]:.4f} s, "
        f"tpot {view.step_s(decode, decode.sequences + 1):.4f} s"
    )
    return chosen.ttft_s + after_s, _placement(chosen.worker, decode, chosen, now, reason)


def _rested(
    view: ClusterView, prefills: Sequence[str], decodes: Sequence[WorkerView], now: float
) -> list[WorkerView]:
    """The decode workers that do not rest from all of `prefills`; all, where none is one."""
    if not view.any_resting:
        return list(decodes)
    rested = [d for d in decodes if not all(view.resting(p, d.name, now) for p in prefills)]
    return rested or list(decodes)


def _colocated(
    view: ClusterView,
    demand: Demand,
    depths: dict[int, int],
    workers: Sequence[WorkerView],
    now: float,
    rng: random.Random,
) -> tuple[float, Placement]:
    candidates = [_candidate(view, demand, depths, w) for w in _with_room(demand, depths, workers)]
    costs = [(c.ttft_s + _stream_s(view, c.worker), i) for i, c in enumerate(candidates)]
    cost, i = _best_of_two(costs, rng)
    chosen = candidates[i]
    # Both phases share the engine: a step of the running batch goes before each chunk.
    step_s = view.step_s(chosen.worker, chosen.worker.sequences)
    chosen = replace(chosen, ttft_s=chosen.ttft_s + step_s)
    reason = f"{chosen.worker.queued_tokens} queued + {chosen.uncached} own tokens, both phases"
    return cost, _placement(None, chosen.worker, chosen, now, reason)


def _candidate(
    view: ClusterView, demand: Demand, depths: dict[int, int], worker: WorkerView
) -> _Prefill:
    cached = depths.get(worker.slot, 0)
    # The last prompt token is always computed: its logits are what token 0 is drawn from.
    uncached = max(1, demand.num_tokens - cached * demand.block_size)
    ttft_s = view.prefill_s(worker, worker.queued_tokens + uncached)
    return _Prefill(worker, cached, uncached, ttft_s)


def _placement(
    prefill: WorkerView | None, decode: WorkerView, chosen: _Prefill, now: float, reason: str
) -> Placement:
    worker = chosen.worker
    return Placement(
        prefill=prefill.name if prefill else None,
        decode=decode.name,
        cached_blocks=chosen.cached_blocks,
        uncached_tokens=chosen.uncached,
        predicted_ttft_s=chosen.ttft_s,
        measured=worker.knows_prefill(worker.queued_tokens + chosen.uncached, now),
        reason=reason,
    )


def _decode_candidates(
    view: ClusterView,
    demand: Demand,
    depths: dict[int, int],
    decodes: Sequence[WorkerView],
    rng: random.Random,
) -> list[tuple[float, WorkerView]]:
    """Seconds of the stream on each, without what is to be pulled, of the few with the least."""
    ranked = []
    for worker in _with_room(demand, depths, decodes):
        seconds = _stream_s(view, worker)
        pulled_s = seconds + _transfer_s(view, demand, depths, "", worker)
        ranked.append((pulled_s, rng.random(), seconds, worker))
    least = heapq.nsmallest(DECODE_CANDIDATES, ranked, key=lambda item: item[:2])
    return [(seconds, worker) for _, _, seconds, worker in least]


def _stream_s(view: ClusterView, worker: WorkerView) -> float:
    """Predicted seconds of STREAM_TOKENS steps after joining, and until there is a place in the
    batch: each of its streams leaves one after as many steps."""
    joined = worker.sequences + 1
    most = worker.facts.max_batch or joined
    waited = max(0, joined - most) / most
    return STREAM_TOKENS * view.step_s(worker, min(joined, most)) * (1 + waited)


def _with_room(
    demand: Demand, depths: dict[int, int], workers: Sequence[WorkerView]
) -> list[WorkerView]:
    """Those that have the blocks; where nobody has, those with the most room."""
    fitting = [w for w in workers if demand.blocks - depths.get(w.slot, 0) <= w.available_blocks]
    roomiest = max(w.available_blocks for w in workers)
    return fitting or [w for w in workers if w.available_blocks == roomiest]


def _transfer_s(
    view: ClusterView, demand: Demand, depths: dict[int, int], prefill: str, decode: WorkerView
) -> float:
    blocks = -(-demand.num_tokens // demand.block_size) - depths.get(decode.slot, 0)
    return max(0, blocks) * decode.facts.block_bytes / view.bandwidth(prefill, decode.name)


def _best_of_two(costs: Sequence[tuple[float, int]], rng: random.Random) -> tuple[float, int]:
    """The better of two at random of those within a tie of the least."""
    limit = min(costs)[0] * (1 + TIE_RELATIVE) + TIE_ABSOLUTE_S
    tied = [option for option in costs if option[0] <= limit]
    return min(rng.sample(tied, min(2, len(tied))), key=lambda option: option[0])
