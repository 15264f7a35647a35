"""What a worker has measured of its own speed, as the router's predictions need it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

RIDGE = 0.01  # weight of the presumption against that of what was measured
LEAST_SLOPE = 0.02  # of the mean time of a token: a prompt token is never free


@dataclass
class StepFit:
    """Least-squares line through (size, seconds) of engine steps, older ones fading.

    Sizes that hardly differ do not tell base from slope. Then time is put down to the base, or,
    `by_size`, to the size: steps of decode are alike, those of prefill as long as their tokens.
    """

    decay: float = 0.98
    by_size: bool = False
    largest: float = 0.0  # size among the steps that still count
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # of 1, x, y, x*x, x*y

    def observe(self, size: int, seconds: float) -> None:
        """A step of this size took this many seconds; older ones weigh less."""
        terms = (1.0, size, seconds, size * size, size * seconds)
        self._sums = [self.decay * old + new for old, new in zip(self._sums, terms)]
        self.largest = max(size, self.decay * self.largest)

    @property
    def base_and_slope(self) -> tuple[float, float]:
        """Seconds of a step as base + slope * size, neither below 0; (0, 0) if unmeasured."""
        count, x, y, xx, xy = self._sums
        if not count:
            return 0.0, 0.0
        ridged = (count * (1 + RIDGE), xx) if self.by_size else (count, xx * (1 + RIDGE))
        slope = (ridged[0] * xy - x * y) / (ridged[0] * ridged[1] - x * x)
        least = LEAST_SLOPE * y / x if self.by_size else 0.0
        slope = min(max(slope, least), y / x)
        return max(0.0, y - slope * x) / count, slope
