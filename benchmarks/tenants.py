"""What a tenant at ten times its rate does to another: p99 of TTFT, in one run.

A gateway, a prefill and a decode worker of the simulated engine run in this process, with real gRPC
between them. One tenant asks steadily. Beside it another asks at its rate, then at ten times that
with a key that is limited to its rate, then at ten times that with no limit, where turns at the
gateway are all that stands between the two.

    python benchmarks/tenants.py --seconds 30 --json result.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossdock.bench.run import describe_machine
from crossdock.client import AsyncClient
from crossdock.decode import role as decode_worker
from crossdock.engine.simulated import Profile
from crossdock.engine.simulated import Settings as SimulatedSettings
from crossdock.prefill import role as prefill_worker
from crossdock.proto.errors import Overloaded
from crossdock.proto.hashing import hash_key
from crossdock.proto.types import Role
from crossdock.router.config import AuthSettings
from crossdock.router.frontdoor.keys import add_key
from crossdock.router.gateway import GatewayConfig, GatewayServer
from crossdock.worker.config import WorkerConfig

KEY = b"the key of this benchmark's cluster"
PROMPT_TOKENS, TOKENS = 200, 8
PROFILE = Profile(  # 12 ms a prompt: about 80 a second
    prefill_s=0.002, prefill_token_s=0.00005, decode_s=0.01, decode_sequence_s=0.00002
)
STEADY, RATE, FLOOD = 6.0, 8.0, 10.0  # requests a second, and how many times the other's rate


async def ask(
    client: AsyncClient, rng: random.Random, ttft_s: list[float], late: list[int]
) -> None:
    """One request; how long its first token took, or that it was refused."""
    prompt = [rng.randrange(3, 256) for _ in range(PROMPT_TOKENS)]
    began = time.perf_counter()
    try:
        chunks = client.stream(prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True)
        async for chunk in chunks:
            if chunk.token_ids:
                ttft_s.append(time.perf_counter() - began)
                break
        async for _ in chunks:
            pass
    except Overloaded:
        late.append(1)


async def arrive(client: AsyncClient, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """Requests in a Poisson process; TTFT of those that were served."""
    rng, ttft_s, refused = random.Random(seed), list[float](), list[int]()
    end, tasks = time.perf_counter() + seconds, set[asyncio.Task[None]]()
    while time.perf_counter() < end:
        await asyncio.sleep(rng.expovariate(rate))
        task = asyncio.create_task(ask(client, rng, ttft_s, refused))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {"ttft_s": ttft_s, "refused": len(refused)}


def percentile(values: Sequence[float], part: float) -> float:
    """Of the values in order."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else 0.0


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The three phases, one after another."""
    file = folder / "keys.yaml"
    steady_key = add_key(file, {"tenant": "steady"})
    limited_key = add_key(
        file, {"tenant": "limited", "limits": {"requests_per_minute": int(60 * RATE)}}
    )
    free_key = add_key(file, {"tenant": "free"})
    async with contextlib.AsyncExitStack() as stack:
        gateway = await start(stack, AuthSettings(keys=str(file)))

        async def client(key: str) -> AsyncClient:
            return await stack.enter_async_context(AsyncClient(gateway.grpc_address, api_key=key))

        steady, limited, free = [await client(k) for k in (steady_key, limited_key, free_key)]
        await arrive(steady, 2 * STEADY, 3.0, 99)  # warm
        found: dict[str, Any] = {}
        for name, other, rate in (
            ("at its rate", free, RATE),
            ("ten times, limited", limited, FLOOD * RATE),
            ("ten times, unlimited", free, FLOOD * RATE),
        ):
            mine, theirs = await asyncio.gather(
                arrive(steady, STEADY, options.seconds, 1), arrive(other, rate, options.seconds, 2)
            )
            found[name] = {
                "requests": len(mine["ttft_s"]),
                "p50_ms": round(1000 * percentile(mine["ttft_s"], 0.5), 1),
                "p99_ms": round(1000 * percentile(mine["ttft_s"], 0.99), 1),
                "other": {
                    "served": len(theirs["ttft_s"]),
                    "refused": theirs["refused"],
                    "p99_ms": round(1000 * percentile(theirs["ttft_s"], 0.99), 1),
                },
            }
            await asyncio.sleep(1.0)
    base = found["at its rate"]["p99_ms"]
    for each in found.values():
        each["ratio"] = round(each["p99_ms"] / base, 3)
    return found


async def start(stack: contextlib.AsyncExitStack, auth: AuthSettings) -> GatewayServer:
    """The cluster, until the stack is closed."""
    workers = []
    for role, create in (
        (Role.PREFILL, prefill_worker.create),
        (Role.DECODE, decode_worker.create),
    ):
        config = WorkerConfig(
            name=f"{role}-0",
            pool=str(role),
            role=role,
            model="simulated",
            cluster_key=KEY,
            transport="local",
            kv_memory_mb=256,
            engine=SimulatedSettings(profile=PROFILE),
        )
        worker = create(config)
        stack.push_async_callback(worker.stop)
        workers.append(worker)
    endpoints = [await worker.start() for worker in workers]
    for worker in workers:
        await worker.update_peers(endpoints)
    local = {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"}
    gateway = GatewayServer(GatewayConfig("g", "simulated", hash_key(KEY), auth=auth, **local))
    await gateway.start()
    stack.push_async_callback(gateway.stop)
    await gateway.update_members(endpoints)
    while not gateway.ready:
        await asyncio.sleep(0.02)
    return gateway


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each phase")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(options, Path(folder)))
    for name, each in found.items():
        print(f"{name:22} p50 {each['p50_ms']:7.1f} ms  p99 {each['p99_ms']:7.1f} ms  "
              f"ratio {each['ratio']:.2f}  other: {each['other']}")  # fmt: skip
    if options.json:
        report = {"machine": describe_machine(), "phases": found}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
