"""What a gateway believes of one worker: how it stands, what it was just sent, how fast it is.

A worker's load report is a little old. Work placed since then is counted on top of it until a
report arrives that can have seen it; without this a burst would go to one worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

from crossdock.proto.steps import YIELDING_SHARE, Yields, attention
from crossdock.proto.types import Role
from crossdock.proto.v1 import worker_pb2
from crossdock.router.placement.speed import (
    DEFAULT_DECODE,
    DEFAULT_PREFILL,
    Line,
    PoolSpeeds,
    decode_line,
    prefill_line,
)

T = TypeVar("T")

REUSED = 0.1  # how probable it is that somebody will ask for a block that a prompt evicts
STALE_AFTER_S = 2.5  # workers report at least once a second
STALE_AT_WORK_AFTER_S = 1.5  # and after each step where they have work
FAILED_FOR_S = 2.0  # a device that failed a step is left alone for so long while there are others
SEEN_AFTER_S = 0.05  # a report that arrives this long after a send has counted what was sent
MEASURED_FOR_S = 10.0  # what was measured longer ago refuses nobody
MEASURED_UP_TO = 8  # steps this many times as large as any that was measured are not known
INFINITE = float("inf")
ANY_CHUNK = 2**53  # tokens of a step, of a worker that does not say


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
class Placed:
    """A sequence that was promised to a worker."""

    tokens: int  # uncached prompt tokens to compute
    blocks: int
    attention: float = 0.0  # tokens × context of the chunks that compute them
    context: int = 0  # tokens of the stream that joins
    yields: int = 0  # see Yields
    sent_at: float | None = None  # None: reserved, not sent yet


class _Unseen(dict[str, Placed]):
    """What was promised to a worker and is not in its reports yet, by key, with its totals."""

    tokens = blocks = context = 0
    attention = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.by_yields = [[0, 0.0] for _ in Yields]  # tokens, and their attention

    def put(self, key: str, item: Placed) -> None:
        self.drop(key)
        self[key] = item
        self.tokens += item.tokens
        self.blocks += item.blocks
        self.context += item.context
        self.attention += item.attention
        of = self.by_yields[item.yields]
        of[0] += item.tokens
        of[1] += item.attention

    def drop(self, key: str) -> None:
        item = self.pop(key, None)
        if item is not None:
            self.tokens -= item.tokens
            self.blocks -= item.blocks
            self.context -= item.context
            self.attention -= item.attention
            of = self.by_yields[item.yields]
            of[0] -= item.tokens
            of[1] -= item.attention


class Numbers(NamedTuple, Generic[T]):
    """What decisions read: of one worker numbers, of several arrays [workers]. Tokens, blocks,
    sequences, seconds. Placed work counts; speeds are as presumed at the last change."""

    most_tokens: T  # that a sequence there may grow to; -1: it takes none
    fresh_until: T  # when it is stale, if nothing is heard of it
    well_from: T  # until then its device may be broken
    available_blocks: T
    free_blocks: T  # of these, what nobody's cached KV is evicted for
    spare_tokens: T  # of available_blocks, less what its streams are expected to draw yet
    block_size: T
    block_bytes: T
    queued_tokens: T
    sequences: T
    queue_s: T  # until the prompts that wait there are computed, but for those that yield
    yielding_s: T  # until those are of them that are of many
    late_s: T  # and those that are late
    chunk_tokens: T  # of a step at the most
    chunk_s: T  # of each chunk, with the step of those who decode there before it
    token_s: T  # more for each token
    attention_s: T  # more for each token × context
    running_s: T  # of a decode step as it is; 0: nobody decodes
    step_s: T  # of one with a sequence more
    context_s: T  # more for each token of its context
    wait: T  # steps for each of that sequence's, with those in which others have the places

    def before_s(self, yields: int) -> T:
        """Until the prompts are computed that one comes after which yields so."""
        seconds: Any = self.queue_s
        if yields:
            seconds = seconds + self.yielding_s
        return seconds + self.late_s if yields > 1 else seconds


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
    unseen: _Unseen = field(default_factory=_Unseen)
    computing: dict[str, Placed] = field(default_factory=dict)  # prompts sent, no token 0 yet
    computing_since: float = 0.0  # the first of them
    failed_at: float = float("-inf")  # its device failed a step and nothing shows why
    prefill_line: Line | None = None  # as it measured itself, or nothing
    decode_line: Line | None = None
    lines: tuple[Line, Line] = DEFAULT_PREFILL, DEFAULT_DECODE  # as presumed, of both kinds
    output: float = 0.0  # tokens that each stream here is presumed to draw yet

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def role(self) -> Role:
        return self.facts.role

    @property
    def queued_tokens(self) -> float:
        return self.numbers.queued_tokens

    def tokens_before(self, yields: int) -> float:
        """Of queued_tokens those of prompts that do not yield to one that does so."""
        if self.role is not Role.PREFILL:
            return self.queued_tokens
        load, unseen = self.load, self.unseen.by_yields
        late = load.late_tokens + unseen[Yields.LATE][0]
        of_many = load.yielding_tokens + unseen[Yields.OF_MANY][0]
        return self.queued_tokens - (0 if yields > 1 else late) - (0 if yields else of_many)

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

    def prompt_s(self, cached: float, tokens: float) -> float:
        """Predicted time to compute a prompt of which so many tokens are cached and so many not,
        in chunks, once it has its turn."""
        numbers = self.numbers
        chunks = -(-tokens // numbers.chunk_tokens)
        attended = attention(cached, tokens, numbers.chunk_tokens)
        seconds = chunks * numbers.chunk_s + tokens * numbers.token_s
        return seconds + attended * numbers.attention_s

    def prompts_s(self, tokens: float, attended: float) -> float:
        """The same of several that share chunks; `attended`: their tokens × context."""
        numbers = self.numbers
        seconds = tokens / numbers.chunk_tokens * numbers.chunk_s + tokens * numbers.token_s
        return seconds + attended * numbers.attention_s

    def ttft_s(self, cached: float, tokens: float, yields: int = 0) -> float:
        """Predicted time until token 0 of a prompt that comes after those that wait there."""
        return self.numbers.before_s(yields) + self.prompt_s(cached, tokens)

    def stream_s(self, context: float, output: float, tpot_s: float = INFINITE) -> float:
        """Predicted seconds of the steps of a stream that joins, and until there is a place; over
        `output` tokens, its context on the average of so many. What a step takes beyond `tpot_s`
        counts for each stream there, since all miss that."""
        numbers = self.numbers
        step_s = numbers.step_s + context * numbers.context_s
        missed_s = max(step_s - tpot_s, 0.0) * numbers.sequences
        return numbers.wait * output * (step_s + missed_s)

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

    def presume(self, queued: float, sequences: float) -> tuple[Line, Line]:
        """How long steps of prompts and of decodes take, as far as is known now; and streams."""
        self.output = self.speeds.output
        prefill = self.prefill_line if queued else None
        decode = self.decode_line if sequences else None
        self.lines = prefill or self.speeds.prefill.line, decode or self.speeds.decode.line
        return self.lines

    def changed(self) -> None:
        """What decisions read is made anew when one is made."""
        self.__dict__.pop("numbers", None)

    @cached_property
    def numbers(self) -> Numbers[float]:
        """What was placed counts on top of what was reported."""
        facts, load, unseen = self.facts, self.load, self.unseen
        queued = load.queued_tokens + unseen.tokens
        sequences = load.waiting + load.running + len(unseen)
        (base, slope, attention_s), (step, share, context_s) = self.presume(queued, sequences)
        blocks = load.free_blocks + load.cached_blocks if load.total_blocks else facts.num_blocks
        available = blocks - unseen.blocks
        joined = sequences + 1
        most = facts.max_batch or joined  # each of so many streams leaves one place in its time
        # Of those who wait for a place the contexts count when they have one.
        context = (load.context_tokens + unseen.context) * min(1.0, most / joined)
        running_s = step + share * min(sequences, most) + context * context_s if sequences else 0.0
        chunk_tokens = facts.chunk_tokens or ANY_CHUNK
        chunk_s = base if facts.role is Role.PREFILL else base + running_s
        of_many = late = of_many_attention = late_attention = 0.0
        if facts.role is Role.PREFILL:  # elsewhere nobody yields
            _, (of_many, of_many_attention), (late, late_attention) = unseen.by_yields
            of_many += load.yielding_tokens
            of_many_attention += load.yielding_attention
            late += load.late_tokens
            late_attention += load.late_attention
        # A report that contradicts itself must not make a wait less than none.
        before = max(0.0, queued - of_many - late)
        attended = load.queued_attention + unseen.attention - of_many_attention - late_attention
        token_s = chunk_s / chunk_tokens + slope
        of_many_s = of_many * token_s + of_many_attention * attention_s
        late_s = late * token_s + late_attention * attention_s
        begun_s = 0.0  # of a chunk that yielded to nobody, half of which is over on the average
        if of_many or late:
            begun_s = (base + min(of_many + late, chunk_tokens / YIELDING_SHARE) * slope) / 2
        return Numbers(
            -1 if load.draining else facts.most_tokens,
            float("-inf")
            if load.late
            else self.reported_at + (STALE_AT_WORK_AFTER_S if sequences else STALE_AFTER_S),
            self.failed_at + FAILED_FOR_S,
            available,
            min(available, load.free_blocks) if load.total_blocks else available,
            available * facts.block_size - sequences * self.output,
            facts.block_size,
            facts.block_bytes,
            queued,
            sequences,
            before * token_s + max(0.0, attended) * attention_s + begun_s,
            of_many_s - begun_s if of_many else 0.0,
            late_s if of_many else late_s - begun_s,
            chunk_tokens,
            chunk_s,
            slope,
            attention_s,
            running_s,
            step + share * min(joined, most) + context * context_s,
            context_s,
            max(1.0, joined / most),
        )
