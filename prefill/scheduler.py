"""Which prompt tokens a prefill worker computes next. Pure bookkeeping: no torch, no clock.

    WAITING ─admit─> COMPUTING ─last chunk─> computed (the blocks go to whoever takes them next)
        └────────────────┴─remove─> gone

First come, first served within a priority, and the head of the queue is finished before the next
begins: finishing one prompt early beats advancing two. A prompt looks for its prefix when its first
chunk is planned, not when it arrives, so it finds what the prompts before it have just computed.
"""

from __future__ import annotations

from collections.abc import Iterator

from crossdock.kvcache import block_tables
from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.worker.scheduler import Scheduler


class PrefillScheduler(Scheduler):
    """Owns the block tables of the prompts it computes, from admission to their last chunk."""

    def __init__(self, pool: BlockPool, chunk_tokens: int, lookahead: int = 0) -> None:
        self._computing: list[Sequence] = []
        super().__init__(pool, chunk_tokens, lookahead, self._computing)

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run. Admits as far as the budget reaches."""
        budget, chunks = self._chunk_tokens, []
        for sequence in self._computing:
            if budget == 0:
                break
            chunks.append(self._chunk(sequence, budget))
            budget -= chunks[-1].length
        while budget and self._waiting:
            sequence = self._waiting[0]
            reusable, lookahead = sequence.reusable, self._lookahead
            if not block_tables.take(self._pool, sequence, reusable, lookahead=lookahead):
                break
            self._computing.append(self._waiting.pop(0))
            chunks.append(self._chunk(sequence, budget))
            budget -= chunks[-1].length
        return StepPlan(tuple(chunks)) if chunks else None

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
