"""What the schedulers of both roles have in common. Pure bookkeeping: no torch, no clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Iterator
from typing import NamedTuple

from crossdock.kvcache import block_tables
from crossdock.kvcache.block_pool import BlockPool
from crossdock.kvcache.sequence import Chunk, Sequence
from crossdock.proto.steps import Yields, attention


class Queued(NamedTuple):
    """What there is to compute of prompts."""

    tokens: int  # uncached
    attention: float  # tokens × context, over the chunks that they will be
    yielding_tokens: int  # of both, of prompts that yield, being of many of one tenant
    yielding_attention: float
    late_tokens: int  # and being late
    late_attention: float


class Scheduler(ABC):
    """Sequences that wait, in order, and those whose block tables it owns, by state."""

    def __init__(
        self, pool: BlockPool, chunk_tokens: int, lookahead: int, *held: list[Sequence]
    ) -> None:
        """`chunk_tokens`: prompt tokens that one step computes at the most. `lookahead`: tokens
        that it may draw for a sequence beyond the first; each needs room in a block."""
        self._pool = pool
        self._chunk_tokens = chunk_tokens
        self._lookahead = lookahead
        self._waiting: list[Sequence] = []
        self._held = held

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence behind those of its priority that arrived earlier; takes no blocks."""
        insort(self._waiting, sequence, key=order)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence in any state and frees its blocks."""
        for group in (self._waiting, *self._held):
            if sequence in group:
                group.remove(sequence)
                block_tables.release(self._pool, sequence)
                return
        raise KeyError(sequence.sequence_id)

    @property
    def waiting(self) -> int:
        """Sequences that no step advances yet."""
        return len(self._waiting) + sum(len(group) for group in self._held[:-1])

    @property
    def running(self) -> int:
        """Sequences that steps advance."""
        return len(self._held[-1])

    @property
    def queued(self) -> Queued:
        """Prompts still to be computed here, with what is cached now."""
        tokens, attended = [0, 0, 0], [0.0, 0.0, 0.0]  # by Yields
        for cached, sequence in self._uncomputed():
            left = sequence.num_tokens - cached
            tokens[sequence.yields] += left
            attended[sequence.yields] += attention(cached, left, self._chunk_tokens)
        of_many, late = Yields.OF_MANY, Yields.LATE
        return Queued(
            *(sum(tokens), sum(attended)),
            *(tokens[of_many], attended[of_many]),
            *(tokens[late], attended[late]),
        )

    @property
    def context_tokens(self) -> int:
        """Tokens of all sequences here, waiting ones too."""
        groups = (self._waiting, *self._held)
        return sum(len(sequence.token_ids) for group in groups for sequence in group)

    @abstractmethod
    def _uncomputed(self) -> Iterator[tuple[int, Sequence]]:
        """Sequences with prompts to compute here, each with how many of its tokens have KV."""

    def _cached(self, sequence: Sequence) -> int:
        """Tokens that a waiting sequence would find in the prefix cache now."""
        return sequence.num_tokens - block_tables.uncached(self._pool, sequence)

    @property
    def held(self) -> list[list[int]]:
        """The block tables that sequences here own, for check_integrity."""
        return [sequence.block_table for group in self._held for sequence in group]

    @staticmethod
    def _chunk(sequence: Sequence, budget: int) -> Chunk:
        length = min(sequence.num_uncomputed, budget)
        return Chunk.of(sequence, sequence.num_computed, length)


def order(sequence: Sequence) -> tuple[int, int, float]:
    """Arrival is at the gateway, and a restart keeps it: so who is first here is preempted by
    nobody and ends, then the next, and whoever was preempted before gets its turn."""
    return sequence.priority, sequence.yields, sequence.arrival
