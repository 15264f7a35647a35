"""What workers say of sequences: tokens go to the clients, prompts on to who decodes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

from crossdock.proto import events
from crossdock.proto.errors import CrossdockError
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch import attempts, tracing
from crossdock.router.dispatch.delivery import detokenize
from crossdock.router.dispatch.handoff import HandOffs
from crossdock.router.dispatch.links import WorkerLink
from crossdock.router.dispatch.losses import Losses
from crossdock.router.dispatch.metrics import ModelMetrics, StepGain
from crossdock.router.dispatch.request import Delta
from crossdock.router.dispatch.sequence import ActiveRequest, Phase, SequenceState
from crossdock.router.placement.view import ClusterView

log = logging.getLogger(__name__)

End = Callable[[ActiveRequest, CrossdockError | None, str], None]


@dataclass(frozen=True)
class Outputs:
    """Keeps nothing of its own. `sequences` and `numbered`: a dispatcher's, by id and by number;
    `end` ends a request, `hand_off` goes on from token 0, `release` forgets where one is, `begin`
    has one that was held take its turn, and `learn` hears of first tokens."""

    _view: ClusterView
    _hand_offs: HandOffs
    _losses: Losses
    _metrics: ModelMetrics
    _clock: Callable[[], float]
    _eos: list[int]
    _sequences: Mapping[str, SequenceState]
    _numbered: Mapping[int, SequenceState]
    _: KW_ONLY
    end: End
    hand_off: Callable[[SequenceState], None]
    release: Callable[[SequenceState], None]
    begin: Callable[[SequenceState], None]
    learn: Callable[[SequenceState, float], None]

    def on_outputs(self, link: WorkerLink, outputs: Sequence[pb.SequenceOutput]) -> None:
        gain = StepGain(self._clock())
        for output in outputs:  # those not found: cancelled, or of an attempt that was given up
            if not output.numbers:
                if sequence := self._sequences.get(output.sequence_id):
                    self._heard(sequence, link, list(output.token_ids), output, gain)
                continue
            for number, token_id in zip(output.numbers, output.token_ids, strict=True):
                if sequence := self._numbered.get(number):
                    self._heard(sequence, link, [token_id], None, gain)
        self._metrics.carried_on(gain)

    def _heard(
        self,
        sequence: SequenceState,
        link: WorkerLink,
        token_ids: list[int],
        output: pb.SequenceOutput | None,
        gain: StepGain,
    ) -> None:
        """`output`: what was said of it; None where that is the tokens alone."""
        try:
            if sequence.steady is link and (output is None or not output.finish_reason):
                gain.add(len(token_ids), sequence.timeline.token(gain.now))
                sequence.carry_on(token_ids)
            elif link.name in sequence.holders:
                said = pb.SequenceOutput(token_ids=token_ids) if output is None else output
                self._take(sequence, link, said, gain.now)
        except CrossdockError as error:
            self.end(sequence.active, error, "failed")
        except Exception as error:  # of one request; the others on the stream go on
            log.exception("%s: an output could not be delivered", sequence.sequence_id)
            self.end(sequence.active, CrossdockError(f"internal error: {error!r}"), "failed")

    def _take(
        self, sequence: SequenceState, link: WorkerLink, output: pb.SequenceOutput, now: float
    ) -> None:
        if output.HasField("times"):
            sequence.timeline.merge(output.times)
        if output.HasField("error"):
            self._losses.failed(sequence, link, output.error)
            return
        if sequence.phase is Phase.DECODE:
            if link.name != sequence.decode_worker:
                return
            if sequence.progress.HasField("ticket") and output.token_ids:
                self._joined(sequence, output.transfer)
        if output.HasField("prompt_logprobs"):
            sequence.score(output.prompt_logprobs)
            return
        if sequence.cached_tokens is None and (output.token_ids or output.finish_reason):
            sequence.cached_tokens = output.cached_tokens
        if output.token_ids or output.finish_reason:
            self._deliver(sequence, detokenize(sequence, output, self._eos), now)
        if sequence.phase is Phase.DECODE and sequence.plain:
            sequence.steady = link
        if sequence.phase is Phase.PREFILL and link.name == sequence.prefill_worker:
            sequence.progress.MergeFrom(output.progress)
            if output.token_ids:
                self.hand_off(sequence)
            else:
                self._hand_offs.advance(sequence, now)

    def _joined(self, sequence: SequenceState, transfer: pb.TransferStats) -> None:
        """The first token after a hand-off: the prefill worker has nothing of it any more."""
        for name in [name for name in sequence.holders if name != sequence.decode_worker]:
            sequence.release(name)
        sequence.joined(transfer)
        self._metrics.transferred(transfer)
        pair = sequence.prefill_worker, sequence.decode_worker
        self._view.transferred(*pair, transfer.bytes, transfer.seconds)

    def _deliver(self, sequence: SequenceState, delta: Delta, now: float) -> None:
        """Passes new tokens to the client, and the end of the sequence with the last of them."""
        delta.prompt = sequence.prompt_to_tell()
        if delta.token_ids:
            first, gap_s = sequence.generated == 0, sequence.gained(delta.token_ids, now)
            self._view.computed(sequence.prefill_worker, sequence.sequence_id, now)
            self._metrics.gained(len(delta.token_ids), first, gap_s)
            if first and gap_s is not None:
                self.learn(sequence, now)
                self._metrics.started(gap_s, sequence.prompt_tokens, sequence.cached_tokens or 0)
        if delta.finish_reason is not None:
            reserved_early = sequence.phase is Phase.PREFILL and sequence.decode_worker
            if delta.cut_short or reserved_early:
                attempts.cancel(sequence, "finished")
            sequence.finish_reason = delta.finish_reason
            self._finish(sequence, now)
            delta.usage, delta.timings = sequence.usage(), sequence.timings()
        sequence.active.stream.push(delta)
        if sequence.active.unfinished == 0:
            self.end(sequence.active, None, "")
        else:
            self._release_held(sequence)

    def _finish(self, sequence: SequenceState, now: float) -> None:
        if sequence.generated:
            events.emit("last_token", sequence.active.request.request_id)
        sequence.timeline.mark("finished", now)
        self.release(sequence)
        sequence.phase = Phase.DONE
        sequence.active.unfinished -= 1
        self._metrics.prompt_tokens.inc(sequence.prompt_tokens)
        self._metrics.cached_tokens.inc(sequence.cached_tokens or 0)
        self._metrics.sequence_done(sequence.timeline, sequence.generated)
        self._view.ended(
            sequence.decode_worker,
            sequence.active.request.tenant,
            sequence.prompt_tokens,
            sequence.generated,
        )
        tracing.sequence_ended(sequence)

    def _release_held(self, sequence: SequenceState) -> None:
        """The first of n continuations has its prompt's KV in place: the others follow."""
        n = sequence.active.request.n
        if n == 1 or sequence.index % n:
            return
        for other in sequence.active.sequences[sequence.index + 1 : sequence.index + n]:
            if other.phase is Phase.HELD and not sequence.active.ended:
                self.begin(other)
