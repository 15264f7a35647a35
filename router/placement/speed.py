"""How fast a worker is presumed to be: by its own measurement while it works, by its pool's idle.

An idle worker's measurement is as old as its last work, and a new one has none. Going by them would
keep work from a worker for ever because its first request was slow. Workers of one pool run on
equal hardware, so an idle one is presumed to be as fast as its pool has lately been.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from crossdock.proto.v1 import worker_pb2

Line = tuple[float, float]  # of an engine step's seconds: base, and for each token or sequence

DEFAULT_PREFILL_S: Line = (0.0, 0.001)
DEFAULT_DECODE_S: Line = (0.02, 0.005)
WEIGHT = 0.1  # of the newest measurement in a pool's running mean
# A sequence more costs the others of its batch this part of a step at the least, measured or not.
LEAST_SHARE = 0.005


def prefill_line(load: worker_pb2.Load) -> Line | None:
    """Base and slope by tokens of a prefill step's time; None where nothing was measured."""
    rate = load.prefill_tokens_per_s
    return (load.prefill_base_s, 1 / rate) if rate else None


def decode_line(load: worker_pb2.Load) -> Line | None:
    """The same by sequences of a decode step's time."""
    line = (load.step_base_s, load.step_per_sequence_s)
    return line if any(line) else None


def step_line(line: Line) -> Line:
    """Of a decode step, as far as its slope is believed."""
    base, slope = line
    return base, max(slope, LEAST_SHARE * base)


@dataclass
class PoolSpeed:
    """Running mean over what the workers of one pool have measured of one kind of step."""

    default: Line
    mean: Line | None = None  # None: nobody has measured

    def measured(self, new: Line) -> None:
        old = self.mean or new
        self.mean = old[0] + WEIGHT * (new[0] - old[0]), old[1] + WEIGHT * (new[1] - old[1])

    @property
    def line(self) -> Line:
        """Of a worker that goes by its pool."""
        return self.mean or self.default


@dataclass(eq=False)
class PoolSpeeds:
    """Both kinds of step of one pool."""

    prefill: PoolSpeed = field(default_factory=lambda: PoolSpeed(DEFAULT_PREFILL_S))
    decode: PoolSpeed = field(default_factory=lambda: PoolSpeed(DEFAULT_DECODE_S))
