"""Candidates among many workers, in a few operations on arrays of all of them."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from functools import cached_property
from itertools import repeat

import numpy as np
import numpy.typing as npt

from crossdock.proto.types import Role
from crossdock.router.placement.candidates import (
    DECODE_CANDIDATES,
    PREFILL_CANDIDATES,
    Decodes,
)
from crossdock.router.placement.columns import Columns, Floats, Mask, depth_by_slot
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
        by_slot = depth_by_slot(self.levels, view.num_slots) if self.levels else None
        self._sides = {
            role: _Side(view.columns(role), by_slot, demand, tokens, now, view.token_s)
            for role, tokens in demand.held.items()
        }

    def depth(self, worker: WorkerView) -> int:
        return depth_at(self.levels, worker.slot)

    def any_of(self, role: Role) -> bool:
        return self._sides[role].any

    def prefills(self) -> list[Computes]:
        side = self._sides[Role.PREFILL]
        costs = np.where(side.with_room(side.usable), side.ttft_s + side.evicted_s, np.inf)
        rows = self._nearest(costs, PREFILL_CANDIDATES)
        ttfts = side.ttft_s[rows].tolist()
        return list(zip(costs[rows].tolist(), ttfts, repeat(0.0), side.at(rows)))

    def decodes(self, cut_off: Collection[str]) -> list[Decodes]:
        side = self._sides[Role.DECODE]
        usable = side.usable
        if cut_off:
            linked = side.without(usable, cut_off)
            usable = linked if np.count_nonzero(linked) else usable
        streams = np.where(side.with_room(usable), side.stream_s, np.inf)
        streams -= streams[streams.argmin()]
        nbytes = side.nbytes
        rows = self._nearest(streams + nbytes * self._pairs.presumed, DECODE_CANDIDATES)
        return list(zip(streams[rows].tolist(), nbytes[rows].tolist(), side.at(rows)))

    def colocated(self) -> list[Computes]:
        side = self._sides[Role.COLOCATED]
        ttfts = side.ttft_s
        streams = np.where(side.with_room(side.usable), side.stream_s, np.inf)
        streams -= streams[streams.argmin()]
        costs = ttfts + streams + side.evicted_s
        rows = self._nearest(costs, PREFILL_CANDIDATES)
        found = (each[rows].tolist() for each in (costs, ttfts, streams))
        return list(zip(*found, side.at(rows)))

    def local(self) -> list[Computes]:
        demand, most = self._demand, self._demand.local_tokens
        if not most or not any(demand.uncached(depth) <= most for _, depth in self.levels):
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
        tokens = side.numbers.queued_tokens + side.uncached
        able &= (tokens <= most) & side.room
        streams = side.stream_s - side.stream_s[side.usable].min()
        options = []
        for row in able.nonzero()[0].tolist():
            cached = demand.num_tokens - float(side.uncached[row])
            ttft_s = float(prefills.prompt_s(cached, float(tokens[row]))[prefills.usable].min())
            ttft_s += float(side.numbers.running_s[row])
            excess_s = float(streams[row])
            options.append((ttft_s + excess_s, ttft_s, excess_s, side.workers[row]))
        rows = self._nearest(np.array([option[0] for option in options]), DECODE_CANDIDATES)
        return [options[row] for row in rows.tolist()]

    def _nearest(self, costs: Floats, count: int) -> npt.NDArray[np.intp]:
        """The rows of the least finite cost; of equal ones any."""
        if len(costs) <= count:
            return (costs < np.inf).nonzero()[0]
        limit = np.partition(costs, count - 1)[count - 1]
        if limit == np.inf:
            return (costs < np.inf).nonzero()[0]
        rows = (costs <= limit).nonzero()[0]
        if len(rows) == count:
            return rows
        near = costs[rows]
        nearer, equal = rows[near < limit], rows[near == limit]
        start = int(self._rng.random() * len(equal))
        return np.concatenate((nearer, equal[start:], equal[:start]))[:count]


class _Side:
    """The workers of one role, and what the demand costs there: one number each, [workers]."""

    def __init__(
        self,
        columns: Columns,
        by_slot: Floats | None,
        demand: Demand,
        most_tokens: int,
        now: float,
        token_s: float,
    ) -> None:
        self._token_s = token_s
        self._columns, self._demand = columns, demand
        self.any = False
        if not columns.workers:
            return
        self.workers = columns.workers
        self.numbers = columns.numbers
        self.depth = columns.of_slots(by_slot)
        choices = columns.usable(most_tokens, now)
        if demand.avoid:
            choices = [m for each in choices for m in (self.without(each, demand.avoid), each)]
        for self.usable in choices:
            self.any = bool(np.count_nonzero(self.usable))
            if self.any:
                break

    def at(self, rows: npt.NDArray[np.intp]) -> list[WorkerView]:
        return [self.workers[row] for row in rows.tolist()]

    def rows(self, names: Iterable[str]) -> list[int]:
        return self._columns.rows(names)

    def without(self, mask: Mask, names: Iterable[str]) -> Mask:
        """Of `mask` those that are not called so."""
        found = mask.copy()
        for row in self.rows(names):
            found[row] = False
        return found

    def with_room(self, mask: Mask) -> Mask:
        """Of `mask` those that have the blocks; where nobody has, those with the most room."""
        available = self.numbers.available_blocks
        if available[available.argmin()] >= self._demand.blocks:
            return mask  # the usual case, by one look
        fitting = mask & self.room
        if np.count_nonzero(fitting):
            return fitting
        blocks = np.where(mask, available, -np.inf)
        return blocks == blocks[blocks.argmax()]

    @cached_property
    def room(self) -> Mask:
        return self._demand.blocks - self.depth <= self.numbers.available_blocks

    @cached_property
    def uncached(self) -> Floats:
        """Tokens to compute."""
        return np.maximum(self._demand.num_tokens - self.depth * self._demand.block_size, 1)

    @cached_property
    def nbytes(self) -> Floats:
        """To pull."""
        blocks = np.maximum(self._demand.pulled_blocks - self.depth, 0)
        return blocks * self.numbers.block_bytes

    def prompt_s(self, cached: Floats | float, tokens: Floats | float) -> Floats:
        """To compute a prompt of which so many tokens are cached and so many not."""
        numbers = self.numbers
        chunks = np.ceil(tokens / numbers.chunk_tokens)
        attended = tokens * (2 * cached + tokens + np.minimum(tokens, numbers.chunk_tokens)) / 2
        seconds = chunks * numbers.chunk_s + tokens * numbers.token_s
        return seconds + attended * numbers.attention_s

    @cached_property
    def ttft_s(self) -> Floats:
        """Until token 0."""
        cached = self._demand.num_tokens - self.uncached
        queue_s = self.numbers.before_s(self._demand.yields)
        return queue_s + self.prompt_s(cached, self.uncached)

    @cached_property
    def stream_s(self) -> Floats:
        """Of a stream that joins; as FewWorkers has it."""
        numbers, demand = self.numbers, self._demand
        step_s = numbers.step_s + demand.mean_context * numbers.context_s
        missed_s = np.maximum(step_s - demand.tpot_s, 0.0) * numbers.sequences
        kept = demand.num_tokens - self.depth * demand.block_size + demand.output
        lacking = np.maximum(kept - numbers.spare_tokens, 0.0)
        return numbers.wait * demand.output * (step_s + missed_s) + lacking * self._token_s

    @cached_property
    def evicted_s(self) -> Floats:
        """To compute again what the prompt's blocks are expected to be in the way of."""
        evicted = np.maximum(self._demand.blocks - self.depth - self.numbers.free_blocks, 0)
        return evicted * self._demand.block_size * (self._token_s * REUSED)
