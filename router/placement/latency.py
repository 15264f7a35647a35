"""Our own policy: the workers on which the least seconds are predicted."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter

from crossdock.proto.types import Role
from crossdock.router.placement.busy import MANY
from crossdock.router.placement.candidates import Candidates, Decodes, nobody
from crossdock.router.placement.demand import Demand, Placement, Reason
from crossdock.router.placement.few import FewWorkers
from crossdock.router.placement.many import ManyWorkers
from crossdock.router.placement.pairs import Pairs
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.weighed import Computes, Predicted, Pull
from crossdock.router.placement.workers import WorkerView

TIE_RELATIVE = 0.05
TIE_ABSOLUTE_S = 0.0005
BACK_OFF_S = 1e6  # a pair whose pulls fail comes after all others

# As of Predicted: who may compute the prompt, and these with the best of who may decode.
Paired = tuple[Sequence[Computes], Sequence[float], Sequence[Pull], Sequence[float]]
Way = tuple[float, Computes, WorkerView | None]  # seconds; None: it goes on where it is computed


def predicted_latency(
    view: ClusterView, demand: Demand, now: float, rng: random.Random, turn: int = 0
) -> Placement:
    """The workers with the least predicted seconds, of those that can hold the sequence.

    Seconds = TTFT (the prompts that wait and its own uncached tokens, with their attention to what
    is cached, by the worker's prefill time) + bytes to pull / bandwidth of the pair, which delays
    token 1 + what the decode steps of the expected completion, by the sequences and the context
    tokens of the batch it joins, and the wait for a place there take longer than on the best decode
    worker. So queue depth, prefix hits, links and batches are one number. Near ties of either side
    go to the better of two at random, so that gateways with slightly old views do not herd. Pairs
    whose pulls fail back off while there are others. A decode worker that has more of the sequence
    cached than any prefill worker, as it has of a chat that it answered, may go on by itself.
    Raises NoWorker.
    """
    choice = _Choice(view, demand, now, rng)
    ways = [*choice.local(), choice.disaggregated()] if choice.pairs else []
    ways += [choice.colocated()] if choice.among.any_of(Role.COLOCATED) else []
    if not ways:
        raise nobody(view, demand, choice.among)
    _, (_, ttft_s, *_, worker), decode = min(ways, key=_SECONDS)
    reason, depth = _REASONS[worker.role], choice.among.depth(worker)
    return Placement.on(worker, decode, demand, now, depth, ttft_s, reason, choice.weighed())


def decode_for(
    view: ClusterView, demand: Demand, prefill: str, now: float, rng: random.Random
) -> str:
    """Another decode worker for a sequence whose prompt is computed already. Raises NoWorker."""
    choice = _Choice(view, demand, now, rng)
    if not choice.among.any_of(Role.DECODE):
        raise nobody(view, demand, choice.among, (Role.DECODE,))
    decodes = choice.among.decodes(view.pairs.cut_off([prefill], now))
    after = _Links(view.pairs, decodes, now).after_token_0(prefill)
    return decodes[choice.best_of_two(after)][2].name


class _Choice:
    """One decision, in seconds."""

    def __init__(self, view: ClusterView, demand: Demand, now: float, rng: random.Random) -> None:
        self._pairs, self._now, self._rng = view.pairs, now, rng
        self._answered_by = demand.answered_by
        kind = ManyWorkers if len(view.workers) >= MANY else FewWorkers
        self.among: Candidates = kind(view, demand, now, rng)
        self._paired: Paired = (), (), (), ()
        self._both: list[Computes] = []  # who may do all of it

    @property
    def pairs(self) -> bool:
        return self.among.any_of(Role.PREFILL) and self.among.any_of(Role.DECODE)

    def disaggregated(self) -> Way:
        """Seconds until token 1 and lost after it, and where."""
        prefills = sorted(self.among.prefills(), key=_SECONDS)
        cut_off: Collection[str] = ()
        if self._pairs.any_backs_off:
            names = [worker.name for *_, worker in prefills]
            cut_off = self._pairs.cut_off(names, self._now)
        decodes = self.among.decodes(cut_off)
        links = _Links(self._pairs, decodes, self._now)
        least_s = links.least_s()
        costs: list[float] = []
        afters: list[Sequence[float]] = []
        least_cost_s = limit = float("inf")
        for first_s, *_, worker in prefills:
            if first_s + least_s > limit:
                break  # nor is one of those after it among the best
            after = links.after_token_0(worker.facts.name)
            afters.append(after)
            cost_s = first_s + min(after)
            costs.append(cost_s)
            if cost_s < least_cost_s:
                least_cost_s, limit = cost_s, _tie(cost_s)
        chosen = self.best_of_two(costs)
        prefill, after = prefills[chosen], afters[chosen]
        best = self.best_of_two(after)
        self._paired = prefills, costs, links.pulls, after
        return prefill[0] + after[best], prefill, decodes[best][2]

    def colocated(self) -> Way:
        """The same where one worker does both phases."""
        options = self.among.colocated()
        return self._alone(options, self._gone_on(options))

    def local(self) -> list[Way]:
        """The same for a decode worker that has the most of it and may compute the rest."""
        able = self.among.local()
        return [self._alone(able)] if able else []

    def best_of_two(self, costs: Sequence[float], preferred: int | None = None) -> int:
        """Which is the better of two at random of those within a tie of the least; `preferred`
        where it is one of those."""
        limit = _tie(min(costs))
        if preferred is not None and costs[preferred] <= limit:
            return preferred
        tied = [i for i, cost in enumerate(costs) if cost <= limit]
        if len(tied) == 1:
            return tied[0]
        one = tied.pop(int(self._rng.random() * len(tied)))
        other = tied[int(self._rng.random() * len(tied))]
        return other if costs[other] < costs[one] else one

    def _gone_on(self, options: Sequence[Computes]) -> int | None:
        """Who answered the turn before, where nobody has more blocks: it may have a part of another
        one, of which nobody is told."""
        if not self._answered_by:
            return None
        depths = [self.among.depth(worker) for *_, worker in options]
        for i, (*_, worker) in enumerate(options):
            if worker.name == self._answered_by and depths[i] == max(depths) > 0:
                return i
        return None

    def _alone(self, options: Sequence[Computes], preferred: int | None = None) -> Way:
        self._both += options
        best = options[self.best_of_two([option[0] for option in options], preferred)]
        return best[0], best, None

    def weighed(self) -> Predicted:
        """What it went by, for who asks later."""
        return Predicted(*self._paired, self._both, self.among.levels)


class _Links:
    """From any prefill worker to those who may decode."""

    def __init__(self, pairs: Pairs, decodes: Sequence[Decodes], now: float) -> None:
        self._pairs, self._now = pairs, now
        self.pulls: list[Pull] = [
            (excess_s, nbytes, worker.facts.name) for excess_s, nbytes, worker in decodes
        ]
        self._names = [name for _, _, name in self.pulls]
        self._unmeasured: Sequence[float] = ()

    def least_s(self) -> float:
        """Over the best link that there has been."""
        least = self._pairs.least
        return min([excess_s + nbytes * least for excess_s, nbytes, _ in self.pulls])

    def after_token_0(self, prefill: str) -> Sequence[float]:
        """Seconds that each decode worker costs with the pull."""
        pairs = self._pairs
        measured = pairs.seconds_per_byte(prefill)
        if measured.keys().isdisjoint(self._names):  # as most are where workers are many
            costs = self._unmeasured = self._unmeasured or self._over(measured)
        else:
            costs = self._over(measured)
        if pairs.any_backs_off:
            waits = [pairs.backs_off(prefill, name, self._now) for name in self._names]
            costs = [cost + BACK_OFF_S * wait for cost, wait in zip(costs, waits)]
        return costs

    def _over(self, links: Mapping[str, float]) -> Sequence[float]:
        of, presumed = links.get, self._pairs.presumed
        return [excess_s + nbytes * of(name, presumed) for excess_s, nbytes, name in self.pulls]


_SECONDS = itemgetter(0)
_REASONS = {  # by the role of who computes the prompt
    Role.PREFILL: Reason.QUICKEST_PAIR,
    Role.DECODE: Reason.QUICKEST_LOCAL,
    Role.COLOCATED: Reason.QUICKEST_COLOCATED,
}


def _tie(seconds: float) -> float:
    """What is no more than that is as good as `seconds`."""
    return seconds * (1 + TIE_RELATIVE) + TIE_ABSOLUTE_S
