"""What a hand-off costs the client: the gap between token 0 and token 1, beside a decode step.

For each way of reserving blocks (kv.reserve) a cluster of one prefill and one decode worker is
started. First one request at a time, so that nothing but the hand-off stands between the first two
tokens; then many at once on decode pools that are too small for all, where blocks set aside early
are missing elsewhere.

    python benchmarks/hand_off.py --prompt-len 1000 --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from clusters import DEFAULT_MODEL, DISAGGREGATED, running, spec

from crossdock.bench.run import describe_machine
from crossdock.client import AsyncClient

SMALL_POOL = """\
  prefill: {{role: prefill, replicas: 1, resources: {{cpus: 1}}}}
  decode:  {{role: decode,  replicas: 1, resources: {{cpus: 1}}, kv_memory_mb: {kv_memory_mb}}}
"""
WARM_UP = 3  # requests that are not counted


@dataclass
class Measured:
    """Of some requests: seconds and bytes."""

    ttft_s: list[float] = field(default_factory=list)
    stall_s: list[float] = field(default_factory=list)  # token 0 to token 1, at the client
    step_s: list[float] = field(default_factory=list)  # between later tokens
    bytes: list[int] = field(default_factory=list)
    late_bytes: list[int] = field(default_factory=list)
    tokens: int = 0


async def ask(client: AsyncClient, prompt: list[int], tokens: int, into: Measured) -> None:
    started = time.perf_counter()
    arrivals: list[float] = []
    stream = client.stream(prompt, max_tokens=tokens, temperature=0, ignore_eos=True, timeout=300)
    timings = None
    async for chunk in stream:
        arrivals += [time.perf_counter()] * len(chunk.token_ids)
        timings = chunk.timings or timings
    assert timings is not None
    into.ttft_s.append(arrivals[0] - started)
    into.stall_s.append(arrivals[1] - arrivals[0])
    into.step_s += [after - before for before, after in pairwise(arrivals[1:])]
    into.bytes.append(timings.transferred_bytes)
    into.late_bytes.append(timings.late_bytes)
    into.tokens += len(arrivals)


async def load(
    target: str, options: argparse.Namespace, count: int, at_once: int
) -> dict[str, Any]:
    """Sends `count` requests with nothing in common, `at_once` of them at a time."""
    rng = random.Random(options.seed)
    turns, measured, warm = asyncio.Semaphore(at_once), Measured(), Measured()

    def prompt() -> list[int]:
        return [rng.randrange(10, options.vocabulary) for _ in range(options.prompt_len)]

    async with AsyncClient(target) as client:
        for _ in range(WARM_UP):
            await ask(client, prompt(), options.output_len, warm)

        async def one() -> None:
            async with turns:
                await ask(client, prompt(), options.output_len, measured)

        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(count)))
        took = time.perf_counter() - started
    above = sorted(stall - median(measured.step_s) for stall in measured.stall_s)
    return {
        "requests": count,
        "ttft_p50_s": median(measured.ttft_s),
        "step_p50_s": median(measured.step_s),
        "stall_p50_s": median(measured.stall_s),
        "above_step_p50_s": above[len(above) // 2],
        "above_step_p90_s": above[len(above) * 9 // 10],
        "bytes": max(measured.bytes),
        "late_bytes_max": max(measured.late_bytes),
        "output_tokens_per_s": measured.tokens / took,
    }


def measure(reserve: str, pools: str, options: argparse.Namespace, at_once: int) -> dict[str, Any]:
    yaml = spec(f"handoff-{reserve}", pools, options.model)
    yaml += (
        f"kv: {{transport: {options.transport}, reserve: {reserve}, verify: {options.verify}}}\n"
    )
    count = options.requests if at_once == 1 else options.crowd_requests
    with running(yaml) as cluster:
        found = asyncio.run(load(cluster.grpc, options, count, at_once))
    print(
        f"{reserve:5} {at_once:3} at once: TTFT p50 {found['ttft_p50_s']:.3f} s, stall p50 "
        f"{1000 * found['stall_p50_s']:.1f} ms, above a step p50 "
        f"{1000 * found['above_step_p50_s']:.1f} p90 {1000 * found['above_step_p90_s']:.1f} ms, "
        f"late {found['late_bytes_max'] / 1e6:.1f} of {found['bytes'] / 1e6:.1f} MB, "
        f"{found['output_tokens_per_s']:.1f} tok/s",
        flush=True,
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--transport", default="nixl")
    parser.add_argument("--verify", default="fence", choices=["fence", "checksum"])
    parser.add_argument("--reserve", nargs="+", default=["early", "late"])
    parser.add_argument("--requests", type=int, default=30, help="one at a time")
    parser.add_argument("--prompt-len", type=int, default=1000)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--crowd", type=int, default=16, help="at once; 0 leaves that part out")
    parser.add_argument("--crowd-requests", type=int, default=32)
    parser.add_argument("--crowd-kv-mb", type=int, default=300, help="the decode pool of a crowd")
    parser.add_argument("--vocabulary", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    small = SMALL_POOL.format(kv_memory_mb=options.crowd_kv_mb)
    result: dict[str, Any] = {"machine": describe_machine(), "alone": {}, "crowd": {}}
    for reserve in options.reserve:
        result["alone"][reserve] = measure(reserve, DISAGGREGATED, options, 1)
    for reserve in options.reserve if options.crowd else ():
        result["crowd"][reserve] = measure(reserve, small, options, options.crowd)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
