"""Candidates among many workers, in a few operations on arrays of all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from itertools import repeat

import numpy as np

from crossdock.proto.types import Role
from crossdock.router.placement.candidates import (
    DECODE_CANDIDATES,
    PREFILL_CANDIDATES,
    Decodes,
)
from crossdock.router.placement.columns import Columns, Depths, Floats, Mask
from crossdock.router.placement.demand import Demand
from crossdock.router.placement.prefix_index import depth_at
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.weighed import Computes
from crossdock.router.placement.workers import REUSED, WorkerView


class ManyWorkers:
    """Candidates for one demand at one time."""

    def __init__(self, view: ClusterView, demand: Demand, now: float, rng: random.Random) -> None:
        self._pairs, self._demand, self._rng = view.pairs, demand, rng
        self.levels = view.index.levels(demand.block_hashes)
        depths = Depths(self.levels, view.num_slots)
        self._sides = {
            role: _Side(view.columns(role), depths, demand, tokens, now, view.token_s)
            for role, tokens in demand.held.items()
            if view.count(role)
        }

    def depth(self, worker: WorkerView) -> int:
        return depth_at(self.levels, worker.slot)

    def any_of(self, role: Role) -> bool:
        return role in self._sides and self._sides[role].any

    def prefills(self) -> list[Computes]:
        side = self._sides[Role.PREFILL]
        queues, ttfts = side.token_0_s()
        costs = side.of_able(side.usable, side.with_evicted(ttfts))
        rows = self._nearest(costs, PREFILL_CANDIDATES)
        found = _at(rows, costs, ttfts, queues)
        return list(zip(*found, repeat(0.0), side.at(rows)))

    def decodes(self, cut_off: Collection[str]) -> list[Decodes]:
        side = self._sides[Role.DECODE]
        usable = side.usable
        if cut_off:
            linked = side.without(usable, cut_off)
            usable = linked if np.count_nonzero(linked) else usable
        streams = _excess(side.of_able(usable, side.stream_s()))
        nbytes = side.nbytes()
        rows = self._nearest(streams + nbytes * self._pairs.presumed, DECODE_CANDIDATES)
        return list(zip(*_at(rows, streams, nbytes), side.at(rows)))

    def colocated(self) -> list[Computes]:
        side = self._sides[Role.COLOCATED]
        queues, ttfts = side.token_0_s()
        streams = _excess(side.of_able(side.usable, side.stream_s()))
        costs = side.with_evicted(ttfts + streams)
        rows = self._nearest(costs, PREFILL_CANDIDATES)
        last = side.rows([self._demand.answered_by])
        rows += [row for row in last if row not in rows and costs[row] < np.inf]
        return list(zip(*_at(rows, costs, ttfts, queues, streams), side.at(rows)))

    def local(self) -> list[Computes]:
        demand, most = self._demand, self._demand.local_tokens
        if not most or not self.levels or demand.uncached(self.levels[0][1]) > most:
            return []
        prefills, side = self._sides[Role.PREFILL], self._sides[Role.DECODE]
        held = prefills.depth[prefills.usable].max()
        ahead = side.depth > held
        if held and demand.answered_by:
            last = side.rows([demand.answered_by])
            ahead[last] |= side.depth[last] == held
        able = side.usable & ahead
        if not np.count_nonzero(able):
            return []
        uncached, stream_s = side.uncached(), side.stream_s()
        tokens = side.numbers.queued_tokens + uncached
        able &= (tokens <= most) & side.room
        streams = stream_s - stream_s[side.usable].min()
        options = []
        for row in able.nonzero()[0].tolist():
            cached = demand.num_tokens - float(uncached[row])
            of_prefill = prefills.prompt_s(cached + float(tokens[row]), float(tokens[row]))
            queue_s = float(side.numbers.running_s[row])
            ttft_s = float(of_prefill[prefills.usable].min()) + queue_s
            excess_s = float(streams[row])
            options.append((ttft_s + excess_s, ttft_s, queue_s, excess_s, side.workers[row]))
        rows = self._nearest(np.array([option[0] for option in options]), DECODE_CANDIDATES)
        return [options[row] for row in rows]

    def _nearest(self, costs: Floats, count: int) -> list[int]:
        """The rows of the least finite cost; of equal ones any."""
        limit = np.inf
        if len(costs) > count:
            parted = costs.copy()
            parted.partition(count - 1)
            limit = parted[count - 1]
        rows: list[int] = (costs < limit).nonzero()[0].tolist()
        if limit == np.inf:
            return rows
        equal, lacking = (costs == limit).nonzero()[0], count - len(rows)
        if len(equal) == lacking:
            return sorted(rows + equal.tolist())
        start = int(self._rng.random() * len(equal))
        rows += equal[start : start + lacking].tolist()
        return rows + equal[: count - len(rows)].tolist()


def _at(rows: list[int], *columns: Floats) -> list[list[float]]:
    """What each of these columns has in these rows."""
    taken = np.array(rows, np.intp)
    return [column[taken].tolist() for column in columns]


def _excess(seconds: Floats) -> Floats:
    """More than the least of them."""
    return seconds - seconds[seconds.argmin()]


class _Side:
    """The workers of one role, and what the demand costs there: one number each, [workers]."""

    def __init__(
        self,
        columns: Columns,
        depths: Depths,
        demand: Demand,
        most_tokens: int,
        now: float,
        token_s: float,
    ) -> None:
        self._columns, self._depths = columns, depths
        self._demand, self._token_s = demand, token_s
        self.workers = columns.workers
        self.numbers = columns.numbers
        self.usable = columns.everybody
        self.any = self._all = not demand.avoid and columns.all_usable(most_tokens, now)
        if self._all:
            return
        choices = columns.usable(most_tokens, now)
        if demand.avoid:
            choices = [m for each in choices for m in (self.without(each, demand.avoid), each)]
        for self.usable in choices:
            self.any = bool(np.count_nonzero(self.usable))
            if self.any:
                break

    def at(self, rows: list[int]) -> list[WorkerView]:
        workers = self.workers
        return [workers[row] for row in rows]

    def rows(self, names: Iterable[str]) -> list[int]:
        return self._columns.rows(names)

    def without(self, mask: Mask, names: Iterable[str]) -> Mask:
        """Of `mask` those that are not called so."""
        found = mask.copy()
        for row in self.rows(names):
            found[row] = False
        return found

    def of_able(self, usable: Mask, costs: Floats) -> Floats:
        """These costs, infinite of who is not of `usable` or has no room."""
        able = self._with_room(usable)
        return costs if able is self.usable and self._all else np.where(able, costs, np.inf)

    def _with_room(self, mask: Mask) -> Mask:
        """Of `mask` those that have the blocks; where nobody has, those with the most room."""
        available = self.numbers.available_blocks
        if available[available.argmin()] >= self._demand.blocks:
            return mask  # the usual case, by one look
        fitting = mask & self.room
        if np.count_nonzero(fitting):
            return fitting
        blocks = np.where(mask, available, -np.inf)
        return blocks == blocks[blocks.argmax()]

    def _each(self, of: Callable[[int], float]) -> Floats:
        """`of` the leading blocks that each holds."""
        return self._depths.each(self._columns.slots, of)

    @cached_property
    def room(self) -> Mask:
        return self._demand.blocks - self.depth <= self.numbers.available_blocks

    @cached_property
    def depth(self) -> Floats:
        """Leading blocks."""
        return self._each(float)

    def uncached(self) -> Floats:
        """Tokens to compute."""
        return self._each(self._demand.uncached)

    def nbytes(self) -> Floats:
        """To pull."""
        return self._each(self._demand.pulled) * self.numbers.block_bytes

    def prompt_s(self, context: float, tokens: Floats | float) -> Floats:
        """To compute the last `tokens` of so many, those before them being cached."""
        numbers, most = self.numbers, self.numbers.chunk_tokens
        if most[most.argmin()] >= context:  # one chunk
            seconds = numbers.chunk_s + tokens * numbers.token_s
            return seconds + tokens * context * numbers.attention_s
        chunks = np.ceil(tokens / numbers.chunk_tokens)
        attended = tokens * (2 * context - tokens + np.minimum(tokens, numbers.chunk_tokens)) / 2
        seconds = chunks * numbers.chunk_s + tokens * numbers.token_s
        return seconds + attended * numbers.attention_s

    def token_0_s(self) -> tuple[Floats, Floats]:
        """Until each begins with the prompt, and until token 0."""
        queues = self.numbers.before_s(self._demand.yields)
        return queues, queues + self.prompt_s(self._demand.num_tokens, self.uncached())

    def stream_s(self) -> Floats:
        """Of a stream that joins; as FewWorkers has it."""
        numbers, demand = self.numbers, self._demand
        step_s = numbers.step_s + demand.mean_context * numbers.context_s
        if step_s[step_s.argmax()] > demand.tpot_s:
            step_s += np.maximum(step_s - demand.tpot_s, 0.0) * numbers.sequences
        stream_s = numbers.wait * demand.output * step_s
        spare = numbers.spare_tokens
        if spare[spare.argmin()] < demand.num_tokens + demand.output:
            kept = demand.num_tokens - self.depth * demand.block_size + demand.output
            stream_s += np.maximum(kept - spare, 0.0) * self._token_s
        return stream_s

    def with_evicted(self, seconds: Floats) -> Floats:
        """These and what it takes to compute again what the prompt's blocks are expected to be in
        the way of."""
        demand, free = self._demand, self.numbers.free_blocks
        if free[free.argmin()] >= demand.blocks:
            return seconds
        evicted = np.maximum(demand.blocks - self.depth - free, 0)
        return seconds + evicted * demand.block_size * (self._token_s * REUSED)
