"""Whose sequence is begun next. Those of one tenant wait in a queue of its own, so that a flood
waits here and not in the workers, and who asks for little does not wait behind it.

Between tenants: start-time fair queueing (Goyal, Vin and Cheng, 1997). Each tenant has a virtual
time, which its sequences move on by their tokens as they are begun; the one that is furthest behind
is next. One that asks for less than its share falls behind the present, by BURST_CHUNKS of the
workers at the most, and has that much at once when it sends a few together. One that is new is
behind those that are here by OWED_TOKENS and no more, so that a flood goes before nobody. While
one that has fallen so far behind is expected back, those of whom much waits have their prompts
yield on the workers, so that it does not wait for these either. Within a tenant line.py says who is
next; of sequences that are due at once the k-th of a request lets as many later requests go first.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import nlargest
from itertools import accumulate, count
from operator import itemgetter

from crossdock.proto.steps import Yields
from crossdock.router.dispatch.line import Late, Line, Work
from crossdock.router.dispatch.sequence import SequenceState
from crossdock.router.placement.busy import Busy

OWED_TOKENS = 4096  # that a new tenant may have before the others go on
BURST_CHUNKS = 8  # of each worker, that a tenant may have which asked for less than its share
EXPECTED_FOR_S = 10.0  # after its newest, another of a tenant that asked for less than its share
SHED_EVERY_S = 0.02  # it is looked whose deadlines cannot be met any more
KEPT_TENANTS = 1000  # of those with no queue, before all but half that are furthest ahead are not
TURN_TOKENS = 65_536  # begun in one turn of the loop, some 5 ms
BEGIN_TOKENS = 2048  # as which it counts that a sequence is begun, whatever its length
EXPECTED_TOKENS = 256  # of a completion at the most, as far as its cost is weighed


@dataclass(eq=False)
class _Queue:
    start: float  # virtual time of its first sequence
    line: Line


class Turns:
    """Sequences that are to be begun. `room` says whether a worker would take another one soon that
    yields so; `begin` begins one and raises nothing; `shed` hears of one with a deadline that is
    not in time, and of the predicted seconds until its first token, and may end it; `least_part`:
    of what is predicted, that things take at the least; `later` calls after so many seconds. `due`
    and `work_of` are a Line's."""

    def __init__(
        self,
        room: Callable[[Yields], bool],
        begin: Callable[[SequenceState], object],
        due: Callable[[SequenceState], float] = lambda sequence: math.inf,
        work_of: Callable[[SequenceState], Work] = lambda sequence: Work(),
        clock: Callable[[], float] = lambda: 0.0,
        busy: Callable[[], Busy] = Busy,
        shed: Callable[[SequenceState, float], object] = lambda sequence, seconds: None,
        least_part: Callable[[], float] = lambda: 1.0,
        later: Callable[[float, Callable[[], None]], object] = lambda in_s, then: then(),
    ) -> None:
        self.pumps_later = False
        self._later = later
        self._shed, self._least_part, self._shed_at = shed, least_part, -math.inf
        self._room, self._begin, self._clock = room, begin, clock
        self._busy, self._late = busy, Late(busy)
        self._due, self._work_of = due, work_of
        self._queues: dict[str, _Queue] = {}  # by tenant; none is empty
        self._where: dict[SequenceState, _Queue] = {}
        self._present = 0.0  # virtual time at which the last one was begun
        self._finished: dict[str, float] = {}  # where tenants with no queue now had come to
        self._saver, self._saver_until = "", -math.inf  # who asked for less than its share last
        self._of_many: dict[str, set[SequenceState]] = {}  # by tenant, begun, maybe with token 0
        self._ties = count()

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, sequence: SequenceState) -> bool:
        return sequence in self._where

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(self._where)

    def add(self, sequence: SequenceState) -> None:
        """It waits from now on; `pump` begins it."""
        request = sequence.active.request
        queue = self._queues.get(request.tenant)
        if queue is None:
            start, oldest = self._start(request.tenant), self._oldest
            if start <= oldest:
                self._saver, self._saver_until = request.tenant, self._clock() + EXPECTED_FOR_S
            self._finished.pop(request.tenant, None)
            queue = _Queue(start, Line(self._due, self._work_of, self._late))
            self._queues[request.tenant] = queue
        rank = sequence.active.order + sequence.index
        queue.line.add(sequence, rank, next(self._ties))
        self._where[sequence] = queue

    def remove(self, sequence: SequenceState) -> None:
        """It has ended, whether it waited or was begun."""
        self._late.forget(sequence)
        tenant = sequence.active.request.tenant
        if begun := self._of_many.get(tenant):
            begun.discard(sequence)
            if not begun:
                del self._of_many[tenant]
        queue = self._where.pop(sequence, None)
        if queue is not None:
            queue.line.remove(sequence)
            self._trim(tenant, queue)

    def pump(self) -> None:
        """Begins what there is room for, some of it in each turn of the loop, and sheds what has
        come too late for it."""
        if self._where and self._clock() - self._shed_at >= SHED_EVERY_S:
            self._shed_at = self._clock()
            self._shed_late()
        left = TURN_TOKENS
        while self._where and self._room(Yields.NOT):
            if left <= 0:
                return self.pump_later(0.0)
            sequence = self._next()
            if sequence is None:
                return None
            left -= BEGIN_TOKENS + sequence.prompt_tokens
            self._begin(sequence)
        return None

    def pump_later(self, in_s: float) -> None:
        """Does so in a while, unless that is to come anyway."""
        if not self.pumps_later:
            self.pumps_later = True
            self._later(in_s, self._pump_now)

    def _pump_now(self) -> None:
        self.pumps_later = False
        self.pump()

    def busy_s(self, tenant: str) -> float:
        """For which the workers are taken by what one of this tenant comes after."""
        return self._busy_s(self._yields(tenant, self._queues.get(tenant)))

    def seconds_before(self, tenant: str, priority: int, due: float) -> float:
        """For which what goes before another sequence of a tenant keeps the workers: those of its
        own that are more urgent, and the others' until they have had as much as it."""
        now, mine = self._clock(), self._queues.get(tenant)
        busy_s = self.busy_s(tenant)
        ahead = mine.line.before(priority, due, now, busy_s) if mine else []
        reached = mine.start if mine else self._start(tenant)
        reached += sum(_cost(sequence) for sequence, _ in ahead)
        seconds = sum(work.share_s for _, work in ahead)
        for other in self._queues.values():
            if other is mine or other.start >= reached:
                continue
            theirs = other.line.before(sys.maxsize, math.inf, now, busy_s)
            tokens = sum(_cost(sequence) for sequence, _ in theirs)
            part = min(1.0, (reached - other.start) / tokens) if tokens else 0.0
            seconds += part * sum(work.share_s for _, work in theirs)
        return seconds

    def _shed_late(self) -> None:
        now, part, sharing = self._clock(), self._least_part(), self._sharing()
        for tenant, queue in list(self._queues.items()):
            busy_s = self._busy_s(self._yields(tenant, queue))
            for sequence, seconds in queue.line.late_ones(now, busy_s, sharing(queue), part):
                if sequence in self._where:  # not ended with another of its request
                    self._shed(sequence, seconds)

    def _sharing(self) -> Callable[[_Queue], float]:
        """Says of a queue how many times as long it takes to compute what waits there, since others
        take turns: until it is done each other has had as much, or all that it waits for."""
        waits = sorted(each.line.tokens for each in self._queues.values())
        sums = list(accumulate(waits, initial=0))

        def times(queue: _Queue) -> float:
            mine = max(1, queue.line.tokens)
            less = bisect_left(waits, mine)
            return len(waits) - less + sums[less] / mine

        return times

    def _start(self, tenant: str) -> float:
        """Virtual time at which one that has no queue goes on."""
        oldest = self._oldest
        if tenant in self._finished:
            return max(oldest, self._finished[tenant])
        here = [queue.start for queue in self._queues.values()]
        least = min((*here, *self._finished.values()), default=self._present)
        return max(oldest, min(least, self._present) - OWED_TOKENS)

    @property
    def _oldest(self) -> float:
        """Virtual time behind which nobody is."""
        busy = self._busy()
        return self._present - max(OWED_TOKENS, BURST_CHUNKS * busy.workers * busy.chunk_tokens)

    def _next(self) -> SequenceState | None:
        now, sharing = self._clock(), self._sharing()
        for tenant, queue in sorted(self._queues.items(), key=lambda item: item[1].start):
            yields = self._yields(tenant, queue)
            if yields and not self._room(yields):
                continue
            sequence = queue.line.pop(now, self._busy_s(yields), sharing(queue))
            if sequence is not None:
                sequence.yields = max(sequence.yields, yields)
                if yields:
                    self._of_many.setdefault(tenant, set()).add(sequence)
                if sequence.yields is Yields.LATE and not yields and self._any_of_many:
                    sequence.yields = Yields.OF_MANY  # it comes after its own tenant's, not theirs
                return self._taken(tenant, queue, sequence)
        return None

    @property
    def _any_of_many(self) -> bool:
        return any(self._yields(tenant, queue) for tenant, queue in self._queues.items())

    def _yields(self, tenant: str, queue: _Queue | None) -> Yields:
        """Of what is in time: whether it is of many, and another tenant expected that is behind;
        also while others of its own that are begun were, lest it go before them."""
        expected = self._saver not in ("", tenant) and self._clock() < self._saver_until
        if queue is None or not expected or queue.start <= self._position(self._saver):
            return Yields.NOT
        begun = {each for each in self._of_many.pop(tenant, ()) if _is_computed(each)}
        if begun:
            self._of_many[tenant] = begun
            return Yields.OF_MANY
        busy = self._busy()
        much = queue.line.tokens > busy.workers * busy.chunk_tokens
        return Yields.OF_MANY if much else Yields.NOT

    def _position(self, tenant: str) -> float:
        """Virtual time to which it has come."""
        queue = self._queues.get(tenant)
        return queue.start if queue else self._finished.get(tenant, -math.inf)

    def _busy_s(self, yields: Yields) -> float:
        """For which the workers are taken by what does not yield to one that yields so."""
        busy = self._busy()
        return busy.seconds + busy.yielding_s if yields else busy.seconds

    def _taken(self, tenant: str, queue: _Queue, sequence: SequenceState) -> SequenceState:
        del self._where[sequence]
        self._present = max(self._present, queue.start)
        queue.start += _cost(sequence)
        self._trim(tenant, queue)
        return sequence

    def _trim(self, tenant: str, queue: _Queue) -> None:
        """Drops the queue with its last sequence. Where it had come to is remembered until the
        others have too."""
        if not queue.line and self._queues.get(tenant) is queue:
            del self._queues[tenant]
            self._finished[tenant] = queue.start
            if len(self._finished) > KEPT_TENANTS:
                ahead = nlargest(KEPT_TENANTS // 2, self._finished.items(), key=itemgetter(1))
                oldest = self._oldest
                self._finished = {t: at for t, at in ahead if at > oldest}


def _is_computed(sequence: SequenceState) -> bool:
    """Whether a worker has its prompt and no token has come."""
    return bool(sequence.holders) and not sequence.generated


def _cost(sequence: SequenceState) -> int:
    return sequence.prompt_tokens + min(sequence.sampling.max_tokens, EXPECTED_TOKENS)
