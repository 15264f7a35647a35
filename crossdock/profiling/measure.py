"""Sends shaped requests to an idle cluster and notes what they took.

Prompts go alone, one token out, so that a prefill worker computes one at a time and nobody decodes:
of several lengths, and again with a suffix behind a prefix that is cached. Then come waves of
streams that decode together, counted from when the last of them has its first token. Where workers
share a host, prompts are sent once more while streams decode: what they cost each other.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle

from crossdock.client import AsyncClient
from crossdock.profiling.fit import Beside, PromptTime, StepTime
from crossdock.proto.errors import CrossdockError
from crossdock.results import Timings

TOKEN_IDS = (100, 250)  # of made-up prompts: every vocabulary has them
SHORTEST = 16  # prompt tokens
LONGEST = 32_768
PROMPTS_SHARE = 0.45  # of the time that there is
SUFFIXES_SHARE = 0.6  # until these are done as well
ROUNDS = 4  # of prompts of all lengths, at the most
BATCHES = (1, 4, 16, 2, 8, 64, 256)  # streams of a decode worker
WINDOW = 24  # steps of a wave that are counted, about
WAVES_SHARE = 0.8  # until these are, where workers share a host
BESIDE_STREAMS = 4
BESIDE_TOKENS = (64, 1024)  # of a prompt: not over at once, and several in the time
ENOUGH_WAVES = 4  # these are sent however long they take
FEWEST_STEPS = 6  # that a step's time is the mean of
TIMEOUT_S = 120.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """What the workers take. Sizes in tokens, unless they say otherwise."""

    context: int  # of a sequence
    chunk: int  # of a prefill step, by the worker with the least
    block: int
    pool: int  # of the smallest decode worker's KV
    batch: int  # sequences of a decode worker
    decoders: int  # workers that decode
    neighbours: int = 0  # workers that only compute prompts, where they share the decoders' host


@dataclass
class Stream:
    """One request: when its tokens came (by the client), how many, and what the gateway says."""

    prompt: int
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # of a message: when, tokens
    cached: int = 0
    timings: Timings | None = None
    sent: float = 0.0  # by the client

    @property
    def prefill(self) -> tuple[float, float] | None:
        """From when to when its prompt was computed, by the client; None where nobody says."""
        events = self.timings.events if self.timings else {}
        began, ended = events.get("prefill_started"), events.get("first_token")
        if began is None or ended is None or ended <= began:
            return None
        return self.sent + began, self.sent + ended

    @property
    def worker(self) -> str:
        """That decoded it."""
        return self.timings.decode_worker if self.timings else ""


class Measurement:
    """Of one cluster. `seconds`: how long it may take, about; `chunks`: of each worker, by name."""

    def __init__(
        self,
        client: AsyncClient,
        limits: Limits,
        chunks: dict[str, int],
        seconds: float,
        model: str = "",
        seed: int = 0,
        progress: Progress = lambda line: None,
    ) -> None:
        self.prompts: list[PromptTime] = []
        self.steps: list[StepTime] = []
        self.beside: list[Beside] = []
        self._client, self._limits, self._chunks = client, limits, chunks
        self._seconds, self._model, self._progress = seconds, model, progress
        self._rng = random.Random(seed)
        self._known: list[list[int]] = []  # prompts that were computed, the longest first
        self._began = 0.0
        self._step_s = 0.02  # of the newest wave

    async def run(self) -> None:
        """Measures everything. Raises CrossdockError where a request fails."""
        for _ in range(2):
            await self._ask(self._made_up(SHORTEST), 4)  # peers meet, kernels load
        self._began = time.monotonic()
        await self._all_lengths()
        await self._all_suffixes()
        await self._all_waves()
        if self._limits.neighbours:
            await self._all_beside()

    # -- prompts -------------------------------------------------------------------------------

    async def _all_lengths(self) -> None:
        longest = min(LONGEST, self._limits.context - 2, self._limits.pool - self._limits.block)
        lengths = [length for length in _lengths(SHORTEST) if length <= longest]
        for number in range(ROUNDS):
            for length in lengths:
                ahead_s = length * self._rate
                if self._used + ahead_s / self._seconds > PROMPTS_SHARE:
                    break
                prompt = self._made_up(length)
                await self._prompt(prompt)
                self._known.append(prompt)
            self._progress(f"prompts: round {number + 1}, {len(self.prompts)} measured")
            if self._used > PROMPTS_SHARE * (number + 1) / (number + 2):
                break  # no time for another round
        self._known.sort(key=len, reverse=True)

    async def _all_suffixes(self) -> None:
        """Prompts that begin with one just computed: more attention with as many tokens."""
        block = self._limits.block
        longest = max((each.tokens for each in self.prompts), default=0)
        for prefix in (longest // 2, longest - longest // 8, longest // 4):
            known = self._made_up(max(block, prefix // block * block))
            room = min(self._limits.context - 2, self._limits.pool - block) - len(known)
            suffixes = [n for n in (block, 4 * block, len(known) // 4) if 0 < n <= room]
            if (
                not suffixes
                or self._used + len(known) * self._rate / self._seconds > SUFFIXES_SHARE
            ):
                continue
            await self._prompt(known)
            for suffix in suffixes:
                await self._prompt(known + self._made_up(suffix))
        self._progress(f"prompts behind cached prefixes: {len(self.prompts)} measured in all")

    async def _prompt(self, token_ids: list[int]) -> None:
        taken = self._taken(await self._ask(token_ids, 1))
        if taken is not None:
            self.prompts.append(taken)

    def _taken(self, stream: Stream) -> PromptTime | None:
        timings, prefill = stream.timings, stream.prefill
        if timings is None or prefill is None:
            return None
        chunk = self._chunks.get(timings.prefill_worker or timings.decode_worker)
        if chunk is None:
            return None  # computed where prompts are not, as it happens to what is cached there
        return PromptTime.of(stream.cached, stream.prompt, chunk, prefill[1] - prefill[0])

    # -- decoding ------------------------------------------------------------------------------

    async def _all_waves(self) -> None:
        """Short sequences that nobody has seen, and the longest prompts that were measured, whose
        prefill is cached; as many at once as there is time for, then again."""
        batches = [batch for batch in BATCHES if batch <= self._limits.batch]
        waves = [(batch, long) for batch in batches for long in (False, True)]
        for number, (batch, long) in enumerate(waves * ROUNDS):
            ahead = self._ahead_s(batch) / self._seconds
            share = WAVES_SHARE if self._limits.neighbours else 1.0
            if number >= ENOUGH_WAVES and self._used + ahead > share:
                return
            prompts = self._prompts_of(batch * self._limits.decoders, long)
            await self._wave(prompts)
            context = sum(map(len, prompts)) // self._limits.decoders
            self._progress(f"decode: {batch} at once, {context} tokens of context")

    def _prompts_of(self, streams: int, long: bool) -> list[list[int]]:
        if not long:
            return [self._made_up(4 * SHORTEST) for _ in range(streams)]
        room = int(0.7 * self._limits.pool * self._limits.decoders)
        tokens = _wave_tokens(0.0)
        fitting = [
            known
            for known in self._known
            if streams * (len(known) + tokens) <= room
            and len(known) + tokens < self._limits.context
        ]
        fitting = fitting or [self._made_up(SHORTEST)]
        return [fitting[i % len(fitting)] for i in range(streams)]

    def _ahead_s(self, batch: int) -> float:
        """Seconds that a wave will take, about."""
        prefill_s = batch * self._limits.decoders * 4 * SHORTEST * self._rate
        return 2.5 * prefill_s + 2 * WINDOW * self._step_s

    async def _wave(self, prompts: list[list[int]]) -> None:
        """All of them decode until the last has begun, and then for WINDOW steps."""
        prefill_s = len(prompts) * 4 * SHORTEST * self._rate
        tokens = _wave_tokens(prefill_s / self._step_s)
        room = self._limits.context - max(map(len, prompts)) - 1
        wave = await asyncio.gather(*(self._ask(each, min(tokens, room)) for each in prompts))
        found = steps_of(wave)
        if found:
            self._step_s = found[-1].seconds
        self.steps += found

    # -- both ----------------------------------------------------------------------------------

    async def _all_beside(self) -> None:
        """Prompts while streams decode, at once as many as workers compute them, then one less, and
        so on; again until the streams or the time are over."""
        limits, left_s = self._limits, self._seconds * max(0.1, 1.0 - self._used)
        room = limits.context - 4 * SHORTEST - 1
        tokens = min(room, WINDOW + int(left_s / self._step_s))
        streams = [Stream(4 * SHORTEST) for _ in range(min(BESIDE_STREAMS, limits.batch))]
        wave = asyncio.gather(
            *(self._ask(self._made_up(each.prompt), tokens, each) for each in streams)
        )
        lengths = [n for n in _lengths(BESIDE_TOKENS[0]) if n <= BESIDE_TOKENS[1]]
        lengths = [n for n in lengths if n < limits.context - 1] or [SHORTEST]
        begun, counts = time.monotonic(), cycle(range(limits.neighbours, 0, -1))
        try:
            while not wave.done() and time.monotonic() - begun < left_s:
                if min(len(each.arrivals) for each in streams) < 2:
                    await asyncio.sleep(self._step_s)
                    continue
                length = self._rng.choice(lengths)
                sent = (self._ask(self._made_up(length), 1) for _ in range(next(counts)))
                prompts = await asyncio.gather(*sent)
                if not wave.done():
                    self.beside += self._found_beside(streams, prompts)
        finally:
            await wave
        self._progress(f"prompts beside decodes: {len(self.beside)} measured")

    def _found_beside(self, streams: Sequence[Stream], prompts: Sequence[Stream]) -> list[Beside]:
        others = len(prompts)
        taken = [each for each in map(self._taken, prompts) if each is not None]
        spans = [each.prefill for each in prompts if each.prefill is not None]
        workers = {each.timings.prefill_worker for each in prompts if each.timings}
        if len(taken) < len(prompts) or len(workers) < len(prompts):
            return []  # they were not computed at once
        found = [Beside(each, others) for each in taken]
        begin, end = max(begin for begin, _ in spans), min(end for _, end in spans)
        step = _step_within(streams, begin, end)
        return [*found, Beside(step, others)] if step is not None else found

    # -- requests ------------------------------------------------------------------------------

    @property
    def _used(self) -> float:
        """Of the time that there is."""
        return (time.monotonic() - self._began) / self._seconds

    @property
    def _rate(self) -> float:
        """Seconds a prompt token, so far."""
        tokens = sum(each.tokens for each in self.prompts)
        return sum(each.seconds for each in self.prompts) / tokens if tokens else 0.0

    def _made_up(self, length: int) -> list[int]:
        return self._rng.choices(range(*TOKEN_IDS), k=length)

    async def _ask(self, token_ids: list[int], tokens: int, stream: Stream | None = None) -> Stream:
        stream = stream or Stream(len(token_ids))
        stream.sent = time.perf_counter()
        chunks = self._client.stream(
            token_ids=token_ids,
            model=self._model,
            max_tokens=tokens,
            temperature=0.0,
            ignore_eos=True,
            timeout=TIMEOUT_S,
        )
        async for chunk in chunks:
            if chunk.token_ids:
                stream.arrivals.append((time.perf_counter(), len(chunk.token_ids)))
            if chunk.usage is not None:
                stream.cached = chunk.usage.cached_tokens
            stream.timings = chunk.timings or stream.timings
        if not stream.arrivals:
            raise CrossdockError(
                f"a request of {stream.prompt} tokens was answered without a token"
            )
        return stream


def steps_of(wave: Sequence[Stream], window: int = WINDOW // 2) -> list[StepTime]:
    """Times of steps from when all streams decode: of `window` steps of each stream with so many
    sequences running on its worker, the mean, and of that the median over these streams. A message
    that comes late brings the next one early, so gaps alone tell less."""
    settled = max(stream.arrivals[:2][-1][0] for stream in wave)
    by_worker: defaultdict[str, list[Stream]] = defaultdict(list)
    for stream in wave:
        by_worker[stream.worker].append(stream)
    found = []
    for streams in by_worker.values():
        means: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
        for stream in streams:
            for key, gaps in _gaps(stream, streams, settled, window).items():
                if (drawn := sum(tokens for _, tokens, _ in gaps)) >= FEWEST_STEPS:
                    mean_s = sum(seconds for seconds, _, _ in gaps) / drawn
                    means[key].append((mean_s, statistics.fmean(each for _, _, each in gaps)))
        for (sequences, _), of_streams in means.items():
            seconds = statistics.median(mean_s for mean_s, _ in of_streams)
            context = statistics.fmean(each for _, each in of_streams)
            found.append(StepTime(sequences, context, seconds))
    return found


def _step_within(streams: Sequence[Stream], begin: float, end: float) -> StepTime | None:
    """The mean step of these streams, all of one batch, between two times; None: too few."""
    means, contexts = [], []
    for stream in streams:
        before = sum(tokens for at, tokens in stream.arrivals if at < begin)
        within = [(at, tokens) for at, tokens in stream.arrivals if begin <= at <= end]
        drawn = sum(tokens for _, tokens in within[1:])
        if drawn < FEWEST_STEPS:
            return None
        means.append((within[-1][0] - within[0][0]) / drawn)
        contexts.append(stream.prompt + before + drawn / 2)
    return StepTime(len(streams), sum(contexts), statistics.median(means))


def _gaps(
    stream: Stream, streams: Sequence[Stream], settled: float, window: int
) -> dict[tuple[int, int], list[tuple[float, int, float]]]:
    """(seconds, tokens, context of all that ran) of a stream's gaps, by how many ran and by
    window."""
    found: defaultdict[tuple[int, int], list[tuple[float, int, float]]] = defaultdict(list)
    drawn = 1
    for (before, _), (now, count) in zip(stream.arrivals, stream.arrivals[1:]):
        if before >= settled:
            running = [each for each in streams if each.arrivals[-1][0] >= now]
            context = float(sum(each.prompt for each in running) + len(running) * drawn)
            found[len(running), drawn // window].append((now - before, count, context))
        drawn += count
    return found


def _wave_tokens(steps: float) -> int:
    """That each stream of a wave draws, so that all decode although it takes `steps` steps until
    the last of them does."""
    return WINDOW + int(1.5 * steps)


def _lengths(shortest: int) -> list[int]:
    """Twice as long each, and those half way between."""
    powers = _powers(shortest, 2)
    return sorted([*powers, *(3 * power // 2 for power in powers)])


def _powers(first: int, ratio: int) -> list[int]:
    found = [first]
    while found[-1] < LONGEST:
        found.append(found[-1] * ratio)
    return found
