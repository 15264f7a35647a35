"""A first guess of how many workers a load needs, from a profile by arithmetic. Pure.

Prefill is a queue with several servers: its mean wait by Allen and Cunneen's approximation of
G/G/m (with Sakasegawa's term for the wait in M/M/m), its tail taken as exponential. A decode worker
is in balance where the tokens that it draws in a step are those that arrive meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crossdock.bench.traces import Trace, TraceRequest
from crossdock.engine.profiles import Profile
from crossdock.router.dispatch.lifecycle import Slo

MOST = 4096  # workers of a kind
TAIL = 0.01  # of the requests may miss
Z_TAIL = 2.33  # standard deviations that a normal variable exceeds as rarely


@dataclass(frozen=True)
class Load:
    """What is asked, on average and beyond. Tokens, seconds."""

    rate: float  # requests a second
    prompt_tokens: float  # uncached ones, mean
    longest_prompt: float  # that TAIL of the requests exceed
    output_tokens: float
    context: float  # of a sequence while it decodes: mean over its tokens
    variation: float  # variance of arrivals in a window of a TTFT over their mean; Poisson: 1

    @classmethod
    def of(cls, trace: Trace, slo: Slo) -> Load:
        """What a trace asks, with the cache hits that it allows at best."""
        rows, fresh = trace.requests, 1.0 - trace.hit_rate
        outputs = [float(row.output_tokens) for row in rows]
        contexts = [row.output_tokens * (row.input_tokens + row.output_tokens / 2) for row in rows]
        longest = float(np.quantile([row.input_tokens for row in rows], 1 - TAIL))
        return cls(
            rate=rate_of(rows),
            prompt_tokens=fresh * sum(row.input_tokens for row in rows) / len(rows),
            longest_prompt=longest,
            output_tokens=sum(outputs) / len(rows),
            context=sum(contexts) / sum(outputs),
            variation=_variation(rows, slo.ttft_ms / 1000),
        )


def rate_of(rows: Sequence[TraceRequest]) -> float:
    """Requests a second: of n of them, n - 1 gaps."""
    span = rows[-1].at_s - rows[0].at_s
    return (len(rows) - 1) / span if span else float(len(rows))


def prompt_s(profile: Profile, tokens: float, chunk: int) -> float:
    """Seconds to compute a prompt alone, `chunk` tokens a step."""
    steps = max(1, math.ceil(tokens / chunk))
    linear = profile.prefill_s * steps + profile.prefill_token_s * tokens
    return linear + profile.prefill_attention_s * tokens * tokens / 2


def prefill_workers(load: Load, profile: Profile, slo: Slo, chunk: int) -> int:
    """The fewest that let all but TAIL of the prompts wait so shortly that they are in time."""
    mean_s = prompt_s(profile, load.prompt_tokens, chunk)
    longest_s = prompt_s(profile, load.longest_prompt, chunk) + profile.pull_s(
        min(chunk, round(load.longest_prompt))  # the rest is read while the prompt is computed
    )
    room_s = slo.ttft_ms / 1000 - longest_s - profile.decode_s
    least = max(1, math.ceil(load.rate * mean_s))
    for workers in range(least, MOST):
        busy = load.rate * mean_s / workers
        if busy < 1 and _late_wait_s(workers, busy, mean_s, load.variation) <= max(room_s, mean_s):
            return workers
    return MOST


def decode_workers(load: Load, profile: Profile, slo: Slo, batch: int, pool_tokens: int) -> int:
    """The fewest whose steps are short enough, with a batch that is larger than its mean as rarely
    as requests may miss, and that have the KV for it."""
    for workers in range(1, MOST):
        running = running_on(load, profile, load.rate / workers)
        if running is None:
            continue
        most = running + Z_TAIL * math.sqrt(running * load.variation)
        step_s = profile.decode_s + most * _sequence_s(load, profile)
        fits = most <= batch and most * load.context <= pool_tokens
        if fits and step_s <= slo.tpot_ms / 1000:
            return workers
    return MOST


def colocated_workers(
    load: Load, profile: Profile, slo: Slo, batch: int, pool_tokens: int, chunk: int
) -> int:
    """The fewest of workers that do both: decodes take what prompts leave of the time."""
    mean_s = prompt_s(profile, load.prompt_tokens, chunk)
    for workers in range(1, MOST):
        rate = load.rate / workers
        left = 1.0 - rate * mean_s
        running = running_on(load, profile, rate, left)
        if running is None:
            continue
        most = running + Z_TAIL * math.sqrt(running * load.variation)
        step_s = (profile.decode_s + most * _sequence_s(load, profile)) / left
        if most <= batch and most * load.context <= pool_tokens and step_s <= slo.tpot_ms / 1000:
            return workers
    return MOST


def running_on(load: Load, profile: Profile, rate: float, share: float = 1.0) -> float | None:
    """Sequences that a worker decodes at once, by Little's law, where so many requests a second
    come to it and it decodes for `share` of its time; None: ever more."""
    tokens = rate * load.output_tokens  # that are to be drawn in a second
    left = share - tokens * _sequence_s(load, profile)
    return tokens * profile.decode_s / left if left > 0 else None


def colocated_chunk(profile: Profile, slo: Slo) -> int:
    """Prompt tokens of a step that decodes wait for: as many as fit their aim, a power of two."""
    if not profile.prefill_token_s:
        return 8192
    room_s = 0.8 * slo.tpot_ms / 1000 - profile.prefill_s
    tokens = max(1.0, room_s / profile.prefill_token_s)
    return min(8192, max(64, 1 << int(math.log2(tokens))))


def _sequence_s(load: Load, profile: Profile) -> float:
    """That one more sequence adds to a step."""
    return profile.decode_sequence_s + profile.decode_context_s * load.context


def _late_wait_s(workers: int, busy: float, mean_s: float, variation: float) -> float:
    """The wait that TAIL of the prompts exceed."""
    waits = busy ** (math.sqrt(2 * (workers + 1)) - 1)  # share of them, Sakasegawa
    wait_s = waits * mean_s / (workers * (1 - busy)) * (variation + 1) / 2
    if wait_s <= 0 or waits <= TAIL:
        return 0.0
    return wait_s / waits * math.log(waits / TAIL)


def _variation(rows: Sequence[TraceRequest], window_s: float) -> float:
    at = np.array([row.at_s for row in rows])
    span_s = at[-1] - at[0]
    windows = int(span_s / window_s)
    if windows < 2:
        return 1.0
    window_of = np.minimum((at - at[0]) / span_s * windows, windows - 1).astype(np.int64)
    counts = np.unique(window_of, return_counts=True)[1]  # of those with any: the others are many
    mean = len(rows) / windows
    return float(max(1.0, (np.square(counts).sum() / windows - mean**2) / mean))
