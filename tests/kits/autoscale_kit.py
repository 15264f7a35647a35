"""A model's two pools in a world of small time slices, sized by `autoscale` or another rule."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from crossdock.deploy.autoscaling.autoscale import Decision, State, autoscale
from crossdock.deploy.autoscaling.observation import (
    Config,
    Observation,
    Pool,
    PoolState,
    StepTimes,
)
from crossdock.deploy.autoscaling.settings import AutoscaleSettings
from crossdock.proto.types import Role
from crossdock.router.dispatch.lifecycle import Slo
from crossdock.router.dispatch.traffic import Traffic, TrafficCount

STEPS = StepTimes(0.005, 0.0002, 0.0, 0.01, 0.0005, 0.0)
PREFILL = Pool("prefill", Role.PREFILL, 1, 32, start_s=30.0, chunk_tokens=2048, alike="a")
DECODE = Pool("decode", Role.DECODE, 1, 32, start_s=30.0, max_batch=64, alike="a")
CONFIG = Config((PREFILL, DECODE), Slo(2000.0, 40.0), AutoscaleSettings(interval_s=10.0))

Decide = Callable[[Observation, float], dict[str, int]]


def with_settings(config: Config = CONFIG, **fields) -> Config:
    return replace(config, settings=replace(config.settings, **fields))


def with_pools(config: Config = CONFIG, **fields) -> Config:
    """Both pools with these fields."""
    return replace(config, pools=tuple(replace(pool, **fields) for pool in config.pools))


@dataclass
class Autoscaler:
    """Calls `autoscale` and keeps what it decided."""

    config: Config
    state: State = field(default_factory=State)
    decisions: list[Decision] = field(default_factory=list)

    def __call__(self, seen: Observation, now: float) -> dict[str, int]:
        self.state, decision = autoscale(self.config, self.state, seen, now)
        self.decisions.append(decision)
        if self.config.settings.dry_run:
            return {name: state.target for name, state in seen.pools.items()}
        return decision.targets


@dataclass
class _Job:
    arrived: float
    uncached: int
    cached: int
    output: int
    first: float = 0.0
    left: float = 0.0


@dataclass
class _Worker:
    ready_at: float
    free_at: float = 0.0
    jobs: list[_Job] = field(default_factory=list)
    leaving: bool = False


@dataclass
class World:
    """`start_s`: of a worker. A flip takes `flip_s`. Times in seconds of the world's clock."""

    config: Config
    start_s: float = 30.0
    flip_s: float = 2.0
    steps: StepTimes = STEPS
    slice_s: float = 0.05
    counts: TrafficCount = field(default_factory=TrafficCount)
    worker_s: float = 0.0

    def __post_init__(self) -> None:
        self.now = 0.0
        self.prefill: list[_Worker] = []
        self.decode: list[_Worker] = []
        self.queue: deque[_Job] = deque()
        self.targets: dict[str, int] = {}
        self.sizes: list[tuple[float, int, int]] = []
        self._started: dict[str, list[float]] = {"prefill": [], "decode": []}

    def run(
        self, arrivals: Iterable[tuple[float, int, int, int]], decide: Decide, until: float,
        first: tuple[int, int] = (1, 1),
    ) -> Traffic:  # fmt: skip
        """Serves (time, uncached, cached, output) with `first` workers to begin with."""
        self.targets = {"prefill": first[0], "decode": first[1]}
        self.prefill = [_Worker(0.0) for _ in range(first[0])]
        self.decode = [_Worker(0.0) for _ in range(first[1])]
        pending = deque(arrivals)
        next_at, before = self.config.settings.interval_s, self.counts.now
        while self.now < until:
            while pending and pending[0][0] <= self.now:
                self.queue.append(_Job(*pending.popleft()))
                self.counts.arrived += 1
            self._prefill()
            self._decode()
            self.worker_s += self.slice_s * (len(self.prefill) + len(self.decode))
            self.now += self.slice_s
            if self.now >= next_at:
                seen = self._observe(self.counts.now.since(before))
                before, next_at = self.counts.now, next_at + self.config.settings.interval_s
                self._resize(decide(seen, self.now))
                self.sizes.append((self.now, len(self.prefill), len(self.decode)))
        return self.counts.now

    def _prefill(self) -> None:
        for worker in list(self.prefill):
            if worker.ready_at > self.now:
                continue
            while self.queue and worker.free_at <= self.now and not worker.leaving:
                job = self.queue.popleft()
                seconds = self.steps.prompt_s(job.uncached, job.cached, 2048)
                worker.free_at = max(worker.free_at, self.now - self.slice_s) + seconds
                worker.jobs.append(job)
                job.first = worker.free_at
            for job in [job for job in worker.jobs if job.first <= self.now]:
                worker.jobs.remove(job)
                self._first_token(job)
            if worker.leaving and not worker.jobs:
                self.prefill.remove(worker)

    def _first_token(self, job: _Job) -> None:
        counts = self.counts
        counts.started += 1
        counts.ttft_met += job.first - job.arrived <= self.config.slo.ttft_ms / 1000
        counts.prompt_tokens += job.uncached + job.cached
        counts.cached_tokens += job.cached
        counts.uncached_squares += job.uncached**2
        job.left = float(job.output)
        taking = [w for w in self.decode if w.ready_at <= self.now and not w.leaving]
        min(taking, key=lambda w: len(w.jobs)).jobs.append(job)

    def _decode(self) -> None:
        for worker in list(self.decode):
            batch = worker.jobs[: self.config.pools[1].max_batch]
            if batch:
                gained = self.slice_s / self.steps.step_s(len(batch), 0)
                for job in batch:
                    job.left -= gained
                for job in [job for job in batch if job.left <= 0]:
                    worker.jobs.remove(job)
                    self.counts.finished += 1
                    self.counts.generated_tokens += job.output
                    tpot_s = (self.now - job.first) / job.output
                    self.counts.tpot_met += tpot_s <= self.config.slo.tpot_ms / 1000
            if worker.leaving and not worker.jobs:
                self.decode.remove(worker)

    def _observe(self, traffic: Traffic) -> Observation:
        pools = {}
        for name, workers in (("prefill", self.prefill), ("decode", self.decode)):
            ready = [w for w in workers if w.ready_at <= self.now and not w.leaving]
            starting = sum(w.ready_at > self.now for w in workers)
            started, self._started[name] = self._started[name], []
            held = [min(len(w.jobs), 64) for w in ready]
            pools[name] = PoolState(
                self.targets[name],
                len(ready),
                starting,
                queued_tokens=sum(j.uncached for j in self.queue) if name == "prefill" else 0,
                running=sum(held),
                waiting=sum(len(w.jobs) for w in ready) - sum(held),
                steps=self.steps,
                started_s=tuple(started),
            )
        return Observation(self.config.settings.interval_s, pools, {"": traffic})

    def _resize(self, targets: dict[str, int]) -> None:
        """As reconcile would: what one has too many of changes its role where another lacks."""
        pools = {"prefill": self.prefill, "decode": self.decode}
        lacks = {name: targets[name] - self.targets[name] for name in pools}
        alike = self.config.pools[0].alike == self.config.pools[1].alike != ""
        flips = min(max(lacks.values()), -min(lacks.values())) if alike else 0
        self.targets = dict(targets)
        for name, workers in pools.items():
            staying = [w for w in workers if not w.leaving]
            for worker in sorted(staying, key=lambda w: -w.ready_at)[: max(0, -lacks[name])]:
                worker.leaving = True
            for i in range(max(0, lacks[name])):
                takes = self.flip_s if i < flips else self.start_s
                workers.append(_Worker(self.now + takes))
                if i >= flips:
                    self._started[name].append(takes)


def poisson(
    rate: Callable[[float], float], until: float, rng: random.Random,
    uncached: int = 1000, cached: int = 0, output: int = 100,
) -> list[tuple[float, int, int, int]]:  # fmt: skip
    """Arrivals at rate(t) a second, of exponentially distributed lengths."""
    highest = max(rate(t * until / 1000) for t in range(1001))
    arrivals, now = [], 0.0
    while (now := now + rng.expovariate(highest)) < until:
        if rng.random() * highest < rate(now):
            lengths = (int(1 + mean * rng.expovariate(1.0)) for mean in (uncached, cached, output))
            arrivals.append((now, *lengths))
    return arrivals
