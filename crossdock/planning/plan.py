"""Plans: what a load needs disaggregated and co-located, each checked by simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from crossdock.bench.traces import Trace, TraceRequest, arrival_times
from crossdock.deploy.spec import ClusterSpec, PoolSpec
from crossdock.engine.profiles import MIB, Profile
from crossdock.planning import guess
from crossdock.planning.guess import Load
from crossdock.planning.search import Outcome, Size, best_split, cheapest_pair, fewest
from crossdock.proto.errors import ConfigError, InvalidRequest
from crossdock.proto.types import Role
from crossdock.sim.cluster import Served, SimCluster, profile_in
from crossdock.sim.report import SimReport, meets, report
from crossdock.worker.config import settings_of

MOST_WORKERS = 1024
FEWEST_REQUESTS, MOST_REQUESTS = 500, 20_000
BLOCK = 512  # tokens that a made-up prompt names at once
HOUR_S = 3600.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Pools:
    """How workers are set up. Sizes in tokens, but for the pool of KV, MB."""

    kv_memory_mb: int
    prefill_chunk: int
    decode_chunk: int
    colocated_chunk: int
    max_batch: int


def profile_of(base: ClusterSpec) -> Profile:
    """That of the first pool, with its KV memory. Raises ConfigError where it has none."""
    name, pool = next(iter(base.pools.items()))
    return replace(profile_in(name, pool.engine), kv_memory_mb=pool.kv_memory_mb)


def span(field: str, text: str) -> tuple[int, int]:
    """N or LOW:HIGH, of tokens. Raises InvalidRequest."""
    low, _, high = text.partition(":")
    try:
        found = int(low), int(high or low)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise InvalidRequest(field, text, "must be N or LOW:HIGH, from 1")
    return found


def pools_of(base: ClusterSpec, profile: Profile, kv_memory_mb: int = 0) -> Pools:
    """As the base's pools of each role are set up, and where it has none of a role, as fits the
    profile. Raises ConfigError where the size of a worker's KV pool is not known."""
    chunks = {pool.role: pool.chunk_tokens for pool in base.pools.values()}
    batches = [p.max_batch for p in base.pools.values() if p.role != Role.PREFILL]
    memory = kv_memory_mb or profile.kv_memory_mb
    if not memory:
        raise ConfigError(
            "kv_memory_mb",
            "is not in the profile: say there or by --kv-memory-mb how large a pool is",
        )
    return Pools(
        kv_memory_mb=memory,
        prefill_chunk=chunks.get(Role.PREFILL, 8192),
        decode_chunk=chunks.get(Role.DECODE, 512),
        colocated_chunk=chunks.get(Role.COLOCATED) or guess.colocated_chunk(profile, base.slo),
        max_batch=max(batches),
    )


@dataclass(frozen=True)
class Option:
    """One way to serve the load: what it takes and what comes of it."""

    size: Size
    outcome: Outcome
    report: SimReport
    gpus: int
    usd_per_hour: float  # 0: the price is not known

    @property
    def gpu_hours_per_million_tokens(self) -> float:
        """Of tokens that are answered."""
        return self.gpus / HOUR_S / self.output_rate * 1e6 if self.output_rate else 0.0

    @property
    def usd_per_million_tokens(self) -> float:
        """Of tokens that are answered; 0: the price is not known."""
        return self.usd_per_hour / HOUR_S / self.output_rate * 1e6 if self.output_rate else 0.0

    @property
    def output_rate(self) -> float:
        """Tokens a second, over the time in which requests arrive."""
        of = self.report
        return of.rate * of.output_tokens / of.requests

    def to_json(self) -> dict[str, Any]:
        """As a JSON document."""
        return {
            **{f"{kind}_workers": count for kind, count in asdict(self.size).items()},
            "gpus": self.gpus,
            "attained": self.outcome.attained,
            "usd_per_hour": self.usd_per_hour,
            "usd_per_million_output_tokens": self.usd_per_million_tokens,
            "gpu_hours_per_million_output_tokens": self.gpu_hours_per_million_tokens,
            "simulated": self.report.to_json(),
        }


