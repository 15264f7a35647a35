"""The clients of a history, who know what they must be answered, and timers that a test fires."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from roles_kit import VOCAB, Clock, kv_of_tokens, undisturbed

from crossdock.engine.simulated import rank_logprob, score, weights
from crossdock.model.detokenizer import IncrementalDetokenizer
from crossdock.proto import errors
from crossdock.proto.types import FinishReason, SamplingParams
from crossdock.router.dispatch.request import Delta, Request, ResponseStream
from crossdock.router.dispatch.scored import ScoredPrompt

if TYPE_CHECKING:
    from protocol_front import Gateway

ENDS = (  # of requests, but for their deadlines and their clients' own
    errors.Unavailable,
    errors.WorkerLost,
    errors.Overloaded,
    errors.TransferFailed,
    errors.Draining,
)


@dataclass(order=True)
class VirtualTimer:
    when: float
    order: int
    callback: Callable[..., object] = field(compare=False)
    args: tuple = field(compare=False)
    over: bool = field(default=False, compare=False)  # fired or cancelled

    def cancel(self) -> None:
        self.over = True


class VirtualTimers:
    """See router.ports.Timers: they fire where the test's clock passes them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[VirtualTimer] = []
        self._order = count()

    def call_later(self, delay: float, callback: Callable[..., object], *args: object):
        timer = VirtualTimer(self._clock.now + delay, next(self._order), callback, args)
        heapq.heappush(self._heap, timer)
        return timer

    def fire_due(self) -> bool:
        fired = False
        while self._heap and (self._heap[0].over or self._heap[0].when <= self._clock.now):
            timer = heapq.heappop(self._heap)
            if not timer.over:
                timer.over = fired = True
                timer.callback(*timer.args)
        return fired

    @property
    def pending(self) -> list[VirtualTimer]:
        return [timer for timer in self._heap if not timer.over]

    def next_at(self) -> float | None:
        return min((timer.when for timer in self.pending), default=None)


class Ticks(VirtualTimers):
    """The watchdog's: it counts its turns, which the test gives it."""

    def fire_due(self) -> bool:
        for timer in self.pending[:1]:
            self._heap.clear()
            timer.callback(*timer.args)
        return True


class Pieces:
    """Tokens that are parts of characters, words and ends of words."""

    strips_first_space = False
    _table = tuple(
        (b"\xe2\x82", b"\xac", b"%d " % token, b"%d." % token)[token % 4] for token in range(1000)
    )

    def __init__(self) -> None:
        self.ascii: dict[int, str] = {}

    def of(self, token_id: int, skip_special: bool) -> bytes:
        return self._table[token_id]


class Text:
    pieces = Pieces()


def detokenizer(prompt: list[int], stop: tuple[str, ...]) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(Text(), prompt, stop)


Scored = tuple[int, float, int, list[tuple[int, float]]]  # token, log-probability, rank, the top


def scores_of(prompt: list[int], top: int) -> list[Scored]:
    """What must be said of each token of a prompt but the first."""
    seen = (kv_of_tokens(prompt) * weights(0, len(prompt))).cumsum(dtype="uint64").tolist()
    found = []
    for token, before in zip(prompt[1:], seen):
        logprob, rank, ids = score(before, token, top, VOCAB)
        best = [(other, rank_logprob(place)) for place, other in enumerate(ids, 1)]
        found.append((token, logprob, rank, best))
    return found


def told_of(prompt: ScoredPrompt) -> list[Scored]:
    """The same of what a client was told."""
    return [
        (
            each.chosen.token_id,
            each.chosen.logprob,
            each.chosen.rank,
            [(other.token_id, other.logprob) for other in each.top],
        )
        for each in prompt.tokens()
    ]


