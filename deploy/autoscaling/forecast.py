"""What is to come, from what was: the rate of requests with its trend, and mean lengths. Pure.

The rate is a local linear trend (level and slope, each wandering) under counting noise, which a
Kalman filter follows. How fast a load can turn, and how much its arrivals clump, nobody says
beforehand: so a bank of filters runs that presume different things, and each weighs as well as it
has lately predicted (Magill 1965, multiple model estimation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

TURNS_S = (30.0, 120.0, 600.0, 3600.0)  # in which a slope may become one that doubles the rate
CLUMPS = (1.0, 4.0, 16.0)  # variance of a count over its mean: 1 is a Poisson process
MEMORY = 0.95  # weight of what was predicted an observation earlier
LEAST_WEIGHT = 1e-4  # so that a filter can come back
LIKELY = math.log(1e-12)  # nothing is less likely than that: one surprise ends no filter


class Forecast(NamedTuple):
    """A rate at one moment: its mean, the deviation of that, and how much arrivals clump."""

    mean: float  # a second
    deviation: float  # of the mean: what counts add around it is not in it
    clumping: float  # variance of a count over its mean


@dataclass(frozen=True)
class _Filter:
    """One local linear trend: rate a second and slope a second squared, with their covariance."""

    turn_s: float
    clumping: float
    level: float
    slope: float = 0.0
    p00: float = 0.0
    p01: float = 0.0
    p11: float = 0.0
    weight: float = 1.0

    @property
    def presumed(self) -> float:
        """The logarithm of its weight where nothing speaks for or against it: arrivals seldom
        clump."""
        return -math.log(self.clumping)

    def ahead(self, seconds: float) -> _Filter:
        """As it will be if nothing is observed until then."""
        t = seconds
        # White noise on the slope: in turn_s its deviation becomes level / turn_s. Of next to no
        # requests as of one in that time: else a filter that has seen none becomes deaf.
        noise = max(self.level, 1 / self.turn_s) ** 2 / self.turn_s**3
        return replace(
            self,
            level=self.level + self.slope * t,
            p00=self.p00 + 2 * t * self.p01 + t * t * self.p11 + noise * t**3 / 3,
            p01=self.p01 + t * self.p11 + noise * t * t / 2,
            p11=self.p11 + noise * t,
        )

    def observed(self, rate: float, seconds: float) -> tuple[_Filter, float]:
        """After a mean rate over the last `seconds`, and the logarithm of how likely that was."""
        half = seconds / 2  # the mean is of the middle of that time, the level of its end
        expected = self.level - half * self.slope
        of_level, of_slope = self.p00 - half * self.p01, self.p01 - half * self.p11
        counting = self.clumping * max(expected, 0.5 * rate, 1 / seconds) / seconds
        variance = of_level - half * of_slope + counting
        surprise = rate - expected
        gain0, gain1 = of_level / variance, of_slope / variance
        likely = -0.5 * (math.log(2 * math.pi * variance) + surprise * surprise / variance)
        corrected = replace(
            self,
            level=max(0.0, self.level + gain0 * surprise),
            slope=self.slope + gain1 * surprise,
            p00=self.p00 - gain0 * of_level,
            p01=self.p01 - gain0 * of_slope,
            p11=self.p11 - gain1 * of_slope,
        )
        return corrected, max(likely, LIKELY)


@dataclass(frozen=True)
class Trend:
    """The bank of filters. Empty before the first observation."""

    filters: tuple[_Filter, ...] = ()

    def observed(self, count: int, seconds: float) -> Trend:
        """After `count` arrivals in the last `seconds`. What comes after none is a new load, which
        the slope and the certainty of the one before say nothing of."""
        rate = count / seconds
        if not any(each.level for each in self.filters):
            return Trend(tuple(_fresh(rate, seconds, *kind) for kind in product(TURNS_S, CLUMPS)))
        moved = [each.ahead(seconds).observed(rate, seconds) for each in self.filters]
        scores = [
            MEMORY * math.log(each.weight) + (1 - MEMORY) * each.presumed + likely
            for each, likely in moved
        ]
        best = max(scores)
        weights = [max(math.exp(score - best), LEAST_WEIGHT) for score in scores]
        whole = sum(weights)
        return Trend(tuple(replace(each, weight=w / whole) for (each, _), w in zip(moved, weights)))

    def at(self, ahead_s: float) -> Forecast:
        """The rate in `ahead_s` seconds; 0 before anything was observed."""
        if not self.filters:
            return Forecast(0.0, 0.0, 1.0)
        there = [each.ahead(ahead_s) for each in self.filters]
        means = [max(0.0, each.level) for each in there]
        mean = sum(each.weight * m for each, m in zip(there, means))
        square = sum(each.weight * (each.p00 + (m - mean) ** 2) for each, m in zip(there, means))
        clumping = sum(each.weight * each.clumping for each in there)
        return Forecast(mean, math.sqrt(square), clumping)


def _fresh(rate: float, seconds: float, turn_s: float, clumping: float) -> _Filter:
    """After a first observation, which says nothing of the slope."""
    weight = 1 / (clumping * len(TURNS_S) * sum(1 / each for each in CLUMPS))
    first = clumping * max(rate, 1 / seconds) / seconds
    slope = (rate / turn_s) ** 2
    return _Filter(turn_s, clumping, rate, 0.0, first, 0.0, slope, weight)


@dataclass(frozen=True)
class Mean:
    """Mean and variation of what is seen now and then, older ones fading by time."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def observed(self, count: int, total: float, squares: float, keep: float) -> Mean:
        """After `count` more with this sum, and sum of squares; what was seen before counts
        `keep` of what it did."""
        return Mean(
            keep * self.count + count, keep * self.total + total, keep * self.squares + squares
        )

    @property
    def value(self) -> float:
        """The mean; 0 where nothing was seen."""
        return self.total / self.count if self.count else 0.0

    @property
    def variation(self) -> float:
        """Variance over the mean's square; 0 where nothing was seen."""
        if not self.total:
            return 0.0
        # What has faded for hours is so little that its square is 0.
        return max(0.0, self.squares / self.total * (self.count / self.total) - 1.0)
