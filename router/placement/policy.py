"""Where a request goes: pure functions over a ClusterView. The clock and the dice are passed in."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from crossdock.proto.errors import Unavailable
from crossdock.proto.types import Role
from crossdock.router.placement.view import ClusterView, WorkerView

TIE_RELATIVE = 0.05
TIE_ABSOLUTE_S = 0.0005
STREAM_TOKENS = 100  # over so many a decode worker's TPOT is weighed against seconds before them
BACK_OFF_S = 1e6  # a pair whose pulls fail comes after all others
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
    local_tokens: int = 0  # that a decode worker which has all before them may compute itself

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


UNPLACED = Placement("", "", 0, 0, 0.0, measured=False)

T = TypeVar("T")
Policy = Callable[[ClusterView, Demand, float, random.Random, int], Placement]


def least_latency(
    view: ClusterView, demand: Demand, now: float, rng: random.Random, turn: int = 0
) -> Placement:
    """The workers with the least predicted seconds, of those that can hold the sequence.

    Seconds = TTFT (queued + own uncached tokens, by the worker's prefill time) + bytes to pull /
    bandwidth of the pair, which delays token 1 + what STREAM_TOKENS decode steps after joining and
    the wait for a place in the batch take longer than on the best decode worker. So queue depth,
    prefix hits, links and batches are one number. Near ties of either side go to the better of two
    at random, so that gateways with slightly old views do not herd. Pairs whose pulls fail back
    off while there are others. A decode worker that has more of the sequence cached than any
    prefill worker, as it has of a chat that it answered, may go on by itself. Raises NoWorker.
    """
    choice = _Choice(view, demand, now, rng)
    best = choice.local() if choice.pairs else []
    best += [choice.disaggregated()] if choice.pairs else []
    best += [choice.colocated()] if choice.usable[Role.COLOCATED] else []
    if not best:
        raise NoWorker(choice.missing(Role.PREFILL, Role.DECODE))
    return min(best, key=lambda option: option[0])[1]


def round_robin(
    view: ClusterView, demand: Demand, now: float, rng: random.Random, turn: int = 0
) -> Placement:
    """The baseline: each role in turn, blind to load and cache. Raises NoWorker."""
    choice = _Choice(view, demand, now, rng)
    prefills, _, colocated = choice.usable.values()
    if colocated and (not choice.pairs or turn % 2):
        return choice.placement(colocated[turn % len(colocated)])
    if not choice.pairs:
        raise NoWorker(choice.missing(Role.PREFILL, Role.DECODE))
    prefill = prefills[turn % len(prefills)]
    decodes = choice.linked([prefill.name])
    return choice.placement(prefill, decodes[turn % len(decodes)])


POLICIES: dict[str, Policy] = {"least_latency": least_latency, "round_robin": round_robin}


def decode_for(
    view: ClusterView, demand: Demand, prefill: str, now: float, rng: random.Random
) -> str:
    """Another decode worker for a sequence whose prompt is computed already. Raises NoWorker."""
    choice = _Choice(view, demand, now, rng)
    if not choice.usable[Role.DECODE]:
        raise NoWorker(choice.missing(Role.DECODE))
    return choice.best_of_two(choice.after_token_0(prefill, choice.streams([prefill])))[1].name


class _Choice:
    """One decision: who may get the sequence, and what it costs there, in seconds."""

    def __init__(self, view: ClusterView, demand: Demand, now: float, rng: random.Random) -> None:
        self.view, self.demand, self.now, self.rng = view, demand, now, rng
        self.depths = view.index.depths(demand.block_hashes)
        self.usable = {
            role: view.usable(role, now, demand.avoid, tokens)
            for role, tokens in demand.held.items()
        }

    @property
    def pairs(self) -> bool:
        return bool(self.usable[Role.PREFILL] and self.usable[Role.DECODE])

    def missing(self, *roles: Role) -> str:
        """Names the roles that nobody fills, or nobody who can hold the sequence."""
        missed = [role for role in roles if not self.usable[role]]
        small = any(worker.role in missed for worker in self.view.workers.values())
        held = f" that holds {self.demand.held[missed[-1]]} tokens" if small else ""
        return f"no {' and no '.join(missed)} worker{held} is ready"

    def disaggregated(self) -> tuple[float, Placement]:
        """Seconds until token 1 and lost after it, and where."""
        workers = self.with_room(self.usable[Role.PREFILL])
        firsts = self.nearest([(self.ttft_s(w), w) for w in workers], PREFILL_CANDIDATES)
        streams = self.streams([worker.name for _, worker in firsts])
        after = {worker: self.after_token_0(worker.name, streams) for _, worker in firsts}
        costs = [(ttft_s + min(s for s, _ in after[worker]), worker) for ttft_s, worker in firsts]
        prefill = self.best_of_two(costs)[1]
        after_s, decode = self.best_of_two(after[prefill])
        return self.ttft_s(prefill) + after_s, self.placement(prefill, decode)

    def colocated(self) -> tuple[float, Placement]:
        """The same where one worker does both phases."""
        streams = [(self.stream_s(w), w) for w in self.with_room(self.usable[Role.COLOCATED])]
        least_s = min(seconds for seconds, _ in streams)
        costs = [(self.ttft_s(worker) + seconds - least_s, worker) for seconds, worker in streams]
        cost, worker = self.best_of_two(costs)
        return cost, self.placement(worker)

    def local(self) -> list[tuple[float, Placement]]:
        """The same for the decode worker that has the most of it, where it may compute the rest: a
        few tokens, those that wait there already included, so that no stream waits for long. That
        is presumed to take as long as on the fastest prefill worker."""
        demand, prefills = self.demand, self.usable[Role.PREFILL]
        held = max(self.depths.get(worker.slot, 0) for worker in prefills)
        able = [
            worker
            for worker in self.usable[Role.DECODE]
            if self.depths.get(worker.slot, 0) > held
            and worker.queued_tokens + self.uncached(worker) <= demand.local_tokens
            and demand.blocks - self.depths[worker.slot] <= worker.available_blocks
        ]
        if not able:
            return []
        least_s = min(self.stream_s(worker) for worker in self.usable[Role.DECODE])
        options = []
        for worker in able:
            tokens = worker.queued_tokens + self.uncached(worker)
            ttft_s = min(self.view.prefill_s(prefill, tokens) for prefill in prefills)
            if worker.sequences:  # whose step goes before
                ttft_s += self.view.step_s(worker, worker.sequences)
            placement = replace(self.placement(worker), predicted_ttft_s=ttft_s)
            options.append((ttft_s + self.stream_s(worker) - least_s, placement))
        return [self.best_of_two(options)]

    def uncached(self, worker: WorkerView) -> int:
        """The last prompt token is always computed: its logits are what token 0 is drawn from."""
        cached = self.depths.get(worker.slot, 0)
        return max(1, self.demand.num_tokens - cached * self.demand.block_size)

    def ttft_s(self, worker: WorkerView) -> float:
        seconds = self.view.prefill_s(worker, worker.queued_tokens + self.uncached(worker))
        if worker.role is Role.COLOCATED:  # a step of the running batch goes before each chunk
            seconds += self.view.step_s(worker, worker.sequences)
        return seconds

    def placement(self, worker: WorkerView, decode: WorkerView | None = None) -> Placement:
        """`worker` computes the prompt; `decode`: None where it goes on to the end."""
        uncached = self.uncached(worker)
        return Placement(
            prefill=worker.name if decode else None,
            decode=(decode or worker).name,
            cached_blocks=self.depths.get(worker.slot, 0),
            uncached_tokens=uncached,
            predicted_ttft_s=self.ttft_s(worker),
            measured=worker.knows_prefill(worker.queued_tokens + uncached, self.now),
        )

    def linked(self, prefills: Sequence[str]) -> list[WorkerView]:
        """The decode workers that back off from not all of `prefills`; all, where none is one."""
        decodes, view = self.usable[Role.DECODE], self.view
        if not view.any_backs_off:
            return decodes
        return [
            d for d in decodes if not all(view.backs_off(p, d.name, self.now) for p in prefills)
        ] or decodes

    def streams(self, prefills: Sequence[str]) -> list[tuple[float, WorkerView]]:
        """The few decode workers with the least to spend: seconds of the stream, more than on the
        best of them, and of a pull from nobody in particular. With the former."""
        streams = [(self.stream_s(w), w) for w in self.with_room(self.linked(prefills))]
        least_s = min(seconds for seconds, _ in streams)
        options = [(s + self.transfer_s("", w), (s - least_s, w)) for s, w in streams]
        return [stream for _, stream in self.nearest(options, DECODE_CANDIDATES)]

    def stream_s(self, worker: WorkerView) -> float:
        """Predicted seconds of STREAM_TOKENS steps after joining, and until there is a place in the
        batch: each of its streams leaves one after as many steps."""
        joined = worker.sequences + 1
        most = worker.facts.max_batch or joined
        waited = max(0, joined - most) / most
        return STREAM_TOKENS * self.view.step_s(worker, min(joined, most)) * (1 + waited)

    def after_token_0(
        self, prefill: str, streams: Sequence[tuple[float, WorkerView]]
    ) -> list[tuple[float, WorkerView]]:
        """Seconds that each of `streams` costs with the pull."""
        return [(excess_s + self.transfer_s(prefill, w), w) for excess_s, w in streams]

    def transfer_s(self, prefill: str, decode: WorkerView) -> float:
        held = self.depths.get(decode.slot, 0)
        blocks = -(-self.demand.num_tokens // self.demand.block_size) - held
        nbytes = max(0, blocks) * decode.facts.block_bytes
        backs_off = self.view.backs_off(prefill, decode.name, self.now)
        return nbytes / self.view.bandwidth(prefill, decode.name) + BACK_OFF_S * backs_off

    def with_room(self, workers: Sequence[WorkerView]) -> list[WorkerView]:
        """Those that have the blocks; where nobody has, those with the most room."""
        blocks = self.demand.blocks
        fitting = [w for w in workers if blocks - self.depths.get(w.slot, 0) <= w.available_blocks]
        if fitting:
            return fitting
        roomiest = max(w.available_blocks for w in workers)
        return [w for w in workers if w.available_blocks == roomiest]

    def nearest(self, options: list[tuple[float, T]], count: int) -> list[tuple[float, T]]:
        """The `count` options of the least cost; of equal ones any."""
        if len(options) <= count:
            return options
        ranked = [(option[0], self.rng.random(), option) for option in options]
        return [item[2] for item in heapq.nsmallest(count, ranked, key=lambda item: item[:2])]

    def best_of_two(self, costs: Sequence[tuple[float, T]]) -> tuple[float, T]:
        """The better of two at random of those within a tie of the least."""
        limit = min(cost for cost, _ in costs) * (1 + TIE_RELATIVE) + TIE_ABSOLUTE_S
        tied = [option for option in costs if option[0] <= limit]
        return min(self.rng.sample(tied, min(2, len(tied))), key=lambda option: option[0])
