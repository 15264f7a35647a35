"""What the YAML says of autoscaling."""

from __future__ import annotations

import builtins
from dataclasses import dataclass

from crossdock.proto.settings import setting


@dataclass(frozen=True)
class PoolAutoscale:
    """The YAML's `autoscale` of a pool: the bounds that it stays within. Falsy where it is not
    autoscaled."""

    min: int = setting(1, "Fewest workers.", low=1, high=1024)
    max: int = setting(
        0, "Most workers. 0: the pool is not autoscaled, `replicas` is its size.", low=0, high=1024
    )
    start_s: float = setting(
        60.0,
        "How long a worker takes to start, seconds, until one was measured.",
        low=0,
        high=86_400,
    )

    def __bool__(self) -> bool:
        return self.max > 0

    def within(self, workers: int) -> int:
        """As many as the bounds allow."""
        return builtins.min(builtins.max(workers, self.min), self.max)


@dataclass(frozen=True)
class AutoscaleSettings:
    """The YAML's `autoscale`: what all autoscaled pools have in common."""

    interval_s: float = setting(
        10.0, "Seconds between two decisions, each over what was seen since.", low=0.1, high=3600
    )
    dry_run: bool = setting(
        False, "Decide, log and show what would be done, and leave every pool as it is."
    )
    gpus: float = setting(
        0.0,
        "Most GPUs of all autoscaled pools together; a worker that reserves none counts as one. "
        "0: as many as their `max` allows.",
        low=0,
        high=1_000_000,
    )
    attainment: float = setting(
        0.99, "The part of sequences that is to meet each aim of `slo`.", low=0.5, high=0.9999
    )
    down_s: float = setting(
        0.0,
        "How long fewer workers must have been enough before some are drained, seconds. "
        "0: as long as a start takes, as measured, and 3 intervals at the least.",
        low=0,
        high=86_400,
    )
