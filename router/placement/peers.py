"""Policies as other routers publish them, to compare ours with, and for who knows them.

Each weighs those who may compute the prompt: the prefill workers, where there is a decode worker
too, and the colocated ones; after a prefill worker it chooses who decodes. Whatever it goes by, it
has only workers that are usable (fresh, not draining, not to be avoided, large enough) and have
room for the blocks, where there are such; and no pair whose pulls fail. A decode worker never
computes a prompt (gateway.local_prompt_tokens is of predicted_latency alone). Every worker is
looked at by itself: 1,000 of them take milliseconds.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from crossdock.proto.settings import setting
from crossdock.proto.types import Role
from crossdock.router.placement.candidates import PREFILL_CANDIDATES, nobody
from crossdock.router.placement.demand import Demand, Placement, Reason
from crossdock.router.placement.few import FewWorkers
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.weighed import ByNumber, Compared
from crossdock.router.placement.workers import WorkerView

T = TypeVar("T")
# Which, why, and the number of each that it went by, if by any.
Choice = tuple[WorkerView, Reason, Sequence[float]]
# Which of these: they compute the prompt, or (all of them decode workers) go on from token 0.
Choose = Callable[[FewWorkers, Sequence[WorkerView]], Choice]


def round_robin(
    view: ClusterView, demand: Demand, now: float, rng: random.Random, turn: int = 0
) -> Placement:
    """Each worker in turn, blind to load and cache: the round_robin of sgl-router and of Dynamo.

    Of who computes the prompt and of who decodes, each has its turn as often as any other, while
    the same workers are there. Raises NoWorker.
    """
    pairs = 0  # that had their turn before this one

    def choose(among: FewWorkers, workers: Sequence[WorkerView]) -> Choice:
        nonlocal pairs
        if workers[0].role is Role.DECODE:
            return workers[pairs % len(workers)], Reason.IN_TURN, ()
        rounds, place = divmod(turn, len(workers))
        pairs = rounds * sum(worker.role is Role.PREFILL for worker in workers) + place
        return workers[place], Reason.IN_TURN, ()

    return _place(view, demand, now, rng, choose)


def least_loaded(
    view: ClusterView, demand: Demand, now: float, rng: random.Random, turn: int = 0
) -> Placement:
    """Who has the fewest sequences, running or waiting; of several any: Dynamo's router mode
    least-loaded ("Routing Concepts": the worker with the fewest active connections). Raises
    NoWorker."""
    return _place(view, demand, now, rng, lambda _, workers: _least_loaded(workers, rng))


@dataclass(frozen=True)
class PrefixThreshold:
    """The longest cached prefix, unless loads are too far apart: sgl-router's cache_aware.

    As "Cache-Aware Routing" of the SGLang model gateway has it: where the most sequences of a
    worker exceed the least by more than `balance_abs`, and are more than `balance_rel` times as
    many, the least loaded is taken; else the one with the longest prefix, if that is more than
    `cache_threshold` of the prompt; else the least loaded. Prefill and decode workers are pools of
    their own with the same rule, as where its --policy is given alone. What is cached is what
    workers say, where that router also guesses by what it sent. Equal ones: the least loaded of
    them, or any.
    """

    cache_threshold: float = setting(
        0.3, "The part of a prompt beyond which its cached prefix decides.", low=0, high=1
    )
    balance_abs: int = setting(
        64, "Loads are balanced up to this difference, in sequences.", low=0, high=1_000_000
    )
    balance_rel: float = setting(
        1.5, "They are too where the most are up to so many times the least.", low=1, high=1_000
    )

    def __call__(
        self, view: ClusterView, demand: Demand, now: float, rng: random.Random, turn: int = 0
    ) -> Placement:
        """Raises NoWorker."""

        def choose(among: FewWorkers, workers: Sequence[WorkerView]) -> Choice:
            loads = [worker.sequences for worker in workers]
            least, most = min(loads), max(loads)
            if most - least > self.balance_abs and most > self.balance_rel * least:
                return _any_of(least, workers, loads, rng), Reason.IMBALANCED, loads
            depths = [among.depth(worker) for worker in workers]
            deepest = max(depths)
            if deepest * demand.block_size <= self.cache_threshold * demand.num_tokens:
                return _any_of(least, workers, loads, rng), Reason.SHORT_PREFIX, loads
            holders = [worker for worker, depth in zip(workers, depths) if depth == deepest]
            return _least_loaded(holders, rng)[0], Reason.LONGEST_PREFIX, depths

        return _place(view, demand, now, rng, choose)


@dataclass(frozen=True)
class KvCost:
    """The least cost in blocks of KV: Dynamo's KV router.

    As its "Routing Concepts" has it, a worker costs `prefill_scale` × max(blocks of prompts that
    wait there + blocks of this prompt − `overlap_credit` × those of them that it has cached, 0) +
    blocks of its active sequences, this one's among them. As "Disaggregated Serving" has it, a
    prefill worker's cost is the first term alone and a decode worker's the second, without credit.
    A colocated worker's is both, which is weighed against a prefill worker's and the least of a
    decode worker's. With `temperature` 0 the least cost decides (of equal ones any); else the dice,
    by a softmax of −cost / (most − least cost) / temperature.
    """

    overlap_credit: float = setting(
        1.0, "By how much a cached block lowers a prompt's cost, in blocks.", low=0, high=100
    )
    prefill_scale: float = setting(
        1.0, "What a block to prefill costs beside an active one.", low=0, high=1_000
    )
    temperature: float = setting(
        0.0, "0: the least cost. Above, workers of more cost get some too.", low=0, high=1_000
    )

    def __call__(
        self, view: ClusterView, demand: Demand, now: float, rng: random.Random, turn: int = 0
    ) -> Placement:
        """Raises NoWorker."""

        def prefill(worker: WorkerView, depth: int) -> float:
            blocks = (worker.queued_tokens + demand.num_tokens) / demand.block_size
            return self.prefill_scale * max(blocks - self.overlap_credit * depth, 0.0)

        def decode(worker: WorkerView) -> float:
            in_all = worker.load.total_blocks or worker.facts.num_blocks
            return in_all - worker.available_blocks + demand.blocks

        def choose(among: FewWorkers, workers: Sequence[WorkerView]) -> Choice:
            after = 0.0  # a prefill worker
            if any(worker.role is Role.COLOCATED for worker in workers):
                after = min(map(decode, among.usable(Role.DECODE)), default=0.0)
            costs = []
            for worker in workers:
                cost = after if worker.role is Role.PREFILL else decode(worker)
                if worker.role is not Role.DECODE:
                    cost += prefill(worker, among.depth(worker))
                costs.append(cost)
            chosen = self._drawn(costs, rng)
            least = costs[chosen] == min(costs)
            return workers[chosen], Reason.LEAST_COST if least else Reason.SAMPLED_COST, costs

        return _place(view, demand, now, rng, choose)

    def _drawn(self, costs: Sequence[float], rng: random.Random) -> int:
        """Which of them."""
        least, most = min(costs), max(costs)
        if not self.temperature or least == most:
            return _any([i for i, cost in enumerate(costs) if cost == least], rng)
        weights = [math.exp((least - cost) / (most - least) / self.temperature) for cost in costs]
        return rng.choices(range(len(costs)), weights)[0]


def _place(
    view: ClusterView, demand: Demand, now: float, rng: random.Random, choose: Choose
) -> Placement:
    """Where `choose` has it. Raises NoWorker."""
    among = FewWorkers(view, demand, now, rng)
    firsts = list(among.usable(Role.PREFILL)) if among.any_of(Role.DECODE) else []
    firsts += among.usable(Role.COLOCATED)
    if not firsts:
        raise nobody(view, demand, among)
    able = among.with_room(firsts)
    worker, reason, numbers = choose(among, able)
    weighed = ByNumber(_best(able, numbers, worker, reason))
    decode = None
    if worker.role is Role.PREFILL:
        able = among.with_room(among.usable(Role.DECODE, view.pairs.cut_off([worker.name], now)))
        decode, why, numbers = choose(among, able)
        weighed = ByNumber(weighed.computes, _best(able, numbers, decode, why), why)
    depth = among.depth(worker)
    tokens = demand.uncached(depth)
    prompt = demand.num_tokens - tokens, tokens
    ttft_s = worker.ttft_s(*prompt, demand.yields)
    weighed = weighed._replace(before_s=ttft_s - worker.prompt_s(*prompt))
    return Placement.on(worker, decode, demand, now, depth, ttft_s, reason, weighed)


def _best(
    workers: Sequence[WorkerView], numbers: Sequence[float], chosen: WorkerView, reason: Reason
) -> list[Compared]:
    """What is told of them later: the best, and the one that was chosen."""
    sign = -1 if reason is Reason.LONGEST_PREFIX else 1
    others = [(sign * n, i) for i, n in enumerate(numbers) if workers[i] is not chosen]
    told = heapq.nsmallest(PREFILL_CANDIDATES - 1, others)
    told += [(sign * n, i) for i, n in enumerate(numbers) if workers[i] is chosen]
    return [(workers[i].name, numbers[i]) for _, i in sorted(told)]


def _least_loaded(workers: Sequence[WorkerView], rng: random.Random) -> Choice:
    loads = [worker.sequences for worker in workers]
    return _any_of(min(loads), workers, loads, rng), Reason.LEAST_LOADED, loads


def _any_of(
    number: float, workers: Sequence[WorkerView], numbers: Sequence[float], rng: random.Random
) -> WorkerView:
    return _any([worker for worker, has in zip(workers, numbers) if has == number], rng)


def _any(options: Sequence[T], rng: random.Random) -> T:
    return options[int(rng.random() * len(options))]
