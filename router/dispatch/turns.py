"""Whose sequence is begun next. Those of one tenant wait in a queue of its own, so that a flood
waits here and not in the workers, and who asks for little does not wait behind it.

Between tenants: start-time fair queueing (Goyal, Vin and Cheng, 1997). Each tenant has a virtual
time, which its sequences move on by their tokens as they are begun; the one that is furthest behind
is next. One that asks for less than its share may be behind the present by OWED_TOKENS, so that a
few that it sends together go together. Within a tenant: the more urgent priority, then `urgency`,
where there is one, or the order of arrival, in which the k-th sequence of a request lets as many
later requests go first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

from crossdock.router.dispatch.sequence import SequenceState
from crossdock.router.dispatch.urgency import Urgency

OWED_TOKENS = 4096  # that a tenant may have after a pause, before the others go on
KEPT_TENANTS = 1000  # of those with no queue, before those that are not ahead are forgotten
EXPECTED_TOKENS = 256  # of a completion at the most, as far as its cost is weighed

Entry = tuple[int, int, int, SequenceState]  # priority, rank, tie break


@dataclass(eq=False)
class _Queue:
    start: float  # virtual time of its first sequence
    heap: list[Entry] = field(default_factory=list)
    tokens: int = 0  # of prompts that wait here


class Turns:
    """Sequences that are to be begun. `room` says whether a worker would take another one soon,
    `begin` begins one and raises nothing."""

    def __init__(
        self,
        room: Callable[[], bool],
        begin: Callable[[SequenceState], object],
        urgency: Urgency | None = None,
    ) -> None:
        self._room, self._begin, self._urgency = room, begin, urgency
        self._queues: dict[str, _Queue] = {}  # by tenant; none is empty
        self._where: dict[SequenceState, _Queue] = {}
        self._present = 0.0  # virtual time at which the last one was begun
        self._finished: dict[str, float] = {}  # where tenants with no queue now had come to
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
            start = self._present - OWED_TOKENS
            start = max(start, self._finished.pop(request.tenant, start))
            queue = self._queues[request.tenant] = _Queue(start)
        rank = sequence.active.order + sequence.index
        heapq.heappush(queue.heap, (request.priority, rank, next(self._ties), sequence))
        queue.tokens += sequence.prompt_tokens
        self._where[sequence] = queue

    def remove(self, sequence: SequenceState) -> None:
        """It has ended; nothing where it does not wait."""
        queue = self._where.pop(sequence, None)
        if queue is not None:
            queue.tokens -= sequence.prompt_tokens
            self._trim(sequence.active.request.tenant, queue)
            if self._urgency is not None:
                self._urgency.forget(sequence)

    def pump(self) -> None:
        """Begins what there is room for."""
        while self._where and self._room():
            sequence = self._next()
            if sequence is None:
                return
            self._begin(sequence)

    def tokens_of(self, tenant: str) -> int:
        """Of the prompts of a tenant that wait, but for those that let others go first."""
        queue = self._queues.get(tenant)
        if queue is None or self._urgency is None:
            return queue.tokens if queue else 0
        priorities = {entry[0] for entry in queue.heap}
        return sum(
            sequence.prompt_tokens
            for priority in priorities
            for sequence in self._urgency.before_others(self._waiting(queue, priority))
        )

    def _next(self) -> SequenceState | None:
        for tenant, queue in sorted(self._queues.items(), key=lambda item: item[1].start):
            sequence = self._first(queue)
            if sequence is not None:
                return self._taken(tenant, queue, sequence)
        return None

    def _first(self, queue: _Queue) -> SequenceState | None:
        """Of a tenant; None: nobody should begin now."""
        if self._urgency is None:
            return queue.heap[0][3]
        return self._urgency.first(self._waiting(queue, queue.heap[0][0]))

    def _waiting(self, queue: _Queue, priority: int) -> list[SequenceState]:
        """The sequences of a tenant of one priority, in order."""
        entries = sorted(entry for entry in queue.heap if entry[0] == priority)
        return [entry[3] for entry in entries if self._where.get(entry[3]) is queue]

    def _taken(self, tenant: str, queue: _Queue, sequence: SequenceState) -> SequenceState:
        del self._where[sequence]
        queue.tokens -= sequence.prompt_tokens
        self._present = max(self._present, queue.start)
        queue.start += _cost(sequence)
        self._trim(tenant, queue)
        return sequence

    def _trim(self, tenant: str, queue: _Queue) -> None:
        """Drops what was removed from the head, and the queue with its last sequence. Where it had
        come to is remembered until the others have too."""
        while queue.heap and self._where.get(queue.heap[0][3]) is not queue:
            heapq.heappop(queue.heap)
        if not queue.heap and self._queues.get(tenant) is queue:
            del self._queues[tenant]
            self._finished[tenant] = queue.start
            if len(self._finished) > KEPT_TENANTS:
                owed = self._present - OWED_TOKENS
                ahead = {t: at for t, at in self._finished.items() if at > owed}
                self._finished = ahead


def _cost(sequence: SequenceState) -> int:
    return sequence.prompt_tokens + min(sequence.sampling.max_tokens, EXPECTED_TOKENS)
