"""What a gateway believes of one worker: how it stands, what it was just sent, how fast it is.

A worker's load report is a little old. Work placed since then is counted on top of it until a
report arrives that can have seen it; without this a burst would go to one worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2
from crossdock.router.placement.speed import (
    Line,
    PoolSpeeds,
    decode_line,
    prefill_line,
    step_line,
)

T = TypeVar("T")

STALE_AFTER_S = 2.5  # workers report at least once a second
STALE_AT_WORK_AFTER_S = 1.5  # and after each step where they have work
FAILED_FOR_S = 2.0  # a device that failed a step is left alone for so long while there are others
SEEN_AFTER_S = 0.05  # a report that arrives this long after a send has counted what was sent
MEASURED_FOR_S = 10.0  # what was measured longer ago refuses nobody
MEASURED_UP_TO = 8  # steps this many times as large as any that was measured are not known
STREAM_TOKENS = 100  # over so many a decode worker's TPOT is weighed against seconds before them
ANY_CHUNK = 2**53  # tokens of a step, of a worker that does not say
AS_ITS_POOL: Line = (float("nan"), float("nan"))


LoadReport = worker_pb2.Load  # the newest that a worker sent; zeros mean not measured yet


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself when its stream opens; zeros mean that it did not say."""

    name: str
    role: Role
    incarnation: str
    num_blocks: int
    block_size: int
    block_bytes: int
    pool: str = ""
    layout_hash: bytes = b""
    context_length: int = 0  # tokens
    max_batch: int = 0  # sequences that decode at once; more wait
    chunk_tokens: int = 0  # of one prefill step at the most
    gpus: float = 0.0  # of its engine
    weights_digest: str = ""

    @cached_property
    def most_tokens(self) -> int:
        """The longest sequence that it can hold."""
        pool_tokens = self.num_blocks * self.block_size
        return min(pool_tokens, self.context_length or pool_tokens)


@dataclass
class Unseen:
    """A sequence that was promised to a worker and is not in its reports yet."""

    tokens: int  # uncached prompt tokens to compute
    blocks: int
    sent_at: float | None = None  # None: reserved, not sent yet


class _Placed(dict[str, Unseen]):
    """What was promised to a worker and is not in its reports yet, by key, with its totals."""

    tokens = blocks = 0

    def put(self, key: str, item: Unseen) -> None:
        self.drop(key)
        self[key] = item
        self.tokens += item.tokens
        self.blocks += item.blocks

    def drop(self, key: str) -> None:
        item = self.pop(key, None)
        if item is not None:
            self.tokens -= item.tokens
            self.blocks -= item.blocks


class Numbers(NamedTuple, Generic[T]):
    """What decisions read: of one worker numbers, of several arrays [workers]. Tokens, blocks,
    sequences, seconds."""

    most_tokens: T  # that a sequence there may grow to; -1: it takes none
    fresh_until: T  # when it is stale, if nothing is heard of it
    well_from: T  # until then its device may be broken
    available_blocks: T
    block_bytes: T
    chunk_tokens: T  # of a step at the most
    queued_tokens: T  # reported and placed since
    sequences: T
    batch: T  # of its decode steps with one sequence more
    stream_steps: T  # STREAM_TOKENS, and those that a stream which joins waits for a place
    prefill_base: T  # of its own steps' times, where it goes by them; NaN: by its pool's
    prefill_slope: T
    step_base: T
    step_slope: T


