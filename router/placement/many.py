"""Candidates among many workers, in a few operations on arrays of all of them."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from crossdock.proto.types import Role
from crossdock.router.placement.candidates import (
    DECODE_CANDIDATES,
    PREFILL_CANDIDATES,
    Computes,
    Decodes,
)
from crossdock.router.placement.columns import Columns, Floats, Mask, depth_by_slot
from crossdock.router.placement.demand import Demand
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.workers import WorkerView


class ManyWorkers:
    """Candidates for one demand at one time."""

    def __init__(self, view: ClusterView, demand: Demand, now: float, rng: random.Random) -> None:
        self._pairs, self._demand, self._rng = view.pairs, demand, rng
        self._levels = view.index.levels(demand.block_hashes)
        by_slot = depth_by_slot(self._levels, view.num_slots) if self._levels else None
        self._sides = {
            role: _Side(view.columns(role), by_slot, demand, tokens, now)
            for role, tokens in demand.held.items()
        }

    def depth(self, worker: WorkerView) -> int:
        return next((depth for mask, depth in self._levels if mask >> worker.slot & 1), 0)

    def any_of(self, role: Role) -> bool:
        return self._sides[role].any

    def prefills(self) -> list[Computes]:
        side = self._sides[Role.PREFILL]
        costs = np.where(side.with_room(side.usable), side.prefill_s(side.tokens), np.inf)
        rows = self._nearest(costs, PREFILL_CANDIDATES)
        seconds = costs[rows].tolist()
        return list(zip(seconds, seconds, side.at(rows)))

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
        base, slope = side.step_lines
        ttfts = side.prefill_s(side.tokens) + (base + slope * side.numbers.sequences)
        streams = np.where(side.with_room(side.usable), side.stream_s, np.inf)
        costs = ttfts + (streams - streams[streams.argmin()])
        rows = self._nearest(costs, PREFILL_CANDIDATES)
        return list(zip(costs[rows].tolist(), ttfts[rows].tolist(), side.at(rows)))

    def local(self) -> list[Computes]:
        most = self._demand.local_tokens
        if not self._levels or not most:
            return []
        prefills, side = self._sides[Role.PREFILL], self._sides[Role.DECODE]
        held = prefills.depth[prefills.usable].max()
        able = side.usable & (side.depth > held)
        if not np.count_nonzero(able):
            return []
        able &= (side.tokens <= most) & side.room
        streams = side.stream_s - side.stream_s[side.usable].min()
        options = []
        fastest_s: dict[float, float] = {}  # by tokens
        for row in able.nonzero()[0].tolist():
            worker, tokens = side.workers[row], float(side.tokens[row])
            if tokens not in fastest_s:
                fastest_s[tokens] = float(prefills.prefill_s(tokens)[prefills.usable].min())
            ttft_s = fastest_s[tokens]
            ttft_s += worker.step_s(worker.sequences) if worker.sequences else 0.0
            options.append((ttft_s + float(streams[row]), ttft_s, worker))
        rows = self._nearest(np.array([option[0] for option in options]), DECODE_CANDIDATES)
        return [options[row] for row in rows.tolist()]

    def _nearest(self, costs: Floats, count: int) -> npt.NDArray[np.intp]:
        """The rows of the least finite cost; of equal ones any."""
        if len(costs) <= count:
            return (costs < np.inf).nonzero()[0]
        limit = np.sort(costs)[count - 1]
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
    ) -> None:
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

    def without(self, mask: Mask, names: Iterable[str]) -> Mask:
        """Of `mask` those that are not called so."""
        found = mask.copy()
        for row in self._columns.rows(names):
            found[row] = False
        return found

    def with_room(self, mask: Mask) -> Mask:
        """Of `mask` those that have the blocks; where nobody has, those with the most room."""
        fitting = mask & self.room
        if np.count_nonzero(fitting):
            return fitting
        blocks = np.where(mask, self.numbers.available_blocks, -np.inf)
        return blocks == blocks[blocks.argmax()]

    @cached_property
    def room(self) -> Mask:
        return self._demand.blocks - self.depth <= self.numbers.available_blocks

    @cached_property
    def tokens(self) -> Floats:
        """Until token 0, all that wait there already included."""
        own = self._demand.num_tokens - self.depth * self._demand.block_size
        return self.numbers.queued_tokens + np.maximum(own, 1)

    @cached_property
    def nbytes(self) -> Floats:
        """To pull."""
        blocks = np.maximum(self._demand.pulled_blocks - self.depth, 0)
        return blocks * self.numbers.block_bytes

    def prefill_s(self, tokens: Floats | float) -> Floats:
        base, slope = self.prefill_lines
        return base * np.ceil(tokens / self.numbers.chunk_tokens) + slope * tokens

    @cached_property
    def prefill_lines(self) -> Floats:
        return self._columns.prefill_lines()

    @cached_property
    def step_lines(self) -> Floats:
        return self._columns.step_lines()

    @cached_property
    def stream_s(self) -> Floats:
        """Of a stream that joins."""
        base, slope = self.step_lines
        return self.numbers.stream_steps * (base + slope * self.numbers.batch)
