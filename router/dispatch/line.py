"""Who of one tenant is next: as many as can be get their first token in time.

Of the most urgent priority, those that can still meet their target go in the order of their due
times, but where all of them together are too much, the longest of them step aside until the others
can be met (Moore, 1968). Those that are late anyway, or stepped aside, yield: they have what the
others leave of the workers, the shortest first and now and then the oldest.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from crossdock.proto.steps import Yields
from crossdock.router.dispatch.sequence import SequenceState
from crossdock.router.placement.busy import Busy

INFINITE = float("inf")
WINDOW = 256  # sequences that are weighed against each other, those due first
FRESH_S = 0.25  # for so long it stays as it is what was asked of a sequence
OLDEST_EVERY = 4  # of so many late ones that are begun one is the first that came


@dataclass(frozen=True)
class Work:
    """What is between a sequence and its first token, in seconds of the gateway's clock."""

    due: float = INFINITE  # when the token is to be there
    alone_s: float = 0.0  # on an idle worker
    share_s: float = 0.0  # for which it keeps others waiting


Place = tuple[float, int, int]  # due, rank, tie break


@dataclass(eq=False)
class _Entry:
    sequence: SequenceState
    priority: int
    place: Place
    work: Work | None = None
    known_until: float = float("-inf")  # when it is to be asked for again


@dataclass(eq=False)
class Late:
    """Sequences that are late and were begun all the same: a chunk for each worker, or a longer
    prompt. `busy` says how many workers there are, and how long their chunks."""

    busy: Callable[[], Busy]
    _begun: set[SequenceState] = field(default_factory=set)  # and maybe without token 0
    _count: int = 0

    @property
    def room(self) -> bool:
        """Whether another may be."""
        self._begun = {each for each in self._begun if each.holders and not each.generated}
        busy = self.busy()
        tokens = sum(min(each.placement.uncached_tokens, busy.chunk_tokens) for each in self._begun)
        return tokens < busy.workers * busy.chunk_tokens

    def begin(self, sequence: SequenceState) -> None:
        """It is."""
        self._begun.add(sequence)
        self._count += 1

    def forget(self, sequence: SequenceState) -> None:
        """It has ended, or waits again."""
        self._begun.discard(sequence)

    @property
    def oldest_first(self) -> bool:
        """Whether the next is not to be the shortest, for once."""
        return self._count % OLDEST_EVERY == OLDEST_EVERY - 1


