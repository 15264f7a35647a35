"""Candidates among a few workers, each looked at in turn."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import TypeVar

from crossdock.proto.types import Role
from crossdock.router.placement.candidates import (
    DECODE_CANDIDATES,
    PREFILL_CANDIDATES,
    Decodes,
)
from crossdock.router.placement.demand import Demand
from crossdock.router.placement.prefix_index import depths
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.weighed import Computes
from crossdock.router.placement.workers import REUSED, WorkerView

Option = TypeVar("Option", Computes, Decodes)


class FewWorkers:
    """Candidates for one demand at one time."""

    def __init__(self, view: ClusterView, demand: Demand, now: float, rng: random.Random) -> None:
        self._pairs, self._demand, self._rng = view.pairs, demand, rng
        self._token_s = view.token_s
        self.levels = view.index.levels(demand.block_hashes)
        self._depths = depths(self.levels)
        self._usable = {
            role: view.usable(role, now, demand.avoid, tokens)
            for role, tokens in demand.held.items()
        }

    def depth(self, worker: WorkerView) -> int:
        return self._depths.get(worker.slot, 0)

    def any_of(self, role: Role) -> bool:
        return bool(self._usable[role])

    def usable(self, role: Role, cut_off: Collection[str] = ()) -> Sequence[WorkerView]:
        """Who may get the sequence; without those called `cut_off`, where there are others."""
        workers = self._usable[role]
        if cut_off:
            workers = [worker for worker in workers if worker.name not in cut_off] or workers
        return workers

    def with_room(self, workers: Sequence[WorkerView]) -> Sequence[WorkerView]:
        """Those that have the blocks; where nobody has, those with the most room."""
        fitting = [worker for worker in workers if self._has_room(worker)]
        if fitting:
            return fitting
        roomiest = max(worker.available_blocks for worker in workers)
        return [worker for worker in workers if worker.available_blocks == roomiest]

    def prefills(self) -> list[Computes]:
        options: list[Computes] = []
        for worker in self.with_room(self._usable[Role.PREFILL]):
            queue_s, ttft_s = self._token_0_s(worker)
            options.append((ttft_s + self._evicted_s(worker), ttft_s, queue_s, 0.0, worker))
        return self._nearest(options, PREFILL_CANDIDATES)

    def decodes(self, cut_off: Collection[str]) -> list[Decodes]:
        workers, pulled = self.usable(Role.DECODE, cut_off), self._demand.pulled
        options: list[Decodes] = []
        for excess_s, worker in self._streams(self.with_room(workers)):
            nbytes = pulled(self.depth(worker)) * worker.facts.block_bytes
            options.append((excess_s, nbytes, worker))
        if len(options) <= DECODE_CANDIDATES:
            return options
        presumed = self._pairs.presumed
        costs = [excess_s + nbytes * presumed for excess_s, nbytes, _ in options]
        return self._nearest(options, DECODE_CANDIDATES, costs)

    def colocated(self) -> list[Computes]:
        options: list[Computes] = []
        for excess_s, worker in self._streams(self.with_room(self._usable[Role.COLOCATED])):
            queue_s, ttft_s = self._token_0_s(worker)
            cost_s = ttft_s + excess_s + self._evicted_s(worker)
            options.append((cost_s, ttft_s, queue_s, excess_s, worker))
        near, last = self._nearest(options, PREFILL_CANDIDATES), self._demand.answered_by
        return near + [each for each in options if each[-1].name == last and each not in near]

    def local(self) -> list[Computes]:
        depths, demand, most = self._depths, self._demand, self._demand.local_tokens
        if not depths or not most:
            return []
        prefills, decodes = self._usable[Role.PREFILL], self._usable[Role.DECODE]

        def tokens(worker: WorkerView) -> float:
            """Until its token 0, all that wait there already included."""
            return worker.queued_tokens + demand.uncached(self.depth(worker))

        held = max(self.depth(worker) for worker in prefills)

        def ahead(worker: WorkerView) -> bool:
            depth = self.depth(worker)
            return depth > held or (worker.name == demand.answered_by and depth == held > 0)

        able = [worker for worker in decodes if ahead(worker) and tokens(worker) <= most]
        able = [worker for worker in able if self._has_room(worker)]
        if not able:
            return []
        options: list[Computes] = []
        for excess_s, worker in self._streams(decodes):
            if worker in able:
                cached = demand.num_tokens - demand.uncached(self.depth(worker))
                ttft_s = min(prefill.prompt_s(cached, tokens(worker)) for prefill in prefills)
                # It takes a few tokens into its next step.
                queue_s = worker.numbers.running_s
                ttft_s += queue_s
                options.append((ttft_s + excess_s, ttft_s, queue_s, excess_s, worker))
        return self._nearest(options, DECODE_CANDIDATES)

    def _token_0_s(self, worker: WorkerView) -> tuple[float, float]:
        """Until it begins with the prompt, and until token 0."""
        demand, queue_s = self._demand, worker.numbers.before_s(self._demand.yields)
        tokens = demand.uncached(self.depth(worker))
        return queue_s, queue_s + worker.prompt_s(demand.num_tokens - tokens, tokens)

    def _evicted_s(self, worker: WorkerView) -> float:
        """To compute again what the prompt's blocks are expected to be in the way of."""
        demand = self._demand
        evicted = demand.blocks - self.depth(worker) - worker.numbers.free_blocks
        return max(evicted, 0) * demand.block_size * (self._token_s * REUSED)

    def _stream_s(self, worker: WorkerView) -> float:
        """With what the streams there lack of blocks, which some of them are preempted for and
        computed again elsewhere."""
        demand = self._demand
        kept = demand.num_tokens - self.depth(worker) * demand.block_size + demand.output
        lacking = max(kept - worker.numbers.spare_tokens, 0.0)
        stream_s = worker.stream_s(demand.mean_context, demand.output, demand.tpot_s)
        return stream_s + lacking * self._token_s

    def _streams(self, workers: Sequence[WorkerView]) -> list[tuple[float, WorkerView]]:
        """Seconds that a stream takes, more than on the best of them."""
        seconds = [self._stream_s(worker) for worker in workers]
        least_s = min(seconds)
        return [(stream_s - least_s, worker) for stream_s, worker in zip(seconds, workers)]

    def _has_room(self, worker: WorkerView) -> bool:
        return self._demand.blocks - self.depth(worker) <= worker.available_blocks

    def _nearest(
        self, options: list[Option], count: int, costs: Sequence[float] | None = None
    ) -> list[Option]:
        """The `count` options of the least cost, which is their first number; of equal ones any."""
        if len(options) <= count:
            return options
        costs = costs or [option[0] for option in options]
        limit = sorted(costs)[count - 1]
        near = [option for cost, option in zip(costs, options) if cost <= limit]
        if len(near) == count:
            return near
        nearer = [option for cost, option in zip(costs, options) if cost < limit]
        equal = [option for cost, option in zip(costs, options) if cost == limit]
        start = int(self._rng.random() * len(equal))
        return nearer + (equal[start:] + equal[:start])[: count - len(nearer)]
