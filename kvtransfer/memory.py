"""Host memory: pages for KV pools, in huge pages where the kernel gives them, and scratch."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crossdock.kvtransfer.transport import PoolBuffers

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
_POPULATE_LIMIT = 4 << 30  # touching more than this at start would delay it by seconds


def allocate_pages(nbytes: int, num_blocks: int) -> PoolBuffers:
    """See registry.allocate. The pages are touched here, so that the first pull finds them."""
    pool = _map_pages(nbytes)
    counters = _map_pages(num_blocks * 8)
    buffer = np.frombuffer(pool, dtype=np.uint8, count=nbytes)
    generations = np.frombuffer(counters, dtype=np.int64, count=num_blocks)

    def close() -> None:
        for pages in (pool, counters):
            # A view that somebody still has keeps its pages mapped until it goes.
            with contextlib.suppress(BufferError):
                pages.close()

    return buffer, generations, close


def _map_pages(nbytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    if nbytes <= _POPULATE_LIMIT:
        with contextlib.suppress(OSError, ValueError):
            pages.madvise(_POPULATE_WRITE)
    return pages


@dataclass(frozen=True)
class Spans:
    """Stretches of entries that hold all that is wanted, and maybe others between."""

    first: npt.NDArray[np.int64]  # [spans] the first entry of each
    length: npt.NDArray[np.int64]  # [spans]
    offset: npt.NDArray[np.int64]  # [spans] where each lies when they are laid end to end
    places: npt.NDArray[np.int64]  # [ids] where each wanted entry lies then


def spans_of(ids: Sequence[int], gap: int) -> Spans:
    """Few spans over these entries, that hold at most `gap` entries for each of them."""
    wanted = np.asarray(ids, dtype=np.int64)
    low, high = min(ids), max(ids)
    if high - low < gap * len(ids):
        zero = np.zeros(1, dtype=np.int64)
        return Spans(zero + low, zero + high - low + 1, zero, wanted - low)
    ascending = np.sort(wanted)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(ascending) >= gap) + 1))
    first = ascending[starts]
    length = ascending[np.append(starts[1:], len(ascending)) - 1] - first + 1
    offset = np.cumsum(length) - length
    span = np.searchsorted(first, wanted, side="right") - 1
    return Spans(first, length, offset, offset[span] + wanted - first[span])


class Scratch:
    """int64 entries that generations are read into, handed out in ranges, first fit."""

    def __init__(self, entries: int) -> None:
        self.entries: npt.NDArray[np.int64] = np.zeros(entries, dtype=np.int64)
        self._free = [slice(0, entries)]

    def take(self, count: int) -> slice | None:
        """The first free stretch of `count` entries; None: there is none so long."""
        for index, free in enumerate(self._free):
            if free.stop - free.start >= count:
                taken = slice(free.start, free.start + count)
                self._free[index] = slice(taken.stop, free.stop)
                return taken
        return None

    def give_back(self, taken: slice) -> None:
        """Frees a stretch that `take` gave, and joins it with its free neighbours."""
        merged: list[slice] = []
        for free in sorted([*self._free, taken], key=lambda part: (part.start, part.stop)):
            if merged and merged[-1].stop == free.start:
                merged[-1] = slice(merged[-1].start, free.stop)
            elif free.stop > free.start:
                merged.append(free)
        self._free = merged
