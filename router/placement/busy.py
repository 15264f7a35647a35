"""How the workers that compute prompts stand, all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from crossdock.router.placement.columns import Columns
from crossdock.router.placement.workers import ANY_CHUNK

MANY = 48  # workers, from which on arrays of all are quicker than a look at each


class Busy(NamedTuple):
    """Of those that are heard of; nobody there counts as one that is idle."""

    seconds: float = 0.0  # that one is taken on the average, by prompts that do not yield
    yielding_s: float = 0.0  # and by those that do, being of many
    workers: int = 1
    chunk_tokens: float = 1  # of a step at the most


def busy(sides: Sequence[Columns], now: float) -> Busy:
    """Of the workers of these roles; the arrays of MANY are as they are now."""
    seconds, yielding_s, workers, chunk_tokens = 0.0, 0.0, 0, float(ANY_CHUNK)
    for columns in sides:
        if len(columns) >= MANY:
            usable = columns.usable(1, now)[0]
            seconds += float(columns.numbers.queue_s[usable].sum())
            yielding_s += float(columns.numbers.yielding_s[usable].sum())
            workers += int(usable.sum())
            chunk_tokens = min(chunk_tokens, float(columns.numbers.chunk_tokens.min()))
            continue
        for worker in columns.workers:
            chunk_tokens = min(chunk_tokens, worker.numbers.chunk_tokens)
            if worker.numbers.most_tokens >= 1 and not worker.is_stale(now):
                seconds += worker.numbers.queue_s
                yielding_s += worker.numbers.yielding_s
                workers += 1
    if not workers:
        return Busy()
    return Busy(seconds / workers, yielding_s / workers, workers, chunk_tokens)
