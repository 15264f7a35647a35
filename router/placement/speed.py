"""How fast a worker is presumed to be: by its own measurement while it works, by its pool's idle.

An idle worker's measurement is as old as its last work, and a new one has none. Going by them would
keep work from a worker for ever because its first request was slow. Workers of one pool run on
equal hardware, so an idle one is presumed to be as fast as its pool has lately been.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_PREFILL_TOKENS_PER_S = 1000.0
DEFAULT_STEP_S = (0.02, 0.005)  # of a decode step: base, and for each sequence
WEIGHT = 0.1  # of the newest measurement in a pool's running mean


@dataclass
class PoolSpeed:
    """Running means over what the workers of one pool have measured."""

    prefill_tokens_per_s: float = 0.0  # 0: nobody has measured
    step_s: tuple[float, float] | None = None

    def prefill_measured(self, tokens_per_s: float) -> None:
        old = self.prefill_tokens_per_s or tokens_per_s
        self.prefill_tokens_per_s = old + WEIGHT * (tokens_per_s - old)

    def step_measured(self, base: float, per_sequence: float) -> None:
        old = self.step_s or (base, per_sequence)
        self.step_s = (
            old[0] + WEIGHT * (base - old[0]),
            old[1] + WEIGHT * (per_sequence - old[1]),
        )
