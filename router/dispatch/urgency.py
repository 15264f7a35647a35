"""Who is next of a tenant's sequences, where it counts that as many as can be are in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from crossdock.proto.types import Role
from crossdock.router.dispatch.sequence import SequenceState
from crossdock.router.placement.demand import Demand
from crossdock.router.placement.urgency import Due, in_time
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.workers import WorkerView

FRESH_S = 0.25  # how old what is known of a prompt's cached part may be
OLDEST_EVERY = 4  # of so many late ones that are begun one is the first that came


class Urgency:
    """First those that can meet the SLO's TTFT, as many as can be, by their due times. Those that
    cannot any more yield: one on each worker computes what the others leave, the shortest first,
    and now and then the oldest."""

    def __init__(
        self,
        view: ClusterView,
        clock: Callable[[], float],
        ttft_s: float,
        demand_of: Callable[[SequenceState], Demand],
    ) -> None:
        """`ttft_s`: the SLO's."""
        self._view, self._clock, self._ttft_s, self._demand_of = view, clock, ttft_s, demand_of
        self._known: dict[SequenceState, tuple[float, float]] = {}  # until when, seconds
        self._late: set[SequenceState] = set()  # begun, and maybe without token 0
        self._begun_late = 0

    def first(self, waiting: Sequence[SequenceState]) -> SequenceState | None:
        """Of sequences in order of arrival; None: of those that wait nobody should begin now."""
        now = self._clock()
        workers = self._workers(now)
        kept = self._in_time(waiting, workers, now)
        chosen = kept[0] if kept else self._first_late(waiting, now, len(workers))
        if chosen is not None:
            chosen.yields = not kept
            self.forget(chosen)
        return chosen

    def before_others(self, waiting: Sequence[SequenceState]) -> Sequence[SequenceState]:
        """Of sequences in order of arrival, those that do not yield, the first of them first."""
        now = self._clock()
        return self._in_time(waiting, self._workers(now), now)

    def forget(self, sequence: SequenceState) -> None:
        """It waits no more."""
        self._known.pop(sequence, None)

    def _workers(self, now: float) -> list[WorkerView]:
        """That compute prompts."""
        roles = (Role.PREFILL, Role.COLOCATED)
        return [worker for role in roles for worker in self._view.usable(role, now)]

    def _in_time(
        self, waiting: Sequence[SequenceState], workers: list[WorkerView], now: float
    ) -> Sequence[SequenceState]:
        if not workers:
            return waiting
        # Who has tokens already has a client that reads them: it goes on first.
        begun = [each for each in waiting if each.generated]
        order = sorted((each for each in waiting if not each.generated), key=self._due)
        dues = [Due(self._due(each), self._seconds(each, now)) for each in order]
        busy_s = sum(worker.numbers.queue_s for worker in workers) / len(workers)
        return begun + [order[place] for place in in_time(dues, now + busy_s, len(workers))]

    def _first_late(
        self, waiting: Sequence[SequenceState], now: float, workers: int
    ) -> SequenceState | None:
        self._late = {each for each in self._late if each.holders and not each.generated}
        if len(self._late) >= workers:
            return None
        self._begun_late += 1
        chosen = waiting[0]
        if self._begun_late % OLDEST_EVERY:
            chosen = min(waiting, key=lambda each: self._seconds(each, now))
        self._late.add(chosen)
        return chosen

    def _due(self, sequence: SequenceState) -> float:
        request = sequence.active.request
        target = request.received + self._ttft_s
        return target if request.deadline is None else min(target, request.deadline)

    def _seconds(self, sequence: SequenceState, now: float) -> float:
        """Of its prompt, where the most of it is cached."""
        until, seconds = self._known.get(sequence, (now, 0.0))
        if until <= now:
            seconds = self._view.prompt_s(self._demand_of(sequence), now)
            self._known[sequence] = now + FRESH_S, seconds
        return seconds
