"""Who of one tenant is next: as many as can be get their first token in time.

Of the most urgent priority, those that can still meet their target go in the order of their due
times, but where all of them together are too much, the longest of them step aside until the others
can be met (Moore, 1968). Those that are late anyway, or stepped aside, have a part of the turns, in
order, so that nobody waits for ever.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from crossdock.router.dispatch.sequence import SequenceState

WINDOW = 256  # sequences that are weighed against each other, those due first
LATE_PART = 1 / 8  # of the seconds that go to others, for those that are late, where some are


@dataclass(frozen=True)
class Work:
    """What is between a sequence and its first token, in seconds of the gateway's clock."""

    due: float = float("inf")  # when the token is to be there
    alone_s: float = 0.0  # on an idle worker
    share_s: float = 0.0  # for which it keeps others waiting


Place = tuple[float, int, int]  # due, rank, tie break


@dataclass(eq=False)
class _Entry:
    sequence: SequenceState
    priority: int
    place: Place
    work: Work | None = None  # once it was asked for


@dataclass(eq=False)
class Line:
    """Sequences that wait. `due` and `work_of` say how urgent one is; the latter is asked once
    another waits beside it."""

    due: Callable[[SequenceState], float]
    work_of: Callable[[SequenceState], Work]
    _entries: dict[SequenceState, _Entry] = field(default_factory=dict)
    _waiting: dict[int, list[tuple[Place, _Entry]]] = field(default_factory=dict)  # by priority
    _owed_s: float = 0.0  # to those that are late

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(self._entries)

    def add(self, sequence: SequenceState, rank: int, tie: int) -> None:
        """It waits from now on. Equal ones go by rank."""
        priority = sequence.active.request.priority
        entry = _Entry(sequence, priority, (self.due(sequence), rank, tie))
        self._entries[sequence] = entry
        insort(self._waiting.setdefault(priority, []), (entry.place, entry), key=_place)

    def remove(self, sequence: SequenceState) -> None:
        """It waits no more."""
        entry = self._entries.pop(sequence)
        waiting = self._waiting[entry.priority]
        del waiting[bisect_left(waiting, entry.place, key=_place)]
        if not waiting:
            del self._waiting[entry.priority]

    def pop(self, now: float) -> SequenceState:
        """Takes the next out. Raises ValueError where nobody waits."""
        waiting = [entry for _, entry in self._waiting[min(self._waiting)][:WINDOW]]
        chosen = waiting[0] if len(waiting) == 1 else self._choose(waiting, now)
        self.remove(chosen.sequence)
        return chosen.sequence

    def _choose(self, waiting: list[_Entry], now: float) -> _Entry:
        works = [self._work(entry) for entry in waiting]
        kept = in_time(works, now)
        if not kept:
            return waiting[0]
        late = next((i for i in range(len(works)) if i not in kept), None)
        if late is not None:
            if self._owed_s >= works[late].share_s:
                self._owed_s -= works[late].share_s
                return waiting[late]
            self._owed_s += LATE_PART * works[min(kept)].share_s
        return waiting[min(kept)]

    def _work(self, entry: _Entry) -> Work:
        if entry.work is None:
            entry.work = self.work_of(entry.sequence)
        return entry.work


def in_time(works: list[Work], now: float) -> set[int]:
    """Which of them, given by due time, are met if only these are begun, in this order: as many as
    there can be."""
    kept: list[tuple[float, int]] = []  # the longest on top
    begins = now
    for i, work in enumerate(works):
        if now + work.alone_s > work.due:
            continue  # not even if it were the next
        heappush(kept, (-work.share_s, i))
        begins += work.share_s
        if begins - work.share_s + work.alone_s > work.due:
            begins += heappop(kept)[0]
    return {i for _, i in kept}


def _place(item: tuple[Place, _Entry]) -> Place:
    return item[0]
