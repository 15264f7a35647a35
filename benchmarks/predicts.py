"""What the simulator and the router predict, beside what a cluster does.

    python benchmarks/predicts.py TRACE [--limit 60] [--layout 1p1d 2p1d] [--contend] [--json FILE]

For each layout a local cluster with the default model is started and profiled (as `crossdock
profile` does), then the trace is replayed on it, slowed down until its prompts keep the prefill
workers busy for --load of the time; then the same requests, sent when they were sent, go through
the simulator with that profile. Beside it what each placement predicted of its TTFT, and which
requests a deadline would have refused although it was met: their deadline is not sent, so that
what would have become of them is known.

Each worker has a fixed share of the cores, as on a cluster it has hardware of its own. With
--contend, or where the system grants no shares, they slow each other down.

A machine that others use as well may be faster or slower in the replay than it was when it was
profiled, which says nothing of the simulator: a trial whose prompts took over a tenth more or less
than the profile has it is made again, --tries times at the most. What it found otherwise does not
count for that; the JSON has all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import statistics
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import clusters
import shares

from crossdock.bench.load import Arrival, Job, open_loop
from crossdock.bench.metrics import RequestRecord, percentile
from crossdock.bench.traces import PromptMaker, Trace, TraceOptions, TraceRequest, load_trace
from crossdock.client import AsyncClient
from crossdock.deploy import admin
from crossdock.deploy.spec import ClusterSpec
from crossdock.engine.profiles import Profile
from crossdock.profiling.fit import PromptTime
from crossdock.profiling.session import Profiled, profile_cluster
from crossdock.results import Timings
from crossdock.router.dispatch.deadlines import FIRST_PART
from crossdock.sim.cluster import Served, SimCluster
from crossdock.tables import console_of, table

POOLS = """\
  prefill: {{role: prefill, replicas: {prefill}, resources: {{cpus: 1}}}}
  decode:  {{role: decode,  replicas: 1, resources: {{cpus: 1}}}}
"""
LAYOUTS = {"1p1d": 1, "2p1d": 2}  # prefill workers
DEADLINES_S = (1.0, 2.0, 4.0, 8.0)
WARM_LENGTHS = (32, 64, 128, 256, 512, 768, 1024, 1536) * 2  # before the simulation is counted
WARM_GAP_S = 8.0
WARM_NAMES = 1 << 28  # of their blocks: no trace's own
TIMEOUT_S = 300.0
FOR_WORKERS = 0.9  # of the cores
SAME_PACE = 0.1  # by which the machine may differ between profile and replay, relative


class TimedEndpoint:
    """See crossdock.bench.load.Endpoint. Keeps the timings of each job, by its index."""

    def __init__(self, target: str) -> None:
        self.timings: dict[int, Timings] = {}
        self._client = AsyncClient(target)

    async def stream(self, job: Job) -> AsyncIterator[Arrival]:
        chunks = self._client.stream(
            token_ids=job.token_ids,
            max_tokens=job.output_tokens,
            temperature=0.0,
            ignore_eos=True,
            timeout=TIMEOUT_S,
        )
        count = 0
        async for chunk in chunks:
            count += len(chunk.token_ids)
            if chunk.timings is not None:
                self.timings[job.index] = chunk.timings
            cached = chunk.usage.cached_tokens if chunk.usage else None
            yield Arrival(bool(chunk.token_ids), count, None, cached)

    async def close(self) -> None:
        await self._client.close()


@dataclass(frozen=True)
class Row:
    """One figure, of the cluster and of the simulation."""

    name: str
    measured: float
    simulated: float
    aim: float  # by how much they may differ, relative

    @property
    def ratio(self) -> float:
        """Simulated over measured; 1 where both are 0."""
        if not self.measured:
            return 1.0 if not self.simulated else float("inf")
        return self.simulated / self.measured


@dataclass(frozen=True)
class Placed:
    """A placement's prediction and what came of it. Seconds since the request was received."""

    routed: float
    predicted: float  # of token 0, from `routed`
    started: float  # its prefill
    first_token: float
    worker: str  # that computed it

    @property
    def error(self) -> float:
        """Of the prediction, relative to what it took."""
        taken = self.first_token - self.routed
        return abs(self.predicted - taken) / taken

    def refused_wrongly(self, deadline_s: float) -> bool:
        """It would have been refused, by what a gateway goes by before it has learned anything of
        its predictions, and was in time."""
        return self.routed + FIRST_PART * self.predicted > deadline_s >= self.first_token


