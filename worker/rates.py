"""What a worker has measured of its own speed, as the router's predictions need it. Pure.

A step that computes prompts takes base + slope × tokens + context × (tokens × the context that they
attend to, summed over its chunks); one that decodes base + slope × sequences + context × the tokens
of their contexts. Chunks computed beside decodes have a fit of their own: what the step takes
longer than these decodes alone, which is what their streams wait for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from crossdock.kvcache.sequence import StepWork

RIDGE = 0.001  # weight of the presumption against that of what was measured
LEAST_SLOPE = 0.02  # of the mean time of a token: a prompt token is never free
MOST_CONTEXT = 1 / 64  # of a token's own time: that of its attention to another one
KNOWN = 1.5  # times what was seen lately, a step is one of which something can be expected
# What a step takes beyond so many times the usual deviation, and this part of its time, is a pause.
OUTLIER, LEAST_OUTLIER = 3.0, 0.1
LEAST_VARIATION = 0.04  # variance of sizes over their mean's square: less tells nothing apart
QUICK = 0.7  # of what is known stays known after a step that takes so much less
STEADY = 0.95  # of the usual deviation is of the steps before the last
FADING = 0.99  # of the share of prompts' steps beside decodes is of the steps before the last
RARE = 0.05  # of them: the fit of fewer is not renewed often enough to go by


class Line(NamedTuple):
    """Seconds of a step; all 0 where nothing was measured."""

    base: float
    slope: float  # more for each prompt token, or sequence
    context: float  # more for each token × context, or token of context

    def seconds(self, size: float, context: float) -> float:
        return self.base + self.slope * size + self.context * context


UNMEASURED = Line(0.0, 0.0, 0.0)


@dataclass
class StepFit:
    """Least squares of (size, context, seconds) of engine steps, older ones fading.

    What does not vary tells nothing of what it costs. Then time is put down to the base, or,
    `by_size`, to the size: steps of decode are alike, those of prefill as long as their tokens.
    """

    decay: float = 0.995
    by_size: bool = False
    largest: float = 0.0  # size among the steps that still count
    _farthest: float = 0.0  # context among them
    _deviation: float = 1.0  # of what was measured from what was expected, as a part of that
    _sums: tuple[float, ...] = (0.0,) * 9  # products of 1, size, context and seconds
    _line: Line | None = UNMEASURED  # None: not worked out since the last step

    def observe(self, size: float, context: float, seconds: float) -> None:
        """A step of this size and context took this many seconds; older ones weigh less."""
        decay, expected = self.decay, 0.0
        if size <= KNOWN * self.largest and context <= KNOWN * self._farthest:
            expected = self.line.seconds(size, context)
        if expected:
            limit = OUTLIER * self._deviation + LEAST_OUTLIER
            off = seconds / expected - 1
            if off > limit:
                seconds = (1 + limit) * expected
            elif off < -min(limit, 0.5):  # those before were pauses
                decay = QUICK
            self._deviation += (1 - STEADY) * (min(abs(off), 2.0) - self._deviation)
        n, x, z, y, xx, xz, zz, xy, zy = self._sums
        self._sums = (
            decay * n + 1.0,
            decay * x + size,
            decay * z + context,
            decay * y + seconds,
            decay * xx + size * size,
            decay * xz + size * context,
            decay * zz + context * context,
            decay * xy + size * seconds,
            decay * zy + context * seconds,
        )
        self.largest = max(size, self.decay * self.largest)
        self._farthest = max(context, self.decay * self._farthest)
        self._line = None

    @property
    def told_apart(self) -> bool:
        """Whether sizes differed enough lately to tell the base from the slope."""
        n, x, _, _, xx, *_ = self._sums
        return n * xx > (1 + LEAST_VARIATION) * x * x

    @property
    def line(self) -> Line:
        """What a step takes, none of it below 0."""
        if self._line is None:
            self._line = self._fitted()
        return self._line

    def _fitted(self) -> Line:
        n, x, z, y, xx, xz, zz, xy, zy = self._sums
        ridge, presumed = 1 + RIDGE, int(self.by_size)
        diagonal = (n * ridge, xx, zz * ridge) if self.by_size else (n, xx * ridge, zz * ridge)
        base, slope, context = _nonnegative(diagonal, (xz, z, x), (y, xy, zy), presumed)
        if self.by_size:
            slope = max(slope, LEAST_SLOPE * y / x)
            context = min(context, MOST_CONTEXT * slope)
        return Line(base, slope, context)


@dataclass
class StepTimes:
    """The fits of one worker's steps."""

    prefill: StepFit = field(default_factory=lambda: StepFit(decay=0.99, by_size=True))
    decode: StepFit = field(default_factory=StepFit)
    beside: StepFit = field(default_factory=lambda: StepFit(decay=0.99, by_size=True))
    _share: float = 0.0  # of the steps that computed prompts lately, those beside decodes

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step took this many seconds."""
        if work.tokens:
            self._share += (1 - FADING) * (bool(work.sequences) - self._share)
        if not work.sequences:
            self.prefill.observe(work.tokens, work.attention, seconds)
        elif not work.tokens:
            self.decode.observe(work.sequences, work.context, seconds)
        elif self.decode.line is not UNMEASURED:
            alone_s = self.decode.line.seconds(work.sequences, work.context)
            self.beside.observe(work.tokens, work.attention, max(0.0, seconds - alone_s))
        else:  # what decodes take is not known yet, and may never be seen alone
            alone_s = self.prefill.line.seconds(work.tokens, work.attention)
            self.decode.observe(work.sequences, work.context, max(0.0, seconds - alone_s))

    def seconds(self, work: StepWork) -> float:
        """What a step takes as far as was measured; 0 where nothing was."""
        seconds = 0.0
        if work.sequences:
            seconds += self.decode.line.seconds(work.sequences, work.context)
        if work.tokens:
            known = self.prompts if work.sequences else self.prefill
            seconds += known.line.seconds(work.tokens, work.attention)
        return seconds

    @property
    def prompts(self) -> StepFit:
        """What a prompt takes here: beside decodes, where such steps are no rarity."""
        known = self.prefill.line is not UNMEASURED
        return self.prefill if known and self._share < RARE else self.beside


Three = tuple[float, float, float]


def _nonnegative(diagonal: Three, others: Three, right: Three, presumed: int) -> Three:
    """Solves three normal equations, `others[i]` being the product of the other two, so that no
    unknown is below 0. Those that would be are 0, the presumed one never for another's sake."""
    a, d, f = diagonal
    e, c, b = others
    p, q, r = right
    u, v, w = d * f - e * e, c * e - b * f, b * e - c * d  # cofactors of the first row
    determinant = a * u + b * v + c * w
    if determinant > 0:
        solved = (
            (p * u + q * v + r * w) / determinant,
            (p * v + q * (a * f - c * c) + r * (b * c - a * e)) / determinant,
            (p * w + q * (b * c - a * e) + r * (a * d - b * b)) / determinant,
        )
        if min(solved) >= 0:
            return solved
    alone, gained = right[presumed] / diagonal[presumed], 0.0
    best = [0.0, 0.0, 0.0]
    best[presumed] = alone
    for other in {0, 1, 2} - {presumed}:
        cross = others[3 - presumed - other]
        determinant = diagonal[presumed] * diagonal[other] - cross * cross
        if determinant <= 0:
            continue
        one = (right[presumed] * diagonal[other] - right[other] * cross) / determinant
        two = (right[other] * diagonal[presumed] - right[presumed] * cross) / determinant
        gain = one * right[presumed] + two * right[other]
        if min(one, two) >= 0 and gain > gained:
            gained, best = gain, [0.0, 0.0, 0.0]
            best[presumed], best[other] = one, two
    return best[0], best[1], best[2]
