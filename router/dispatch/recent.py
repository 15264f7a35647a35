"""The newest requests of a gateway: where each sequence was placed, and what that took. Of prompts
and answers nothing is kept but how long they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from crossdock.proto.errors import CrossdockError
from crossdock.proto.types import FinishReason
from crossdock.proto.v1 import inference_pb2
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.lifecycle import Timeline
from crossdock.router.dispatch.request import request_id_of
from crossdock.router.dispatch.sequence import ActiveRequest, Attempt, SequenceState, timings_of

# Minutes of most gateways. One that was weighed among 8 + 8 workers has some 5 kB: 20 MB in all.
KEPT_SEQUENCES = 4096


@dataclass(frozen=True, slots=True)
class Course:
    """What one sequence went through, as far as it has come."""

    index: int
    prompt_tokens: int
    cached_tokens: int
    generated: int
    finish_reason: FinishReason | None
    prefill_worker: str
    decode_worker: str
    attempts: Sequence[Attempt]
    timeline: Timeline
    transfer: pb.TransferStats

    @classmethod
    def of(cls, sequence: SequenceState) -> Course:
        """As it stands."""
        return cls(
            sequence.index,
            sequence.prompt_tokens,
            sequence.cached_tokens or 0,
            sequence.generated,
            sequence.finish_reason,
            sequence.prefill_worker,
            sequence.decode_worker,
            sequence.attempts,
            sequence.timeline,
            sequence.transfer,
        )

    @property
    def timings(self) -> inference_pb2.Timings:
        """What it took."""
        return timings_of(self.timeline, self.prefill_worker, self.decode_worker, self.transfer)


@dataclass(eq=False, slots=True)
class Trail:
    """One request. `active`: it is under way; else `courses` are what was of it."""

    request_id: str
    response: str
    model: str
    received: float  # on the gateway's clock
    received_unix: float
    active: ActiveRequest | None
    courses: Sequence[Course] = ()
    error: str = ""  # the kind of what ended it
    ended: float = 0.0  # on the gateway's clock


@dataclass
class Recent:
    """Those under way and those that ended lately, of all models, KEPT_SEQUENCES in all."""

    most: int = KEPT_SEQUENCES
    _order: deque[tuple[Trail, int]] = field(default_factory=deque)  # with its sequences
    _known: dict[str, Trail] = field(default_factory=dict)  # by ids; the newest of each
    _running: dict[ActiveRequest, Trail] = field(default_factory=dict)
    _sequences: int = 0

    def began(self, active: ActiveRequest) -> None:
        """A request was taken on."""
        asked = active.request
        trail = self._running[active] = Trail(
            asked.request_id,
            asked.response,
            asked.model,
            asked.received,
            asked.received_unix,
            active,
        )
        for name in _names(trail):
            self._known[name] = trail
        self._order.append((trail, asked.num_sequences))
        self._sequences += asked.num_sequences
        while self._sequences > self.most:
            oldest, sequences = self._order.popleft()
            self._sequences -= sequences
            for name in _names(oldest):
                if self._known.get(name) is oldest:
                    del self._known[name]

    def ended(self, active: ActiveRequest, error: CrossdockError | None, now: float) -> None:
        """It is over; its tokens are kept no longer."""
        trail = self._running.pop(active)
        trail.courses = [Course.of(sequence) for sequence in active.sequences]
        trail.error = type(error).__name__ if error is not None else ""
        trail.active, trail.ended = None, now

    def find(self, asked: str) -> Trail | None:
        """The newest request of that id, or whose answer has it; None where it is not known."""
        return self._known.get(asked) or self._known.get(request_id_of(asked))


def _names(trail: Trail) -> list[str]:
    return [name for name in (trail.request_id, trail.response) if name]
