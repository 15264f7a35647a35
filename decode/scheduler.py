"""Which sequences a decode worker advances next. Pure bookkeeping: no torch, no clock.

    WAITING ─reserve─> PULLING ─join─> RUNNING ─token after token─> gone
        │                 └──────preempt──────┴─> gone, handed back
        └──admit (no ticket: this worker computes the prompt)──^

Decode tokens go first in every step; prompts computed here (colocated workers, short suffixes)
share what is left of the step's token budget, or a fixed part of it where that is more.
Blocks are reserved when there is room for all that the sequence has and for one more step of
everything that runs. An early reservation, for a prompt still being computed elsewhere, only uses
what room there is: it is preempted for whoever is complete, and before anybody who runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from crossdock.kvcache import block_tables
from crossdock.kvcache.block_pool import BlockPool, OutOfBlocks
from crossdock.kvcache.sequence import Chunk, Sequence, StepPlan
from crossdock.worker.scheduler import Scheduler, order

PROMPT_SHARE = 4  # prompts get at least this part (1/4) of a step's token budget


class DecodeScheduler(Scheduler):
    """Owns the block tables of pulling and running sequences; waiting ones hold no block."""

    def __init__(
        self, pool: BlockPool, max_batch: int, chunk_tokens: int, lookahead: int = 0
    ) -> None:
        """`max_batch`: sequences that run at once."""
        self._pulling: list[Sequence] = []
        self._running: list[Sequence] = []
        super().__init__(pool, chunk_tokens, lookahead, self._pulling, self._running)
        self._max_batch = max_batch
        self._remote: dict[Sequence, int] = {}  # of sequences with a ticket: tokens it covers

    def add(self, sequence: Sequence, remote_tokens: int = 0) -> None:
        """`remote_tokens`: of token_ids, how many have KV to pull; 0 computes them here."""
        if remote_tokens:
            self._remote[sequence] = remote_tokens
        super().add(sequence)

    def reserve(
        self, preemptible: Iterable[Sequence] = ()
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Gives blocks to waiting sequences, as far as they go: in order, first to complete ones.
        Returns those that now wait for a pull of block_table[num_sealed:] (the others have gone on
        to run), and the sequences preempted for complete ones; preemptible as for `schedule`."""
        spare = sorted(preemptible, key=order)
        reserved: list[Sequence] = []
        preempted: list[Sequence] = []
        for sequence in sorted(self._waiting, key=self._reserves_early):
            while not self._take_blocks(sequence):
                if not spare or self._reserves_early(sequence):
                    return reserved, preempted
                preempted.append(spare.pop())
                self.remove(preempted[-1])
            self._waiting.remove(sequence)
            if sequence in self._remote:
                self._pulling.append(sequence)
                reserved.append(sequence)
            else:
                self._running.append(sequence)
        return reserved, preempted

    def join(self, sequence: Sequence) -> None:
        """The pulled blocks were fenced: the sequence runs from the next step on."""
        self._pulling.remove(sequence)
        sequence.num_computed = self._remote.pop(sequence)
        block_tables.seal_full(self._pool, sequence)
        self._running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence in any state and frees its blocks."""
        self._remote.pop(sequence, None)
        super().remove(sequence)

    def schedule(
        self, preemptible: Iterable[Sequence] = ()
    ) -> tuple[StepPlan | None, list[Sequence]]:
        """The next step and the sequences preempted for it, whose blocks are already free.
        preemptible: of those reserved early, the ones whose blocks no transfer touches just now."""
        spare = sorted(preemptible, key=order)
        preempted: list[Sequence] = []
        chunks = []
        for sequence in sorted(self._running, key=order):
            if sequence.num_uncomputed == 1 and self._make_room(sequence, spare, preempted):
                chunks.append(Chunk(sequence, sequence.num_computed, 1, sequence.draws))
        # Decodes are never held up for a prompt, nor a prompt for good by many decodes.
        budget = max(self._chunk_tokens - len(chunks), self._chunk_tokens // PROMPT_SHARE, 1)
        for sequence in self._running.copy():
            uncomputed = sequence.num_uncomputed > 1 and budget > 0
            if uncomputed and self._make_room(sequence, spare, preempted):
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].length
        plan = StepPlan(tuple(c for c in chunks if c.sequence not in preempted))
        return (plan if plan.chunks else None), preempted

    def computed(self, chunk: Chunk, taken: int = 1) -> None:
        """Takes note that the KV of a chunk, and of all but the last of the `taken` tokens that it
        gained, is in its blocks."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.end + (taken - 1 if chunk.sample else 0)
        block_tables.seal_full(self._pool, sequence)

    def ended(self, sequence: Sequence) -> None:
        """Not by a failure, and is about to be removed: who goes on with it finds all of it."""
        block_tables.keep_tail(self._pool, sequence)

    def _uncomputed(self) -> Iterator[tuple[int, Sequence]]:
        yield from ((self._cached(s), s) for s in self._waiting if s not in self._remote)
        yield from ((s.num_computed, s) for s in self._running if s.num_uncomputed > 1)

    def _take_blocks(self, sequence: Sequence) -> bool:
        batch = self.running + len(self._pulling)
        if batch >= self._max_batch:
            return False
        reusable = self._remote.get(sequence, sequence.reusable)  # all of a pulled one is computed
        step = block_tables.blocks_for(1 + self._lookahead, self._pool.block_size)
        here = sequence not in self._remote
        return block_tables.take(self._pool, sequence, reusable, spare=step * batch, tail=here)

    def _reserves_early(self, sequence: Sequence) -> bool:
        """Its prompt is still being computed elsewhere: token 0 is not known."""
        return self._remote.get(sequence) == sequence.num_tokens

    def _make_room(
        self, sequence: Sequence, spare: list[Sequence], preempted: list[Sequence]
    ) -> bool:
        """Slots for what the sequence has and may gain, by preemption of the last in order if need
        be: of the spare ones, which lose nothing by it, or else of those that run."""
        while sequence not in preempted:
            try:
                block_tables.grow(self._pool, sequence, sequence.num_tokens + self._lookahead)
                return True
            except OutOfBlocks:
                victim = spare.pop() if spare else sorted(self._running, key=order)[-1]
                self.remove(victim)
                preempted.append(victim)
        return False