def rows(records: Sequence[RequestRecord], served: Sequence[Served]) -> list[Row]:
    """Of the requests that neither failed at. Raises ValueError where none is left."""
    both = [(r, s) for r, s in zip(records, served, strict=True) if r.ok and not s.error]
    measured, simulated = [r for r, _ in both], [s for _, s in both]

    def times(values: Sequence[float | None]) -> list[float]:
        return [each for each in values if each is not None]

    def of(name: str, aim: float, reduce: Callable[[list[float]], float], *found: Any) -> Row:
        return Row(name, *(reduce(times(values)) for values in found), aim)

    ttfts = [r.ttft for r in measured], [s.ttft_s for s in simulated]
    tpots = [r.tpot for r in measured], [s.tpot_s for s in simulated]
    hits = [r.cached_tokens for r in measured], [s.cached_tokens for s in simulated]
    return [
        of("TTFT p50", 0.2, lambda values: percentile(values, 50), *ttfts),
        of("TTFT p90", 0.2, lambda values: percentile(values, 90), *ttfts),
        of("TPOT mean", 0.2, statistics.fmean, *tpots),
        of("hit tokens", 0.02, sum, *hits),
    ]


def placed(timings: Sequence[Timings]) -> list[Placed]:
    """Those whose prediction rested on measurements."""
    return [
        Placed(
            each.events["routed"],
            each.predicted_ttft,
            each.events["prefill_started"],
            each.events["first_token"],
            each.prefill_worker or each.decode_worker,
        )
        for each in timings
        if each.predicted_ttft is not None
        and {"routed", "prefill_started", "first_token"} <= each.events.keys()
    ]


def pace(
    records: Sequence[RequestRecord], timings: Mapping[int, Timings], profile: Profile, chunk: int
) -> float:
    """What the replay's prompts took over what the profile says of them, the median: how much
    slower the machine was than when it was profiled. `timings` by the records' indices."""
    found = []
    for record in records:
        events = timings[record.index].events if record.index in timings else {}
        if not record.ok or not {"prefill_started", "first_token"} <= events.keys():
            continue
        of = PromptTime.of(record.cached_tokens, record.prompt_tokens, chunk, 0.0)
        taken = events["first_token"] - events["prefill_started"]
        found.append(taken / of.expected_s(profile))
    return statistics.median(found) if found else math.nan


