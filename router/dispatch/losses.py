"""Workers that fail a sequence, or are lost with it: it goes on elsewhere, or its request fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial

from crossdock.proto.errors import CrossdockError, WorkerLost
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch import attempts
from crossdock.router.dispatch.admission import Limits
from crossdock.router.dispatch.handoff import HandOffs
from crossdock.router.dispatch.links import WorkerLink
from crossdock.router.dispatch.metrics import ModelMetrics
from crossdock.router.dispatch.ports import Timers
from crossdock.router.dispatch.restarts import RESTARTED, count_loss, failure_of, restart_delay_s
from crossdock.router.dispatch.sequence import Phase, SequenceState
from crossdock.router.dispatch.waiting import Step
from crossdock.router.placement.view import ClusterView

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Losses:
    """Keeps nothing of its own. `sequences`: a dispatcher's, by id; `guarded` runs a step of one
    and ends its request where that raises, `release` forgets where one is, `route` places it."""

    _view: ClusterView
    _hand_offs: HandOffs
    _limits: Limits
    _metrics: ModelMetrics
    _timers: Timers
    _clock: Callable[[], float]
    _sequences: Mapping[str, SequenceState]
    _: KW_ONLY
    guarded: Callable[[SequenceState, Step], None]
    release: Callable[[SequenceState], None]
    route: Step

    def failed(self, sequence: SequenceState, link: WorkerLink, error: pb.SequenceError) -> None:
        """A worker says that it cannot go on with a sequence. Raises the request's error where
        nobody else is to try."""
        if sequence.phase is Phase.DECODE and link.name != sequence.decode_worker:
            sequence.release(link.name)  # of the prefill side; the decode worker will judge
            return
        failure = failure_of(link.name, error)
        reserved_early = sequence.phase is Phase.PREFILL and link.name == sequence.decode_worker
        if error.code == pb.ERROR_CODE_PULL_FAILED:
            self._view.pull_failed(sequence.prefill_worker, link.name, self._clock())
        if reserved_early and error.code in RESTARTED:
            self._hand_offs.drop(sequence, lost=False)
            return
        sequence.release(link.name)
        if error.code not in RESTARTED:
            raise failure
        if error.code == pb.ERROR_CODE_DEVICE:
            self._view.device_failed(link.name, self._clock())
            count_loss(sequence, failure, self._limits)
        if error.code == pb.ERROR_CODE_PULL_FAILED:
            sequence.avoid.add(sequence.prefill_worker)  # either of the pair may be broken
        self.restart(sequence, link.name, RESTARTED[error.code], failure)

    def restart(
        self, sequence: SequenceState, culprit: str, cause: str, failure: CrossdockError
    ) -> None:
        """Prompt and delivered tokens are prefilled again, elsewhere if there is an elsewhere; a
        token depends on nothing else, so the stream goes on as if nothing had happened."""
        delay_s = restart_delay_s(sequence, cause, failure, self._limits)
        sequence.gave_up(f"{cause} on {culprit}")
        attempts.cancel(sequence, cause)
        self.release(sequence)
        sequence.avoid.add(culprit)
        sequence.phase = Phase.ROUTING
        self._metrics.restarts.inc(1, cause)
        log.info("%s: %s on %s after %d tokens, prefilling again",
                 sequence.sequence_id, cause, culprit, sequence.generated)  # fmt: skip
        sequence.timer = self._timers.call_later(delay_s, self.guarded, sequence, self.route)

    def link_lost(self, link: WorkerLink, reason: str) -> None:
        """The stream broke: nothing that was sent over it will be answered."""
        self._metrics.lost.inc()
        for sequence_id in list(link.sequences):
            sequence = self._sequences.get(sequence_id)
            if sequence is None:
                continue
            sequence.release(link.name)
            if sequence.phase is Phase.DECODE and link.name != sequence.decode_worker:
                continue  # the pull may be over already; the decode worker will say
            self.guarded(sequence, partial(self._lost_under, link.name, reason))
        link.sequences.clear()

    def _lost_under(self, worker: str, reason: str, sequence: SequenceState) -> None:
        """Carries the sequence on elsewhere; raises WorkerLost once it has seen too many die."""
        role = "decode" if worker == sequence.decode_worker else "prefill"
        error = WorkerLost(
            f"{role} worker {worker} was lost ({reason}) after {sequence.generated} tokens; "
            "send the request again"
        )
        count_loss(sequence, error, self._limits)
        if sequence.phase is Phase.PREFILL and worker == sequence.decode_worker:
            self._hand_offs.drop(sequence, lost=True)
            return
        self.restart(sequence, worker, "worker lost", error)
