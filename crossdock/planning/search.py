"""The fewest workers that attain an aim, where attaining is found out by trying. Pure: how to try
comes in as a function.

More workers never do worse but for chance, so their number is searched by bisection. How a number
is best split between the kinds, what its requests miss says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Size:
    """Workers of each kind."""

    prefill: int = 0
    decode: int = 0
    colocated: int = 0

    @property
    def workers(self) -> int:
        return self.prefill + self.decode + self.colocated

    def __str__(self) -> str:
        if self.colocated:
            return f"{self.colocated} colocated"
        return f"{self.prefill} prefill + {self.decode} decode"


@dataclass(frozen=True)
class Outcome:
    """What a trial showed. A trial is cut short once it cannot attain the aim any more, so misses
    may be fewer than there would have been."""

    attained: float  # share of the requests, if no more of them missed
    ttft_misses: int
    tpot_misses: int

    def meets(self, aim: float) -> bool:
        return self.attained >= aim


Try = Callable[[Size], Outcome]


def fewest(low: int, guess: int, high: int, meets: Callable[[int], bool]) -> int | None:
    """The least number in [low, high] that meets, from a guess on by ever larger strides and then
    by bisection; None where `high` does not."""
    guess = min(max(guess, low), high)
    stride = 1
    if meets(guess):
        good, bad = guess, low - 1
        while good - stride > bad:
            if not meets(good - stride):
                bad = good - stride
                break
            good, stride = good - stride, 2 * stride
    else:
        good, bad = high + 1, guess
        while bad + stride <= high:
            if meets(bad + stride):
                good = bad + stride
                break
            bad, stride = bad + stride, 2 * stride
        if good > high and (bad == high or not meets(high)):
            return None
        good = min(good, high)
    while good - bad > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if meets(middle) else (good, middle)
    return good


def cheapest_pair(guess: Size, most: int, aim: float, attempt: Try) -> Size | None:
    """The fewest prefill and decode workers together, at most `most`."""
    found = {guess.workers: guess}

    def meets(workers: int) -> bool:
        near = found[min(found, key=lambda known: abs(known - workers))]
        split = _split(workers, near, aim, attempt)
        if split is not None:
            found[workers] = split
        return split is not None

    workers = fewest(2, guess.workers, most, meets)
    return None if workers is None else found[workers]


def best_split(workers: int, guess: Size, aim: float, attempt: Try) -> tuple[Size, Outcome]:
    """Of so many workers, the split that attains most of those on the way to the aim."""
    tried: dict[Size, Outcome] = {}

    def noted(size: Size) -> Outcome:
        tried[size] = attempt(size)
        return tried[size]

    _split(workers, guess, aim, noted)
    best = max(tried, key=lambda size: tried[size].attained)
    return best, tried[best]


def _split(workers: int, near: Size, aim: float, attempt: Try) -> Size | None:
    """A pair of so many workers that meets the aim, if one does: from one in the proportion of
    `near`, as long as what is missed more says which kind lacks a worker."""
    prefill = round(workers * near.prefill / near.workers)
    prefill = min(max(1, prefill), workers - 1)
    tried: set[int] = set()
    while 0 < prefill < workers and prefill not in tried:
        tried.add(prefill)
        outcome = attempt(Size(prefill, workers - prefill))
        if outcome.meets(aim):
            return Size(prefill, workers - prefill)
        prefill += 1 if outcome.ttft_misses >= outcome.tpot_misses else -1
    return None
