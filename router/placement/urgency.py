"""Which of those that wait can still have their first token in time. Pure.

To be late is as bad by a second as by a minute, so what counts is how many are in time. For prompts
on one worker that is Moore's rule (J. M. Moore, 1968): take them by their due times, and whenever
one of them would be late, give up the longest so far. Here the workers are taken for one that is
as many times as fast.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Due(NamedTuple):
    """A prompt that waits."""

    by: float  # when its first token is to be there
    seconds: float  # that it takes a worker


def in_time(prompts: Sequence[Due], start: float, workers: int) -> list[int]:
    """The most that can be in time of `prompts`, in order of their due times, where the work before
    them is done at `start`: their places, in order."""
    kept: list[tuple[float, int]] = []  # the longest first
    ends = start
    for place, prompt in enumerate(prompts):
        if start + prompt.seconds > prompt.by:
            continue
        heapq.heappush(kept, (-prompt.seconds, place))
        ends += prompt.seconds / workers
        if ends + prompt.seconds * (1 - 1 / workers) > prompt.by:
            longest_s, _ = heapq.heappop(kept)
            ends += longest_s / workers
    return sorted(place for _, place in kept)
