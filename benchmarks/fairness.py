"""Tenants and deadlines in the simulator: what a flood does to another tenant's first tokens, and
whom early refusal turns away.

    python benchmarks/fairness.py                        # made-up prompts
    python benchmarks/fairness.py TRACE --limit 2000     # a trace's prompts and answers, in order
    python benchmarks/fairness.py --trial deadlines --load 1.5 3 --json fairness.json

Flood: a steady tenant asks for a quarter of what the prefill workers can compute. Beside it another
asks for 15 % of it, then for 10 and 25 times that. The same again without tenants, all in one line,
shows that the trial can fail.

Deadlines: three tenants ask for more than can be computed, each request with a deadline. Of those
that are refused early, a share is let through all the same; it was refused wrongly where its first
token came in time.

All of it is the product's own dispatcher, queues, policy and workers on a virtual clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.table import Table

from crossdock.bench.metrics import percentile
from crossdock.bench.traces import (
    SyntheticOptions,
    Trace,
    TraceOptions,
    TraceRequest,
    load_trace,
    synthesize,
)
from crossdock.deploy.spec import ClusterSpec
from crossdock.proto.errors import Overloaded
from crossdock.router.dispatch.deadlines import Deadlines
from crossdock.router.dispatch.request import Request
from crossdock.router.placement.view import ClusterView
from crossdock.sim.cluster import SimCluster, profile_in
from crossdock.tables import console_of, table

CLUSTER = Path(__file__).parent.parent / "deploy/manifests/sim-8p8d.yaml"
MADE_UP = SyntheticOptions(
    requests=4000, burst_s=0.0, mean_input=3000, mean_output=30, sigma=0.8, max_input=30_000
)
STEADY, OTHER = 0.25, 0.15  # of what the prefill workers can compute
FLOODS = (10.0, 25.0)  # times OTHER
LOADS = (0.8, 1.2, 2.0)  # of the same, all with deadlines
DEADLINES_S = (0.5, 1.0, 2.0, 5.0)
TENANTS = {"a": 6, "b": 3, "c": 1}  # how often each asks, beside the others
LET = 0.2  # share of the refused that are let through


@dataclass(frozen=True)
class Bench:
    """The cluster, and the rows whose lengths and prefixes the trials take in order."""

    spec: ClusterSpec
    rows: Trace
    seconds: float  # of arrivals
    seed: int
    other: float = OTHER

    @cached_property
    def capacity(self) -> float:
        """Requests a second that the prefill workers can compute, each prompt by itself, where
        prefixes are found as well as any cache can."""
        rate, hits = 0.0, self.rows.hit_rate
        for name, pool in self.spec.pools.items():
            if pool.role == "decode":
                continue
            profile, work_s = profile_in(name, pool.engine), 0.0
            for row in self.rows.requests:
                tokens = row.input_tokens * (1 - hits)
                context = row.input_tokens - tokens / 2
                work_s += profile.prefill_s + profile.prefill_token_s * tokens
                work_s += profile.prefill_attention_s * tokens * context
            rate += pool.replicas * len(self.rows.requests) / work_s
        return rate

    def asked(self, tenant: str, rate: float, salt: int) -> Iterator[TraceRequest]:
        """Poisson arrivals of one tenant, who shares no prefix with another."""
        rng, at = random.Random(f"{self.seed} {salt}"), 0.0
        shift = salt * (1 + max(max(row.block_ids) for row in self.rows.requests))
        for row in itertools.cycle(self.rows.requests):
            at += rng.expovariate(rate)
            if at > self.seconds:
                return
            names = tuple(shift + name for name in row.block_ids)
            yield replace(row, at_s=at, block_ids=names, tenant=tenant)

    def trace(self, *asked: Iterator[TraceRequest]) -> Trace:
        """All of them, in order of arrival."""
        rows = sorted(itertools.chain(*asked), key=lambda row: row.at_s)
        return Trace(tuple(rows), self.rows.block_size)


@dataclass(frozen=True)
class Flooded:
    """What the steady tenant saw. Seconds."""

    times: float  # of OTHER, that the other asked for
    turns: bool
    requests: int
    ttft_p50: float
    ttft_p99: float
    ratio: float  # of ttft_p99, to what it is beside OTHER once
    failed: int
    other_failed: int


def flooded(bench: Bench, floods: Sequence[float]) -> list[Flooded]:
    """One row for each flood, with turns and without."""
    found: list[Flooded] = []
    for turns in (True, False):
        base = 0.0
        for times in (1.0, *floods):
            capacity = bench.capacity
            steady = bench.asked("steady", STEADY * capacity, 1)
            other = bench.asked("other", times * bench.other * capacity, 2)
            trace = bench.trace(steady, other)
            mine = [row.tenant == "steady" for row in trace.requests]
            if not turns:
                rows = tuple(replace(row, tenant="") for row in trace.requests)
                trace = replace(trace, requests=rows)
            served = SimCluster(bench.spec, seed=bench.seed).run(trace)
            seen = [each for each, is_mine in zip(served, mine, strict=True) if is_mine]
            ttfts = [each.ttft_s for each in seen if each.ttft_s is not None]
            p99 = percentile(ttfts, 99)
            base = base or p99
            failed = sum(bool(each.error) for each in seen)
            others = sum(bool(each.error) for each in served) - failed
            found.append(
                Flooded(times, turns, len(seen), percentile(ttfts, 50), p99, p99 / base, failed,
                        others)
            )  # fmt: skip
    return found


class Probed(Deadlines):
    """Lets some of those through that it would refuse, to see what becomes of them."""

    def __init__(self, view: ClusterView, share: float, seed: int) -> None:
        super().__init__(view)
        self._share, self._rng = share, random.Random(seed)
        self.let: dict[str, float] = {}  # by request: how late it was predicted to be, seconds
        self.refused: set[str] = set()

    def check(self, request: Request, predicted_s: float, now: float) -> None:
        """See Deadlines."""
        try:
            super().check(request, predicted_s, now)
        except Overloaded as error:
            name = request.request_id
            if name not in self.let and self._rng.random() >= self._share:
                self.refused.add(name)
                raise
            self.let.setdefault(name, error.retry_after_s)


@dataclass(frozen=True)
class Refused:
    """What became of requests with deadlines."""

    load: float  # of what the prefill workers can compute
    requests: int
    refused: int
    refused_after_s: float  # the median, from its arrival
    tried: int  # of those to be refused, let through
    wrongly: int  # of those, with a first token in time
    missed: int  # neither refused nor let through, and without a first token in time
    cut: int  # with a first token in time, but not the last

    @property
    def wrong(self) -> float:
        """Share of the cases that would have been refused wrongly, as far as was tried."""
        if not self.tried:
            return 0.0
        return self.wrongly / self.tried * (self.refused + self.tried) / self.requests


def refusals(bench: Bench, load: float, share: float = LET) -> Refused:
    """A trial at a load."""
    rng = random.Random(bench.seed)
    rates = {name: load * bench.capacity * part / sum(TENANTS.values())
             for name, part in TENANTS.items()}  # fmt: skip
    asked = [bench.asked(name, rate, i) for i, (name, rate) in enumerate(rates.items())]
    trace = bench.trace(*asked)
    dated = [replace(row, deadline_s=row.deadline_s or rng.choice(DEADLINES_S))
             for row in trace.requests]  # fmt: skip
    cluster = SimCluster(bench.spec, seed=bench.seed)
    (gateway,) = cluster.gateways
    probed = gateway.dispatcher.deadlines = Probed(gateway.view, share, bench.seed)
    served = cluster.run(replace(trace, requests=tuple(dated)))
    missed = cut = wrongly = 0
    after = []
    for index, (row, each) in enumerate(zip(dated, served, strict=True)):
        assert row.deadline_s is not None
        met = each.ttft_s is not None and each.ttft_s <= row.deadline_s
        if str(index) in probed.let:
            wrongly += met
        elif str(index) in probed.refused:
            after.append(each.ended_s - each.at_s)
        else:
            missed += not met
            cut += met and bool(each.error)
    return Refused(
        load, len(served), len(after), percentile(after, 50) if after else 0.0,
        len(probed.let), wrongly, missed, cut,
    )  # fmt: skip


def flood_table(floods: Sequence[Flooded]) -> Table:
    """What flooded() found."""
    columns = ("the other asks", "tenants", "requests", "TTFT p50", "p99", "ratio", "failed",
               "the other's")  # fmt: skip
    rows = [
        (f"{each.times:g} ×", "yes" if each.turns else "no", each.requests,
         f"{each.ttft_p50:.3f}", f"{each.ttft_p99:.3f}", f"{each.ratio:.2f}", each.failed,
         each.other_failed)
        for each in floods
    ]  # fmt: skip
    return table("A steady tenant beside another", columns, rows, columns)


def refusal_table(refused: Sequence[Refused]) -> Table:
    """What refusals() found at each load."""
    columns = ("load", "requests", "refused", "after", "let through", "in time", "wrong",
               "taken and missed", "cut off")  # fmt: skip
    rows = [
        (f"{each.load:g}", each.requests, each.refused, f"{1000 * each.refused_after_s:.0f} ms",
         each.tried, each.wrongly, f"{each.wrong:.2%}", each.missed, each.cut)
        for each in refused
    ]  # fmt: skip
    return table("Early refusal", columns, rows, columns)


def main() -> None:
    """Runs the trials and prints a table each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path, nargs="?", help="made-up prompts without one")
    parser.add_argument("--cluster", type=Path, default=CLUSTER)
    parser.add_argument("--workers", type=int, default=2, help="of each pool; 0: the file's")
    parser.add_argument("--limit", type=int, default=0, help="only the first rows")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, virtual")
    parser.add_argument("--trial", choices=("flood", "deadlines"), action="append")
    parser.add_argument("--flood", type=float, nargs="+", default=FLOODS)
    parser.add_argument("--load", type=float, nargs="+", default=LOADS)
    parser.add_argument("--other", type=float, default=OTHER, help="of the prefill workers, once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    spec = ClusterSpec.load(options.cluster)
    for pool in spec.pools if options.workers else ():
        spec = spec.with_replicas(pool, options.workers)
    rows = synthesize(MADE_UP)
    if options.trace is not None:
        rows = load_trace(options.trace, TraceOptions(options.limit))
    bench = Bench(spec, rows, options.seconds, options.seed, options.other)
    trials, console = options.trial or ["flood", "deadlines"], console_of()
    found: dict[str, list[dict[str, Any]]] = {}
    print(f"the prefill workers can compute {bench.capacity:.1f} of these prompts a second")
    if "flood" in trials:
        floods = flooded(bench, options.flood)
        found["flood"] = [asdict(each) for each in floods]
        console.print(flood_table(floods))
    if "deadlines" in trials:
        refused = [refusals(bench, load) for load in options.load]
        found["deadlines"] = [asdict(each) | {"wrong": each.wrong} for each in refused]
        console.print(refusal_table(refused))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
