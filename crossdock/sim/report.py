"""What a simulation shows: one report a policy and rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from crossdock.bench.metrics import percentile
from crossdock.router.dispatch.lifecycle import Slo
from crossdock.sim.cluster import Served, SimCluster


@dataclass(frozen=True)
class SimReport:
    """Times in seconds. A request that failed counts in `slo_attainment` as one that missed it, and
    in no time."""

    policy: str
    rate: float  # requests a second, of the trace as it was replayed
    requests: int
    failed: int
    slo_attainment: float  # share of requests within both TTFT and TPOT aims
    goodput: float  # those a second, from the first request until the last answer
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_mean: float  # (last token - first) / (tokens - 1) of each request
    tpot_p99: float
    itl_p99: float  # of each request's longest gap between tokens
    hit_tokens: int  # of prompt_tokens, found in a prefix cache of a worker that computed them
    prompt_tokens: int
    output_tokens: int
    transferred_bytes: int  # KV from prefill to decode workers
    duration: float  # from the first request until the last answer
    utilization: dict[str, float] = field(default_factory=dict)  # by pool, share of time in steps
    worker_seconds: dict[str, float] = field(default_factory=dict)  # by pool, from launch to end

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def report(policy: str, cluster: SimCluster, slo: Slo) -> SimReport:
    """Of a simulation that has run."""
    served = cluster.served
    good = [each for each in served if meets(each, slo)]
    duration = max((each.ended_s for each in served), default=0.0)
    seconds, utilization = _by_pool(cluster)
    return SimReport(
        policy=policy,
        rate=_rate(served),
        requests=len(served),
        failed=sum(bool(each.error) for each in served),
        slo_attainment=len(good) / len(served),
        goodput=len(good) / duration if duration else 0.0,
        **_times(served),
        hit_tokens=sum(each.cached_tokens for each in served),
        prompt_tokens=sum(each.input_tokens for each in served),
        output_tokens=sum(each.output_tokens for each in served),
        transferred_bytes=sum(each.transport.stats.bytes for each in cluster.control.all_workers),
        duration=duration,
        utilization=utilization,
        worker_seconds=seconds,
    )


def meets(served: Served, slo: Slo) -> bool:
    """Whether a request was answered within the aims."""
    if served.error or served.ttft_s is None or served.ttft_s > slo.ttft_ms / 1000:
        return False
    return served.tpot_s is None or served.tpot_s <= slo.tpot_ms / 1000


def _rate(served: Sequence[Served]) -> float:
    """Of the arrivals: of n, n - 1 gaps."""
    span = served[-1].at_s - served[0].at_s
    return (len(served) - 1) / span if span else 0.0


def _times(served: Sequence[Served]) -> dict[str, float]:
    def of(value: Callable[[Served], float | None]) -> list[float]:
        return [found for each in served if not each.error and (found := value(each)) is not None]

    ttfts, tpots = of(lambda each: each.ttft_s), of(lambda each: each.tpot_s)
    return {
        "ttft_p50": _percentile(ttfts, 50),
        "ttft_p90": _percentile(ttfts, 90),
        "ttft_p99": _percentile(ttfts, 99),
        "tpot_mean": sum(tpots) / len(tpots) if tpots else 0.0,
        "tpot_p99": _percentile(tpots, 99),
        "itl_p99": _percentile(of(lambda each: each.longest_gap_s), 99),
    }


def _percentile(values: Sequence[float], percent: float) -> float:
    return percentile(values, percent) if values else 0.0


def _by_pool(cluster: SimCluster) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of all workers, and the share of them in steps."""
    control, until = cluster.control, cluster.clock.now
    busy = dict.fromkeys(cluster.spec.pools, 0.0)
    for worker in control.all_workers:
        busy[worker.config.pool] += worker.busy_s
    seconds = {pool: control.worker_seconds(until, pool) for pool in busy}
    shares = {pool: busy[pool] / seconds[pool] if seconds[pool] else 0.0 for pool in busy}
    return seconds, shares
