"""Owns each request from received to finished.

    admit → route (prefill and decode worker together) → prefill → token 0 delivered → hand-off
    → decode, a frame for each step's tokens → finished

Everything here runs in turns of one event loop: frames and timers come in, frames and deltas go
out, and no task is made per request or per token.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import time
from collections.abc import Callable
from functools import partial

from crossdock.model.detokenizer import IncrementalDetokenizer
from crossdock.proto.errors import (
    Cancelled,
    CrossdockError,
    DeadlineExceeded,
    Draining,
    NotFound,
    Overloaded,
    WorkerLost,
)
from crossdock.proto.hashing import BlockHasher
from crossdock.router.dispatch import attempts, tracing
from crossdock.router.dispatch.admission import Admission, Limits, retry_after_s
from crossdock.router.dispatch.deadlines import Deadlines, passed
from crossdock.router.dispatch.ended import tell
from crossdock.router.dispatch.handoff import HandOffs
from crossdock.router.dispatch.line import Work
from crossdock.router.dispatch.links import Links
from crossdock.router.dispatch.losses import Losses
from crossdock.router.dispatch.metrics import ModelMetrics
from crossdock.router.dispatch.outputs import Outputs
from crossdock.router.dispatch.ports import Timers
from crossdock.router.dispatch.recent import Recent
from crossdock.router.dispatch.request import Request, ResponseStream
from crossdock.router.dispatch.sequence import ActiveRequest, Phase, SequenceState, make_sequences
from crossdock.router.dispatch.turns import Turns
from crossdock.router.dispatch.waiting import Step, Waiting
from crossdock.router.placement.demand import Demand, NoWorker
from crossdock.router.placement.policy import Policy
from crossdock.router.placement.room import has_place, has_room, takes_more
from crossdock.router.placement.view import ClusterView
from crossdock.router.placement.workers import WorkerView

log = logging.getLogger(__name__)

APART_S = 0.012  # within which gateways send to a worker that has room again


class Dispatcher:
    """The gateway's requests under way."""

    def __init__(
        self,
        *,
        view: ClusterView,
        links: Links,
        timers: Timers,
        policy: Policy,
        limits: Limits,
        admission: Admission | None = None,
        metrics: ModelMetrics,
        hasher: BlockHasher,
        eos_token_ids: frozenset[int],
        detokenizer_of: Callable[[list[int], tuple[str, ...]], IncrementalDetokenizer],
        prefix: str,
        ttft_aim_s: float = math.inf,
        tpot_aim_s: float = math.inf,
        recent: Recent | None = None,
        on_ready: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.view = view
        self.metrics = metrics
        self.draining = False
        self.retired = ""  # why it takes nothing new
        self._links = links
        self._timers = timers
        self._policy = policy
        self._limits = limits
        self._admission = admission or Admission(limits)  # of all dispatchers of a gateway
        self.deadlines = Deadlines(view)
        self.recent = recent or Recent()  # likewise
        self.hasher = hasher
        self._eos = sorted(eos_token_ids)
        self._detokenizer_of = detokenizer_of
        self._ttft_aim_s, self._tpot_aim_s = ttft_aim_s, tpot_aim_s
        self._prefix = prefix  # makes sequence ids unique in the cluster
        self._on_ready = on_ready
        self._clock = clock
        self._rng = rng or random.Random()
        self._hand_offs = HandOffs(view, links, hasher, self._eos, self._rng)
        self._retry_after_s = partial(retry_after_s, view)
        self._turn = 0
        self._count = self._arrivals = 0
        self._sequences: dict[str, SequenceState] = {}  # by sequence id
        self._numbered: dict[int, SequenceState] = {}  # the same, by their attempts' numbers
        self._turns = Turns(
            lambda yields: has_room(view, clock(), yields),
            lambda sequence: self._guarded(sequence, self._route),
            lambda sequence: self._due(sequence.active.request),
            self._work,
            clock,
            lambda: view.busy(clock()),
            self._shed,
            lambda: self.deadlines.part,
            timers.call_later,
        )
        self._waiting = Waiting(
            timers, limits.worker_wait_s, lambda each, why: self._end(each.active, why, "no worker")
        )
        self._requests: dict[ActiveRequest, None] = {}
        self._losses = Losses(
            view,
            self._hand_offs,
            limits,
            metrics,
            timers,
            clock,
            self._sequences,
            guarded=self._guarded,
            release=self._release_holders,
            route=self._route,
        )
        self.on_lost = self._losses.link_lost
        self.on_outputs = Outputs(
            view,
            self._hand_offs,
            self._losses,
            metrics,
            clock,
            self._eos,
            self._sequences,
            self._numbered,
            end=self._end,
            hand_off=self._hand_off,
            release=self._release_holders,
            begin=lambda sequence: self._guarded(sequence, self._take_turn),
            learn=lambda sequence, now: self.deadlines.learn(sequence, now),
        ).on_outputs

    @property
    def active_sequences(self) -> int:
        return self._admission.active

    @property
    def active_requests(self) -> int:
        return len(self._requests)

    @property
    def waiting_sequences(self) -> int:
        return len(self._waiting)

    @property
    def queued_sequences(self) -> int:
        return len(self._turns)

    @property
    def ready(self) -> bool:
        return not self.draining and self.view.ready

    def root_hash(self, cache_salt: bytes) -> bytes:
        """What chains of hashes begin with, as workers' KV is laid out now."""
        return self.hasher.root(self.view.layout_hash, cache_salt)

    # -- the server's side --------------------------------------------------------------------

    def submit(self, request: Request) -> ResponseStream:
        """Takes a request on; its stream must be read to its end, or closed. Raises Overloaded,
        InvalidRequest, Draining or DeadlineExceeded, and then nothing was started."""
        now = self._clock()
        try:
            self._admit(request, now)
        except CrossdockError as error:
            self.metrics.outcome(error)
            raise
        span, traceparent = tracing.start(request)
        self._arrivals += 1
        active = ActiveRequest(request, span, traceparent, order=self._arrivals)
        active.stream = ResponseStream(
            lambda: self._end(active, Cancelled("the client went away"), "client gone")
        )
        self._requests[active] = None
        self.recent.began(active)
        self.metrics.traffic.arrived += request.num_sequences
        try:
            self._begin(active, now)
        except Exception as error:
            told = error if isinstance(error, CrossdockError) else CrossdockError(repr(error))
            self._end(active, told, "refused")
            raise
        if active.error is not None:
            raise active.error
        return active.stream

    def _begin(self, active: ActiveRequest, now: float) -> None:
        request = active.request
        if request.deadline is not None:
            active.deadline_timer = self._timers.call_later(
                request.deadline - now, self._deadline_passed, active
            )
        active.unfinished = request.num_sequences
        layout_hash = self.view.layout_hash
        active.sequences = make_sequences(active, self.hasher, layout_hash, self._detokenizer_of)
        for sequence in active.sequences:
            sequence.timeline.mark("admitted", now)
        first, before_s = active.sequences[0], 0.0
        if request.deadline is not None and self._turns:
            due = self._due(request)
            before_s = self._turns.seconds_before(request.tenant, request.priority, due)
        busy_s = self._turns.busy_s(request.tenant) if request.deadline is not None else 0.0
        for sequence in active.sequences:
            if sequence.phase is Phase.ROUTING:
                self._turns.add(sequence)
        self._turns.pump()
        if request.deadline is not None and first in self._turns:
            self._check_waiting(first, before_s + busy_s + self._work(first).alone_s)

    def _take_turn(self, sequence: SequenceState) -> None:
        """It is begun when its tenant's turn comes."""
        sequence.phase = Phase.ROUTING
        self._turns.add(sequence)
        self._turns.pump_later(0.0)  # of many at once, only some in this turn

    def _admit(self, request: Request, now: float) -> None:
        if self.retired:
            raise NotFound(self.retired)
        if self.draining:
            raise Draining("this gateway is shutting down; send the request again")
        if request.deadline is not None and request.deadline <= now:
            raise DeadlineExceeded("the deadline passed before any work started")
        self._admission.admit(request.tenant, request.num_sequences, self._retry_after_s)

    def why_full(self, tenant: str, tokens: int, latest: float) -> str:
        """Why a prompt of so many tokens would have to wait here, be it for a place or until after
        `latest`, on this clock, for its first token; empty where it would not."""
        now = self._clock()
        demand = Demand(tokens, (), self.hasher.block_size)
        try:
            placement = self._policy(self.view, demand, now, self._rng, self._turn)
        except NoWorker as error:
            return str(error)
        if not has_place(self.view, demand, now):
            return "every worker that decodes has all that it takes"
        due = min(latest, now + self._ttft_aim_s)
        waits_s = placement.predicted_ttft_s + self._turns.seconds_before(tenant, 0, due)
        late = placement.measured and now + waits_s > latest
        return f"the first token is predicted in {waits_s:.2f} s" if late else ""

    def retire(self, why: str) -> None:
        """Refuses what comes, by NotFound, and ends what no worker has begun; the rest goes on."""
        self.retired = why
        for active in [active for active in self._requests if not active.started]:
            self._end(active, NotFound(why), "retired")

    def close(self) -> None:
        """Ends everything that is under way, and takes nothing new."""
        self.draining = True
        for active in list(self._requests):
            self._end(active, Draining("the gateway stopped; send the request again"), "stopped")

    # -- routing ------------------------------------------------------------------------------

    def _route(self, sequence: SequenceState) -> None:
        """Chooses both workers and sends the prompt on its way, or waits for workers to appear."""
        sequence.stop_timer()
        sequence.phase = Phase.ROUTING
        sequence.extend_hashes(self.hasher, self.view.layout_hash)
        demand, now = self._demand(sequence), self._clock()
        started = time.perf_counter()
        self._turn += 1
        try:
            placement = self._policy(self.view, demand, now, self._rng, self._turn)
        except NoWorker as error:
            self._waiting.add(sequence, self._take_turn, error)
            return
        finally:
            self.metrics.decision.observe(time.perf_counter() - started)
        sequence.decided(placement, now)
        self.deadlines.check_placed(sequence, placement, now)
        link = self._links.get(placement.prefill or placement.decode)
        if link is None:
            why = NoWorker("the chosen worker is not connected")
            sequence.gave_up(str(why))
            self._waiting.add(sequence, self._take_turn, why)
            return
        self._waiting.remove(sequence)
        self._count += 1
        sequence.placed(f"{self._prefix}-{self._count}", self._count, placement)
        self._sequences[sequence.sequence_id] = self._numbered[sequence.number] = sequence
        sequence.hold(link)
        sequence.timeline.mark("routed", self._clock())
        log.debug("%s: %s", sequence.sequence_id, placement)
        attempts.send(sequence, link, self.view, demand, self._eos, now)

    def _due(self, request: Request) -> float:
        """When its first token is to be there."""
        aim = request.received + self._ttft_aim_s
        return aim if request.deadline is None else min(aim, request.deadline)

    def _work(self, sequence: SequenceState) -> Work:
        alone_s, workers = self.view.alone_s(self._demand(sequence))
        return Work(self._due(sequence.active.request), alone_s, alone_s / max(1, workers))

    def _demand(self, sequence: SequenceState) -> Demand:
        output = self.view.lengths.expected(
            sequence.active.request.tenant,
            sequence.prompt_tokens,
            sequence.sampling.max_tokens,
            sequence.generated,
        )
        local = self._limits.local_prompt_tokens
        return sequence.demand(self.hasher.block_size, local, output, self._tpot_aim_s)

    def on_change(self) -> None:
        """A worker came or went: whoever waited for one is tried again."""
        self._on_ready()
        self._waiting.try_all(self._guarded)
        self._turns.pump()

    def on_load(self, worker: WorkerView) -> None:
        """A worker said how it stands: it may take another sequence."""
        if self._turns and not self._turns.pumps_later and takes_more(worker, self._clock()):
            if self._clock() < self.view.shared_until:
                # All gateways hear of it at once: the first to send is seen by the others.
                self._turns.pump_later(self._rng.random() * APART_S)
            else:
                self._turns.pump()

    def _guarded(self, sequence: SequenceState, step: Step) -> None:
        try:
            step(sequence)
        except CrossdockError as error:
            self._end(sequence.active, error, "refused")

    def _shed(self, sequence: SequenceState, seconds: float) -> None:
        self._guarded(sequence, lambda each: self._check_waiting(each, seconds))

    def _check_waiting(self, sequence: SequenceState, predicted_s: float) -> None:
        now = self._clock()
        try:
            self.deadlines.check_waiting(sequence, predicted_s, now)
        except Overloaded:
            with contextlib.suppress(NoWorker):  # what it would have been, for who asks why
                demand = self._demand(sequence)
                placement = self._policy(self.view, demand, now, self._rng, self._turn)
                sequence.decided(placement, now)
            raise

    def _hand_off(self, sequence: SequenceState) -> None:
        """Token 0 is delivered: a decode worker goes on from here, as soon as there is one."""
        try:
            self._hand_offs.complete(sequence, self._clock())
            self._waiting.remove(sequence)
        except NoWorker as error:
            self._waiting.add(sequence, self._hand_off, error)
        except WorkerLost as error:
            self._losses.restart(sequence, min(sequence.lost_early), "worker lost", error)

    # -- ends ----------------------------------------------------------------------------------

    def _deadline_passed(self, active: ActiveRequest) -> None:
        self._end(active, passed(active), "deadline")

    def _end(self, active: ActiveRequest, error: CrossdockError | None, why: str) -> None:
        """The one way out of a request: frees what is left of it here and on the workers."""
        if active.ended:
            return
        active.ended, active.error = True, error
        now = self._clock()
        if active.deadline_timer is not None:
            active.deadline_timer.cancel()
        for sequence in active.sequences:
            if sequence.phase is not Phase.DONE:
                attempts.cancel(sequence, why)
                self._release_holders(sequence)
                sequence.phase = Phase.DONE
                sequence.timeline.mark("finished", now)
                tracing.sequence_ended(sequence)
        self._requests.pop(active)
        self.recent.ended(active, error, now)
        self._admission.release(active.request.tenant, active.request.num_sequences)
        self.metrics.outcome(error)
        if isinstance(error, (Overloaded, DeadlineExceeded)):
            late = sum(not sequence.generated for sequence in active.sequences)
            self.metrics.traffic.refused += late
        if error is None:
            self.metrics.e2e.observe(now - active.request.received)
        tracing.end(active, error, now)
        tell(active, self.view, error, now)
        active.sequences = []  # each of which holds the request
        active.stream.end(error)

    def _release_holders(self, sequence: SequenceState) -> None:
        """Forgets where a sequence is; what workers still say of it is ignored."""
        sequence.stop_timer()
        self._waiting.remove(sequence)
        self._turns.remove(sequence)
        self._sequences.pop(sequence.sequence_id, None)
        self._numbered.pop(sequence.number, None)
        attempts.forget(sequence, self.view)
