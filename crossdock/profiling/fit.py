"""Seconds of prompts and steps as the terms of a Profile, fitted. Pure.

Each term costs at least nothing, errors count relative to what was measured, and measurements that
lie far off (a pause of the machine) count little: non-negative least squares, reweighted by Huber.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from crossdock.engine.profiles import Profile

HUBER = 1.345  # of the residuals' spread: 95 % as good as least squares where there are no outliers
SPREAD = 1.4826  # standard deviation of normal residuals over the median of their sizes
ROUNDS = 30
LEAST_SPREAD = 1e-3  # relative: closer than this is no outlier
NO_GAIN = 1e-9  # mean square of relative errors: a term that brings no more is 0
DIGITS = 4

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PromptTime:
    """A prompt that was computed alone: in `steps` steps, `tokens` of them, `attention` tokens
    before its tokens, summed over these."""

    steps: int
    tokens: int
    attention: float
    seconds: float

    @classmethod
    def of(cls, start: int, end: int, chunk: int, seconds: float) -> PromptTime:
        """Of a prompt whose tokens [start, end) were computed, `chunk` in a step."""
        tokens = end - start
        return cls(-(-tokens // chunk), tokens, tokens * (start + end) / 2, seconds)

    def expected_s(self, profile: Profile) -> float:
        """What the profile says that it takes."""
        steps_s = profile.prefill_s * self.steps + profile.prefill_token_s * self.tokens
        return steps_s + profile.prefill_attention_s * self.attention


@dataclass(frozen=True)
class StepTime:
    """A decode step of `sequences` that have `context` tokens together."""

    sequences: int
    context: float
    seconds: float

    def expected_s(self, profile: Profile) -> float:
        """What the profile says that it takes."""
        step_s = profile.decode_s + profile.decode_sequence_s * self.sequences
        return step_s + profile.decode_context_s * self.context


@dataclass(frozen=True)
class Beside:
    """Work that was done while so many other workers of the same host computed."""

    work: PromptTime | StepTime
    others: int


@dataclass(frozen=True)
class Residuals:
    """Sizes of the fit's errors, relative to what was measured."""

    count: int
    median: float
    p90: float


@dataclass(frozen=True)
class Fit:
    """What was fitted, and how well."""

    profile: Profile
    prefill: Residuals
    decode: Residuals


def fit(prompts: Sequence[PromptTime], steps: Sequence[StepTime]) -> Fit:
    """The profile's terms of steps. Raises ValueError where either is empty."""
    if not prompts or not steps:
        raise ValueError(f"{len(prompts)} prompts and {len(steps)} steps: nothing to fit")
    prefill, prefill_errors = _fitted(
        [(each.steps, each.tokens, each.attention) for each in prompts],
        [each.seconds for each in prompts],
    )
    decode, decode_errors = _fitted(
        [(1, each.sequences, each.context) for each in steps], [each.seconds for each in steps]
    )
    profile = Profile(
        prefill_s=prefill[0],
        prefill_token_s=prefill[1],
        prefill_attention_s=prefill[2],
        decode_s=decode[0],
        decode_sequence_s=decode[1],
        decode_context_s=decode[2],
    )
    return Fit(profile, prefill_errors, decode_errors)


def contention(beside: Sequence[Beside], profile: Profile) -> tuple[float, ...]:
    """By what part of what it takes alone work takes longer while 1, 2, … other workers compute:
    the mean of prompts' and of decode steps' medians, and no less than with fewer."""
    found: list[float] = []
    for others in range(1, max((each.others for each in beside), default=0) + 1):
        of_kinds = []
        for kind in (PromptTime, StepTime):
            parts = [
                each.work.seconds / each.work.expected_s(profile) - 1
                for each in beside
                if each.others == others and isinstance(each.work, kind)
            ]
            if parts:
                of_kinds.append(float(np.median(parts)))
        found.append(max([*found[-1:], 0.0, float(np.mean(of_kinds)) if of_kinds else 0.0]))
    return tuple(map(_short, found))


def _fitted(
    rows: Sequence[tuple[float, ...]], seconds: Sequence[float]
) -> tuple[list[float], Residuals]:
    measured = np.maximum(np.asarray(seconds, np.float64), 1e-9)
    relative = np.asarray(rows, np.float64) / measured[:, None]  # [measurements, terms], sum to 1
    weights = np.ones(len(measured))
    terms = np.zeros(relative.shape[1])
    for _ in range(ROUNDS):
        before = terms
        terms = _nonnegative(relative, weights)
        errors = np.abs(relative @ terms - 1.0)
        limit = HUBER * max(SPREAD * float(np.median(errors)), LEAST_SPREAD)
        weights = np.minimum(1.0, limit / np.maximum(errors, 1e-12))
        if np.allclose(terms, before, rtol=1e-6, atol=0.0):
            break
    errors = np.abs(relative @ terms - 1.0)
    median, p90 = np.percentile(errors, (50, 90))
    return [_short(term) for term in terms], Residuals(len(errors), float(median), float(p90))


def _nonnegative(relative: Array, weights: Array) -> Array:
    """Least squares of relative @ terms = 1, no term below 0: of every choice of terms that are 0,
    the best with the fewest others; there are three of them."""
    size = relative.shape[1]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)
    root = np.sqrt(weights)
    found, least = np.zeros(size), float(weights.sum())
    gain = NO_GAIN * least
    for count in range(1, size + 1):
        for chosen in map(list, combinations(range(size), count)):
            part = relative[:, chosen] / scale[chosen] * root[:, None]
            solved = np.linalg.lstsq(part, root, rcond=1e-9)[0]
            loss = float(((part @ solved - root) ** 2).sum())
            if solved.min() >= 0 and loss < least - gain:
                least, found = loss, np.zeros(size)
                found[chosen] = solved / scale[chosen]
    return found


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
