"""How fast a worker is presumed to be: by its own measurement while it works, by its pool's idle.

An idle worker's measurement is as old as its last work, and a new one has none. Going by them would
keep work from a worker for ever because its first request was slow. Workers of one pool run on
equal hardware, so an idle one is presumed to be as fast as its pool has lately been: all of them by
the same numbers, or those that were looked at lately would differ from the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from crossdock.proto.v1 import worker_pb2


class Line(NamedTuple):
    """Of an engine step's seconds."""

    base: float
    slope: float  # more for each prompt token, or sequence
    context: float = 0.0  # more for each token × context of prompts, or token of their contexts


DEFAULT_PREFILL = Line(0.0, 0.001)
DEFAULT_DECODE = Line(0.02, 0.005)
WEIGHT = 0.1  # of the newest measurement in a pool's running mean
PRESUMED_FOR_S = 0.5  # what idle workers go by stays for so long
# A sequence more costs the others of its batch this part of a step at the least, measured or not.
LEAST_SHARE = 0.005
LONGEST_STEP_S = 3600.0  # nor does a token or sequence add more


def prefill_line(load: worker_pb2.Load) -> Line | None:
    """Of a prefill step's time; None where nothing was measured, or what no step can take."""
    rate = load.prefill_tokens_per_s
    return _possible(load.prefill_base_s, 1 / rate, load.prefill_attention_s) if rate else None


def decode_line(load: worker_pb2.Load) -> Line | None:
    """Of a decode step's time, as far as its slope is believed; the same."""
    base, slope, context = load.step_base_s, load.step_per_sequence_s, load.step_context_s
    if not base and not slope and not context:
        return None
    return _possible(base, max(slope, LEAST_SHARE * base), context)


def _possible(base: float, slope: float, context: float) -> Line | None:
    """One NaN, or what overflows, would be in the mean of its pool, and in each comparison with
    another worker."""
    line = Line(base, slope, context)
    return line if all(0 <= part <= LONGEST_STEP_S for part in line) else None


@dataclass
class PoolSpeed:
    """Running mean over what the workers of one pool have measured of one kind of step."""

    line: Line  # of a worker that goes by its pool
    mean: Line | None = None  # None: nobody has measured

    def measured(self, new: Line) -> None:
        """One of them has measured anew."""
        if self.mean is None:
            self.mean = new
        else:
            self.mean = Line(*[old + WEIGHT * (now - old) for old, now in zip(self.mean, new)])


@dataclass(eq=False)
class PoolSpeeds:
    """Both kinds of step of one pool, and how long its streams are."""

    prefill: PoolSpeed = field(default_factory=lambda: PoolSpeed(DEFAULT_PREFILL))
    decode: PoolSpeed = field(default_factory=lambda: PoolSpeed(DEFAULT_DECODE))
    output: float = 0.0  # tokens that each stream here is expected to draw yet
    ended: float = 0.0  # tokens that those that ended lately have drawn
    _due: float = float("-inf")  # when it is brought up to date

    def renew(self, now: float) -> bool:
        """Brings up to date what is presumed of the pool, if it is time. Returns whether it has
        changed: then all its workers' numbers are to be made anew."""
        if now < self._due:
            return False
        before = self.lines, self.output
        for speed in (self.prefill, self.decode):
            speed.line = speed.mean or speed.line
        self.output = self.ended
        if (self.lines, self.output) == before:
            return False
        self._due = now + PRESUMED_FOR_S
        return True

    @property
    def lines(self) -> tuple[Line, Line]:
        """As presumed of its workers, of both kinds."""
        return self.prefill.line, self.decode.line
