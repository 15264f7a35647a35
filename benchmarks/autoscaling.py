"""Autoscaled pools on a day-shaped load, in the simulator: ours, the ±1 rule, and an oracle.

The load is a sinus (a day, compressed) with bursts on top; every rule sees the same requests. The
oracle knows them all beforehand: for each interval it has as many workers from its first second on
as make the busiest part of it busy to a share, and the cheapest pair of shares with which the aims
are attained is found by search. Seconds of workers are from launch to end, starts included.

python benchmarks/autoscaling.py --attainment 0.98 --json autoscaling.json
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from crossdock.bench.traces import Trace, TraceRequest
from crossdock.deploy.autoscaling.observation import Observation, StepTimes
from crossdock.deploy.spec import ClusterSpec
from crossdock.engine.profiles import Profile
from crossdock.router.dispatch.lifecycle import Slo
from crossdock.sim.cluster import Served, SimCluster

SPEC = """
metadata: {{name: day}}
model: {{id: simulated}}
pools:
  prefill:
    role: prefill
    replicas: {prefill}
    autoscale: {{min: 1, max: 32}}
    engine: {{kind: simulated}}
    {common}
  decode:
    role: decode
    replicas: {decode}
    autoscale: {{min: 1, max: 32}}
    engine: {{kind: simulated}}
    {common}
