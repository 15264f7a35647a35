"""Deadlines: who is predicted to miss one is told so early, and when to come again."""

from __future__ import annotations

import math

from crossdock.proto.errors import DeadlineExceeded, Overloaded
from crossdock.router.dispatch.admission import LONGEST_RETRY_S
from crossdock.router.dispatch.line import FRESH_S
from crossdock.router.dispatch.request import Request
from crossdock.router.dispatch.sequence import ActiveRequest, SequenceState
from crossdock.router.placement.demand import Placement
from crossdock.router.placement.view import ClusterView

FIRST_PART = 0.7  # before anything was learned
LEAST_PART, MOST_PART = 0.3, 0.95
NEAR = 0.5  # of the time until its deadline, from which on a prediction is learned from
QUANTILE = 0.10  # of first tokens come in a smaller part of the time that was predicted
STEP = 0.02  # by which one that does moves it, relative
GUESSED_FOR_S = 2 * FRESH_S  # after nothing was known, what waits may still be weighed by guesses


class Deadlines:
    """Compares deadlines with predicted times of first tokens.

    A prediction is wrong either way, and who is refused wrongly loses more than who is let in
    vainly. So refused is who would be late even if everything took but `part` of what is predicted:
    a low quantile of what first tokens took over what was predicted, learned from each that comes
    (stochastic approximation; Robbins and Monro, 1951)."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view
        self.part = FIRST_PART
        self._guessed_at = -math.inf  # when something that waited was not known

    def check(self, request: Request, predicted_s: float, now: float) -> None:
        """Refuses what is predicted to have its first token in so many seconds, and has a deadline
        before a `part` of that. Raises Overloaded."""
        if request.deadline is None or now + self.part * predicted_s <= request.deadline:
            return
        allowed_s = request.deadline - now
        raise Overloaded(
            f"the first token is predicted in {predicted_s:.2f} s, "
            f"after the deadline in {allowed_s:.1f} s",
            min(LONGEST_RETRY_S, max(1.0, predicted_s - allowed_s)),
        )

    def check_placed(self, sequence: SequenceState, placement: Placement, now: float) -> None:
        """The same of one that is to be placed so. A prediction that rests on no measurement
        refuses nothing, and what has begun is carried on."""
        if placement.measured and not sequence.active.started:
            self.check(sequence.active.request, placement.predicted_ttft_s, now)

    def check_waiting(self, sequence: SequenceState, predicted_s: float, now: float) -> None:
        """The same of one that waits."""
        if sequence.active.started:
            return
        if not self._view.knows_prefill(sequence.prompt_tokens, now):
            self._guessed_at = now
        if now - self._guessed_at > GUESSED_FOR_S:
            self.check(sequence.active.request, predicted_s, now)
            if sequence.predicted is None:
                sequence.predicted = now, predicted_s

    def learn(self, sequence: SequenceState, now: float) -> None:
        """Its first token has come. What was predicted to be far within the deadline says little
        of what is not."""
        deadline = sequence.active.request.deadline
        if sequence.predicted is None or deadline is None:
            return
        at, predicted_s = sequence.predicted
        if predicted_s < NEAR * (deadline - at):
            return
        quicker = now - at < self.part * predicted_s
        self.part *= math.exp(STEP * (QUANTILE - quicker))
        self.part = min(MOST_PART, max(LEAST_PART, self.part))


def passed(active: ActiveRequest) -> DeadlineExceeded:
    """What a request ends with whose deadline has passed."""
    request = active.request
    assert request.deadline is not None
    allowed = request.deadline - request.received
    generated = sum(sequence.generated for sequence in active.sequences)
    return DeadlineExceeded(f"the deadline of {allowed:.2f} s passed at {generated} tokens")
