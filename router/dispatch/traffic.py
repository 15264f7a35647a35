"""What came and how it was served, counted for whoever sizes the pools."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Traffic:
    """Counts of the sequences of one model: since a gateway started, or, as the difference of two
    such, in between."""

    arrived: int = 0  # admitted
    refused: int = 0  # of those, before token 0: it was, or would have been, too late
    started: int = 0  # token 0 was delivered
    ttft_met: int = 0  # of started: in time
    prompt_tokens: int = 0  # of started
    cached_tokens: int = 0  # of those, with KV in a prefix cache
    uncached_squares: int = 0  # of each one's other prompt tokens
    finished: int = 0  # ran to the end
    tpot_met: int = 0  # of finished: in time
    generated_tokens: int = 0  # of finished

    def since(self, before: Traffic) -> Traffic:
        """What was counted after `before`: all of it, where counting has begun anew."""
        less = [getattr(self, f.name) - getattr(before, f.name) for f in fields(self)]
        return self if min(less) < 0 else Traffic(*less)

    def __add__(self, other: Traffic) -> Traffic:
        """Of two gateways together."""
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class TrafficCount:
    """The same while it is being counted, on one thread; `now` is a copy."""

    def __init__(self) -> None:
        for about in fields(Traffic):
            setattr(self, about.name, 0)

    arrived: int
    refused: int
    started: int
    ttft_met: int
    prompt_tokens: int
    cached_tokens: int
    uncached_squares: int
    finished: int
    tpot_met: int
    generated_tokens: int

    @property
    def now(self) -> Traffic:
        """As it stands."""
        return Traffic(**vars(self))