@dataclass(eq=False)
class WorkerView:
    """One connected worker. Times are of the clock that the callers pass in. Its view says
    `changed` after each change of what was placed there."""

    facts: WorkerFacts
    slot: int  # in the prefix index
    speeds: PoolSpeeds  # of its pool
    reported_at: float
    measured_at: float = float("-inf")  # when its prefill speed last changed
    load: LoadReport = field(default_factory=LoadReport)
    unseen: _Placed = field(default_factory=_Placed)
    computing: dict[str, int] = field(default_factory=dict)  # prompt tokens sent, no token 0 yet
    computing_since: float = 0.0  # the first of them
    failed_at: float = float("-inf")  # its device failed a step and nothing shows why
    prefill_line: Line | None = None  # as it measured itself, or nothing
    decode_line: Line | None = None

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def role(self) -> Role:
        return self.facts.role

    @property
    def queued_tokens(self) -> float:
        return self.numbers.queued_tokens

    @property
    def sequences(self) -> float:
        return self.numbers.sequences

    @property
    def available_blocks(self) -> float:
        return self.numbers.available_blocks

    def is_stale(self, now: float) -> bool:
        """It hangs, is cut off or has a broken device, as far as can be told."""
        return now > self.numbers.fresh_until or now < self.numbers.well_from

    def knows_prefill(self, tokens: float, now: float) -> bool:
        """Whether it measured lately, and not on much smaller steps, how long so many tokens take:
        what may be wrong must not keep itself from being corrected."""
        step = min(tokens, self.facts.chunk_tokens or tokens)
        known = MEASURED_UP_TO * self.load.prefill_step_tokens or step
        return now - self.measured_at <= MEASURED_FOR_S and step <= known

    def prefill_s(self, tokens: float) -> float:
        """Predicted time to compute `tokens` prompt tokens, as presumed by speed.py."""
        numbers = self.numbers
        base, slope = numbers.prefill_base, numbers.prefill_slope
        if base != base:
            base, slope = self.speeds.prefill.line
        return base * -(-tokens // numbers.chunk_tokens) + slope * tokens

    def step_s(self, batch: float) -> float:
        """Predicted time of one decode step over `batch` sequences, which is their TPOT."""
        base, slope = self.numbers.step_base, self.numbers.step_slope
        if base != base:
            base, slope = step_line(self.speeds.decode.line)
        return base + slope * batch

    def ttft_s(self, tokens: float) -> float:
        """Predicted time until token 0 of the last of `tokens` prompt tokens."""
        seconds = self.prefill_s(tokens)
        if self.facts.role is Role.COLOCATED:  # a step of the running batch goes before each chunk
            seconds += self.step_s(self.sequences)
        return seconds

    @property
    def stream_s(self) -> float:
        """Predicted seconds of STREAM_TOKENS steps after joining, and until there is a place."""
        return self.numbers.stream_steps * self.step_s(self.numbers.batch)

    def reported(self, load: LoadReport, now: float) -> None:
        """It said how it stands; work placed there that it has counted is counted no more."""
        prefill, decode = prefill_line(load), decode_line(load)
        if prefill != self.prefill_line:
            self.prefill_line = prefill
            if prefill is not None:
                self.speeds.prefill.measured(prefill)
                self.measured_at = now
        if decode != self.decode_line:
            self.decode_line = decode
            if decode is not None:
                self.speeds.decode.measured(decode)
        self.load, self.reported_at = load, now
        if self.unseen:
            seen = [
                key
                for key, item in self.unseen.items()
                if item.sent_at is not None and now - load.age_s - item.sent_at >= SEEN_AFTER_S
            ]
            for key in seen:
                self.unseen.drop(key)
        self.__dict__.pop("numbers", None)

    def changed(self) -> None:
        """What decisions read is made anew when one is made."""
        self.__dict__.pop("numbers", None)

    @cached_property
    def numbers(self) -> Numbers[float]:
        """What was placed counts on top of what was reported."""
        facts, load, unseen = self.facts, self.load, self.unseen
        queued = load.queued_tokens + unseen.tokens
        sequences = load.waiting + load.running + len(unseen)
        blocks = load.free_blocks + load.cached_blocks if load.total_blocks else facts.num_blocks
        silent_s = STALE_AT_WORK_AFTER_S if sequences else STALE_AFTER_S
        joined = sequences + 1
        most = facts.max_batch or joined  # each of so many streams leaves one place in its time
        return Numbers(
            -1 if load.draining else facts.most_tokens,
            float("-inf") if load.late else self.reported_at + silent_s,
            self.failed_at + FAILED_FOR_S,
            blocks - unseen.blocks,
            facts.block_bytes,
            facts.chunk_tokens or ANY_CHUNK,
            queued,
            sequences,
            min(joined, most),
            STREAM_TOKENS * max(1.0, joined / most),
            *(self.prefill_line if queued and self.prefill_line else AS_ITS_POOL),
            *(step_line(self.decode_line) if sequences and self.decode_line else AS_ITS_POOL),
        )
