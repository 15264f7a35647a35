"""Defects put on purpose into the gateway, and into the workers' half of its streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from protocol_clients import detokenizer

from crossdock.kvtransfer.pull import Puller
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch import attempts
from crossdock.router.dispatch.admission import Admission
from crossdock.router.dispatch.delivery import detokenize
from crossdock.router.dispatch.dispatcher import Dispatcher
from crossdock.router.dispatch.handoff import HandOffs
from crossdock.router.dispatch.losses import Losses
from crossdock.router.dispatch.outputs import Outputs
from crossdock.router.dispatch.request import Delta
from crossdock.router.dispatch.sequence import ActiveRequest, SequenceState
from crossdock.router.placement.view import ClusterView
from crossdock.worker.gateways import Gateways
from crossdock.worker.streams import GatewayStream

Plant = Callable[[pytest.MonkeyPatch], None]


# -- the gateway's streams on a worker -----------------------------------------------------------


def cancel_leaves_the_meeting(patch: pytest.MonkeyPatch) -> None:
    """A sequence is taken on when its peer is met, although it was cancelled meanwhile."""
    receive = Gateways.receive

    def keep(self: Gateways, stream: GatewayStream, frame: pb.GatewayFrame) -> None:
        meetings = dict(stream.meetings)
        receive(self, stream, frame)
        if frame.HasField("cancel"):
            stream.meetings.update(meetings)

    patch.setattr(Gateways, "receive", keep)


def meeting_outlives_its_stream(patch: pytest.MonkeyPatch) -> None:
    ended = Gateways.ended

    def keep(self: Gateways, stream: GatewayStream) -> None:
        meetings = dict(stream.meetings)
        ended(self, stream)
        stream.meetings.update(meetings)

    patch.setattr(Gateways, "ended", keep)


def read_wakes_nobody(patch: pytest.MonkeyPatch) -> None:
    """The end of a read is told only where it is the last."""
    was_read = Puller._was_read

    def silent(self: Puller, *arguments: object, last: bool) -> bool:
        was_read(self, *arguments, last=last)
        return True

    patch.setattr(Puller, "_was_read", silent)


# -- the gateway ---------------------------------------------------------------------------------


def _at_restart(patch: pytest.MonkeyPatch, act: Callable[[SequenceState], None]) -> None:
    restart = Losses.restart

    def act_and_restart(self: Losses, sequence: SequenceState, *arguments: object) -> None:
        act(sequence)
        restart(self, sequence, *arguments)

    patch.setattr(Losses, "restart", act_and_restart)


def restart_forgets_a_token(patch: pytest.MonkeyPatch) -> None:
    """The last emitted token is drawn, and sent, again."""

    def forget(sequence: SequenceState) -> None:
        if sequence.generated:
            del sequence.token_ids[-1:]

    _at_restart(patch, forget)


def restart_repeats_a_token(patch: pytest.MonkeyPatch) -> None:
    """The last emitted token is in the new attempt's prompt twice."""

    def repeat(sequence: SequenceState) -> None:
        if sequence.generated:
            sequence.token_ids += sequence.token_ids[-1:]

    _at_restart(patch, repeat)


def restart_with_another_seed(patch: pytest.MonkeyPatch) -> None:
    def reseed(sequence: SequenceState) -> None:
        sequence.sampling.seed += 1

    _at_restart(patch, reseed)


def restart_resets_the_detokenizer(patch: pytest.MonkeyPatch) -> None:
    """Bytes of an unfinished character, or the beginning of a stop string, are lost."""

    def reset(sequence: SequenceState) -> None:
        request = sequence.active.request
        sequence.detokenizer = detokenizer(list(request.prompts[0]), request.sampling.stop)

    _at_restart(patch, reset)


def scores_told_again_after_a_restart(patch: pytest.MonkeyPatch) -> None:
    """What was scored is counted from the beginning, beside what is kept of it."""

    def count_again(sequence: SequenceState) -> None:
        if sequence.unscored:
            sequence.scored = 1

    _at_restart(patch, count_again)


def scores_forgotten_at_a_restart(patch: pytest.MonkeyPatch) -> None:
    _at_restart(patch, lambda sequence: sequence.scores.clear())


def scored_again_where_it_was_scored(patch: pytest.MonkeyPatch) -> None:
    """Another attempt is asked for the scores of the whole prompt."""
    message = SequenceState.request_message

    def ask_for_all(self: SequenceState, eos: list[int], handed_off: bool = False) -> object:
        request = message(self, eos, handed_off)
        if not handed_off:
            request.scored_tokens = 1
        return request

    patch.setattr(SequenceState, "request_message", ask_for_all)


