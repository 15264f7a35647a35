"""What one pool should have by itself: what the forecast needs, a fast loop above it. Pure."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from crossdock.deploy.autoscaling.forecast import Forecast, Mean, Trend
from crossdock.deploy.autoscaling.observation import Config, Pool, PoolState, StepTimes
from crossdock.deploy.autoscaling.sizing import (
    Aims,
    Load,
    Need,
    batch_within,
    colocated_need,
    decode_need,
    prefill_need,
)
from crossdock.proto.types import Role
from crossdock.router.dispatch.traffic import Traffic

MEAN_S = 120.0  # in which what is known of lengths comes to count a third of what it did
START_WEIGHT = 0.5  # of the newest start among those measured
BAND = 0.67  # deviations of the forecast's mean up to which workers are kept: three cases of four
WAIT_PART = 0.5  # of TTFT: a queue that takes longer is one worker too few
LEAST_MISSES = 3  # in one interval: fewer are chance
LEAST_BUSY = 0.25  # of its time: those who miss their aims on idler workers are helped by none more
MOST_AT_ONCE = 1.0  # the fast loop doubles a pool at the most

NEEDS: dict[Role, Callable[[Load, Aims, Pool, PoolState], Need]] = {
    Role.PREFILL: prefill_need,
    Role.DECODE: decode_need,
    Role.COLOCATED: colocated_need,
}


@dataclass(frozen=True)
class Demand:
    """What was learned of one model's clients."""

    arrivals: Trend = field(default_factory=Trend)
    uncached: Mean = field(default_factory=Mean)  # prompt tokens of a sequence
    cached: Mean = field(default_factory=Mean)
    outputs: Mean = field(default_factory=Mean)

    def observed(self, seen: Traffic, seconds: float) -> Demand:
        """After what was counted in the last `seconds`."""
        keep = math.exp(-seconds / MEAN_S)
        uncached = seen.prompt_tokens - seen.cached_tokens
        return Demand(
            self.arrivals.observed(seen.arrived, seconds),
            self.uncached.observed(seen.started, uncached, seen.uncached_squares, keep),
            self.cached.observed(seen.started, seen.cached_tokens, 0.0, keep),
            self.outputs.observed(seen.finished, seen.generated_tokens, 0.0, keep),
        )

    @property
    def known(self) -> bool:
        """Whether anything was served to its end."""
        return bool(self.uncached.count and self.outputs.count)

    def load(self, rate: float, clumping: float) -> Load:
        """As it is at a rate."""
        return Load(
            rate=rate,
            clumping=clumping,
            prompt_tokens=self.uncached.value + self.cached.value,
            cached_tokens=self.cached.value,
            variation=self.uncached.variation,
            output_tokens=self.outputs.value,
        )


@dataclass(frozen=True)
class Memory:
    """What is remembered of one pool from decision to decision. Times are the caller's clock."""

    start_s: float | None = None  # of its starts, measured
    steps: StepTimes = field(default_factory=StepTimes)  # as they were last measured
    raised_at: float = float("-inf")  # it was last given workers
    pressed: int = 0  # workers that the fast loop asked for,
    pressed_until: float = float("-inf")  # and for how long
    pressed_why: str = ""
    fewer_since: float | None = None  # since when fewer have been enough,
    fewer: int = 0  # and how many at the most were, in that time

    def observed(self, state: PoolState) -> Memory:
        """After starts that ended, and steps that were measured, as far as any were."""
        start_s = self.start_s
        for each in state.started_s:
            start_s = each if start_s is None else start_s + START_WEIGHT * (each - start_s)
        return replace(self, start_s=start_s, steps=state.steps.or_else(self.steps))

    def raised(self, now: float) -> Memory:
        """It is given workers."""
        return replace(self, raised_at=now, fewer_since=None)


class Cause(enum.StrEnum):
    """Why a pool is to have another size."""

    FORECAST = "forecast"  # more are needed for what is expected
    LATE = "late"  # the fast loop: sequences wait, or missed their aims
    FEWER = "fewer"  # fewer have been enough for a while
    FLIP = "flip"  # with an alike pool, that has too many or too few
    GPUS = "gpus"  # the bound on GPUs


@dataclass(frozen=True)
class Want:
    """What a pool should have by itself. `floor` ≤ `keep`: below `keep` none is taken away."""

    target: int
    floor: int
    keep: int
    why: str
    cause: Cause = Cause.FORECAST


