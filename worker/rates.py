"""What a worker has measured of its own speed, as the router's predictions need it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PrefillRate:
    """Prompt tokens per second over the last steps, older ones fading."""

    decay: float = 0.9
    _tokens: float = 0.0
    _seconds: float = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        self._tokens = self.decay * self._tokens + tokens
        self._seconds = self.decay * self._seconds + seconds

    @property
    def tokens_per_s(self) -> float:
        """0 before the first observation."""
        return self._tokens / self._seconds if self._seconds else 0.0


@dataclass
class StepTime:
    """Least-squares line through (batch, seconds) of decode steps, older ones fading."""

    decay: float = 0.98
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # of 1, x, y, x*x, x*y

    def observe(self, batch: int, seconds: float) -> None:
        terms = (1.0, batch, seconds, batch * batch, batch * seconds)
        self._sums = [self.decay * old + new for old, new in zip(self._sums, terms)]

    @property
    def base_and_slope(self) -> tuple[float, float]:
        """Seconds of a step as base + slope * batch, neither below 0; (0, 0) if unmeasured."""
        count, x, y, xx, xy = self._sums
        if not count:
            return 0.0, 0.0
        spread = count * xx - x * x
        slope = max(0.0, (count * xy - x * y) / spread) if spread > 1e-6 * count * count else 0.0
        return max(0.0, (y - slope * x) / count), slope