def time_scale(trace: Trace, profile: Profile, chunk: int, workers: int, load: float) -> float:
    """Of the trace's times, so that its prompts, cached as well as can be, keep so many prefill
    workers busy for `load` of the time, all the while being slowed down by the other workers."""
    seen: set[int] = set()
    work_s, size = 0.0, trace.block_size
    for request in trace.requests:
        whole = request.block_ids[: request.input_tokens // size]
        known = next((i for i, name in enumerate(whole) if name not in seen), len(whole))
        seen.update(whole)
        start = min(known * size, request.input_tokens - 1)
        work_s += PromptTime.of(start, request.input_tokens, chunk, 0.0).expected_s(profile)
    span = trace.requests[-1].at_s - trace.requests[0].at_s
    return work_s * profile.slowdown(workers) / (load * workers * span)


def simulate(
    spec: ClusterSpec, profile: Profile, trace: Trace, sent: Sequence[float]
) -> list[Served]:
    """What became of the trace's requests, sent at these times, in a cluster that has measured
    what prompts take, as the real one has when it was profiled."""
    warm, names = [], WARM_NAMES
    for index, length in enumerate(WARM_LENGTHS):
        blocks = -(-length // trace.block_size)
        warm.append(
            TraceRequest(index * WARM_GAP_S, length, 8, tuple(range(names, names + blocks)))
        )
        names += blocks
    begin = len(warm) * WARM_GAP_S
    asked = [replace(each, at_s=begin + at) for each, at in zip(trace.requests, sent, strict=True)]
    cluster = SimCluster(spec, profile)
    return cluster.run(Trace((*warm, *asked), trace.block_size))[len(warm) :]


async def replayed(target: str, trace: Trace) -> tuple[list[RequestRecord], dict[int, Timings]]:
    """Sends the trace's requests at their times."""
    maker = PromptMaker(trace.block_size)
    jobs = [
        Job(index, row.at_s, tuple(maker.token_ids(row)), "", row.output_tokens)
        for index, row in enumerate(trace.requests)
    ]
    endpoint = TimedEndpoint(target)
    try:
        records = await open_loop(endpoint, jobs)
    finally:
        await endpoint.close()
    return records, endpoint.timings


def trial(layout: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measures and simulates one layout; prints its tables."""
    workers = LAYOUTS[layout]
    yaml = clusters.spec(f"predicts-{os.getpid()}", POOLS.format(prefill=workers))
    spec = ClusterSpec.parse(yaml)
    chunk = spec.pools["prefill"].chunk_tokens
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(clusters.running(yaml))
        if not options.contend:
            members = admin.status(cluster.admin).workers
            cores = FOR_WORKERS * min(1.0, (os.cpu_count() or 1) / len(members))
            pids = [member.pid for member in members]
            why = stack.enter_context(shares.own_share(pids, cores))
            had = f"no shares of cores ({why})" if why else f"{cores:.2f} cores each"
            print(f"{layout}: {len(members)} workers, {had}")
        found = asyncio.run(profile_cluster(cluster.grpc, cluster.admin, options.seconds))
        whole = load_trace(options.trace, TraceOptions(limit=options.limit))
        scale = time_scale(whole, found.profile, chunk, workers, options.load)
        trace = load_trace(
            options.trace,
            TraceOptions(limit=options.limit, time_scale=scale, jitter_s=3.0 * scale),
        )
        records, timings = asyncio.run(replayed(cluster.grpc, trace))
    served = simulate(spec, found.profile, trace, [each.sent_s for each in records])
    compared, predictions = rows(records, served), placed(list(timings.values()))
    slower = pace(records, timings, found.profile, chunk)
    failed = sum(not each.ok for each in records)
    _print(layout, len(records), failed, scale, found, compared, predictions)
    print(f"prompts took {slower:.2f} × what the profile says of them, the median")
    return {
        "layout": layout,
        "requests": len(records),
        "failed": failed,
        "time_scale": scale,
        "contend": options.contend,
        "pace": slower,
        "load_average": os.getloadavg(),
        "profile": asdict(found.profile),
        "fit": {"prefill": asdict(found.fit.prefill), "decode": asdict(found.fit.decode)},
        "rows": [asdict(each) | {"ratio": each.ratio} for each in compared],
        "placements": [asdict(each) for each in predictions],
        "wrong_refusals": {d: _wrong(predictions, d) for d in DEADLINES_S},
    }


def trials(layout: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trials of a layout, up to the first at the pace that was profiled."""
    found: list[dict[str, Any]] = []
    while len(found) < options.tries:
        found.append(trial(layout, options))
        if abs(found[-1]["pace"] - 1) <= SAME_PACE:
            break
        print("the machine was not as fast as when it was profiled", flush=True)
    return found


def _wrong(predictions: Sequence[Placed], deadline_s: float) -> float:
    """Share of the requests that would have been refused wrongly; 0 of none."""
    wrong = sum(each.refused_wrongly(deadline_s) for each in predictions)
    return wrong / max(1, len(predictions))


def _print(
    layout: str,
    requests: int,
    failed: int,
    scale: float,
    found: Profiled,
    compared: Sequence[Row],
    predictions: Sequence[Placed],
) -> None:
    title = f"{layout}: {requests} requests, {failed} failed, times × {scale:.1f}"
    columns = ("figure", "measured", "simulated", "ratio", "aim")
    shown = [
        (r.name, f"{r.measured:.4g}", f"{r.simulated:.4g}", f"{r.ratio:.2f}", f"± {r.aim:.0%}")
        for r in compared
    ]
    console = console_of()
    console.print(table(title, columns, shown, columns[1:]))
    fit = found.fit
    console.print(
        f"the profile's fit: prefill {fit.prefill.median:.1%} median error "
        f"({fit.prefill.p90:.1%} p90), decode {fit.decode.median:.1%} ({fit.decode.p90:.1%})"
    )
    if not predictions:
        console.print("no placement rested on measurements")
        return
    errors = [each.error for each in predictions]
    console.print(
        f"predicted TTFT of {len(errors)} placements: median error "
        f"{statistics.median(errors):.1%} (aim: 15 %), p90 {percentile(errors, 90):.1%}"
    )
    refused = ", ".join(f"{_wrong(predictions, d):.1%} at {d:g} s" for d in DEADLINES_S)
    console.print(f"refused wrongly (aim: below 2 %): {refused}")
    console.print(f"load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}")


def main() -> None:
    """Runs the layouts that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--load", type=float, default=0.5, help="of the prefill workers")
    parser.add_argument("--seconds", type=float, default=60.0, help="for which it is profiled")
    parser.add_argument("--tries", type=int, default=3, help="until the machine keeps its pace")
    parser.add_argument("--contend", action="store_true", help="no fixed shares of the cores")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.trace.is_file():
        print(f"skipped: {options.trace} is not here")
        return
    found = [each for layout in options.layout for each in trials(layout, options)]
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
