"""The nouns of the gateway: what a client asked for, and what streams back to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from crossdock.proto.errors import CrossdockError
from crossdock.proto.types import FinishReason, SamplingParams
from crossdock.proto.v1 import inference_pb2


@dataclass(frozen=True)
class Request:
    """A validated, tokenized request: `n` continuations of each of `prompts`."""

    request_id: str
    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    received: float  # on the gateway's clock, seconds
    received_unix: float  # the same moment, wall clock
    n: int = 1
    tenant: str = ""
    priority: int = 0
    cache_salt: bytes = b""
    deadline: float | None = None  # on the gateway's clock
    trace_context: Any = None  # opentelemetry Context that the client's headers carried

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

    def absorb(self, later: Delta) -> None:
        """Appends what the same index gained next."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.usage = later.usage
        self.timings = later.timings


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
        self._sink: Callable[[Delta], bool] | None = None

    # -- the dispatcher's side ----------------------------------------------------------------

    def push(self, delta: Delta) -> None:
        if self._sink is not None and not self._buffer and self._sink(delta):
            return
        _merge(self._buffer, delta)
        self._wake()

    def end(self, error: CrossdockError | None = None) -> None:
        self.ended = True
        self._error = error
        self._wake()

    # -- the reader's side --------------------------------------------------------------------

    async def batch(self) -> list[Delta]:
        """Waits until `take` has something: at least one delta; empty at the end."""
        while not self._buffer and not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.take()

    def pipe(self, sink: Callable[[Delta], bool]) -> None:
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
        if not self.ended:
            self._on_close()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _merge(into: dict[int, Delta], delta: Delta) -> None:
    earlier = into.setdefault(delta.index, delta)
    if earlier is not delta:
        earlier.absorb(delta)