@dataclass(frozen=True)
class Situation:
    """One autoscaled pool at one decision. `given`: workers of other pools that share its work."""

    config: Config
    pool: Pool
    state: PoolState
    demand: Demand
    seen: Traffic
    seconds: float
    given: int = 0

    @property
    def aims(self) -> Aims:
        """Of the config, in seconds."""
        slo = self.config.slo
        return Aims(slo.ttft_ms / 1000, slo.tpot_ms / 1000, self.config.settings.attainment)

    def start_s(self, memory: Memory) -> float:
        """How long a worker takes to start."""
        return self.pool.start_s if memory.start_s is None else memory.start_s

    def patience_s(self, memory: Memory) -> float:
        """How long fewer must have been enough."""
        settings = self.config.settings
        return settings.down_s or max(self.start_s(memory), 3 * settings.interval_s)

    def want(self, memory: Memory, now: float) -> tuple[Memory, Want]:
        """What it should have, and what is to be remembered."""
        if why := self._unknown():
            as_it_is = self._within(self.state.target)
            return replace(memory, fewer_since=None), Want(as_it_is, 0, as_it_is, why)
        start_s = self.start_s(memory)
        ahead_s = start_s + self.config.settings.interval_s
        soon, later = self.demand.arrivals.at(0.0), self.demand.arrivals.at(ahead_s)
        floor, need = self._need(soon, later, 0.0)
        keep, _ = self._need(soon, later, BAND)
        memory = self._press(memory, now, start_s)
        pressed = memory.pressed if now < memory.pressed_until else 0
        least, keep = self._within(max(floor, pressed)), self._within(max(keep, pressed))
        about = f"{later.mean:.3g} sequences/s in {ahead_s:.3g} s ({soon.mean:.3g} now): {need.why}"
        late = pressed >= floor and pressed > 1
        if late:
            about = f"{memory.pressed_why}; {about}"
        memory, target = self._settle(memory, now, least, keep)
        cause = Cause.FORECAST if not late else Cause.LATE
        if target < self.state.target:
            cause = Cause.FEWER
        return memory, Want(target, self._within(floor), keep, about, cause)

    def _unknown(self) -> str:
        """Why nothing can be said yet."""
        if not self.demand.known:
            return "no sequence was served to its end yet"
        steps, role = self.state.steps, self.pool.role
        if role is not Role.DECODE and not steps.knows_prefill:
            return "no prompt was measured yet"
        if role is not Role.PREFILL and not steps.knows_decode:
            return "no decode step was measured yet"
        return ""

    def _need(self, soon: Forecast, later: Forecast, band: float) -> tuple[int, Need]:
        """Workers of this pool, and the need of all that share its work."""
        rate = max(each.mean + band * each.deviation for each in (soon, later))
        load = self.demand.load(rate, later.clumping)
        need = NEEDS[self.pool.role](load, self.aims, self.pool, self.state)
        return need.workers - self.given, need

    def _press(self, memory: Memory, now: float, start_s: float) -> Memory:
        """The fast loop: what was missed, and what waits, whatever the forecast says. What was
        added last must have begun to help before more is."""
        if now < memory.raised_at + start_s + self.config.settings.interval_s:
            return memory
        over, why = self._excess()
        serving = self.state.ready
        wanted = self._within(math.ceil(serving * (1 + min(over, MOST_AT_ONCE))))
        if over <= 0 or wanted <= serving:
            return memory
        until = now + start_s + self.patience_s(memory)
        return replace(memory, pressed=wanted, pressed_until=until, pressed_why=why)

    def _excess(self) -> tuple[float, str]:
        """By what part of the workers that serve there are too few."""
        signs = [(0.0, "")]
        if self.pool.role is not Role.DECODE:
            signs += self._late_first_tokens()
        if self.pool.role is not Role.PREFILL:
            signs += self._slow_tokens()
        return max(signs)

    def _late_first_tokens(self) -> list[tuple[float, str]]:
        state, aims, load = self.state, self.aims, self.demand.load(0.0, 1.0)
        uncached = load.prompt_tokens - load.cached_tokens
        each_s = state.steps.prompt_s(uncached, load.cached_tokens, self.pool.chunk_tokens)
        wait_s = state.queued_tokens * each_s / max(uncached, 1.0) / max(1, state.ready)
        most_s = WAIT_PART * aims.ttft_s
        served = self.seen.started + self.seen.refused
        missed = served - self.seen.ttft_met
        busy = wait_s / most_s + self.seen.started * each_s / self.seconds / max(1, state.ready)
        return [
            (wait_s / most_s - 1, f"{wait_s:.2f} s of prompts wait on each of {state.ready}"),
            self._missed(missed, served, "TTFT", busy),
        ]

    def _slow_tokens(self) -> list[tuple[float, str]]:
        state, seen = self.state, self.seen
        batch = batch_within(self.demand.load(0.0, 1.0), self.aims, self.pool, state)
        held = (state.running + state.waiting) / max(1, state.ready)
        return [
            (
                held / batch - 1,
                f"{held:.0f} sequences on each of {state.ready}, at most {batch:.0f}",
            ),
            self._missed(seen.finished - seen.tpot_met, seen.finished, "TPOT", held / batch),
        ]

    def _missed(self, missed: int, served: int, aim: str, busy: float) -> tuple[float, str]:
        if missed < LEAST_MISSES or busy < LEAST_BUSY:
            return 0.0, ""
        over = missed / served - (1 - self.aims.attainment)
        return over, f"{missed} of {served} sequences missed {aim}"

    def _settle(self, memory: Memory, now: float, least: int, keep: int) -> tuple[Memory, int]:
        """Up at once; down once fewer have been enough for a while, to the most of that time."""
        target = self._within(self.state.target)
        if least > target or keep >= target:
            return replace(memory, fewer_since=None), max(least, target)
        since = now if memory.fewer_since is None else memory.fewer_since
        fewer = keep if memory.fewer_since is None else max(keep, memory.fewer)
        if now - since < self.patience_s(memory):
            return replace(memory, fewer_since=since, fewer=fewer), target
        return replace(memory, fewer_since=None), fewer

    def _within(self, workers: int) -> int:
        return min(max(workers, self.pool.least), self.pool.most)
