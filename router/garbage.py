"""Python's garbage collector in a process that serves."""

from __future__ import annotations

import gc

# Of objects that are made and not freed, before the youngest are looked through: 0.5 ms, or 3 ms to
# free them where all are garbage. By default it is 700, which a batch of requests makes in a step,
# though few leave cycles behind.
YOUNG_OBJECTS = 5_000
ROUNDS = 20  # of the younger, before the older ones are looked through


def settle() -> None:
    """For a process that has made what it keeps: a collection does not walk that again, which would
    hold the loop for 70 ms, and comes rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, ROUNDS, ROUNDS)
