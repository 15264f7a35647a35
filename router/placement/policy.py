"""Where a request goes: pure functions over a ClusterView. The clock and the dice are passed in."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crossdock.proto.errors import Unavailable
from crossdock.proto.types import Role
from crossdock.router.placement.view import ClusterView, WorkerView

TIE_RELATIVE = 0.05
TIE_ABSOLUTE_S = 0.0005
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
    avoid: frozenset[str] = frozenset()  # workers that just failed it; used only if nobody else is

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
    measured: bool  # the prediction rests on a measured prefill rate
    reason: str


@dataclass(frozen=True)
class _Prefill:
    worker: WorkerView
    cached_blocks: int
    uncached: int
    rate: float

    @property
    def ttft_s(self) -> float:
        return (self.worker.queued_tokens + self.uncached) / self.rate


Policy = Callable[[ClusterView, Demand, float, random.Random, int], Placement]


def least_latency(
    view: ClusterView, demand: Demand, now: float, rng: random.Random, turn: int = 0
) -> Placement:
    """The pair with the least predicted TTFT among the decode workers of least predicted TPOT.

    TTFT = (queued + own uncached tokens) / prefill rate + bytes to pull / bandwidth of the pair, so
    queue depth and prefix hits are one number in seconds. Near ties go to the better of two at
    random, so that gateways with slightly old views do not herd. Pairs whose pulls fail are left to
    rest while there are others. Raises NoWorker.
    """
    depths = view.index.depths(demand.block_hashes)
    best: list[tuple[float, Placement]] = []
    prefills = view.usable(Role.PREFILL, now, demand.avoid)
    decodes = view.usable(Role.DECODE, now, demand.avoid)
    if prefills and decodes:
        best.append(_disaggregated(view, demand, depths, prefills, decodes, now, rng))
    colocated = view.usable(Role.COLOCATED, now, demand.avoid)
    if colocated:
        best.append(_colocated(view, demand, depths, colocated, rng))
    if not best:
        raise NoWorker(missing(prefills, decodes))
    return min(best, key=lambda option: option[0])[1]


def round_robin(
    view: ClusterView, demand: Demand, now: float, rng: random.Random, turn: int = 0
) -> Placement:
    """The baseline: each role in turn, blind to load and cache. Raises NoWorker."""
    depths = view.index.depths(demand.block_hashes)
    prefills = view.usable(Role.PREFILL, now, demand.avoid)
    decodes = view.usable(Role.DECODE, now, demand.avoid)
    colocated = view.usable(Role.COLOCATED, now, demand.avoid)
    if colocated and (not (prefills and decodes) or turn % 2):
        chosen = _candidate(view, demand, depths, colocated[turn % len(colocated)])
        return _placement(None, chosen.worker, chosen, chosen.ttft_s, "round robin")
    if not (prefills and decodes):
        raise NoWorker(missing(prefills, decodes))
    chosen = _candidate(view, demand, depths, prefills[turn % len(prefills)])
    rested = _rested(view, [chosen.worker.name], decodes, now)
    decode = rested[turn % len(rested)]
    return _placement(chosen.worker, decode, chosen, chosen.ttft_s, "round robin")


POLICIES: dict[str, Policy] = {"least_latency": least_latency, "round_robin": round_robin}


def decode_for(
    view: ClusterView, demand: Demand, prefill: str, now: float, rng: random.Random
) -> str:
    """Another decode worker for a sequence whose prompt is computed already. Raises NoWorker."""
    decodes = view.usable(Role.DECODE, now, demand.avoid)
    if not decodes:
        raise NoWorker("no decode worker is ready")
    rested = _rested(view, [prefill], decodes, now)
    depths = view.index.depths(demand.block_hashes)
    tied = _least_tpot(view, demand, depths, rested, rng)
    return min(tied, key=lambda d: _transfer_s(view, demand, depths, prefill, d)).name


def missing(prefills: Sequence[WorkerView], decodes: Sequence[WorkerView]) -> str:
    """Names the role that nobody fills."""
    roles = [role for role, found in (("prefill", prefills), ("decode", decodes)) if not found]
    return f"no {' and no '.join(roles)} worker is ready"


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
    tied = _least_tpot(view, demand, depths, decodes, rng)
    candidates = [_candidate(view, demand, depths, worker) for worker in prefills]
    if len(candidates) > PREFILL_CANDIDATES:
        ranked = [(candidate.ttft_s, rng.random(), candidate) for candidate in candidates]
        nearest = heapq.nsmallest(PREFILL_CANDIDATES, ranked, key=lambda item: item[:2])
        candidates = [candidate for _, _, candidate in nearest]
    pairs = [
        (candidate.ttft_s + _transfer_s(view, demand, depths, candidate.worker.name, decode), i, j)
        for i, candidate in enumerate(candidates)
        for j, decode in enumerate(tied)
    ]
    if view.any_resting:
        pairs = [
            (cost, i, j)
            for cost, i, j in pairs
            if not view.resting(candidates[i].worker.name, tied[j].name, now)
        ] or pairs
    cost, i, j = _best_of_two(pairs, rng)
    chosen, decode = candidates[i], tied[j]
    reason = (
        f"{chosen.worker.queued_tokens} queued + {chosen.uncached} own tokens at "
        f"{chosen.rate:.0f}/s, transfer {cost - chosen.ttft_s:.4f} s, "
        f"tpot {view.step_s(decode, decode.sequences + 1):.4f} s"
    )
    return cost, _placement(chosen.worker, decode, chosen, cost, reason)


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
    rng: random.Random,
) -> tuple[float, Placement]:
    fitting = [w for w in workers if _fits(demand, depths, w)] or list(workers)
    candidates = [_candidate(view, demand, depths, worker) for worker in fitting]
    # Both phases share the engine: a step of the running batch goes before each chunk.
    costs = [
        (c.ttft_s + view.step_s(c.worker, c.worker.sequences), i, 0)
        for i, c in enumerate(candidates)
    ]
    cost, i, _ = _best_of_two(costs, rng)
    chosen = candidates[i]
    reason = f"{chosen.worker.queued_tokens} queued + {chosen.uncached} own tokens, both phases"
    return cost, _placement(None, chosen.worker, chosen, cost, reason)


def _candidate(
    view: ClusterView, demand: Demand, depths: dict[int, int], worker: WorkerView
) -> _Prefill:
    cached = depths.get(worker.slot, 0)
    # The last prompt token is always computed: its logits are what token 0 is drawn from.
    uncached = max(1, demand.num_tokens - cached * demand.block_size)
    return _Prefill(worker, cached, uncached, view.prefill_rate(worker))


def _placement(
    prefill: WorkerView | None, decode: WorkerView, chosen: _Prefill, ttft_s: float, reason: str
) -> Placement:
    return Placement(
        prefill=prefill.name if prefill else None,
        decode=decode.name,
        cached_blocks=chosen.cached_blocks,
        uncached_tokens=chosen.uncached,
        predicted_ttft_s=ttft_s,
        measured=chosen.worker.load.prefill_tokens_per_s > 0,
        reason=reason,
    )


def _least_tpot(
    view: ClusterView,
    demand: Demand,
    depths: dict[int, int],
    decodes: Sequence[WorkerView],
    rng: random.Random,
) -> list[WorkerView]:
    """Those within a tie of the least TPOT after joining, of those that have the blocks; where
    nobody has, those with the most room. Fewest blocks to pull first."""
    fitting = [d for d in decodes if _fits(demand, depths, d)]
    if not fitting:
        roomiest = max(d.available_blocks for d in decodes)
        fitting = [d for d in decodes if d.available_blocks == roomiest]
    tpots = [(view.step_s(d, d.sequences + 1), d) for d in fitting]
    limit = _tie_limit(min(tpot for tpot, _ in tpots))
    tied = [(-depths.get(d.slot, 0), rng.random(), d) for tpot, d in tpots if tpot <= limit]
    return [d for _, _, d in heapq.nsmallest(DECODE_CANDIDATES, tied, key=lambda item: item[:2])]


def _fits(demand: Demand, depths: dict[int, int], worker: WorkerView) -> bool:
    return demand.blocks - depths.get(worker.slot, 0) <= worker.available_blocks


def _transfer_s(
    view: ClusterView, demand: Demand, depths: dict[int, int], prefill: str, decode: WorkerView
) -> float:
    blocks = -(-demand.num_tokens // demand.block_size) - depths.get(decode.slot, 0)
    return max(0, blocks) * decode.facts.block_bytes / view.bandwidth(prefill, decode.name)


def _best_of_two(
    costs: Sequence[tuple[float, int, int]], rng: random.Random
) -> tuple[float, int, int]:
    least = min(costs)
    limit = _tie_limit(least[0])
    tied = [option for option in costs if option[0] <= limit]
    if len(tied) == 1:
        return least
    return min(rng.sample(tied, 2), key=lambda option: option[0])


def _tie_limit(best_s: float) -> float:
    return best_s * (1 + TIE_RELATIVE) + TIE_ABSOLUTE_S