@dataclass(frozen=True)
class Plan:
    """The cheapest way with separate pools and the cheapest co-located one; None where no number of
    workers within the limit meets the aim."""

    aim: float
    guess: Size
    disaggregated: Option | None
    colocated: Option | None
    nearest: Option | None = None  # where neither meets it: the most that is attained
    tried: int = 0  # simulations

    @property
    def best(self) -> Option | None:
        """The cheaper; of equally cheap ones that which attains more, then the simpler."""
        options = [each for each in (self.colocated, self.disaggregated) if each is not None]
        return min(options, key=lambda each: (each.gpus, -each.outcome.attained), default=None)

    @property
    def verdict(self) -> str:
        """Whether to disaggregate, and what that saves, in words."""
        split, both = self.disaggregated, self.colocated
        if split is None and both is None:
            return "no number of workers within the limit meets the aim"
        if both is None:
            return "disaggregate: no number of co-located workers within the limit meets the aim"
        if split is None:
            return "do not disaggregate: no split of the workers within the limit meets the aim"
        saved = both.gpus - split.gpus
        if saved > 0:
            return f"disaggregate: it saves {_of(saved, both)}"
        if saved < 0:
            return f"do not disaggregate: co-located workers save {_of(-saved, split)}"
        return "as you like: both take as much"

    def to_json(self) -> dict[str, Any]:
        """As a JSON document."""
        options = {"disaggregated": self.disaggregated, "colocated": self.colocated}
        shown = {name: each.to_json() if each else None for name, each in options.items()}
        best = self.best
        return {
            "aim": self.aim,
            "verdict": self.verdict,
            "best": None if best is None else asdict(best.size),
            "guess": asdict(self.guess),
            "simulations": self.tried,
            **shown,
            "nearest": self.nearest.to_json() if self.nearest else None,
        }


@dataclass
class Planner:
    """Plans for one load. `base`: where policy, limits and SLO are from. `most`: workers at the
    most; `gpus` are those of a worker, 1 where its profile has none."""

    base: ClusterSpec
    profile: Profile
    trace: Trace
    pools: Pools
    aim: float = 0.99
    most: int = MOST_WORKERS
    seed: int = 0
    progress: Progress = lambda line: None
    _tried: dict[Size, tuple[Outcome, SimReport]] = field(default_factory=dict)

    def plan(self) -> Plan:
        """Searches both ways to serve the load."""
        load, first = self._load, self.guess
        split = cheapest_pair(first, self.most, self.aim, self.attempt) if self.most > 1 else None
        room = split.workers if split is not None else self.most
        both = guess.colocated_workers(
            load, self.profile, self.base.slo, *self._limits, self.pools.colocated_chunk
        )
        # With twice the workers of the other it is no rival: how many more it takes is not asked.
        count = fewest(
            1,
            both,
            min(self.most, max(2 * room, 2)),
            lambda workers: self.attempt(Size(colocated=workers)).meets(self.aim),
        )
        disaggregated = None if split is None else self._option(split)
        colocated = None if count is None else self._option(Size(colocated=count))
        nearest = None if disaggregated or colocated else self._nearest()
        return Plan(self.aim, first, disaggregated, colocated, nearest, len(self._tried))

    @cached_property
    def guess(self) -> Size:
        """Prefill and decode workers by arithmetic, without a simulation."""
        load, slo = self._load, self.base.slo
        prefill = guess.prefill_workers(load, self.profile, slo, self.pools.prefill_chunk)
        decode = guess.decode_workers(load, self.profile, slo, *self._limits)
        total = prefill + decode
        if total > self.most > 1:
            prefill = min(max(1, round(self.most * prefill / total)), self.most - 1)
            decode = self.most - prefill
        return Size(prefill, decode)

    def attempt(self, size: Size) -> Outcome:
        """Simulates workers of this size, until too many requests have missed."""
        if size not in self._tried:
            self._tried[size] = self._simulated(size)
            outcome = self._tried[size][0]
            missed = f"misses it, with {outcome.attained:.1%} at the most"
            met = "meets it" if self.aim else f"attains {outcome.attained:.1%}"
            self.progress(f"{size}: {met if outcome.meets(self.aim) else missed}")
        return self._tried[size][0]

    def spec(self, size: Size) -> ClusterSpec:
        """The cluster of this size."""
        simulated: Any = settings_of("simulated")
        pools, engine = self.pools, simulated(profile=self.profile)
        made = {}
        for role, workers, chunk in (
            (Role.PREFILL, size.prefill, pools.prefill_chunk),
            (Role.DECODE, size.decode, pools.decode_chunk),
            (Role.COLOCATED, size.colocated, pools.colocated_chunk),
        ):
            if workers:
                made[str(role)] = PoolSpec(
                    role=str(role),
                    replicas=workers,
                    engine=engine,
                    kv_memory_mb=pools.kv_memory_mb,
                    max_batch=pools.max_batch,
                    chunk_tokens=chunk,
                )
        return replace(self.base, pools=MappingProxyType(made)).validate()

    @cached_property
    def _load(self) -> Load:
        return Load.of(self.trace, self.base.slo)

    @property
    def _limits(self) -> tuple[int, int]:
        tokens = (self.pools.kv_memory_mb * MIB) // self.profile.kv_bytes_per_token
        return self.pools.max_batch, tokens

    def _simulated(self, size: Size) -> tuple[Outcome, SimReport]:
        spec = self.spec(size)
        cluster = SimCluster(spec, seed=self.seed)
        tally = _Tally(spec, len(self.trace.requests), self.aim)
        cluster.on_ended = tally.ended
        cluster.run(self.trace, until=tally.hopeless)
        return tally.outcome, report(spec.gateway.policy, cluster, spec.slo)

    def _option(self, size: Size) -> Option:
        outcome, simulated = self._tried[size]
        gpus = size.workers * max(1, self.profile.gpus)
        return Option(size, outcome, simulated, gpus, gpus * self.profile.usd_per_gpu_hour)

    def _nearest(self) -> Option:
        """Nothing meets the aim: simulated to their ends, so that what is attained is known."""
        tried = self.aim, self._tried
        self.aim, self._tried = 0.0, {}
        options = [Size(colocated=self.most)]
        if self.most > 1:
            options.append(best_split(self.most, self.guess, 1.0, self.attempt)[0])
        best = max(options, key=lambda size: self.attempt(size).attained)
        option = self._option(best)
        self.aim, self._tried = tried
        return option