@dataclass
class Answer:
    """What one continuation must be, and what has come of it."""

    token_ids: list[int]
    text: str
    reason: FinishReason
    scores: list[Scored] | None = None  # of the prompt, where that is asked for
    got_scores: list[Scored] | None = None
    got: list[int] = field(default_factory=list)
    got_text: str = ""
    got_reason: FinishReason | None = None

    @classmethod
    def of(cls, prompt: list[int], sampling: SamplingParams, index: int) -> Answer:
        answer, top = cls._drawn(prompt, sampling, index), sampling.prompt_logprobs
        answer.scores = None if top is None else scores_of(prompt, top)
        return answer

    @classmethod
    def _drawn(cls, prompt: list[int], sampling: SamplingParams, index: int) -> Answer:
        drawn = {"temperature": sampling.temperature, "seed": sampling.seed + index}
        tokens = undisturbed(prompt, sampling.max_tokens, **drawn)
        texts, whole = detokenizer(prompt, sampling.stop), ""
        for i, token in enumerate(tokens):
            piece = texts.push([token])
            whole += piece.text
            if piece.stopped is not None:
                return cls(tokens[: i + 1], whole, FinishReason.STOP)
        return cls(tokens, whole + texts.finish(), FinishReason.LENGTH)

    def take(self, delta: Delta) -> None:
        assert self.got_reason is None, "something came after the end"
        if delta.prompt is not None:
            assert self.got_scores is None and not self.got, "a prompt's scores came late, or twice"
            self.got_scores = told_of(delta.prompt)
            assert self.got_scores == self.scores, "wrong scores of a prompt"
        self.got += delta.token_ids
        self.got_text += delta.text
        self.got_reason = delta.finish_reason
        so_far = self.token_ids[: len(self.got)]
        assert self.got == so_far, f"wrong tokens: {self.got}, not {so_far}"
        assert self.text.startswith(self.got_text), f"wrong text: {self.got_text!r}"

    def check_whole(self) -> None:
        assert self.got == self.token_ids and self.got_reason is self.reason, "tokens are missing"
        assert self.got_text == self.text, "text is missing"
        assert self.got_scores == self.scores, "scores are missing"


class Client:
    """The reader of one request."""

    def __init__(self, request: Request, gateway: Gateway, see: Callable[[str], None]) -> None:
        self.request, self.gateway, self._see = request, gateway, see
        sampling, (prompt,) = request.sampling, request.prompts
        self.answers = [Answer.of(list(prompt), sampling, i) for i in range(request.n)]
        self.ends: list[str] = []
        self.left = False
        self._told = 0  # times that the stream was ended
        try:
            self.stream: ResponseStream | None = gateway.dispatcher.submit(request)
        except errors.CrossdockError as error:
            self.stream = None
            self._over(error)
            return
        end, push = self.stream.end, self.stream.push

        def in_time(delta: Delta) -> None:
            assert self._told == 0, "a token was delivered after the end"
            push(delta)

        def counted(error: errors.CrossdockError | None = None) -> None:
            self._told += 1
            assert self._told == 1, "a request ended twice"
            end(error)

        self.stream.end, self.stream.push = counted, in_time  # type: ignore[method-assign]

    def leave(self) -> None:
        self.left = True
        self.stream.close()

    def read(self) -> None:
        try:
            while batch := self.stream.take():
                for delta in batch:
                    self.answers[delta.index].take(delta)
        except errors.CrossdockError as error:
            self._over(error)
            return
        if self.stream.ended:
            for answer in self.answers:
                answer.check_whole()
            if self.request.sampling.prompt_logprobs is not None:
                self._see("scored")
            if not self.request.sampling.max_tokens:
                self._see("no token asked for")
            self._over(None)

    def _over(self, error: errors.CrossdockError | None) -> None:
        how = "finished" if error is None else type(error).__name__
        if isinstance(error, errors.DeadlineExceeded):
            now, deadline = self.gateway.dispatcher._clock(), self.request.deadline
            assert deadline is not None and deadline <= now + 0.001, "ended before its deadline"
        elif isinstance(error, errors.Cancelled):
            assert self.left, f"nobody cancelled it: {error}"
        elif error is not None:
            assert type(error) in ENDS or isinstance(error, errors.Unavailable), repr(error)
        self.ends.append(how)
        self._see(how)
