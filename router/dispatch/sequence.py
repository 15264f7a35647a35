"""What a gateway holds of each sequence and request that is under way."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from crossdock.model.detokenizer import IncrementalDetokenizer
from crossdock.proto import events
from crossdock.proto.convert import sampling_to_pb
from crossdock.proto.errors import CrossdockError
from crossdock.proto.hashing import BlockHasher
from crossdock.proto.steps import Yields
from crossdock.proto.types import FinishReason, SamplingParams
from crossdock.proto.v1 import inference_pb2
from crossdock.proto.v1 import worker_pb2 as pb
from crossdock.router.dispatch.lifecycle import Timeline
from crossdock.router.dispatch.links import WorkerLink
from crossdock.router.dispatch.ports import Timer
from crossdock.router.dispatch.request import Request, ResponseStream
from crossdock.router.dispatch.scored import ScoredPrompt
from crossdock.router.placement.demand import OUTPUT_TOKENS, UNPLACED, Demand, Placement


class Phase(enum.Enum):
    """Where a sequence is; each phase has one way out.

    HELD ──> ROUTING ──> PREFILL ──token 0, ticket──> HAND_OFF ──> DECODE ──> DONE
                 ^──────────┴──────── restart ────────────┴───────────┘
    """

    HELD = "held"  # an equal prompt goes first, so that its KV is found
    ROUTING = "routing"
    PREFILL = "prefill"
    HAND_OFF = "hand_off"
    DECODE = "decode"
    DONE = "done"


MOST_ATTEMPTS = 8  # of a sequence that are told of: the first, and the newest


@dataclass(eq=False, slots=True)
class Attempt:
    """A placement, and what became of it."""

    at: float  # seconds since the request was received
    placement: Placement
    sequence_id: str = ""  # once it was sent
    decode_worker: str = ""  # that was told of it, once it was given up
    gave_up: str = ""  # why, and on whom


@dataclass(eq=False)
class SequenceState:
    """One continuation of one prompt, from admission to its last token."""

    active: ActiveRequest
    index: int
    token_ids: list[int]  # prompt and delivered tokens
    prompt_tokens: int
    root_hash: bytes  # parent of the first of the hashes
    hashes: list[bytes]  # of the full blocks of token_ids
    sampling: inference_pb2.SamplingParams
    detokenizer: IncrementalDetokenizer
    timeline: Timeline
    phase: Phase = Phase.ROUTING
    sequence_id: str = ""  # of this attempt; a restart gets another
    number: int = 0  # of this attempt, by which workers name it where they say little
    placement: Placement = UNPLACED
    holders: dict[str, WorkerLink] = field(default_factory=dict)  # who has something of it
    progress: pb.PromptProgress = field(default_factory=pb.PromptProgress)  # empty once joined
    restarts: int = 0  # since the last token gained
    losses: int = 0  # workers that died while they held it
    avoid: set[str] = field(default_factory=set)
    yields: Yields = Yields.NOT
    timer: Timer | None = None
    prefill_worker: str = ""
    decode_worker: str = ""  # once it has been told
    lost_early: set[str] = field(default_factory=set)  # decode workers lost before token 0
    first_tokens: int = 0  # how many came at once with token 0
    steady: WorkerLink | None = None  # where it decodes, once all that comes is tokens till its end
    cached_tokens: int | None = None
    # When it first waited, and the seconds until its first token as predicted then.
    predicted: tuple[float, float] | None = None
    scores: list[pb.PromptLogprobs] = field(default_factory=list)  # of its prompt, of all attempts
    scored: int = 1  # of prompt_tokens, those whose scores are here; nothing is said of the first
    prompt_told: bool = False  # the client has what it asked for of the prompt
    transfer: pb.TransferStats = field(default_factory=pb.TransferStats)  # of all attempts
    finish_reason: FinishReason | None = None
    attempts: list[Attempt] = field(default_factory=list)  # of which MOST_ATTEMPTS are kept

    @property
    def generated(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def plain(self) -> bool:
        """Nothing but its worker can end it, and its tokens are all that the client asked for."""
        return not self.active.request.sampling.stop and not self.sampling.HasField("logprobs")

    @property
    def unscored(self) -> bool:
        """Log-probabilities of its prompt are asked for and not here."""
        return self.sampling.HasField("prompt_logprobs") and self.scored < self.prompt_tokens

    def score(self, part: pb.PromptLogprobs) -> None:
        """Takes the next part; raises CrossdockError for any other."""
        if part.first != self.scored:
            message = f"log-probabilities of prompt token {part.first} came, not of {self.scored}"
            raise CrossdockError(message)
        self.scores.append(part)
        self.scored += len(part.logprobs)

    def prompt_to_tell(self) -> ScoredPrompt | None:
        """What the first delta says of the prompt, where that was asked for. The continuations of
        one prompt share what the first of them was told. Raises CrossdockError where it is not
        whole."""
        request = self.active.request
        if self.prompt_told or request.sampling.prompt_logprobs is None:
            return None
        self.prompt_told = True
        first = self.active.sequences[self.index - self.index % request.n]
        if first.unscored:
            raise CrossdockError(f"{self.prefill_worker} did not score the whole prompt")
        return ScoredPrompt(self.token_ids[: self.prompt_tokens], first.scores)

    def extend_hashes(self, hasher: BlockHasher, layout_hash: bytes) -> None:
        """Hashes the blocks that tokens have filled since; all, where the layout is another."""
        root = hasher.root(layout_hash, self.active.request.cache_salt)
        if root != self.root_hash:
            self.root_hash, self.hashes = root, []
        hasher.extend(self.hashes, self.token_ids, root)

    def decided(self, placement: Placement, now: float) -> None:
        """It is to go there, unless that is too late for it."""
        if len(self.attempts) == MOST_ATTEMPTS:
            del self.attempts[1]
        self.attempts.append(Attempt(now - self.active.request.received, placement))

    def gave_up(self, why: str) -> None:
        """The newest attempt has failed."""
        self.attempts[-1].decode_worker, self.attempts[-1].gave_up = self.decode_worker, why

    def placed(self, sequence_id: str, number: int, placement: Placement) -> None:
        """A new attempt begins, as was decided, under another id and number."""
        self.sequence_id, self.number = sequence_id, number
        self.attempts[-1].sequence_id = sequence_id
        self.placement, self.decode_worker = placement, ""
        self.progress.Clear()
        self.lost_early.clear()
        self.active.started = True

    def hold(self, link: WorkerLink) -> None:
        self.holders[link.name] = link
        link.sequences[self.sequence_id] = None
        events.emit("held", self.active.request.request_id, f"{self.sequence_id}@{link.name}")

    def release(self, name: str) -> None:
        """A worker has nothing of it any more; what it still says is ignored."""
        link = self.holders.pop(name, None)
        if link is not None:
            self.steady = None
            link.sequences.pop(self.sequence_id, None)
            events.emit("released", self.active.request.request_id, f"{self.sequence_id}@{name}")

    def gained(self, ids: list[int], now: float) -> float | None:
        """Adds tokens that are delivered `now`; returns seconds since request or last token, None
        where that is not known."""
        timeline = self.timeline
        generated, self.restarts = self.generated, 0
        self.token_ids += ids
        if generated == 0:
            self.first_tokens = len(ids)
            return timeline.first(now)
        if generated == self.first_tokens and self.phase is Phase.DECODE:
            timeline.mark_second_token(now)  # in any other phase it was prefilled again
        return timeline.token(now)

    def carry_on(self, token_ids: list[int]) -> None:
        """What most outputs come to: more tokens of a sequence that is steady, and their text."""
        self.token_ids += token_ids
        text = self.detokenizer.text_of(token_ids)
        self.active.stream.push_tokens(self.index, text, token_ids)

    def joined(self, transfer: pb.TransferStats) -> None:
        """A decode worker has the KV: adds what that took to what earlier attempts did."""
        self.progress.Clear()
        for field_, value in transfer.ListFields():
            setattr(self.transfer, field_.name, getattr(self.transfer, field_.name) + value)

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def usage(self) -> inference_pb2.Usage:
        return inference_pb2.Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.generated,
            cached_tokens=self.cached_tokens or 0,
        )

    def timings(self) -> inference_pb2.Timings:
        where = self.prefill_worker, self.decode_worker
        timings = timings_of(self.timeline, *where, self.transfer)
        if self.placement.measured:
            timings.predicted_ttft = self.placement.predicted_ttft_s
        return timings

    def demand(
        self,
        block_size: int,
        local_tokens: int = 0,
        output: float = OUTPUT_TOKENS,
        tpot_s: float = math.inf,
    ) -> Demand:
        """What it asks of the cluster; the rest is as Demand has it."""
        # What is to be scored is computed, whatever is cached, and where prompts are.
        reusable = (self.scored - 1) // block_size if self.unscored else None
        return Demand(
            num_tokens=len(self.token_ids),
            block_hashes=self.hashes[:reusable],
            block_size=block_size,
            most_tokens=self.prompt_tokens + self.sampling.max_tokens,
            avoid=frozenset(self.avoid),
            local_tokens=0 if self.unscored else local_tokens,
            output=output,
            tpot_s=tpot_s,
            yields=Yields.NOT if self.generated else self.yields,
            answered_by=self.active.request.answered_by,
        )

    def request_message(self, eos: list[int], handed_off: bool = False) -> pb.SequenceRequest:
        """What a worker is told of it, as it stands now. `handed_off`: another one computes, and
        scores, its prompt."""
        request = self.active.request
        deadline = 0
        if request.deadline is not None:
            left_s = request.deadline - request.received
            deadline = int((request.received_unix + left_s) * 1000)
        return pb.SequenceRequest(
            sequence_id=self.sequence_id,
            token_ids=self.token_ids,
            block_hashes=self.hashes,
            sampling=self.sampling,
            prompt_tokens=self.prompt_tokens,
            root_hash=self.root_hash,
            deadline_unix_ms=deadline,
            priority=request.priority,
            traceparent=self.active.traceparent,
            eos_token_ids=eos,
            arrival_unix_s=request.received_unix,
            scored_tokens=self.prompt_tokens if handed_off else self.scored,
            number=self.number,
        )


@dataclass(eq=False)
class ActiveRequest:
    """One request, from admission to its end: its sequences, its reader, its span."""

    request: Request
    span: Any
    traceparent: str
    sequences: list[SequenceState] = field(default_factory=list)
    stream: ResponseStream = field(init=False)
    deadline_timer: Timer | None = None
    order: int = 0  # of arrival
    unfinished: int = 0
    started: bool = False  # something was sent to a worker
    ended: bool = False
    error: CrossdockError | None = None  # that ended it


def timings_of(
    timeline: Timeline, prefill_worker: str, decode_worker: str, transfer: pb.TransferStats
) -> inference_pb2.Timings:
    """When it was where, and what moved there."""
    timings = timeline.timings()
    timings.prefill_worker = prefill_worker
    timings.decode_worker = decode_worker
    timings.transferred_bytes = transfer.bytes
    timings.transferred_blocks = transfer.blocks
    timings.late_bytes = transfer.late_bytes
    timings.recomputed_tokens = transfer.recomputed_tokens
    return timings


def make_sequences(
    active: ActiveRequest,
    hasher: BlockHasher,
    layout_hash: bytes,
    detokenizer_of: Callable[[list[int], tuple[str, ...]], IncrementalDetokenizer],
) -> list[SequenceState]:
    """The n continuations of each prompt. Where a prompt fills blocks, its later continuations are
    held until the first has its token 0: then they find its KV instead of computing it again. Where
    it is scored they are as well: that is done once."""
    request = active.request
    events.emit("received", request.request_id)
    told = [_told(request.sampling, i) for i in range(request.n)]
    scored = request.sampling.prompt_logprobs is not None
    root, sequences = hasher.root(layout_hash, request.cache_salt), []
    for position, prompt in enumerate(request.prompts):
        ids = list(prompt)
        known = root == request.root_hash and len(request.chains) > position
        hashes = request.chains[position] if known else hasher.chain(ids, root)
        for i in range(request.n):
            detokenizer = detokenizer_of(ids, request.sampling.stop)
            if request.shown:
                detokenizer.show(request.shown)
            sequences.append(
                SequenceState(
                    active=active,
                    index=position * request.n + i,
                    token_ids=ids.copy() if request.n > 1 else ids,
                    prompt_tokens=len(ids),
                    root_hash=root,
                    hashes=hashes.copy(),
                    sampling=told[i],
                    detokenizer=detokenizer,
                    timeline=Timeline(request.received, request.received_unix, request.request_id),
                    phase=Phase.HELD if i and (hashes or scored) else Phase.ROUTING,
                )
            )
    return sequences


def _told(asked: SamplingParams, i: int) -> inference_pb2.SamplingParams:
    """What workers are told of the i-th continuation of a prompt."""
    told = sampling_to_pb(asked)
    told.ClearField("stop")  # they know no text
    if i:
        told.seed = (told.seed + i) % 2**64
        told.ClearField("prompt_logprobs")  # which are worked out once
    return told