@dataclass(eq=False)
class Line:
    """Sequences that wait. `due` and `work_of` say how urgent one is; where nothing is due ever,
    they go by rank. `late` is shared by all tenants."""

    due: Callable[[SequenceState], float]
    work_of: Callable[[SequenceState], Work]
    late: Late
    _entries: dict[SequenceState, _Entry] = field(default_factory=dict)
    _waiting: dict[int, list[tuple[Place, _Entry]]] = field(default_factory=dict)  # by priority
    tokens: int = 0  # of their prompts

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(self._entries)

    def add(self, sequence: SequenceState, rank: int, tie: int) -> None:
        """It waits from now on. Equal ones go by rank."""
        priority = sequence.active.request.priority
        entry = _Entry(sequence, priority, (self.due(sequence), rank, tie))
        self._entries[sequence] = entry
        self.tokens += sequence.prompt_tokens
        insort(self._waiting.setdefault(priority, []), (entry.place, entry), key=_place)

    def remove(self, sequence: SequenceState) -> None:
        """It waits no more."""
        entry = self._entries.pop(sequence)
        self.tokens -= sequence.prompt_tokens
        waiting = self._waiting[entry.priority]
        del waiting[bisect_left(waiting, entry.place, key=_place)]
        if not waiting:
            del self._waiting[entry.priority]

    def pop(self, now: float, busy_s: float = 0.0, sharing: float = 1.0) -> SequenceState | None:
        """Takes the next out, and says whether it yields; None where nobody is to begin now.
        `busy_s`: for which those before them keep the workers; `sharing`: how many times as long
        these take as without other tenants."""
        if not self._waiting:
            return None
        waiting = [entry for _, entry in self._waiting[min(self._waiting)][:WINDOW]]
        chosen = waiting[0] if waiting[0].place[0] == INFINITE else None
        if chosen is None:
            chosen = self._choose(waiting, now, busy_s, sharing)
        if chosen is not None:
            self.remove(chosen.sequence)
            return chosen.sequence
        return None

    def before(
        self, priority: int, due: float, now: float, busy_s: float = 0.0
    ) -> list[tuple[SequenceState, Work]]:
        """Those that go before one so urgent, as far as they are in time; of each priority the
        first WINDOW at the most."""
        found: list[tuple[SequenceState, Work]] = []
        for urgency, waiting in self._waiting.items():
            if urgency > priority:
                continue
            last = (due if urgency == priority else INFINITE, sys.maxsize, 0)
            first = waiting[: min(WINDOW, bisect_right(waiting, last, key=_place))]
            entries = [entry for _, entry in first]
            works = self._works(entries, now)
            found += [(entries[i].sequence, works[i]) for i in in_time(works, now, busy_s)]
        return found

    def late_ones(
        self, now: float, busy_s: float = 0.0, sharing: float = 1.0, part: float = 1.0
    ) -> list[tuple[SequenceState, float]]:
        """Those that miss their deadline even if all takes but a `part` of what is predicted, and
        the predicted seconds until their first token if they let the others go first; of each
        priority of the first WINDOW."""
        found: list[tuple[SequenceState, float]] = []
        lines = [
            [entry for _, entry in waiting[:WINDOW]] for _, waiting in sorted(self._waiting.items())
        ]
        if not any(_has_deadline(entry) for entries in lines for entry in entries):
            return found
        for entries in lines:
            works = self._works(entries, now)
            hoped = [Work(w.due, part * w.alone_s, part * w.share_s) for w in works]
            kept = in_time(hoped, now, part * busy_s, sharing)
            busy_s += sharing * sum(works[i].share_s for i in kept)
            # Who is late for its due time comes after these, and may yet meet its deadline.
            late = [i for i in range(len(works)) if i not in kept]
            asked = [i for i in late if _has_deadline(entries[i])]
            asked.sort(key=lambda i: _deadline(entries[i]))
            hoped = [replace(hoped[i], due=_deadline(entries[i])) for i in asked]
            met = {asked[at] for at in in_time(hoped, now, part * busy_s, sharing)}
            busy_s += sharing * sum(works[i].share_s for i in met)
            found += [
                (entries[i].sequence, busy_s + works[i].alone_s) for i in asked if i not in met
            ]
            # Who is less urgent comes after the late ones too, but for those that are told now.
            busy_s += sharing * sum(works[i].share_s for i in late if i not in asked)
        return found

    def _choose(
        self, waiting: list[_Entry], now: float, busy_s: float, sharing: float
    ) -> _Entry | None:
        begun = next((entry for entry in waiting if entry.sequence.generated), None)
        if begun is not None:
            return begun  # a client already reads it
        works = self._works(waiting, now)
        kept = in_time(works, now, busy_s, sharing)
        late = [i for i in range(len(works)) if i not in kept]
        if late and self.late.room:
            chosen = min(late, key=lambda i: waiting[i].place[1])  # by arrival
            if not self.late.oldest_first:
                chosen = min(late, key=lambda i: works[i].alone_s)
            self.late.begin(waiting[chosen].sequence)
            waiting[chosen].sequence.yields = Yields.LATE
            return waiting[chosen]
        if not kept:
            return None
        waiting[min(kept)].sequence.yields = Yields.NOT
        return waiting[min(kept)]

    def _works(self, entries: list[_Entry], now: float) -> list[Work]:
        works = []
        for entry in entries:
            if entry.work is None or entry.known_until <= now:
                entry.work, entry.known_until = self.work_of(entry.sequence), now + FRESH_S
            works.append(entry.work)
        return works


def in_time(works: list[Work], now: float, busy_s: float = 0.0, sharing: float = 1.0) -> set[int]:
    """Which of them, given by due time, are met if only these are begun, in this order, `busy_s`
    from now: as many as there can be. Each takes `sharing` times its share."""
    kept: list[tuple[float, int]] = []  # the longest on top, of equal ones the last due
    begins = now + busy_s
    for i, work in enumerate(works):
        if now + busy_s + work.alone_s > work.due:
            continue  # not even if it were the next
        share_s = sharing * work.share_s
        heappush(kept, (-share_s, -i))
        begins += share_s
        if begins - share_s + work.alone_s > work.due:
            begins += heappop(kept)[0]
    return {-i for _, i in kept}


def _has_deadline(entry: _Entry) -> bool:
    return entry.sequence.active.request.deadline is not None


def _deadline(entry: _Entry) -> float:
    deadline = entry.sequence.active.request.deadline
    return INFINITE if deadline is None else deadline


def _place(item: tuple[Place, _Entry]) -> Place:
    return item[0]
