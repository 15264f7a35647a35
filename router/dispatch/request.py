"""The nouns of the gateway: what a client asked for, and what streams back to it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from crossdock.proto.errors import Cancelled, CrossdockError, DeadlineExceeded
from crossdock.proto.types import FinishReason, SamplingParams
from crossdock.proto.v1 import inference_pb2
from crossdock.router.dispatch.scored import ScoredPrompt


@dataclass(frozen=True)
class EndedSequence:
    """What became of one continuation."""

    index: int  # prompt * n + continuation
    prompt_tokens: int
    cached_tokens: int
    token_ids: Sequence[int]  # generated and delivered
    finish_reason: FinishReason | None  # None: it did not get to its end
    prefill_worker: str
    decode_worker: str
    events: Mapping[str, float]  # life-cycle event -> seconds since the request was received
    worker_seconds: float  # of the engines that served it, as far as they worked for it
    gpu_seconds: float  # the same, of each of an engine's GPUs
    started: bool = False  # its prompt was sent to a worker, which is done when one would begin it


@dataclass(frozen=True)
class Ended:
    """What became of a request."""

    error: CrossdockError | None
    seconds: float  # since it was received
    n: int
    sequences: Sequence[EndedSequence]

    @property
    def charged(self) -> Sequence[EndedSequence]:
        """Those that had a token, or asked for none and ended well; none at all where the client is
        to send the request again. Of a client that gave up, also those whose prompt was started."""
        if self.error is not None and self.error.retriable:
            return ()
        gave_up = isinstance(self.error, Cancelled | DeadlineExceeded)
        return [
            each
            for each in self.sequences
            if each.token_ids or each.finish_reason or (gave_up and each.started)
        ]

    @property
    def prompt_tokens(self) -> int:
        """Of the prompts, each once."""
        return sum(s.prompt_tokens for s in self._firsts)

    @property
    def cached_tokens(self) -> int:
        """Of prompt_tokens, those that were found in a cache."""
        return sum(s.cached_tokens for s in self._firsts)

    @property
    def generated_tokens(self) -> int:
        """Of all continuations."""
        return sum(len(sequence.token_ids) for sequence in self.charged)

    @property
    def _firsts(self) -> Iterable[EndedSequence]:
        """Of each prompt the first continuation that is charged."""
        return {s.index // self.n: s for s in reversed(self.charged)}.values()


@dataclass(frozen=True)
class Request:
    """A validated, tokenized request: `n` continuations of each of `prompts`."""

    request_id: str
    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    received: float  # on the gateway's clock, seconds
    received_unix: float  # the same moment, wall clock
    n: int = 1
    model: str = ""  # that serves it, by its own name
    asked_model: str = ""  # what the client called it: its name, an alias, a route, or nothing
    route: str = ""  # why that model, where a route chose
    response: str = ""  # id that its answer has of its own
    answered_by: str = ""  # decode worker of the turn that this one goes on from
    tenant: str = ""  # who takes turns with others, and has one share of the room
    priority: int = 0
    cache_salt: bytes = b""
    root_hash: bytes = b""  # that the chains begin with
    # By prompt, the hashes of its full blocks, as far as they are known.
    chains: list[list[bytes]] = field(default_factory=list)
    deadline: float | None = None  # on the gateway's clock
    shown: frozenset[int] = frozenset()  # special tokens whose text the client's door reads
    trace_context: Any = None  # opentelemetry Context that the client's headers carried
    on_end: Callable[[Ended], None] | None = None  # is called once, however it ends

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.n


@dataclass
class Delta:
    """What one continuation gained. Index counts prompts first: prompt * n + continuation."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[inference_pb2.TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # set in the last delta of an index
    stop_reason: str = ""
    cut_short: bool = False  # a stop string was found while the worker goes on
    usage: inference_pb2.Usage | None = None  # with finish_reason
    timings: inference_pb2.Timings | None = None  # with finish_reason
    prompt: ScoredPrompt | None = None  # with the first delta of an index, where asked for

    def absorb(self, later: Delta) -> None:
        """Appends what the same index gained next."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.usage = later.usage
        self.timings = later.timings


def request_id_of(answer: str) -> str:
    """A request's id, from what the OpenAI API calls its answer: chatcmpl- or cmpl- before it."""
    return re.sub(r"^(chat)?cmpl-", "", answer)


class Sink(Protocol):
    """Takes deltas where they are pushed; False: not now, and nothing of it was taken."""

    def delta(self, delta: Delta) -> bool: ...

    def tokens(self, index: int, text: str, token_ids: list[int]) -> bool:
        """A delta that brings nothing but these. False also where it is to come as a delta."""


class ResponseStream:
    """Deltas of one request on their way to one reader.

    The buffer is bounded by the request's max_tokens; a reader that falls behind gets the deltas
    of an index merged. `close` is how the reader says that it is gone.
    """

    def __init__(self, on_close: Callable[[], None]) -> None:
        self.ended = False
        self._buffer: dict[int, Delta] = {}  # by index
        self._waiter: asyncio.Future[None] | None = None
        self._error: CrossdockError | None = None
        self._on_close = on_close
        self._sink: Sink | None = None

    # -- the dispatcher's side ----------------------------------------------------------------

    def push(self, delta: Delta) -> None:
        if self._sink is not None and not self._buffer and self._sink.delta(delta):
            return
        _merge(self._buffer, delta)
        self._wake()

    def push_tokens(self, index: int, text: str, token_ids: list[int]) -> None:
        """The same for what is most of all: tokens with their text, and nothing else."""
        sink = self._sink
        if sink is None or self._buffer or not sink.tokens(index, text, token_ids):
            self.push(Delta(index, text, token_ids))

    def end(self, error: CrossdockError | None = None) -> None:
        self.ended = True
        self._error = error
        self._on_close = _nothing  # what it was holds the request, which holds this
        self._wake()

    # -- the reader's side --------------------------------------------------------------------

    async def batch(self) -> list[Delta]:
        """Waits until `take` has something: at least one delta; empty at the end."""
        while not self._buffer and not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.take()

    @property
    def done(self) -> bool:
        """It has ended well, and all of it was read."""
        return self.ended and not self._buffer and self._error is None

    def pipe(self, sink: Sink) -> None:
        """From now on a delta goes to `sink` as it comes. One that `sink` cannot take, where it
        answers False, and those after it are for `batch`."""
        self._sink = sink

    async def whole(self) -> list[Delta]:
        """Waits for the end: all that each index gained as one delta, in their order."""
        found: dict[int, Delta] = {}
        async for delta in self:
            _merge(found, delta)
        return [found[index] for index in sorted(found)]

    def take(self) -> list[Delta]:
        """All deltas that came since the last call, without waiting: none as yet, or at the end.
        Raises the CrossdockError that ended the request, after what came before it was read."""
        batch, self._buffer = list(self._buffer.values()), {}
        if not batch and self._error is not None:
            raise self._error
        return batch

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while batch := await self.batch():
            for delta in batch:
                yield delta

    def close(self) -> None:
        """The reader is gone: whatever still runs for it stops."""
        self._on_close()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _nothing() -> None:
    pass


def _merge(into: dict[int, Delta], delta: Delta) -> None:
    earlier = into.setdefault(delta.index, delta)
    if earlier is not delta:
        earlier.absorb(delta)