class _Tally:
    """Counts misses as requests end."""

    def __init__(self, spec: ClusterSpec, requests: int, aim: float) -> None:
        self._slo, self._requests = spec.slo, requests
        self._allowed = requests - aim * requests
        self._ttft = self._tpot = self._misses = 0

    def ended(self, served: Served) -> None:
        if meets(served, self._slo):
            return
        self._misses += 1
        if served.ttft_s is None or served.ttft_s > self._slo.ttft_ms / 1000:
            self._ttft += 1
        else:
            self._tpot += 1

    def hopeless(self) -> bool:
        return self._misses > self._allowed + 1e-9

    @property
    def outcome(self) -> Outcome:
        return Outcome(1 - self._misses / self._requests, self._ttft, self._tpot)


def steady(
    rate: float, inputs: tuple[int, int], outputs: tuple[int, int], seconds: float, seed: int
) -> Trace:
    """Requests at a steady rate (Poisson), lengths uniform in inclusive ranges, that share no
    prefix. As many as come in so many seconds, within FEWEST_REQUESTS and MOST_REQUESTS. Raises
    InvalidRequest for a rate or seconds that are not finite."""
    if not rate * seconds < math.inf:
        raise InvalidRequest("rate", f"{rate:g} for {seconds:g} s", "must be finite")
    count = min(MOST_REQUESTS, max(FEWEST_REQUESTS, round(rate * seconds)))
    rng = np.random.default_rng([seed, 6])
    names = itertools.count()
    requests = []
    for at_s in arrival_times(count, rate, True, seed):
        tokens = int(rng.integers(*inputs, endpoint=True))
        blocks = tuple(itertools.islice(names, -(-tokens // BLOCK)))
        output = int(rng.integers(*outputs, endpoint=True))
        requests.append(TraceRequest(at_s, tokens, output, blocks))
    return Trace(tuple(requests), BLOCK)


def _of(saved: int, of: Option) -> str:
    return f"{saved} of {of.gpus} GPUs ({saved / of.gpus:.0%})"
