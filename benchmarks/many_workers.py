"""What many workers cost a gateway: CPU seconds of its process for a streamed request, and how late
its event loop is, before 200 simulated workers and before two of them, in turn in one run.

The workers are fakes that compute nothing (light_workers.py), so that what is measured is the
gateway, and share `--hosts` processes. Both gateways are processes of their own. What the hosts
used of a core is told with each round: much less than one, or the gateway waits for them.

    python benchmarks/many_workers.py
    python benchmarks/many_workers.py --workers 64 --concurrency 128 --requests 256   # smaller
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import tempfile
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gateway_cpu import KEY, Child, GrpcClient, HttpClient, load, told
from light_workers import LightWorker

from crossdock.model.store import SIMULATED
from crossdock.proto.types import Role, WorkerEndpoint

LAG_EVERY_S = 0.01
PREFILL_SHARE = 0.1  # of the workers; at least one
CLIENTS = {"http": HttpClient, "grpc": GrpcClient}
LIMITS = {"http": 2.0, "grpc": 1.5}  # ms of CPU a request, aimed at


async def host(pipe: Connection, roles: str, first: int, step_s: float) -> None:
    """Workers of these roles in this process."""
    workers, endpoints = [], []
    for number, letter in enumerate(roles, first):
        role = Role.PREFILL if letter == "p" else Role.DECODE
        workers.append(LightWorker(f"{role}-{number}", role, step_s))
        endpoints.append(await workers[-1].start())
    pipe.send([asdict(endpoint) for endpoint in endpoints])
    async for _ in told(pipe):
        pipe.send((time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    for worker in workers:
        await worker.stop()


async def gateway(pipe: Connection) -> None:
    """Answers None with its CPU seconds so far, and how late its loop was since it was last asked:
    each a list of seconds."""
    from crossdock.proto.hashing import hash_key
    from crossdock.router import garbage
    from crossdock.router.gateway import GatewayConfig, GatewayServer

    anywhere = "127.0.0.1:0"
    server = GatewayServer(
        GatewayConfig(
            "g", SIMULATED, hash_key(KEY), home=Path(os.devnull), grpc=anywhere, http=anywhere
        )
    )
    await server.start()
    garbage.settle()
    late: list[float] = []
    watching = asyncio.create_task(watch(late))
    pipe.send([server.grpc_address, server.http_address])
    async for members in told(pipe):
        if members is None:
            pipe.send((time.process_time(), late.copy()))
            late.clear()
            continue
        await server.update_members(members)
        while len(server.view.workers) < len(members):
            await asyncio.sleep(0.01)
        pipe.send(True)
    watching.cancel()


async def watch(late: list[float]) -> None:
    """Notes how much later than asked for it is woken up."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(LAG_EVERY_S)
        late.append(max(0.0, time.perf_counter() - before - LAG_EVERY_S))


class Cluster:
    """Workers in some processes, and a gateway before them."""

    def __init__(self, workers: int, hosts: int, step_s: float) -> None:
        prefills = max(1, round(workers * PREFILL_SHARE))
        roles = "p" * prefills + "d" * (workers - prefills)
        shares = [roles[index::hosts] for index in range(hosts)]
        began = time.monotonic()
        self.hosts = [
            Child(host, share, 1000 * index, step_s) for index, share in enumerate(shares) if share
        ]
        described = [each for child in self.hosts for each in child.pipe.recv()]
        members = [WorkerEndpoint(**each) for each in described]
        self.front = Child(gateway)
        self.addresses = dict(zip(("grpc", "http"), self.front.pipe.recv()))
        self.front.ask(members)
        self.start_s = time.monotonic() - began

    @property
    def megabytes(self) -> float:
        """Of all workers' processes."""
        return sum(child.ask(None)[1] for child in self.hosts) / 1024

    @property
    def hosts_s(self) -> float:
        """CPU seconds of the busiest of them."""
        return max(float(child.ask(None)[0]) for child in self.hosts)

    async def measure(
        self, kind: str, options: argparse.Namespace, number: int
    ) -> tuple[float, list[float], float]:
        """Milliseconds of CPU a request, the loop's delays, and the hosts' share of a core."""
        client = CLIENTS[kind](self.addresses[kind], options.tokens)
        await load(client, options.concurrency, options.concurrency, number)  # connections
        before, _ = self.front.ask(None)
        hosts_s, began = self.hosts_s, time.monotonic()
        await load(client, options.requests, options.concurrency, number + 1)
        after, late = self.front.ask(None)
        busy = (self.hosts_s - hosts_s) / (time.monotonic() - began)
        await client.close()
        return 1000 * (after - before) / options.requests, late, busy

    def end(self) -> None:
        for child in (self.front, *self.hosts):
            child.end()


async def rounds(clusters: dict[int, Cluster], options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, dict[int, list[tuple[float, list[float]]]]] = {}
    for number in range(options.rounds):
        for kind in CLIENTS:
            for workers, cluster in clusters.items():
                cpu_ms, late, busy = await cluster.measure(kind, options, 2 * number)
                found.setdefault(kind, {}).setdefault(workers, []).append((cpu_ms, late))
                p99 = 1000 * statistics.quantiles(late, n=100)[-1]
                print(
                    f"{kind}, {workers} workers: {cpu_ms:.2f} ms of gateway CPU a request, loop "
                    f"late by {p99:.1f} ms p99, hosts {100 * busy:.0f} % of a core",
                    flush=True,
                )
    return {kind: summed(of, kind) for kind, of in found.items()}


def summed(of: dict[int, list[tuple[float, list[float]]]], kind: str) -> dict[str, Any]:
    """The best round of each, and their ratio."""
    best = {workers: min(cpu_ms for cpu_ms, _ in each) for workers, each in of.items()}
    late = {workers: [one for _, some in each for one in some] for workers, each in of.items()}
    few, many = min(best), max(best)
    return {
        "cpu_ms": best,
        "ratio": best[many] / best[few],
        "aim_ms": LIMITS[kind],
        "late_p99_ms": {
            workers: 1000 * statistics.quantiles(each, n=100)[-1] for workers, each in late.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--hosts", type=int, default=2, help="processes that the workers share")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--concurrency", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=200.0, help="of a decode step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clusters: dict[int, Cluster] = {}
    with tempfile.TemporaryDirectory() as home:
        os.environ["CROSSDOCK_HOME"] = home
        try:
            for workers, hosts in ((2, 2), (options.workers, options.hosts)):
                clusters[workers] = cluster = Cluster(workers, hosts, options.step_ms / 1000)
                print(
                    f"{workers} workers ready after {cluster.start_s:.1f} s, "
                    f"{cluster.megabytes:.0f} MB in {len(cluster.hosts)} processes",
                    flush=True,
                )
            report = asyncio.run(rounds(clusters, options))
        finally:
            for cluster in clusters.values():
                cluster.end()
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
