"""Which prompt tokens a prefill worker computes next. Pure bookkeeping: no torch, no clock.

    WAITING ─admit─> COMPUTING ─last chunk─> computed (the blocks go to whoever takes them next)
        └────────────────┴─remove─> gone

First come, first served within a priority, and the head of the queue is finished before the next
begins: finishing one prompt early beats advancing two, so several share a step only as far as that
saves time. Only a prompt that yields, being late or one of many, has others go between its chunks,
which are steps of their own. A prompt looks for its prefix when its first chunk is planned, not
when it arrives, so it finds what the prompts before it have just computed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

from crossdock.kvcache import block_tables
from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.proto.steps import YIELDING_SHARE
from crossdock.worker.scheduler import Scheduler

YIELDED_STEPS = 16  # without a chunk, before it has one all the same


class PrefillScheduler(Scheduler):
    """Owns the block tables of the prompts it computes, from admission to their last chunk."""

    def __init__(self, pool: BlockPool, chunk_tokens: int, lookahead: int = 0) -> None:
        self._computing: list[Sequence] = []
        self._last = 0  # of whom is begun: the most that one yields
        self._yielded = 0  # steps since such a one had a chunk, where there is one
        super().__init__(pool, chunk_tokens, lookahead, self._computing)

    def schedule(self, together: float = math.inf) -> StepPlan | None:
        """The next step, or None when nothing can run. Admits as far as the budget reaches; no
        prompt joins a step of `together` tokens, for those in it would wait for it."""
        most, used = self._chunk_tokens, 0
        self._last = max((sequence.yields for sequence in self._computing), default=0)
        chunks: list[Chunk] = []
        begun = deque(sorted(self._computing, key=self._yields))
        while used < most and (sequence := self._next(begun)) is not None:
            if chunks and self._yields(sequence) > self._yields(chunks[-1].sequence):
                break  # those that do not yield would wait for it
            if sequence.yields:  # so that nobody waits for it for long
                most = min(most, used + max(1, self._chunk_tokens // YIELDING_SHARE))
            chunks.append(self._chunk(sequence, most - used))
            used += chunks[-1].length
            most = int(min(most, together))
        waits = self._last and all(chunk.sequence.yields < self._last for chunk in chunks)
        self._yielded = self._yielded + 1 if waits else 0
        return StepPlan(tuple(chunks)) if chunks else None

    def _next(self, begun: deque[Sequence]) -> Sequence | None:
        """Who has a chunk next: the first of those `begun`, unless one waits to which it yields,
        with room for it."""
        waiting = self._waiting[0] if self._waiting else None
        if begun and (waiting is None or self._yields(waiting) >= self._yields(begun[0])):
            return begun.popleft()
        if waiting is not None and self._take_blocks(waiting):
            self._computing.append(self._waiting.pop(0))
            return waiting
        return begun.popleft() if begun else None

    def _take_blocks(self, sequence: Sequence) -> bool:
        reusable = sequence.reusable
        return block_tables.take(self._pool, sequence, reusable, lookahead=self._lookahead)

    def _yields(self, sequence: Sequence) -> int:
        """To whom; not for ever."""
        starved = self._yielded >= YIELDED_STEPS and sequence.yields == self._last
        return -1 if starved else sequence.yields

    def computed(self, chunk: Chunk, drawn: int = 1) -> None:
        """Takes note that a chunk's KV is in its blocks, and of how many tokens were drawn after
        it. The sequence leaves with token 0, or with its prompt where it asks for no token; where
        token 0 was not drawn, its last token runs again."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.end - (chunk.sample and not drawn)
        block_tables.seal_full(self._pool, sequence)
        if not sequence.num_uncomputed:
            self._computing.remove(sequence)

    def _uncomputed(self) -> Iterator[tuple[int, Sequence]]:
        yield from ((self._cached(sequence), sequence) for sequence in self._waiting)
        yield from ((sequence.num_computed, sequence) for sequence in self._computing)
