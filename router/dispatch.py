"""Owns each request from received to finished.

    admit → route (prefill and decode worker together) → prefill → token 0 delivered → hand-off
    → decode, one token a frame → finished

Everything here runs in turns of one event loop: frames and timers come in, frames and deltas go
out, and no task is made per request or per token.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from functools import partial

from crossdock.proto.errors import (
    Cancelled,
    CrossdockError,
    DeadlineExceeded,
    Draining,
    Unavailable,
    WorkerLost,
)
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router import tracing
from crossdock.router.admission import Admission, Limits, check_deadline, retry_after_s
from crossdock.router.delivery import RESTARTED, Spoken, failure_of, sampling_message, speak
from crossdock.router.flight import (
    Active,
    Detokenizer,
    Flight,
    Phase,
    make_flights,
)
from crossdock.router.handoff import HandOffs
from crossdock.router.links import Links, WorkerLink
from crossdock.router.metrics import GatewayMetrics
from crossdock.router.policy import NoWorker, Policy
from crossdock.router.request import Delta, Request, ResponseStream
from crossdock.router.view import ClusterView

log = logging.getLogger(__name__)


class Dispatcher:
    """The gateway's requests under way. Implements LinkListener; `links` is set once made."""

    links: Links

    def __init__(
        self,
        *,
        view: ClusterView,
        policy: Policy,
        limits: Limits,
        metrics: GatewayMetrics,
        block_size: int,
        eos_token_ids: frozenset[int],
        detokenizer_of: Callable[[list[int], tuple[str, ...]], Detokenizer],
        prefix: str,
        on_ready: Callable[[bool], None] = lambda ready: None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.view = view
        self.metrics = metrics
        self.draining = False
        self._policy = policy
        self._limits = limits
        self._admission = Admission(limits)
        self._block_size = block_size
        self._eos = eos_token_ids
        self._eos_list = sorted(eos_token_ids)
        self._detokenizer_of = detokenizer_of
        self._prefix = prefix  # makes sequence ids unique in the cluster
        self._on_ready = on_ready
        self._clock = clock
        self._rng = rng or random.Random()
        self._hand_offs = HandOffs(
            view, lambda name: self.links.get(name), block_size, self._eos_list, self._rng
        )
        self._turn = 0
        self._count = 0
        self._flights: dict[str, Flight] = {}  # by sequence id
        self._parked: dict[Flight, Callable[[Flight], None]] = {}  # waiting for a worker
        self._requests: set[Active] = set()

    @property
    def active_sequences(self) -> int:
        return self._admission.active

    @property
    def active_requests(self) -> int:
        return len(self._requests)

    @property
    def parked_sequences(self) -> int:
        return len(self._parked)

    @property
    def ready(self) -> bool:
        return not self.draining and self.view.ready

    # -- the server's side --------------------------------------------------------------------

    def submit(self, request: Request) -> ResponseStream:
        """Takes a request on. The stream must be read to its end, or closed.

        Raises Overloaded, Draining or DeadlineExceeded, and then nothing was started.
        """
        now = self._clock()
        try:
            self._admit(request, now)
        except CrossdockError as error:
            self.metrics.outcome(error)
            raise
        span, traceparent = tracing.start(request)
        active = Active(request, span, traceparent)
        active.stream = ResponseStream(
            lambda: self._end(active, Cancelled("the client went away"), "client gone")
        )
        self._requests.add(active)
        try:
            self._take_off(active, now)
        except Exception as error:
            told = error if isinstance(error, CrossdockError) else CrossdockError(repr(error))
            self._end(active, told, "refused")
            raise
        return active.stream

    def _take_off(self, active: Active, now: float) -> None:
        request = active.request
        if request.deadline is not None:
            active.deadline_timer = asyncio.get_running_loop().call_later(
                request.deadline - now, self._deadline_passed, active
            )
        active.unfinished = request.num_sequences
        active.flights = make_flights(
            active,
            self._block_size,
            lambda i: sampling_message(request, i),
            lambda ids: self._detokenizer_of(ids, request.sampling.stop),
        )
        for flight in active.flights:
            flight.timeline.mark("admitted", now)
        for flight in active.flights:
            if flight.phase is Phase.ROUTING:
                self._route(flight)

    def _admit(self, request: Request, now: float) -> None:
        if self.draining:
            raise Draining("this gateway is shutting down; send the request again")
        if request.deadline is not None and request.deadline <= now:
            raise DeadlineExceeded("the deadline passed before any work started")
        self._admission.admit(request.tenant, request.num_sequences, retry_after_s(self.view))

    def close(self) -> None:
        """Ends everything that is under way."""
        for active in list(self._requests):
            self._end(active, Draining("the gateway stopped; send the request again"), "stopped")

    # -- routing ------------------------------------------------------------------------------

    def _route(self, flight: Flight) -> None:
        """Chooses both workers and sends the prompt on its way, or waits for workers to appear."""
        flight.stop_timer()
        flight.phase = Phase.ROUTING
        now = self._clock()
        started = time.perf_counter()
        self._turn += 1
        try:
            placement = self._policy(
                self.view, flight.demand(self._block_size), now, self._rng, self._turn
            )
        except NoWorker as error:
            self._park(flight, self._route, error)
            return
        finally:
            self.metrics.decision.observe(time.perf_counter() - started)
        if not flight.active.started:  # what has begun is carried on
            check_deadline(flight.active.request, placement, now, retry_after_s(self.view))
        link = self.links.get(placement.prefill or placement.decode)
        if link is None:
            self._park(flight, self._route, NoWorker("the chosen worker is not connected"))
            return
        self._count += 1
        flight.sequence_id = f"{self._prefix}-{self._count}"
        flight.placement = placement
        flight.ticket, flight.decode_worker = None, ""
        flight.lost_readers.clear()
        flight.active.started = True
        self._flights[flight.sequence_id] = flight
        flight.hold(link)
        flight.timeline.mark("routed", self._clock())
        log.debug("%s: %s, %s: %s", flight.sequence_id, placement.prefill, placement.decode,
                  placement.reason)  # fmt: skip
        demand = flight.demand(self._block_size)
        message = flight.request_message(self._eos_list)
        sid = flight.sequence_id
        if placement.prefill is None:
            flight.phase = Phase.DECODE
            flight.decode_worker = flight.prefill_worker = placement.decode
            self.view.place(placement.decode, sid, placement.uncached_tokens, demand.blocks)
            link.send(pb.GatewayFrame(decode=pb.DecodeRequest(sequence=message)))
        else:
            flight.phase = Phase.PREFILL
            flight.prefill_worker = placement.prefill
            self.view.place(placement.prefill, sid, placement.uncached_tokens, demand.blocks)
            self.view.place(placement.decode, sid, 0, demand.blocks)
            prefill = pb.PrefillRequest(sequence=message, decode_worker=placement.decode)
            link.send(pb.GatewayFrame(prefill=prefill))
        self.view.sent(link.name, sid, now)

    def _park(self, flight: Flight, again: Callable[[Flight], None], why: Unavailable) -> None:
        """Waits a while for a worker to appear."""
        self._parked[flight] = again
        if flight.timer is None:
            wait_s = self._limits.worker_wait_s
            flight.timer = asyncio.get_running_loop().call_later(
                wait_s, self._give_up, flight, NoWorker(f"{why} (waited {wait_s:g} s)")
            )

    def _give_up(self, flight: Flight, error: CrossdockError) -> None:
        self._parked.pop(flight, None)
        self._end(flight.active, error, "no worker")

    def on_change(self) -> None:
        """A worker came or went: whoever waited for one is tried again."""
        self._on_ready(self.ready)
        for flight, again in list(self._parked.items()):
            if self._parked.pop(flight, None) is None:
                continue
            timer, flight.timer = flight.timer, None
            self._guarded(flight, again)
            if flight in self._parked:  # still nobody: the wait goes on from where it was
                flight.stop_timer()
                flight.timer = timer
            elif timer is not None:
                timer.cancel()

    def _guarded(self, flight: Flight, step: Callable[[Flight], None]) -> None:
        try:
            step(flight)
        except CrossdockError as error:
            self._end(flight.active, error, "refused")

    def _hand_off(self, flight: Flight) -> None:
        """Token 0 is delivered: a decode worker goes on from here, as soon as there is one."""
        try:
            self._hand_offs.complete(flight, self._clock())
        except NoWorker as error:
            self._park(flight, self._hand_off, error)
        except WorkerLost as error:
            self._restart(flight, min(flight.lost_readers), "worker lost", error)

    # -- what the workers say -----------------------------------------------------------------

    def on_outputs(self, link: WorkerLink, outputs: Sequence[pb.SequenceOutput]) -> None:
        now = self._clock()
        for output in outputs:
            flight = self._flights.get(output.sequence_id)
            if flight is None or link.name not in flight.holders:
                continue  # cancelled meanwhile, or of an attempt that was given up
            try:
                self._take(flight, link, output, now)
            except CrossdockError as error:
                self._end(flight.active, error, "failed")
            except Exception as error:  # of one request; the others on the stream go on
                log.exception("%s: an output could not be delivered", flight.sequence_id)
                self._end(flight.active, CrossdockError(f"internal error: {error!r}"), "failed")

    def _take(
        self, flight: Flight, link: WorkerLink, output: pb.SequenceOutput, now: float
    ) -> None:
        if output.HasField("times"):
            flight.timeline.merge(output.times)
        if output.HasField("error"):
            self._take_error(flight, link, output.error)
            return
        if flight.phase is Phase.DECODE:
            if link.name != flight.decode_worker:
                return
            if flight.ticket is not None and output.token_ids:
                self._joined(flight, output)
        if flight.cached_tokens is None and output.token_ids:
            flight.cached_tokens = output.cached_tokens
        flight.recomputed_tokens += output.recomputed_tokens
        if output.token_ids or output.finish_reason:
            self._deliver(flight, speak(flight, output, self._eos), now)
        if flight.phase is Phase.PREFILL and link.name == flight.prefill_worker:
            self._hand_offs.note(flight, output)
            if output.token_ids:
                self._hand_off(flight)
            else:
                self._hand_offs.advance(flight, now)

    def _joined(self, flight: Flight, output: pb.SequenceOutput) -> None:
        """The first token after a hand-off: the prefill worker, if it is still there, let go."""
        for name in [name for name in flight.holders if name != flight.decode_worker]:
            flight.let_go(name)
        flight.ticket = None
        flight.transferred_bytes += output.transferred_bytes
        flight.transferred_blocks += output.transferred_blocks
        flight.late_bytes += output.late_bytes
        self.metrics.transferred_bytes.inc(output.transferred_bytes)
        self.metrics.transferred_blocks.inc(output.transferred_blocks)
        self.metrics.late_bytes.inc(output.late_bytes)
        self.view.transferred(
            flight.prefill_worker,
            flight.decode_worker,
            output.transferred_bytes,
            output.transfer_s,
        )

    def _deliver(self, flight: Flight, spoken: Spoken, now: float) -> None:
        """Passes new tokens to the reader, and the end of the sequence with the last of them."""
        self._count_tokens(flight, spoken.token_ids, now)
        delta = Delta(flight.index, spoken.text, spoken.token_ids, spoken.logprobs)
        if spoken.finish_reason is not None:
            reads_along = flight.phase is Phase.PREFILL and flight.decode_worker
            if spoken.cut_short or reads_along:
                self._cancel_on_holders(flight, "finished")
            delta.finish_reason, delta.stop_reason = spoken.finish_reason, spoken.stop_reason
            self._finish(flight, now)
            delta.usage, delta.timings = flight.usage(), flight.timings()
        flight.active.stream.push(delta)
        if flight.active.unfinished == 0:
            self._end(flight.active, None, "")
        else:
            self._release_held(flight)

    def _count_tokens(self, flight: Flight, ids: list[int], now: float) -> None:
        if not ids:
            return
        had = flight.generated
        timeline = flight.timeline
        if had == 0:
            timeline.mark("first_token", now)
            self.metrics.ttft.observe(now - flight.active.request.received)
        else:
            last = timeline.last_token
            if last is not None:
                gap = now - flight.active.request.received - last
                self.metrics.itl.observe(gap)
            if had == 1 and flight.phase is Phase.DECODE:  # else another prefill drew it
                timeline.mark_second_token(now)
        timeline.move("last_token", now)
        flight.token_ids += ids
        flight.restarts = 0
        self.metrics.generated_tokens.inc(len(ids))

    def _finish(self, flight: Flight, now: float) -> None:
        flight.timeline.mark("finished", now)
        self._let_go(flight)
        flight.phase = Phase.DONE
        flight.active.unfinished -= 1
        self.metrics.prompt_tokens.inc(flight.prompt_tokens)
        self.metrics.cached_tokens.inc(flight.cached_tokens or 0)
        self.metrics.recomputed_tokens.inc(flight.recomputed_tokens)
        self.metrics.sequence_done(flight.timeline, flight.generated)
        tracing.sequence_ended(flight)

    def _release_held(self, flight: Flight) -> None:
        """The first of n continuations has its prompt's KV in place: the others follow."""
        n = flight.active.request.n
        if n == 1 or flight.index % n:
            return
        for other in flight.active.flights[flight.index + 1 : flight.index + n]:
            if other.phase is Phase.HELD and not flight.active.ended:
                self._guarded(other, self._route)

    # -- errors, losses, ends -----------------------------------------------------------------

    def _take_error(self, flight: Flight, link: WorkerLink, error: pb.SequenceError) -> None:
        if flight.phase is Phase.DECODE and link.name != flight.decode_worker:
            flight.let_go(link.name)  # the prefill side's word; the decode worker will judge
            return
        failure = failure_of(link.name, error)
        reads_along = flight.phase is Phase.PREFILL and link.name == flight.decode_worker
        if error.code == pb.ERROR_CODE_PULL_FAILED:
            self.view.pull_failed(flight.prefill_worker, link.name, self._clock())
        if reads_along and error.code in RESTARTED:
            self._hand_offs.drop(flight, lost=False)
            return
        flight.let_go(link.name)
        if error.code not in RESTARTED:
            raise failure
        if error.code == pb.ERROR_CODE_PULL_FAILED:
            flight.avoid.add(flight.prefill_worker)  # either end of the pair may be the broken one
        self._restart(flight, link.name, RESTARTED[error.code], failure)

    def _restart(self, flight: Flight, culprit: str, cause: str, failure: CrossdockError) -> None:
        """Prompt and delivered tokens are prefilled again, elsewhere if there is an elsewhere; a
        token depends on nothing else, so the stream goes on as if nothing had happened."""
        flight.restarts += 1
        if flight.restarts > self._limits.max_restarts:
            raise failure
        self._cancel_on_holders(flight, cause)
        self._let_go(flight)
        flight.avoid.add(culprit)
        flight.extend_hashes(self._block_size)
        flight.phase = Phase.ROUTING
        self.metrics.restarts.labels(cause).inc()
        log.info("%s: %s on %s after %d tokens, prefilling again",
                 flight.sequence_id, cause, culprit, flight.generated)  # fmt: skip
        delay_s = 0.0
        if flight.restarts > 1 or cause == "overloaded":
            delay_s = self._limits.first_backoff_s * 2 ** (flight.restarts - 1)
        flight.timer = asyncio.get_running_loop().call_later(
            delay_s, self._guarded, flight, self._route
        )

    def on_lost(self, link: WorkerLink, reason: str) -> None:
        self.metrics.lost.inc()
        for sequence_id in list(link.sequences):
            flight = self._flights.get(sequence_id)
            if flight is None:
                continue
            flight.let_go(link.name)
            if flight.phase is Phase.DECODE and link.name != flight.decode_worker:
                continue  # the pull may be over already; the decode worker will say
            self._guarded(flight, partial(self._lost_under, link.name, reason))
        link.sequences.clear()

    def _lost_under(self, worker: str, reason: str, flight: Flight) -> None:
        """Carries the sequence on elsewhere; raises WorkerLost once it has seen too many die."""
        role = "decode" if worker == flight.decode_worker else "prefill"
        error = WorkerLost(
            f"{role} worker {worker} was lost ({reason}) after {flight.generated} tokens; "
            "send the request again"
        )
        flight.losses += 1
        if flight.losses > self._limits.max_losses:
            raise error
        if flight.phase is Phase.PREFILL and worker == flight.decode_worker:
            self._hand_offs.drop(flight, lost=True)
            return
        self._restart(flight, worker, "worker lost", error)

    def _deadline_passed(self, active: Active) -> None:
        request = active.request
        assert request.deadline is not None
        allowed = request.deadline - request.received
        generated = sum(flight.generated for flight in active.flights)
        error = DeadlineExceeded(f"the deadline of {allowed:.2f} s passed at {generated} tokens")
        self._end(active, error, "deadline")

    def _end(self, active: Active, error: CrossdockError | None, why: str) -> None:
        """The one way out of a request: frees what is left of it here and on the workers."""
        if active.ended:
            return
        active.ended = True
        now = self._clock()
        if active.deadline_timer is not None:
            active.deadline_timer.cancel()
        for flight in active.flights:
            if flight.phase is not Phase.DONE:
                self._cancel_on_holders(flight, why)
                self._let_go(flight)
                flight.phase = Phase.DONE
                flight.timeline.mark("finished", now)
                tracing.sequence_ended(flight)
        self._requests.discard(active)
        self._admission.release(active.request.tenant, active.request.num_sequences)
        self.metrics.outcome(error)
        if error is None:
            self.metrics.e2e.observe(now - active.request.received)
        tracing.end(active, error, now)
        active.stream.end(error)

    def _cancel_on_holders(self, flight: Flight, why: str) -> None:
        cancel = pb.CancelRequest(sequence_id=flight.sequence_id, reason=why)
        for link in flight.holders.values():
            link.send(pb.GatewayFrame(cancel=cancel))

    def _let_go(self, flight: Flight) -> None:
        """Forgets where a sequence is; what workers still say of it is ignored."""
        flight.stop_timer()
        self._parked.pop(flight, None)
        for name in list(flight.holders):
            flight.let_go(name)
        self._flights.pop(flight.sequence_id, None)
        if flight.placement is not None:
            for worker in {flight.placement.prefill, flight.placement.decode, flight.decode_worker}:
                if worker:
                    self.view.unplace(worker, flight.sequence_id)