kv: {{transport: local, block_size: 128}}
slo: {{ttft_ms: 2000, tpot_ms: 60}}
autoscale: {{interval_s: {interval_s:g}, attainment: {attainment:g}}}
gateway: {{limits: {{max_active: 1000000, max_active_per_tenant: 1000000}}}}
"""
COMMON = "kv_memory_mb: 100000\n    max_batch: 128\n    chunk_tokens: 4096\n    drain_s: 60"
BLOCK = 128
SHARES = ((0.35, 0.4, 0.45, 0.5, 0.6), (0.2, 0.3, 0.4, 0.55))  # of prefill and decode workers' time


@dataclass(frozen=True)
class Day:
    """A load: requests a second as a sinus from `low` to `high` in `period_s`, with bursts that
    multiply it; lengths are lognormal around their medians."""

    low: float = 0.6
    high: float = 4.0
    period_s: float = 900.0
    seconds: float = 900.0
    bursts: int = 3
    burst_s: float = 90.0
    burst_times: float = 1.6
    ramp_s: float = 30.0  # in which a burst comes up, and goes
    prompt: int = 6000
    longest: int = 20_000  # prompt: one that no idle worker computes in time tells of no rule
    answer: int = 250
    spread: float = 0.6  # sigma of the logarithm of lengths

    def rate(self, at: float, starts: Sequence[float]) -> float:
        """Requests a second."""
        middle, swing = (self.low + self.high) / 2, (self.high - self.low) / 2
        base = middle - swing * math.cos(2 * math.pi * at / self.period_s)
        for start in starts:
            inside = min(at - start, start + self.burst_s - at)
            if inside > 0:
                base *= 1 + (self.burst_times - 1) * min(1.0, inside / self.ramp_s)
        return base

    def trace(self, seed: int) -> Trace:
        """Requests that share no prefix."""
        rng = random.Random(seed)
        part = self.seconds / self.bursts
        starts = [part * (i + rng.uniform(0.1, 0.8)) for i in range(self.bursts)]
        highest = self.high * self.burst_times
        rows, at, name = [], 0.0, 0
        while (at := at + rng.expovariate(highest)) < self.seconds:
            if rng.random() * highest > self.rate(at, starts):
                continue
            prompt = min(
                self.longest, 1 + int(rng.lognormvariate(math.log(self.prompt), self.spread))
            )
            answer = min(2_000, 2 + int(rng.lognormvariate(math.log(self.answer), self.spread)))
            blocks = -(-prompt // BLOCK)
            rows.append(TraceRequest(at, prompt, answer, tuple(range(name, name + blocks))))
            name += blocks
        return Trace(tuple(rows), BLOCK)


@dataclass(frozen=True)
class Outcome:
    """What a rule attained, and what it cost. `worker_s`: seconds of workers."""

    rule: str
    attainment: float  # the part of requests within both aims
    ttft_attainment: float
    tpot_attainment: float
    ttft_p99: float
    worker_s: float
    changes: int
    failed: int
    wall_s: float


def outcome(rule: str, cluster: SimCluster, served: Sequence[Served], wall_s: float) -> Outcome:
    """Of a simulation that has run."""
    slo, count = cluster.spec.slo, len(served)
    early = [s.ttft_s is not None and s.ttft_s <= slo.ttft_ms / 1000 for s in served]
    fluent = [(s.tpot_s or 0.0) <= slo.tpot_ms / 1000 for s in served]
    ttfts = sorted(s.ttft_s for s in served if s.ttft_s is not None)
    return Outcome(
        rule,
        sum(a and b and not s.error for a, b, s in zip(early, fluent, served)) / count,
        sum(early) / count,
        sum(fluent) / count,
        ttfts[int(0.99 * (len(ttfts) - 1))],
        cluster.control.worker_seconds(cluster.clock.now),
        len(cluster.control.members),
        sum(bool(s.error) for s in served),
        wall_s,
    )


def simulate(
    rule: str, trace: Trace, spec: ClusterSpec, profile: Profile, decide: object = None
) -> Outcome:
    """One rule on the whole trace; None decides by autoscale()."""
    began = time.perf_counter()
    cluster = SimCluster(spec, profile, decide=decide)  # type: ignore[arg-type]
    served = cluster.run(trace)
    return outcome(rule, cluster, served, time.perf_counter() - began)


# -- the other rules -------------------------------------------------------------------------------


def plus_minus_one(spec: ClusterSpec) -> Callable[[Observation, float], dict[str, int]]:
    """One worker more where the interval's aim was missed, or a queue waits for longer than half of
    it; one less where half of the pool would have been enough."""
    slo, bounds = spec.slo, {name: pool.autoscale for name, pool in spec.pools.items()}

    def decide(seen: Observation, now: float) -> dict[str, int]:
        traffic, sizes = seen.traffic[""], {}
        for name, state in seen.pools.items():
            if spec.pools[name].role == "prefill":
                met = traffic.ttft_met / traffic.started if traffic.started else 1.0
                uncached = traffic.prompt_tokens - traffic.cached_tokens
                busy_s = uncached * state.steps.prefill_token_s
                wait_s = state.queued_tokens * state.steps.prefill_token_s / max(1, state.ready)
                high = met < spec.autoscale.attainment or wait_s > slo.ttft_ms / 2000
                low = busy_s / seen.seconds < 0.5 * state.ready
            else:
                met = traffic.tpot_met / traffic.finished if traffic.finished else 1.0
                high = met < spec.autoscale.attainment
                low = state.running < 0.5 * _batch(spec.slo, state.steps) * state.ready
            step = 1 if high else -1 if low else 0
            sizes[name] = bounds[name].within(state.target + step)
        return sizes

    return decide


def _batch(slo: Slo, steps: StepTimes) -> float:
    each_s = steps.decode_sequence_s + steps.decode_context_s * 6000
    return max(1.0, (slo.tpot_ms / 1000 - steps.decode_base_s) / each_s) if each_s else 1.0


Sizes = list[dict[str, int]]  # of the pools, by interval


def known_sizes(
    trace: Trace,
    spec: ClusterSpec,
    profile: Profile,
    interval_s: float,
    shares: tuple[float, float],
) -> Sizes:
    """From what will come in each interval."""
    seconds = trace.requests[-1].at_s
    parts = int(seconds / interval_s) + 2
    prefill, decode = [0.0] * parts, [0.0] * parts
    steps = StepTimes(
        profile.prefill_s,
        profile.prefill_token_s,
        profile.prefill_attention_s,
        profile.decode_s,
        profile.decode_sequence_s,
        profile.decode_context_s,
    )
    for row in trace.requests:
        index = int(row.at_s / interval_s)
        prefill[index] += steps.prompt_s(row.input_tokens, 0, 4096)
        context = row.input_tokens + row.output_tokens / 2
        each_s = steps.decode_sequence_s + steps.decode_context_s * context
        tpot_s = spec.slo.tpot_ms / 1000
        decode[index] += row.output_tokens * tpot_s * each_s / (tpot_s - steps.decode_base_s)
    return [
        {
            "prefill": max(1, math.ceil(p / interval_s / shares[0])),
            "decode": max(1, math.ceil(d / interval_s / shares[1])),
        }
        for p, d in zip(prefill, decode)
    ]


def oracle(
    sizes: Sizes, spec: ClusterSpec, profile: Profile, interval_s: float
) -> Callable[[Observation, float], dict[str, int]]:
    """Those of the interval, and of the one after it as far ahead as a start takes."""

    def decide(seen: Observation, now: float) -> dict[str, int]:
        ready_at = now + profile.start_s + spec.autoscale.interval_s
        first, last = int(now / interval_s), min(len(sizes) - 1, int(ready_at / interval_s))
        ahead = sizes[min(first, last) : last + 1]
        return {name: max(each[name] for each in ahead) for name in spec.pools}

    return decide


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--profile", default="h100x4-llama-3.1-70b")
    parser.add_argument("--attainment", type=float, default=0.98)
    parser.add_argument("--interval", type=float, default=5.0, help="between decisions, seconds")
    parser.add_argument("--oracle-interval", type=float, default=60.0)
    parser.add_argument("--start", type=float, default=20.0, help="of a worker, seconds")
    parser.add_argument("--seconds", type=float, default=900.0, help="in days of 900")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="one rule: ours, plus-minus-one or oracle")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    bursts = max(1, round(3 * given.seconds / 900))
    day = replace(Day(), seconds=given.seconds, bursts=bursts)
    trace = day.trace(given.seed)
    profile = replace(Profile.NAMED[given.profile], start_s=given.start)
    text = SPEC.format(
        prefill=2, decode=1, common=COMMON, interval_s=given.interval, attainment=given.attainment
    )
    spec = ClusterSpec.parse(text)
    print(f"{len(trace.requests)} requests in {given.seconds:g} s", flush=True)
    found: list[Outcome] = []

    def tried(rule: str, decide: object = None) -> Outcome:
        made = simulate(rule, trace, spec, profile, decide)
        print(_line(made), flush=True)
        return made

    if given.only in ("", "ours"):
        found.append(tried("ours"))
    if given.only in ("", "plus-minus-one"):
        found.append(tried("plus-minus-one", plus_minus_one(spec)))
    if given.only in ("", "oracle"):
        every: list[tuple[Sizes, Outcome]] = []
        for shares in product(*SHARES):
            sizes = known_sizes(trace, spec, profile, given.oracle_interval, shares)
            if any(sizes == before for before, _ in every):
                continue
            decide = oracle(sizes, spec, profile, given.oracle_interval)
            every.append((sizes, tried(f"oracle {shares[0]:g} {shares[1]:g}", decide)))
        good = [each for _, each in every if each.attainment >= given.attainment]
        if good:
            found.append(replace(min(good, key=lambda each: each.worker_s), rule="oracle"))
        else:
            print(f"no oracle attained {given.attainment:.1%}")
    least = next((each.worker_s for each in found if each.rule == "oracle"), 0.0)
    print()
    for each in found:
        print(_line(each), f"{each.worker_s / least:6.2f} x the oracle" if least else "")
    if given.json:
        given.json.write_text(json.dumps([vars(each) for each in found], indent=2) + "\n")


def _line(of: Outcome) -> str:
    return (
        f"{of.rule:20} {of.attainment:7.2%} (TTFT {of.ttft_attainment:.2%}, "
        f"TPOT {of.tpot_attainment:.2%}), TTFT p99 {of.ttft_p99:6.2f} s, "
        f"{of.worker_s:8.0f} worker seconds, {of.changes} workers, {of.failed} failed, "
        f"{of.wall_s:.0f} s"
    )


if __name__ == "__main__":
    main()
