"""Free block ids, kept as maximal runs of consecutive ids. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_PROBES = 8


class FreeRuns:
    """Gives out ids in as few runs as it can: each run is one descriptor when KV is moved. Runs are
    binned by bit length: a run is taken or given back in a few dictionary operations."""

    def __init__(self, num_ids: int) -> None:
        self._length: dict[int, int] = {}  # first id -> length
        self._start: dict[int, int] = {}  # one past the last id -> first id
        self._bins: list[dict[int, None]] = [{} for _ in range(num_ids.bit_length() + 1)]
        self._count = 0
        if num_ids:
            self._insert(0, num_ids)

    def __len__(self) -> int:
        return self._count

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first id, length) of each run."""
        return iter(self._length.items())

    def take(self, n: int, after: int | None = None) -> list[int]:
        """n ids, at most len(self): the run after id `after` first, then the tightest that fits."""
        taken: list[int] = []
        if after is not None and n and after + 1 in self._length:
            taken.extend(self._cut(after + 1, n))
        while len(taken) < n:
            rest = n - len(taken)
            taken.extend(self._cut(self._find(rest), rest))
        return taken

    def put(self, ids: Iterable[int]) -> None:
        """Gives back ids that are not free now."""
        ordered = sorted(ids)
        first = 0
        for i in range(1, len(ordered) + 1):
            if i == len(ordered) or ordered[i] != ordered[i - 1] + 1:
                self._join(ordered[first], i - first)
                first = i

    def _find(self, n: int) -> int:
        """First id of a run with at least n ids, else of one of the longest."""
        exact = n.bit_length()
        for probe, start in enumerate(self._bins[exact]):
            if self._length[start] >= n:
                return start
            if probe == _PROBES:
                break
        for longer in self._bins[exact + 1 :]:
            if longer:
                return next(iter(longer))
        return next(next(iter(shorter)) for shorter in reversed(self._bins) if shorter)

    def _cut(self, start: int, n: int) -> range:
        length = self._length[start]
        n = min(n, length)
        self._remove(start)
        if n < length:
            self._insert(start + n, length - n)
        return range(start, start + n)

    def _join(self, start: int, length: int) -> None:
        right = start + length
        if right in self._length:
            length += self._remove(right)
        if start in self._start:
            left = self._start[start]
            length += self._remove(left)
            start = left
        self._insert(start, length)

    def _insert(self, start: int, length: int) -> None:
        self._length[start] = length
        self._start[start + length] = start
        self._bins[length.bit_length()][start] = None
        self._count += length

    def _remove(self, start: int) -> int:
        length = self._length.pop(start)
        del self._start[start + length]
        del self._bins[length.bit_length()][start]
        self._count -= length
        return length
