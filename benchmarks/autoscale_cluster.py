"""A step in load up and down on a real cluster of simulated engines whose pools are autoscaled: at
most eight prefill and eight decode workers on one machine.

Prints every few seconds how many workers there are and what requests saw meanwhile, and at the end
how long the pools took to follow. Workers, wire, gateway and controller are real, steps take the
time of a made-up profile.

    python benchmarks/autoscale_cluster.py --json autoscale.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import clusters

from crossdock.bench.run import describe_machine
from crossdock.client import AsyncClient
from crossdock.deploy import admin
from crossdock.proto.errors import CrossdockError
from crossdock.tables import console_of, table

# A prompt takes 0.35 s of a prefill worker; an answer of 60 tokens 1.5 s of one of a decode
# worker's 8 places.
PROMPT_TOKENS, TOKENS = 500, 60
PHASES = ((2.0, 30.0), (14.0, 110.0), (1.0, 90.0))  # requests a second, seconds
EVERY_S = 5.0
POOLS = """\
  prefill: {{role: prefill, replicas: 2, autoscale: {{min: 1, max: {most}}}, {worker}}}
  decode:  {{role: decode, replicas: 2, autoscale: {{min: 1, max: {most}}}, {worker}}}
kv: {{transport: local, block_size: 16}}
slo: {{ttft_ms: 2000, tpot_ms: 100}}
autoscale: {{interval_s: 2, down_s: 15, gpus: {gpus}}}
"""
WORKER = (
    "resources: {cpus: 0.05}, kv_memory_mb: 16, max_batch: 8, chunk_tokens: 512, drain_s: 10, "
    "engine: {kind: simulated, profile: {kv_bytes_per_token: 256, prefill_s: 0.1, "
    "prefill_token_s: 5.0e-4, decode_s: 0.02, decode_sequence_s: 5.0e-4}}"
)


@dataclass(frozen=True)
class Row:
    """The cluster over some seconds of the run."""

    at_s: float
    rate: float
    prefill: int  # ready
    decode: int
    requests: int  # that ended
    failed: int
    ttft_p50: float | None  # seconds; None: none ended


@dataclass(eq=False)
class Load:
    """Requests at a rate that changes; what ended since it was last asked."""

    client: AsyncClient
    rng: random.Random
    rate: float = 0.0
    failed: int = 0

    def __post_init__(self) -> None:
        self.ttft: list[float] = []
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        for rate, seconds in PHASES:
            self.rate, end = rate, time.monotonic() + seconds
            at = time.monotonic()
            while (at := at + self.rng.expovariate(rate)) < end:
                await asyncio.sleep(at - time.monotonic())
                task = asyncio.create_task(self._ask())
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
        await asyncio.gather(*self.tasks)

    async def _ask(self) -> None:
        prompt = [self.rng.randrange(3, 250) for _ in range(PROMPT_TOKENS)]
        try:
            result = await self.client.generate(prompt, max_tokens=TOKENS, ignore_eos=True)
        except CrossdockError as error:
            print(f"failed: {error!r}", flush=True)
            self.failed += 1
            return
        assert result.timings is not None and result.timings.ttft is not None
        self.ttft.append(result.timings.ttft)

    def ended(self) -> tuple[list[float], int]:
        """TTFTs, and how many failed, since the last call."""
        found = self.ttft, self.failed
        self.ttft, self.failed = [], 0
        return found


async def follow(cluster: clusters.Cluster, seed: int) -> list[Row]:
    """The whole run."""
    rows: list[Row] = []
    async with AsyncClient(cluster.grpc) as client:
        load = Load(client, random.Random(seed))
        running, began = asyncio.create_task(load.run()), time.monotonic()
        while not running.done():
            await asyncio.wait([running], timeout=EVERY_S)
            status = await asyncio.to_thread(admin.status, cluster.admin)
            ready = Counter(each.pool for each in status.workers if each.state == "ready")
            ttft, failed = load.ended()
            rows.append(
                Row(time.monotonic() - began, load.rate, ready["prefill"], ready["decode"],
                    len(ttft) + failed, failed, statistics.median(ttft) if ttft else None)
            )  # fmt: skip
            print(_told(rows[-1]), flush=True)
        await running
    return rows


def _told(row: Row) -> list[str]:
    p50 = "" if row.ttft_p50 is None else f"{row.ttft_p50:.2f} s"
    return [f"{row.at_s:.0f} s", f"{row.rate:g}", str(row.prefill), str(row.decode),
            str(row.requests), str(row.failed), p50]  # fmt: skip


def main() -> None:
    """Runs the cluster and prints its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=8, help="most of each pool")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pools = POOLS.format(most=options.workers, worker=WORKER, gpus=2 * options.workers)
    yaml = clusters.spec(f"autoscaled-{os.getpid()}", pools, "simulated")
    with clusters.running(yaml) as cluster:
        rows = asyncio.run(follow(cluster, options.seed))
        decisions = [each.action for each in admin.status(cluster.admin).decisions]
    columns = ("at", "requests/s", "prefill", "decode", "ended", "failed", "TTFT p50")
    console_of().print(table("A step up and down", columns, map(_told, rows), columns))
    most = max(rows, key=lambda row: row.prefill + row.decode)
    print(f"most workers: {most.prefill} + {most.decode} at {most.at_s:.0f} s; at the end "
          f"{rows[-1].prefill} + {rows[-1].decode}; failed {sum(row.failed for row in rows)} of "
          f"{sum(row.requests for row in rows)}")  # fmt: skip
    print(f"load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}")
    if options.json is not None:
        report = {"machine": describe_machine(), "rows": [asdict(row) for row in rows]}
        report["decisions"] = decisions
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
