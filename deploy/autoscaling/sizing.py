"""How many workers a load needs, by what their steps take. Pure.

Prefill is a queue: sequences arrive at a rate, each takes the seconds of its uncached tokens, and
the wait must leave time for them within TTFT. Its tail is that of M/M/n (Erlang's C) with the
variation of arrivals and prompts as by Allen and Cunneen. Decode is a shared step: a worker holds
so many sequences that its step still is within TPOT, that there are places, and that their KV has
room. How many there are at once is Little's law, and around that mean as much as counts vary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from crossdock.deploy.autoscaling.observation import Pool, PoolState

BUSY = 0.95  # of its time that a prefill worker computes, at the most
STEP_ROOM = 0.95  # of TPOT that a step is sized for: the first one comes after the hand-off
KV_ROOM = 0.9  # of a worker's blocks: what is left is for those that grow
SLACK = 0.1  # of TTFT that a prompt may wait, also where its own seconds leave less
MOST = 100_000


@dataclass(frozen=True)
class Load:
    """What a model's clients ask for: sequences a second, and the mean one."""

    rate: float
    clumping: float = 1.0  # variance of a count of arrivals over its mean
    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0  # of prompt_tokens
    variation: float = 0.0  # of the uncached ones: variance over the mean's square
    output_tokens: float = 0.0

    @property
    def context(self) -> float:
        """Tokens of a sequence half-way through its answer."""
        return self.prompt_tokens + self.output_tokens / 2


@dataclass(frozen=True)
class Aims:
    """TTFT and TPOT in seconds, and the part of sequences that meets each."""

    ttft_s: float
    tpot_s: float
    attainment: float


@dataclass(frozen=True)
class Need:
    """Workers, and what they were counted by, for a reader."""

    workers: int
    why: str


def prefill_need(load: Load, aims: Aims, pool: Pool, state: PoolState) -> Need:
    """The fewest prefill workers whose waits end in time."""
    own_s = _prompt_s(load, pool, state)
    return _waits_end_in_time(load.rate, own_s, own_s, load, aims)


def _waits_end_in_time(rate: float, busy_s: float, own_s: float, load: Load, aims: Aims) -> Need:
    """Each sequence takes `busy_s` of a worker; `own_s` after its wait it has token 0."""
    offered = rate * busy_s
    slack_s = max(aims.ttft_s - own_s, SLACK * aims.ttft_s)
    spread = max(1.0, (load.clumping + load.variation) / 2)
    workers = max(1, math.ceil(offered / BUSY))
    while workers < MOST and _late(workers, offered, busy_s, slack_s, spread) > 1 - aims.attainment:
        workers += 1
    return Need(workers, f"{offered:.2f} busy with prompts of {1000 * own_s:.0f} ms")


def _late(workers: int, offered: float, each_s: float, slack_s: float, spread: float) -> float:
    """The part that waits longer than `slack_s`."""
    spare = workers - offered
    if spare <= 0:
        return 1.0
    if not each_s:
        return 0.0
    return _any_wait(workers, offered) * math.exp(-spare * slack_s / (each_s * spread))


def _any_wait(workers: int, offered: float) -> float:
    """Erlang's C: the part that finds every worker busy."""
    blocked = 1.0
    for servers in range(1, workers + 1):
        blocked = offered * blocked / (servers + offered * blocked)
    return workers * blocked / (workers - offered * (1 - blocked))


def batch_within(load: Load, aims: Aims, pool: Pool, state: PoolState) -> float:
    """Sequences of a worker whose step is within TPOT, that have places, and whose KV has room."""
    steps, context = state.steps, load.context
    places = float(pool.max_batch)
    if state.kv_tokens:
        longest = load.prompt_tokens + load.output_tokens
        places = min(places, max(1.0, KV_ROOM * state.kv_tokens / max(longest, 1.0)))
    each_s = steps.decode_sequence_s + steps.decode_context_s * context
    left_s = STEP_ROOM * aims.tpot_s - steps.decode_base_s
    if left_s <= each_s:  # no worker meets it, however few sequences it has: room alone decides
        return places
    return max(1.0, min(places, left_s / each_s)) if each_s else places


def decode_need(load: Load, aims: Aims, pool: Pool, state: PoolState) -> Need:
    """The fewest decode workers with steps within TPOT."""
    batch = batch_within(load, aims, pool, state)
    step_s = state.steps.step_s(batch, load.context)
    mean = load.rate * load.output_tokens * step_s
    most = mean + _quantile(aims) * math.sqrt(mean * max(1.0, load.clumping))
    workers = max(1, math.ceil(most / batch))
    return Need(workers, f"{mean:.0f} sequences at once, {batch:.0f} a worker")


def colocated_need(load: Load, aims: Aims, pool: Pool, state: PoolState) -> Need:
    """The fewest colocated workers: prompts take their part of every second, which makes steps
    seem longer, and steps theirs, which makes prompts wait."""
    steps = state.steps
    prompt_s = _prompt_s(load, pool, state)
    first = _waits_end_in_time(load.rate, prompt_s, prompt_s, load, aims)
    second = decode_need(load, aims, pool, state)
    batch = batch_within(load, aims, pool, state)
    step_s = steps.step_s(batch, load.context)
    decoding = load.rate * load.output_tokens * step_s / batch  # workers' time in steps
    whole = load.rate * prompt_s + decoding
    workers = max(first.workers, second.workers, math.ceil(whole / BUSY))
    return Need(workers, f"{whole:.2f} busy, {second.why}")


def _prompt_s(load: Load, pool: Pool, state: PoolState) -> float:
    uncached = load.prompt_tokens - load.cached_tokens
    return state.steps.prompt_s(uncached, load.cached_tokens, pool.chunk_tokens)


def _quantile(aims: Aims) -> float:
    """Deviations above the mean that leave no more than may miss."""
    return NormalDist().inv_cdf(aims.attainment)
