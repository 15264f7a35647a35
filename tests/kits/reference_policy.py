"""What the policy of predicted latency decides, written down as plainly as it can be: every worker
is looked at by itself, from what it reported. It throws its dice as the policy does, so that both
come to the same choice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from crossdock.proto.types import Role
from crossdock.router.placement.demand import Demand, Placement, Reason
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.workers import WorkerView

T = TypeVar("T")
Option = tuple[float, WorkerView]


class Reference:
    """One decision; None where nobody can have the sequence."""

    def __init__(self, view: ClusterView, demand: Demand, now: float, rng: random.Random) -> None:
        self.view, self.demand, self.now, self.rng = view, demand, now, rng
        for worker in view.workers.values():
            worker.presume(self.queued(worker), self.sequences(worker))
        most = max(demand.most_tokens, demand.num_tokens + 1)
        first = min(most, demand.num_tokens + 2)
        self.prefills = self.usable(Role.PREFILL, first)
        self.decodes = self.usable(Role.DECODE, most)
        self.both = self.usable(Role.COLOCATED, most)

    def decide(self) -> Placement | None:
        ways: list[tuple[float, Placement]] = []
        if self.prefills and self.decodes:
            ways += [*self.local(), self.disaggregated()]
        if self.both:
            ways.append(self.colocated())
        return min(ways, key=lambda way: way[0])[1] if ways else None

    # -- of one worker ------------------------------------------------------------------------

    def queued(self, worker: WorkerView) -> int:
        return worker.load.queued_tokens + sum(each.tokens for each in worker.unseen.values())

    def sequences(self, worker: WorkerView) -> int:
        return worker.load.waiting + worker.load.running + len(worker.unseen)

    def free(self, worker: WorkerView) -> int:
        load = worker.load
        known = load.free_blocks + load.cached_blocks if load.total_blocks else 1000
        return known - sum(each.blocks for each in worker.unseen.values())

    def stale(self, worker: WorkerView) -> bool:
        silent_s = 1.5 if self.sequences(worker) else 2.5
        silent = self.now > worker.reported_at + silent_s
        return worker.load.late or silent or self.now < worker.failed_at + 2.0

    def depth(self, worker: WorkerView) -> int:
        held, depth = self.view.index.held(worker.slot), 0
        while depth < len(self.demand.block_hashes) and self.demand.block_hashes[depth] in held:
            depth += 1
        return depth

    def uncached(self, worker: WorkerView) -> int:
        cached = self.depth(worker) * self.demand.block_size
        return max(1, self.demand.num_tokens - cached)

    def chunk(self, worker: WorkerView) -> int:
        return worker.facts.chunk_tokens or 2**53

    def prompt_s(self, worker: WorkerView, cached: int, tokens: int) -> float:
        """Chunk by chunk."""
        base, slope, attention = worker.lines[0]
        base += 0.0 if worker.role is Role.PREFILL else self.running_s(worker)
        chunk = self.chunk(worker)
        attended = tokens * (2 * cached + tokens + min(tokens, chunk)) / 2
        return -(-tokens // chunk) * base + tokens * slope + attended * attention

    def queue_s(self, worker: WorkerView) -> float:
        base, slope, attention = worker.lines[0]
        base += 0.0 if worker.role is Role.PREFILL else self.running_s(worker)
        load, unseen = worker.load, worker.unseen.values()

        def seconds(tokens: float, attended: float) -> float:
            return tokens * (base / self.chunk(worker) + slope) + attended * attention

        def yielding(how: int, tokens: float, attended: float) -> tuple[float, float]:
            if worker.role is not Role.PREFILL:
                return 0, 0.0
            here = [each for each in unseen if each.yields == how]
            tokens += sum(each.tokens for each in here)
            return tokens, attended + sum(each.attention for each in here)

        of_many = yielding(1, load.yielding_tokens, load.yielding_attention)
        late = yielding(2, load.late_tokens, load.late_attention)
        last = of_many[0] + late[0]
        begun_s = (base + min(last, self.chunk(worker) / 4) * slope) / 2 if last else 0.0
        attended = load.queued_attention + sum(each.attention for each in unseen)
        urgent = self.queued(worker) - last, attended - of_many[1] - late[1]
        yields = self.demand.yields
        found = seconds(*urgent) + begun_s
        if yields:
            found += seconds(*of_many) - begun_s if of_many[0] else 0.0
        if yields == 2:
            found += seconds(*late) if of_many[0] else seconds(*late) - begun_s
        return found

    def step_s(self, worker: WorkerView, sequences: int) -> float:
        """Of so many, one of which may be new."""
        load, (base, slope, per_token) = worker.load, worker.lines[1]
        most = worker.facts.max_batch or self.sequences(worker) + 1
        tokens = load.context_tokens + sum(each.context for each in worker.unseen.values())
        tokens *= min(1.0, most / (self.sequences(worker) + 1))
        return base + slope * min(sequences, most) + tokens * per_token

    def stream_s(self, worker: WorkerView) -> float:
        joined = self.sequences(worker) + 1
        wait = max(1.0, joined / (worker.facts.max_batch or joined))
        demand = self.demand
        context = demand.num_tokens + demand.output / 2
        step_s = self.step_s(worker, joined) + context * worker.lines[1].context
        missed_s = max(step_s - demand.tpot_s, 0.0) * self.sequences(worker)
        kept = demand.num_tokens - self.depth(worker) * demand.block_size + demand.output
        drawn = self.sequences(worker) * worker.output
        lacking = max(0, kept - (self.free(worker) * demand.block_size - drawn))
        return wait * demand.output * (step_s + missed_s) + lacking * self.view.token_s

    def evicted_s(self, worker: WorkerView) -> float:
        free, load = self.free(worker), worker.load
        if load.total_blocks:
            free = min(free, load.free_blocks)
        evicted = max(0, self.demand.blocks - self.depth(worker) - free)
        return evicted * self.demand.block_size * (self.view.token_s * 0.1)

    def running_s(self, worker: WorkerView) -> float:
        return self.step_s(worker, self.sequences(worker)) if self.sequences(worker) else 0.0

    def ttft_s(self, worker: WorkerView) -> float:
        tokens = self.uncached(worker)
        own_s = self.prompt_s(worker, self.demand.num_tokens - tokens, tokens)
        return self.queue_s(worker) + own_s

    def pull_s(self, prefill: str, decode: WorkerView) -> float:
        blocks = -(-self.demand.num_tokens // self.demand.block_size) - self.depth(decode)
        nbytes = max(0, blocks) * decode.facts.block_bytes
        seconds = self.view.pairs.seconds_per_byte(prefill).get(
            decode.name, self.view.pairs.presumed
        )
        backs_off = 1e6 if self.view.pairs.backs_off(prefill, decode.name, self.now) else 0.0
        return nbytes * seconds + backs_off

    # -- of all -------------------------------------------------------------------------------

    def usable(self, role: Role, tokens: int) -> list[WorkerView]:
        workers = [w for w in self.view.columns(role).workers if w.role is role]
        alive = [
            w for w in workers if not w.load.draining and tokens <= min(
                w.facts.num_blocks * w.facts.block_size, w.facts.context_length or 10**9
            )
        ]  # fmt: skip
        fresh = [worker for worker in alive if not self.stale(worker)]
        untried = [worker for worker in alive if worker.name not in self.demand.avoid]
        return [worker for worker in fresh if worker in untried] or fresh or untried or alive

    def with_room(self, workers: list[WorkerView]) -> list[WorkerView]:
        needed = (self.demand.num_tokens + self.demand.block_size) // self.demand.block_size
        fitting = [w for w in workers if needed - self.depth(w) <= self.free(w)]
        most = max(self.free(worker) for worker in workers)
        return fitting or [worker for worker in workers if self.free(worker) == most]

    def excess(self, workers: Sequence[WorkerView]) -> list[Option]:
        least_s = min(self.stream_s(worker) for worker in workers)
        return [(self.stream_s(worker) - least_s, worker) for worker in workers]

    def disaggregated(self) -> tuple[float, Placement]:
        room = self.with_room(self.prefills)
        firsts = self.nearest([(self.ttft_s(w) + self.evicted_s(w), w) for w in room], 8)
        backs_off, names = self.view.pairs.backs_off, [worker.name for _, worker in firsts]
        linked = [d for d in self.decodes if not all(backs_off(p, d.name, self.now) for p in names)]
        streams = self.excess(self.with_room(linked or self.decodes))
        streams = self.nearest(streams, 8, [s + self.pull_s("", d) for s, d in streams])
        after = {
            worker: [(excess_s + self.pull_s(worker.name, d), d) for excess_s, d in streams]
            for _, worker in firsts
        }
        firsts.sort(key=lambda option: option[0])
        prefill = self.best_of_two([(s + min(a for a, _ in after[w]), w) for s, w in firsts])[1]
        after_s, decode = self.best_of_two(after[prefill])
        ttft_s = self.ttft_s(prefill)
        cost_s = ttft_s + self.evicted_s(prefill)
        return cost_s + after_s, self.placement(prefill, ttft_s, decode)

    def colocated(self) -> tuple[float, Placement]:
        streams = self.excess(self.with_room(self.both))
        costs = [(self.ttft_s(w) + excess_s + self.evicted_s(w), w) for excess_s, w in streams]
        near, last = self.nearest(costs, 8), self.demand.answered_by
        near += [each for each in costs if each[1].name == last and each not in near]
        limit, deepest = self.tied(near), max(self.depth(worker) for _, worker in near)
        for cost_s, worker in near:
            if worker.name == last and cost_s <= limit and self.depth(worker) == deepest > 0:
                break
        else:
            cost_s, worker = self.best_of_two(near)
        return cost_s, self.placement(worker, self.ttft_s(worker))

    def local(self) -> list[tuple[float, Placement]]:
        held = max(self.depth(worker) for worker in self.prefills)
        needed = (self.demand.num_tokens + self.demand.block_size) // self.demand.block_size
        options = []
        for excess_s, worker in self.excess(self.decodes):
            depth, uncached = self.depth(worker), self.uncached(worker)
            tokens, cached = self.queued(worker) + uncached, self.demand.num_tokens - uncached
            room = needed - depth <= self.free(worker)
            last = worker.name == self.demand.answered_by and depth == held > 0
            if (depth > held or last) and tokens <= self.demand.local_tokens and room:
                ttft_s = min(self.prompt_s(prefill, cached, tokens) for prefill in self.prefills)
                ttft_s += self.running_s(worker)
                options.append((ttft_s + excess_s, (ttft_s, worker)))
        if not options:
            return []
        cost_s, (ttft_s, worker) = self.best_of_two(self.nearest(options, 8))
        return [(cost_s, self.placement(worker, ttft_s))]

    def placement(
        self, worker: WorkerView, ttft_s: float, decode: WorkerView | None = None
    ) -> Placement:
        tokens, load = self.queued(worker) + self.uncached(worker), worker.load
        step = min(tokens, worker.facts.chunk_tokens or tokens)
        kind = "PAIR" if decode else "LOCAL" if worker in self.decodes else "COLOCATED"
        known = step <= (8 * load.prefill_step_tokens or step)
        return Placement(
            prefill=worker.name if decode else None,
            decode=(decode or worker).name,
            cached_blocks=self.depth(worker),
            uncached_tokens=self.uncached(worker),
            predicted_ttft_s=ttft_s,
            measured=known and self.now - worker.measured_at <= 10.0,
            reason=Reason[f"QUICKEST_{kind}"],
        )

    def nearest(
        self, options: list[tuple[float, T]], count: int, costs: list[float] | None = None
    ) -> list[tuple[float, T]]:
        if len(options) <= count:
            return options
        costs = costs or [cost for cost, _ in options]
        limit = sorted(costs)[count - 1]
        near = [(cost, option) for cost, option in zip(costs, options) if cost <= limit]
        nearer = [option for cost, option in near if cost < limit]
        equal = [option for cost, option in near if cost == limit]
        if len(near) == count:
            return [option for _, option in near]
        start = int(self.rng.random() * len(equal))
        return nearer + (equal + equal)[start : start + count - len(nearer)]

    def tied(self, options: Sequence[tuple[float, T]]) -> float:
        return min(cost for cost, _ in options) * 1.05 + 0.0005

    def best_of_two(self, options: Sequence[tuple[float, T]]) -> tuple[float, T]:
        tied = [option for option in options if option[0] <= self.tied(options)]
        if len(tied) == 1:
            return tied[0]
        one = tied.pop(int(self.rng.random() * len(tied)))
        other = tied[int(self.rng.random() * len(tied))]
        return min(one, other, key=lambda option: option[0])
