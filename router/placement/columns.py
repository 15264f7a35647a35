"""What placement asks of the workers of one role, as arrays: one number of all of them each.

The numbers of a worker are copied here when it says how it stands, so that a decision finds them
ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from crossdock.proto.types import Role
from crossdock.router.placement.prefix_index import Level
from crossdock.router.placement.speed import PoolSpeeds
from crossdock.router.placement.workers import Numbers, WorkerView

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Slots = npt.NDArray[np.intp]

FIRST_ROWS = 64  # of the arrays; doubled when they are full
FEW_BITS = 16  # of a bitmask, which are found quicker one after the other
INFINITE = float("inf")


class Columns:
    """The workers of one role. The row of one that leaves is taken over by the last."""

    def __init__(self) -> None:
        self.workers: list[WorkerView] = []  # by row
        self._rows: dict[str, int] = {}  # by name
        # No worker holds less, is stale before or well later than:
        self._holds, self._fresh_until, self._well_from = INFINITE, INFINITE, -INFINITE
        self._make_room(FIRST_ROWS)

    def __len__(self) -> int:
        return len(self.workers)

    def add(self, worker: WorkerView) -> None:
        if len(self.workers) == len(self._slots):
            self._make_room(2 * len(self.workers))
        self.workers.append(worker)
        self._seat(worker, len(self.workers) - 1)

    def remove(self, worker: WorkerView) -> None:
        row, last = self._rows.pop(worker.name), self.workers.pop()
        if last is not worker:
            self.workers[row] = last
            self._seat(last, row)
        self.__dict__.pop("numbers", None)

    def put(self, worker: WorkerView) -> None:
        """Its numbers have changed."""
        row, numbers = self._rows[worker.name], worker.numbers
        for column, number in zip(self._cells, numbers):
            column[row] = number
        self._holds = min(self._holds, numbers.most_tokens)
        self._fresh_until = min(self._fresh_until, numbers.fresh_until)
        self._well_from = max(self._well_from, numbers.well_from)

    def presume(self, speeds: PoolSpeeds) -> None:
        """What is presumed of a pool has changed. Most of its workers have measured what they are
        at, or have nothing to do: what follows of that is written here as WorkerView.numbers has
        it, and the others are put again."""
        if not self.workers:
            return
        numbers, pool = self.numbers, self._pools[: len(self.workers)] == id(speeds)
        (base, slope, attention_s), (step, share, context_s) = lines = speeds.lines
        idle = pool & (numbers.queued_tokens == 0)
        prefills = self.workers[0].role is Role.PREFILL
        numbers.chunk_s[idle] = base if prefills else base + numbers.running_s[idle]
        numbers.token_s[idle], numbers.attention_s[idle] = slope, attention_s
        idle = pool & (numbers.sequences == 0)
        numbers.step_s[idle], numbers.context_s[idle] = step + share, context_s
        available = numbers.available_blocks * numbers.block_size
        drawn = numbers.sequences * speeds.output
        np.copyto(numbers.spare_tokens, available - drawn, where=pool)
        for kind, has in enumerate((numbers.queued_tokens, numbers.sequences)):
            for row in (pool & (has > 0)).nonzero()[0].tolist():
                worker = self.workers[row]
                measured = (worker.prefill_line, worker.decode_line)[kind]
                if measured is None and worker.lines[kind] != lines[kind]:
                    self.put(worker)

    @cached_property
    def numbers(self) -> Numbers[Floats]:
        """As they were put."""
        return Numbers(*self._table[:, : len(self.workers)])

    @property
    def everybody(self) -> Mask:
        return self._everybody[: len(self.workers)]

    def all_usable(self, tokens: int, now: float) -> bool:
        """Whether everybody may get a sequence of `tokens`, and is fresh."""
        if now > self._fresh_until or tokens > self._holds:  # the bounds are of some time ago
            numbers = self.numbers
            self._holds, self._fresh_until = numbers.most_tokens.min(), numbers.fresh_until.min()
            self._well_from = numbers.well_from.max()
        return tokens <= self._holds and self._well_from <= now <= self._fresh_until

    def usable(self, tokens: int, now: float) -> list[Mask]:
        """Who may get a sequence of `tokens`: the fresh ones, and all who can hold it."""
        if self.all_usable(tokens, now):
            return [self.everybody]
        numbers = self.numbers
        alive = numbers.most_tokens >= tokens
        return [alive & (numbers.fresh_until >= now) & (numbers.well_from <= now), alive]

    def rows(self, names: Iterable[str]) -> list[int]:
        """Of the workers of these names that are here."""
        return [self._rows[name] for name in names if name in self._rows]

    @property
    def slots(self) -> Slots:
        """Of the prefix index."""
        return self._slots[: len(self.workers)]

    def _seat(self, worker: WorkerView, row: int) -> None:
        self._rows[worker.name] = row
        self._slots[row], self._pools[row] = worker.slot, id(worker.speeds)
        self.put(worker)
        self.__dict__.pop("numbers", None)

    def _make_room(self, rows: int) -> None:
        self._table: Floats = np.empty((len(Numbers._fields), rows))
        # Quicker for one worker's; of floats, which memoryview's type does not know.
        self._cells: list[Any] = [memoryview(column) for column in self._table]
        self._slots, self._pools = np.empty(rows, np.intp), np.empty(rows, np.intp)
        self._everybody = np.ones(rows, np.bool_)
        for row, worker in enumerate(self.workers):
            self._seat(worker, row)


class Depths:
    """How many leading blocks of a prompt the worker of each slot holds."""

    def __init__(self, levels: Sequence[Level], slots: int) -> None:
        self._depths = [0, *(depth for _, depth in levels)]
        self._of_slot = np.zeros(slots, np.intp)  # which of these
        width = -(-slots // 8)
        for i, (mask, _) in enumerate(levels, 1):
            if mask.bit_count() > FEW_BITS:
                octets = np.frombuffer(mask.to_bytes(width, "little"), np.uint8)
                bits = np.unpackbits(octets, count=slots, bitorder="little").view(np.bool_)
                np.putmask(self._of_slot, bits, i)
                continue
            while mask:
                lowest = mask & -mask
                self._of_slot[lowest.bit_length() - 1] = i
                mask ^= lowest

    def each(self, slots: Slots, of: Callable[[int], float]) -> Floats:
        """`of` what the worker of each of these slots holds."""
        return np.array([of(depth) for depth in self._depths], np.float64)[self._of_slot[slots]]