def token_0_delivered_twice(patch: pytest.MonkeyPatch) -> None:
    """By the prefill worker, and by the decode worker that was told of it."""
    joined = Outputs._joined

    def deliver_again(self: Outputs, sequence: SequenceState, transfer: pb.TransferStats) -> None:
        joined(self, sequence, transfer)
        sequence.active.stream.push(Delta(sequence.index, "", sequence.token_ids[-1:]))

    patch.setattr(Outputs, "_joined", deliver_again)


def late_output_taken(patch: pytest.MonkeyPatch) -> None:
    """What an attempt that was given up still says is delivered."""
    on_outputs, route = Outputs.on_outputs, Dispatcher._route
    attempts: dict[str | int, SequenceState] = {}

    def note(self: Dispatcher, sequence: SequenceState) -> None:
        route(self, sequence)
        attempts[sequence.sequence_id] = attempts[sequence.number] = sequence

    def take(self: Outputs, link: object, outputs: list[pb.SequenceOutput]) -> None:
        for output in outputs:
            alone = [(output.sequence_id, output)]
            pairs = zip(output.numbers, output.token_ids)
            for name, said in [(n, pb.SequenceOutput(token_ids=[t])) for n, t in pairs] or alone:
                sequence = attempts.get(name)
                given_up = name not in self._sequences and name not in self._numbered
                if sequence is not None and given_up and said.token_ids:
                    delta = detokenize(sequence, said, frozenset())
                    self._deliver(sequence, delta, self._clock())
        on_outputs(self, link, outputs)

    patch.setattr(Dispatcher, "_route", note)
    patch.setattr(Outputs, "on_outputs", take)


def ticket_given_to_two_readers(patch: pytest.MonkeyPatch) -> None:
    """At token 0 the ticket goes out again, although somebody has it."""
    complete = HandOffs.complete

    def complete_afresh(self: HandOffs, sequence: SequenceState, now: float) -> None:
        self._view.unplace(sequence.placement.decode, sequence.sequence_id)
        sequence.decode_worker = ""
        sequence.placement = replace(sequence.placement, decode="")
        complete(self, sequence, now)

    patch.setattr(HandOffs, "complete", complete_afresh)


def hand_off_before_token_0(patch: pytest.MonkeyPatch) -> None:
    """The decode worker is told of the whole prompt while it is still being computed."""
    advance = HandOffs.advance

    def advance_all(self: HandOffs, sequence: SequenceState, now: float) -> None:
        if sequence.decode_worker:
            sequence.progress.ready_blocks = len(sequence.progress.ticket.block_ids)
        advance(self, sequence, now)

    patch.setattr(HandOffs, "advance", advance_all)


def holders_not_cancelled(patch: pytest.MonkeyPatch) -> None:
    """The client is gone, and the workers go on."""
    cancel = attempts.cancel

    def unless_gone(sequence: SequenceState, why: str) -> None:
        if why != "client gone":
            cancel(sequence, why)

    patch.setattr(attempts, "cancel", unless_gone)


def deadline_timer_not_cancelled(patch: pytest.MonkeyPatch) -> None:
    end = Dispatcher._end

    def forget_and_end(self: Dispatcher, active: ActiveRequest, *arguments: object) -> None:
        active.deadline_timer = None
        end(self, active, *arguments)

    patch.setattr(Dispatcher, "_end", forget_and_end)


def deadline_never_noticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Dispatcher, "_deadline_passed", lambda self, active: None)


def waiting_sequence_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A worker appears, and whoever waited for one is not told."""
    patch.setattr(Dispatcher, "on_change", lambda self: None)


def admission_not_given_back(patch: pytest.MonkeyPatch) -> None:
    """A request with several continuations counts as one at its end."""
    release = Admission.release
    patch.setattr(Admission, "release", lambda self, tenant, n: release(self, tenant, 1))


def placement_not_taken_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ClusterView, "unplace", lambda self, name, key: None)


def held_continuation_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The first of n continuations has its token 0, and the others go on waiting for it."""
    patch.setattr(Outputs, "_release_held", lambda self, sequence: None)


def lost_worker_not_noticed(patch: pytest.MonkeyPatch) -> None:
    """A stream that the gateway gave up keeps its sequences."""
    patch.setattr(Losses, "link_lost", lambda self, link, reason: None)


GATEWAY_PLANTS: list[Plant] = [
    cancel_leaves_the_meeting,
    meeting_outlives_its_stream,
    read_wakes_nobody,
    restart_forgets_a_token,
    restart_repeats_a_token,
    restart_with_another_seed,
    restart_resets_the_detokenizer,
    scores_told_again_after_a_restart,
    scores_forgotten_at_a_restart,
    scored_again_where_it_was_scored,
    token_0_delivered_twice,
    late_output_taken,
    ticket_given_to_two_readers,
    hand_off_before_token_0,
    holders_not_cancelled,
    deadline_timer_not_cancelled,
    deadline_never_noticed,
    waiting_sequence_forgotten,
    admission_not_given_back,
    placement_not_taken_back,
    held_continuation_forgotten,
    lost_worker_not_noticed,
]
